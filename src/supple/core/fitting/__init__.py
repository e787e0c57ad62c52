"""Estimates with intervals: robust fits, grouped fits, repeats."""
