"""Durable checkpoints: written, kept, refused, published, fenced."""
