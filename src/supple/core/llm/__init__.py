"""A served language model that nobody has run."""
