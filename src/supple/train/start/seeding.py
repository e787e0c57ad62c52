"""Seeds of the random generators that a script uses: torch's, NumPy's and `random`'s."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_LOCK = threading.RLock()
"""Held while the generators of the process are seeded for a block."""


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and `random`, so that random splits made in a training function are equal
    on all workers."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int, *generators: torch.Generator) -> Iterator[None]:
    """Run the block with torch, NumPy, `random` and `generators` seeded; then restore them."""
    with _LOCK, torch.random.fork_rng(devices=[]):
        states = [generator.get_state() for generator in generators]
        numpy_state, python_state = np.random.get_state(), random.getstate()
        torch.default_generator.manual_seed(seed)  # no state of an accelerator changes
        np.random.seed(seed % 2**32)
        random.seed(seed)
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
