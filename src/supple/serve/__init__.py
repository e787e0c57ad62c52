"""Serve a model: load it, decode and batch requests, answer over HTTP and gRPC. No Ray."""
