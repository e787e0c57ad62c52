"""A service on Ray Serve: its replicas, its ingress, its updates."""
