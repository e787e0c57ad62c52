"""Output for users: live lines, tables, pictures, the event log, TensorBoard."""
