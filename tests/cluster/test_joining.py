"""Joining a running Ray cluster: bounded in time, and a signal is heard at once."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import ray

from supple.cluster import starting
from supple.cluster.ray import connect
from supple.core.spec import SpecError, TrainSpec


@pytest.fixture
def head() -> Iterator[str]:
    """An address at which something listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Sets what Ray does first when it is to join; then it waits, as for a head that is silent."""
    over = threading.Event()

    def does(first: Callable[[], None]) -> None:
        def init(**_: object) -> None:
            first()
            over.wait(60.0)

        monkeypatch.setattr(ray, "init", init)

    yield does
    over.set()


def joined(address: str) -> None:
    connect(TrainSpec(name="job", script="train.py", address=address))


def test_an_address_where_nothing_listens_is_refused_at_once(
    init: Callable[[Callable[[], None]], None], head: str
) -> None:
    called: list[int] = []
    init(lambda: called.append(1))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(SpecError, match=rf"no Ray cluster answers at {address}: .*refused"):
        joined(address)
    assert called == []


def test_a_head_that_does_not_answer_is_given_up(
    init: Callable[[Callable[[], None]], None], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(lambda: None)
    monkeypatch.setattr(starting, "_JOIN_S", 0.05)
    with pytest.raises(SpecError, match=rf"at {head} has not answered for 0\.05 s\. Check it"):
        joined(head)


def test_an_interrupt_is_heard_while_ray_waits_for_the_head(
    init: Callable[[Callable[[], None]], None], head: str
) -> None:
    init(lambda: os.kill(os.getpid(), signal.SIGINT))
    # What a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            joined(head)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_ray_is_the_reason(
    init: Callable[[Callable[[], None]], None], head: str
) -> None:
    def refuse() -> None:
        raise RuntimeError("Version mismatch.\nmore")

    init(refuse)
    with pytest.raises(SpecError, match=rf"answers at {head}: Version mismatch\. Check"):
        joined(head)
