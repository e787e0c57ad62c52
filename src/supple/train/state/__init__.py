"""The train state: what it consists of, how it moves, and what is done again after a change."""
