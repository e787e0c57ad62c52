"""Durable checkpoints: writing, keeping, checking, publishing, and fencing out dropped workers."""
