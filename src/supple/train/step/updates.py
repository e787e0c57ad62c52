"""`Updates`: a step of several updates, each of one optimizer (a GAN's, an actor's and a critic's).

Every update reduces and commits by itself; the step, and with it the samples, ends when the script
takes its next batch. After a failure, workers repeat the batch from its first line; the updates
that were committed are not made again.

Before each update, and at the end, all ranks sum one small message: scripts that step different
optimizers at the same time are stopped with the reason.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch.optim import Optimizer

from supple.train.generation.group import Group
from supple.train.step.finite import TrainingError

_END, _ALL = 0, 1
"""Choices: the step has ended, all optimizers are stepped; from 2 on, one optimizer."""
MOST = 1 << 20
"""Updates in a step, at most."""


@final
class Updates:
    """Which update of a step is next, agreed by all ranks; `done` is part of the train state."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.done = 0
        """Committed updates of the step in flight."""
        self.heard = False
        """Whether a rank has heard of a next generation, as of the last agreement."""
        self.loader_stats: list[float] = []
        """The loader's statistics, summed over ranks, as of the last agreement."""
        self._optimizers = list(optimizers)
        self._seen = 0

    def begin(self) -> None:
        """The batch's first line is next."""
        self._seen = 0

    def is_repeated(self) -> bool:
        """Return whether the script's next update of the batch was committed before a failure."""
        self._seen += 1
        return self._seen <= self.done

    def index_of(self, optimizer: Optimizer) -> int:
        """Return the number of one of the job's optimizers. Raises `TrainingError` for another."""
        for index, own in enumerate(self._optimizers):
            if own is optimizer:
                return index
        raise TrainingError(
            "job.step(loss, optimizer=...) was given an object that job.optimizer did not return. "
            "Give one of the job's optimizers."
        )

    def agree_on(
        self,
        group: Group | None,
        optimizer: Optimizer | None,
        *,
        heard: bool,
        stats: Sequence[float],
    ) -> None:
        """Take part in the update of `optimizer` (None: of all). Raises `CollectiveFailed`, and
        `TrainingError` on all ranks if their scripts differ."""
        choice = _ALL if optimizer is None else 2 + self.index_of(optimizer)
        self._sum(group, choice, heard, stats)

    def agree_on_end(self, group: Group | None, *, heard: bool, stats: Sequence[float]) -> None:
        """Take part in the end of the step; raises as `agree_on`."""
        self._sum(group, _END, heard, stats)

    def _sum(self, group: Group | None, choice: int, heard: bool, stats: Sequence[float]) -> None:
        own = (1, choice, choice**2)
        message = torch.tensor([*own, float(heard), *stats], dtype=torch.float64)
        if group is not None:
            group.wait([group.all_reduce(message)])
        ranks, total, squares, num_heard, *summed = message.tolist()
        self.heard, self.loader_stats = num_heard > 0, summed
        if squares * ranks != total * total:
            raise TrainingError(
                "workers step different optimizers at the same time: their scripts took different "
                "branches, by the rank or by data of their own. Decide which optimizer to step "
                "from what is equal on all workers, such as job.step_count."
            )
