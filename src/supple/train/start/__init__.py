"""How a script is found, seeded and called, and where its output goes."""
