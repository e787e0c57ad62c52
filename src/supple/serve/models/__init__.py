"""The user's model: load it, check it, measure it, and split its batch answers into responses."""
