"""Shells around the pure state machines: no Ray, no torch."""
