"""Ray is started to its end or not at all.

Interrupted while it waits for its raylet, Ray knows of no node to shut down, and leaves the agents
of that raylet behind: they look for their parent for a minute before they give up.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def to_its_end() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, some seconds, in which Ray starts; then Ray is shut
    down and `KeyboardInterrupt` raised."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        if pressed:
            ray.shutdown()
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
