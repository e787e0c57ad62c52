"""Runs the ranks of a real gloo group as threads of the test's own process."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from supple.train.generation.group import Group, form
from supple.train.generation.rendezvous import Rendezvous

Result = TypeVar("Result")
_rendezvous: list[Rendezvous] = []
_keys = itertools.count()


def rendezvous() -> Rendezvous:
    """One store for the whole test run."""
    if not _rendezvous:
        _rendezvous.append(Rendezvous("127.0.0.1"))
    return _rendezvous[0]


def run_ranks(
    size: int, body: Callable[[Group], Result], *, aborted: threading.Event | None = None
) -> list[Result]:
    """`body` on every rank of a fresh group, results in rank order; raises what it raises."""
    key = f"test-{next(_keys)}"
    flag = aborted or threading.Event()
    address = rendezvous().address

    def one(rank: int) -> Result:
        group = form(address, key=key, rank=rank, size=size, host="127.0.0.1", aborted=flag.is_set)
        try:
            return body(group)
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(size)]]
