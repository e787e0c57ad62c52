"""The pure part of Supple: all decisions, without side effects.

No torch, no Ray, no clock, no thread, no file, no randomness except from arguments.
"""
