"""The pure part of Supple: it decides, and touches nothing.

No torch, no Ray, no clock, no thread, no file, no randomness it was not handed.
"""
