"""One period of fixed membership: its process group, its rendezvous, its commands and events."""
