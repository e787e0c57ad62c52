"""Measurements of a script: step time, memory, layers, with a stand-in for `Job`."""
