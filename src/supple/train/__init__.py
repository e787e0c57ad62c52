"""Torch code inside a worker process: the user's `Job`, and what makes it resizable."""
