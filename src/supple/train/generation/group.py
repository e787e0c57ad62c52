"""`Group`: a generation's process group, which never blocks on a dead peer.

Groups are independent: no default group, no registry, nothing global. A hanging collective cannot
be interrupted (gloo has no cancel), so it is *abandoned*: its wait is cut into short slices, and
the abort flag is read between them. Sends and receives are awaited in a thread instead: gloo treats
a time-out of one as a failure, so the first slice would close the connection. An abandoned group is
kept until its operations end, since dropping it earlier blocks.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed

from supple.train.generation.heap import give_back
from supple.train.generation.rendezvous import Address, Meeting

_c10d: Any = torch.distributed
"""Untyped: torch's type stubs lack groups outside the registry."""
_SLICE = timedelta(milliseconds=20)
"""Interval between two reads of the abort flag."""
_LAST_RESORT = timedelta(minutes=30)
"""gloo's own time-out."""


class CollectiveFailed(Exception):
    """A peer died, or this generation was aborted: the step in flight must be abandoned."""


@final
class Group:
    """One rank's handle of the process group of one generation."""

    def __init__(
        self, process_group: Any, store: Any, rank: int, size: int, aborted: Callable[[], bool]
    ) -> None:
        self.rank = rank
        self.size = size
        self._group: Any = process_group
        self._store: Any = store
        self._aborted = aborted
        self._inflight: list[Any] = []

    @property
    def is_aborted(self) -> bool:
        """Whether the operations of this group must be abandoned."""
        return self._aborted()

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        """Start summing `tensor` over all ranks in place; return the work to `wait` for."""
        return self._start(lambda: self._group.allreduce([tensor]))

    def sum(self, number: float) -> float:
        """Return the sum of `number` over all ranks. Raises `CollectiveFailed`."""
        total = torch.tensor([number])
        self.wait([self.all_reduce(total)])
        return float(total)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's `tensor`, stacked in rank order: shape (size, *tensor.shape)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.wait([self._start(lambda: self._group.allgather([parts], [tensor]))])
        return torch.stack(parts)

    def send(self, tensor: torch.Tensor, to_rank: int, tag: int) -> Any:
        """Start sending `tensor`; return the message for `wait_for_messages`."""
        return self._start(lambda: self._group.send([tensor], to_rank, tag))

    def receive(self, tensor: torch.Tensor, from_rank: int, tag: int) -> Any:
        """Start receiving into `tensor`; return the message for `wait_for_messages`."""
        return self._start(lambda: self._group.recv([tensor], from_rank, tag))

    def wait_for_messages(self, messages: Sequence[Any]) -> None:
        """Like `wait`, for the messages of `send` and `receive`."""
        errors: list[RuntimeError] = []
        done = threading.Event()

        def block() -> None:
            try:
                for message in messages:
                    message.wait()
            except RuntimeError as error:
                errors.append(error)
            finally:
                done.set()

        waiter = threading.Thread(target=block, daemon=True, name="wait-for-messages")
        waiter.start()
        while not done.wait(_SLICE.total_seconds()):
            if self._aborted():
                raise CollectiveFailed("the generation was aborted")
        if errors:
            raise CollectiveFailed(_first_line(errors[0]))
        for message in messages:
            self._inflight.remove(message)

    def wait(self, works: Sequence[Any]) -> None:
        """Wait for all `works`. Raises `CollectiveFailed` at the first failure or abort."""
        for work in works:
            ended = False
            while True:
                try:
                    work.wait(_SLICE)
                    break
                except RuntimeError as error:
                    # Every wait raises a failure again; a slice's time-out is raised once.
                    if ended:
                        raise CollectiveFailed(_first_line(error)) from None
                    if self._aborted():
                        raise CollectiveFailed("the generation was aborted") from None
                    ended = work.is_completed()
            self._inflight.remove(work)

    def close(self) -> None:
        """Drop the group at once. Peers blocked on this rank see the connection close."""
        group, store, inflight = self._group, self._store, self._inflight
        self._group = self._store = None
        self._inflight = []
        threading.Thread(
            target=_drop, args=([group], [store], inflight), daemon=True, name="drop-group"
        ).start()

    def _start(self, operation: Callable[[], Any]) -> Any:
        if self._aborted():
            raise CollectiveFailed("the generation was aborted")
        try:
            work = operation()
        except RuntimeError as error:
            raise CollectiveFailed(_first_line(error)) from None
        self._inflight.append(work)
        return work


def form(
    rendezvous: Address,
    *,
    key: str,
    rank: int,
    size: int,
    host: str,
    aborted: Callable[[], bool],
) -> Group:
    """Form the group of the `size` members that use `key`. Raises `CollectiveFailed` if it is
    aborted before all have joined. `host` is this worker's address for its peers."""
    outcome: list[Any] = []
    done = threading.Event()
    meeting = Meeting(rendezvous, key=key, rank=rank, size=size)

    def connect() -> None:
        try:
            options = _c10d.ProcessGroupGloo._Options()
            options._timeout = _LAST_RESORT
            options._threads = 2
            options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=host)]
            outcome.append(_c10d.ProcessGroupGloo(meeting, rank, size, options))
        except RuntimeError as error:
            outcome.append(error)
        finally:
            done.set()

    threading.Thread(target=connect, daemon=True, name=f"form-{key}").start()
    while not done.wait(_SLICE.total_seconds()):
        if aborted():
            meeting.leave()
            raise CollectiveFailed("the generation was aborted while its group was being formed")
    if isinstance(outcome[0], RuntimeError):
        raise CollectiveFailed(_first_line(outcome[0]))
    return Group(outcome[0], meeting, rank, size, aborted)


def _drop(group: list[Any], store: list[Any], inflight: list[Any]) -> None:
    for work in inflight:
        with contextlib.suppress(RuntimeError):
            work.wait(_LAST_RESORT)
    group.clear()
    store.clear()
    inflight.clear()
    give_back()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
