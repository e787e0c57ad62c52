"""Layouts of a model: iteration time, memory, and the candidates of a count."""
