"""`Prefetcher`: fetches samples ahead in the worker processes of one torch DataLoader.

The DataLoader is made once and iterated once in the life of the job: its workers are never
restarted, but their tasks can be replaced at any moment. Every task has the number of its plan. A
new plan increases that number, which the workers read in shared memory: they skip outdated tasks,
and results of outdated tasks are dropped here. So a resize waits for at most one sample (one batch
of a dataset with `__getitems__`), not for all tasks in flight.
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
from torch.utils.data._utils import worker

_PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2): signal to receive when the parent thread ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Samples to fetch and collate into one micro-batch."""

    indices: Sequence[int]
    seed: int | None
    """Seed for all random generators before the fetch, so that random augmentation depends only on
    the samples, not on process or time. None: do not seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A map dataset and the function that collates its samples."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None = None

    @property
    def is_in_memory(self) -> bool:
        """Whether fetching a batch is one indexing operation on tensors."""
        return type(self.dataset) is TensorDataset and self.collate_fn is None

    def fetch(self, task: Task, is_outdated: Callable[[], bool] | None = None) -> Any:
        """Return the collated samples; None as soon as `is_outdated()` is true."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """How samples are fetched ahead, with the meaning of torch's `DataLoader` options."""

    num_processes: int = 0
    pin_memory: bool = False
    worker_init_fn: Callable[[int], None] | None = None
    prefetch_factor: int | None = None
    """Tasks for each process; None: torch's default."""
    timeout_s: float = 0.0
    """0: no limit."""
    seed: int = 0
    """Seed of the numbers in `torch.utils.data.get_worker_info().seed`."""


@final
class Prefetcher:
    """Fetches the tasks of the current plan, in order, in the processes of `fetching`."""

    def __init__(self, source: Source, fetching: Fetching) -> None:
        self._plan = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._queue = _Queue(self._plan)
        self._loader: DataLoader[Any] = DataLoader(
            _Numbered(source, self._plan),
            sampler=self._queue,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=fetching.num_processes,
            collate_fn=_unchanged,
            pin_memory=fetching.pin_memory,
            worker_init_fn=_FirstInProcess(source.dataset, fetching.worker_init_fn),
            prefetch_factor=fetching.prefetch_factor,
            timeout=fetching.timeout_s,
            generator=torch.Generator().manual_seed(fetching.seed),
            # Only a forked process has the definitions of the user's script.
            multiprocessing_context="fork" if sys.platform == "linux" else None,
        )
        self._results: Iterator[Any] | None = None
        self._release: weakref.finalize[..., Any] | None = None

    def restart(self, tasks: Iterator[Task | None]) -> None:
        """Replace all tasks by `tasks`. A None is skipped; with it, a plan that has nothing to
        fetch for long can be read in small parts."""
        self._plan += 1
        self._queue.tasks = tasks

    def next(self) -> tuple[Task, Any]:
        """Return the next task of the plan and its data. Raises the errors of fetching it."""
        if self._results is None:
            self._queue.issued.clear()
            self._results = iter(self._loader)
            # Hold the iterator from outside. Collected with its own queues, in a garbage cycle, it
            # could not signal its processes to end and would wait for them (5 s).
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
    """An endless iterator of tasks with their plan numbers, so that the DataLoader never finishes.

    The DataLoader returns results in the order of its requests, which is that of `issued`.
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
    """The dataset for the DataLoader's workers: outdated tasks return None at once."""

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
class _FirstInProcess:
    """Runs first in every fetching process, then calls the script's `worker_init_fn`.

    It makes the process end with its parent, whose connections it has inherited: while they are
    open, peers do not detect the parent's death. It makes `torch.utils.data.get_worker_info()` give
    the script's dataset, not the one that takes tasks.
    """

    def __init__(self, dataset: Any, then: Callable[[int], None] | None) -> None:
        self._parent = os.getpid()
        self._dataset = dataset
        self._then = then

    def __call__(self, number: int) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self._parent:  # the parent ended before the call to prctl
                os._exit(1)
        info = worker.get_worker_info()
        if info is not None:
            worker._worker_info = worker.WorkerInfo(
                id=info.id, num_workers=info.num_workers, seed=info.seed, dataset=self._dataset
            )
        if self._then is not None:
            self._then(number)


def _unchanged(result: Any) -> Any:
    return result


def _let_go(_results: Iterator[Any]) -> None:
    """Do nothing; the call drops the last reference to the iterator."""
