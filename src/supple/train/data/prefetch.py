"""Fetching samples ahead of need, in the worker processes of one torch DataLoader.

The DataLoader is made once and iterated once, for the life of the job: its workers are never
restarted, and what they are to fetch can be replaced at any moment. Every task carries the number
of the plan it belongs to. A new plan raises the number, which the workers see in shared memory:
they pass over outdated tasks without fetching them, and what they had already fetched is dropped
here. So a resize waits for one sample (one batch of a dataset with `__getitems__`) at most, not
for all that is in flight.
"""

import ctypes
import os
import random
import signal
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

_PR_SET_PDEATHSIG = 1
"""Linux's prctl(2): the signal that comes when the thread that made this process ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Samples to fetch and collate into one micro-batch."""

    indices: Sequence[int]
    seed: int | None
    """Set every random generator to this first, so that random augmentation depends on the samples
    and not on who fetches them, or when. None: leave the generators alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A map dataset and the way its samples are collated."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None = None

    @property
    def is_in_memory(self) -> bool:
        """Is a batch one indexing operation on tensors?"""
        return type(self.dataset) is TensorDataset and self.collate_fn is None

    def fetch(self, task: Task, is_outdated: Callable[[], bool] | None = None) -> Any:
        """The collated samples; None as soon as `is_outdated` says so."""
        if task.seed is not None:
            random.seed(task.seed)
            np.random.seed(task.seed % 2**32)
            torch.manual_seed(task.seed)
        if self.is_in_memory:
            indices = torch.tensor(task.indices)
            return [
                tensor.index_select(0, indices.to(tensor.device)) for tensor in self.dataset.tensors
            ]
        collate = self.collate_fn or default_collate
        if callable(getattr(self.dataset, "__getitems__", None)):
            return collate(self.dataset.__getitems__(list(task.indices)))
        samples: list[Any] = []
        for index in task.indices:
            if is_outdated is not None and is_outdated():
                return None
            samples.append(self.dataset[index])
        return collate(samples)


@final
class Prefetcher:
    """Fetches the tasks of the current plan, in order, in `num_loader_processes` processes."""

    def __init__(self, source: Source, num_loader_processes: int, *, pin_memory: bool) -> None:
        self._plan = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._queue = _Queue(self._plan)
        self._loader: DataLoader[Any] = DataLoader(
            _Numbered(source, self._plan),
            sampler=self._queue,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=num_loader_processes,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            worker_init_fn=_EndWithParent() if num_loader_processes > 0 else None,
            generator=torch.Generator().manual_seed(0),
            # What a script defines is found again only by a process that is a copy of this one.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
        self._results: Iterator[Any] | None = None
        self._release: weakref.finalize[..., Any] | None = None

    def restart(self, tasks: Iterator[Task | None]) -> None:
        """Forget all that was asked for and fetch these from now on. A None is passed over: it lets
        a plan that has long nothing to fetch be looked through a little at a time."""
        self._plan += 1
        self._queue.tasks = tasks

    def next(self) -> tuple[Task, Any]:
        """The next task of the plan and its data. Raises what fetching it raised."""
        if self._results is None:
            self._queue.issued.clear()
            self._results = iter(self._loader)
            # Someone outside must hold the iterator: collected together with its own queues, as
            # part of a cycle of garbage, it could not tell its processes to end and would wait
            # for them (5 s).
            self._release = weakref.finalize(self, _let_go, self._results)
            self._release.atexit = False
        while True:
            plan, task = self._queue.issued.popleft()
            data = next(self._results)
            if task is not None and plan == int(self._plan):
                return task, data

    def close(self) -> None:
        """End the worker processes; `next` starts them again."""
        if self._release is not None:
            self._release.detach()
        self._results = None


@final
class _Queue:
    """Tasks with the number of their plan, without end, so that the DataLoader never finishes.

    The DataLoader gives results in the order in which it asked here, which is that of `issued`.
    """

    def __init__(self, plan: Tensor) -> None:
        self._plan = plan
        self.tasks: Iterator[Task | None] = iter(())
        self.issued: deque[tuple[int, Task | None]] = deque()

    def __iter__(self) -> "_Queue":
        return self

    def __next__(self) -> tuple[int, Task | None]:
        item = int(self._plan), next(self.tasks, None)
        self.issued.append(item)
        return item


@final
class _Numbered(Dataset[Any]):
    """The source as the DataLoader's workers see it: outdated tasks give None, at once."""

    def __init__(self, source: Source, plan: Tensor) -> None:
        self._source = source
        self._plan = plan

    def __getitem__(self, item: tuple[int, Task | None]) -> Any:
        plan, task = item

        def is_outdated() -> bool:
            return int(self._plan) != plan

        if task is None or is_outdated():
            return None
        return self._source.fetch(task, is_outdated)


@final
class _EndWithParent:
    """Run first in every fetching process: it is killed when the process that made it ends.

    It has inherited that one's connections, and while they are open nobody else sees it dead.
    """

    def __init__(self) -> None:
        self._parent = os.getpid()

    def __call__(self, _number: int) -> None:
        if sys.platform != "linux":
            return
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._parent:  # it ended before we asked to be told
            os._exit(1)


def _unchanged(result: Any) -> Any:
    return result


def _let_go(_results: Iterator[Any]) -> None:
    """The reference held by the caller was the last."""
