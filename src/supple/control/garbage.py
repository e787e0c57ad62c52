"""The garbage collector, kept from what a controller has no time for while its job runs.

A full collection goes through all that torch and Ray have made, a tenth of a second for nothing;
and the views of thousands of workers, changed twice a second, would start one again and again.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 20_000
"""New objects between two collections of the youngest; Python's own number is 700."""


@contextmanager
def rare_collections() -> Iterator[None]:
    """What is there now is not looked at, and the rest seldom; afterwards all is as it was."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_EVERY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
