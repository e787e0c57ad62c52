"""What a layout of a model costs: its iteration time, its memory, the candidates of a count."""
