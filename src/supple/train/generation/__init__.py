"""One period of fixed membership: how its group forms, and how a worker hears of it."""
