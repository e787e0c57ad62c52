"""Reduce the garbage collector's work in a controller while its job runs.

A full collection scans all objects of torch and Ray, about 0.1 s for nothing. The views of
thousands of workers, changed twice a second, would start one again and again.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 20_000
"""New objects between two collections of the youngest generation; Python's default is 700."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within the block, exclude existing objects from collection and collect new ones seldom."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
