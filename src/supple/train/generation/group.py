"""A generation's process group: formed, used, abandoned, without ever blocking on a dead peer.

Groups stand alone: there is no default group, no registry, nothing global. A collective that
hangs cannot be interrupted in-process (gloo has no cancel), so it is *abandoned*: the wait is cut
into short pieces, and between two of them the abort flag is read. A message between two ranks is
waited for in a thread instead: cut into pieces, its wait would close the connection at the first
(gloo takes a time-out of a send or a receive for a failure). An abandoned group is kept until its
operations end by themselves, since dropping it earlier blocks.
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
"""Groups outside the registry are used, and torch's type stubs do not know them."""
_SLICE = timedelta(milliseconds=20)
_LAST_RESORT = timedelta(minutes=30)


class CollectiveFailed(Exception):
    """A peer died, or this generation was aborted: the step in flight must be abandoned."""


@final
class Group:
    """The process group of one generation, seen from one of its ranks."""

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
        """Must whatever this group is doing be given up?"""
        return self._aborted()

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        """Start summing `tensor` over all ranks in place; returns the work to `wait` for."""
        return self._start(lambda: self._group.allreduce([tensor]))

    def sum(self, number: float) -> float:
        """The sum of every rank's `number`, once all have come. Raises `CollectiveFailed`."""
        total = torch.tensor([number])
        self.wait([self.all_reduce(total)])
        return float(total)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `tensor` stacked in rank order: shape (size, *tensor.shape)."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.wait([self._start(lambda: self._group.allgather([parts], [tensor]))])
        return torch.stack(parts)

    def send(self, tensor: torch.Tensor, to_rank: int, tag: int) -> Any:
        """Start sending `tensor`; returns the message to `wait_for_messages`."""
        return self._start(lambda: self._group.send([tensor], to_rank, tag))

    def receive(self, tensor: torch.Tensor, from_rank: int, tag: int) -> Any:
        """Start receiving into `tensor`; returns the message to `wait_for_messages`."""
        return self._start(lambda: self._group.recv([tensor], from_rank, tag))

    def wait_for_messages(self, messages: Sequence[Any]) -> None:
        """Like `wait`, for what `send` and `receive` returned."""
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
        """Return when all `works` are done; raise `CollectiveFailed` as soon as one failed or the
        generation was aborted."""
        for work in works:
            ended = False
            while True:
                try:
                    work.wait(_SLICE)
                    break
                except RuntimeError as error:
                    # A failure is told again by every wait; a time-out of the slice is not.
                    if ended:
                        raise CollectiveFailed(_first_line(error)) from None
                    if self._aborted():
                        raise CollectiveFailed("the generation was aborted") from None
                    ended = work.is_completed()
            self._inflight.remove(work)

    def close(self) -> None:
        """Let go of the group at once. Peers blocked on us see the connection close."""
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
    """The group of `size` members that meet under `key`. Raises `CollectiveFailed` if it is aborted
    before all have come. `host` is this worker's address as its peers reach it."""
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
