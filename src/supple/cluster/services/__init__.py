"""Services on Ray Serve: replicas, ingress, updates."""
