"""`Evaluations`: validation over all workers between two steps, every sample once.

A rank computes a contiguous share of the dataset, and all ranks gather the sums of its metrics.
When one is due, and whether it was made, are functions of the train state: so a worker that joins,
or a run that resumes, makes exactly those that the others make.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from supple.core.job.order import share
from supple.core.spec import SpecError, is_count
from supple.train.generation.group import Group
from supple.train.job_protocol import Metric
from supple.train.step.finite import TrainingError

_MESSAGE_BYTES = 8192
"""Room for the metrics of one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The arguments of `job.evaluate`."""

    dataset: Any
    compute: Callable[[Any], Mapping[str, Metric]]
    batch_size: int
    every_steps: int | None
    collate_fn: Callable[[list[Any]], Any] | None
    num_workers: int

    def check(self) -> None:
        """Raise `SpecError` for arguments that cannot be evaluated."""
        counts = {"batch_size": self.batch_size}
        if self.every_steps is not None:
            counts["every_steps"] = self.every_steps
        wrong = [f"{name}={value!r}" for name, value in counts.items() if not is_count(value)]
        if wrong or not callable(self.compute):
            what = ", ".join(wrong) or f"{self.compute!r} as function"
            raise SpecError(
                f"job.evaluate was given {what}: sizes are whole numbers of at least 1, and the "
                "function takes a batch and returns a dict of metrics. Change it in the script."
            )
        if not all(hasattr(self.dataset, name) for name in ("__len__", "__getitem__")):
            raise SpecError(
                f"job.evaluate was given a {type(self.dataset).__name__} without a length: each "
                "worker takes its share of the samples. Give a dataset with __len__ and "
                "__getitem__, such as list(iterable)."
            )

    def is_due(self, step: int, *, at_epoch_end: bool, at_end: bool) -> bool:
        """Return whether it is due after `step` steps."""
        if at_end or self.every_steps is None:
            return at_end or at_epoch_end
        return step % self.every_steps == 0

    def sums(self, rank: int, size: int) -> dict[str, list[float]]:
        """Compute this rank's share; return the [weighted sum, weight] of each metric."""
        offset, count = share(len(self.dataset), size, rank)
        loader: Any = DataLoader(
            Subset(self.dataset, range(offset, offset + count)),
            batch_size=self.batch_size,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
        )
        found: dict[str, list[float]] = {}
        left = count
        for batch in loader if count else ():
            num_samples = min(self.batch_size, left)
            left -= num_samples
            for name, metric in self._metrics(batch).items():
                value, weight = metric if isinstance(metric, tuple) else (metric, num_samples)
                sums = found.setdefault(name, [0.0, 0.0])
                if float(weight) > 0:  # a mean over nothing may be NaN
                    sums[0] += float(value) * float(weight)
                    sums[1] += float(weight)
        return found

    def _metrics(self, batch: Any) -> Mapping[str, Metric]:
        metrics = self.compute(batch)
        if not isinstance(metrics, Mapping):
            raise TrainingError(
                f"the function given to job.evaluate returned a {type(metrics).__name__}: it must "
                'return a dict of metrics, such as {"loss": loss}, each a mean over the batch, or '
                "a pair of a mean and its weight."
            )
        return metrics


@final
class Evaluations:
    """All evaluations of a job, and the results of the last ones."""

    def __init__(self) -> None:
        self.results: dict[str, float] = {}
        """The last value of every metric."""
        self.made_at = 0
        """The step after which the last evaluations were made; 0: none yet."""
        self._all: list[Evaluation] = []

    def add(self, evaluation: Evaluation) -> None:
        evaluation.check()
        self._all.append(evaluation)

    def due(self, step: int, *, at_epoch_end: bool, at_end: bool) -> Sequence[Evaluation]:
        """Return those to make after `step` steps, none if they were made."""
        if step == 0 or step == self.made_at:
            return ()
        ends = {"at_epoch_end": at_epoch_end, "at_end": at_end}
        return [one for one in self._all if one.is_due(step, **ends)]

    def make(
        self,
        due: Sequence[Evaluation],
        modules: Sequence[nn.Module],
        group: Group | None,
        step: int,
    ) -> Mapping[str, float]:
        """Make the evaluations, with `modules` in evaluation mode; return their metrics, equal on
        all ranks. Raises `CollectiveFailed` with nothing changed."""
        rank, size = (0, 1) if group is None else (group.rank, group.size)
        with _undisturbed(modules):
            own = [one.sums(rank, size) for one in due]
        everyone = [own] if group is None else _gathered(own, group)
        results: dict[str, float] = {}
        for index in range(len(due)):
            for name in dict.fromkeys(name for sums in everyone for name in sums[index]):
                if name in results:
                    raise TrainingError(
                        f"two functions given to job.evaluate return a metric {name!r}: one would "
                        "hide the other. Give each its own name."
                    )
                parts = [sums[index].get(name, [0.0, 0.0]) for sums in everyone]
                weight = sum(part[1] for part in parts)
                total = sum(part[0] for part in parts)
                results[name] = total / weight if weight > 0 else float("nan")
        self.results |= results
        self.made_at = step
        return results

    def to_json(self) -> dict[str, Any]:
        return {"made_at": self.made_at, "results": self.results}

    def from_json(self, values: Mapping[str, Any]) -> None:
        self.made_at = int(values["made_at"])
        self.results = {name: float(value) for name, value in values["results"].items()}


def _gathered(own: list[dict[str, list[float]]], group: Group) -> list[list[dict[str, Any]]]:
    """Return every rank's sums, in rank order."""
    encoded = json.dumps(own).encode()
    if len(encoded) > _MESSAGE_BYTES:
        raise TrainingError(
            f"the metrics of job.evaluate take {len(encoded):,} bytes, and at most "
            f"{_MESSAGE_BYTES:,} are shared: return fewer, or shorter names."
        )
    padded = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    padded[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    rows = group.all_gather(padded)
    return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in rows]


@contextmanager
def _undisturbed(whole: Sequence[nn.Module]) -> Iterator[None]:
    """Run the block in evaluation mode and without gradients; modes and random states are as before
    after it."""
    modes = [(module, module.training) for model in whole for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    for model in whole:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, is_training in modes:
            module.training = is_training
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
