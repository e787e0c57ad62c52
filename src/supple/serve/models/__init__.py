"""The user's model: loaded, checked, measured, and its answers cut into requests."""
