"""Torch, inside a worker process: the user's `Job` and everything that lets it change size."""
