"""Step cost of data parallelism: every worker has the whole model and a share of the batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import final

from supple.core.planning.view import Candidate
from supple.core.spec import Limits, is_count
from supple.core.training.memory import MemoryModel
from supple.core.training.throughput import StepTimeModel
from supple.core.types import Estimate, Infeasible, ParallelLayout, Plan
from supple.core.words import in_words

_MEMORY_SHARE = 0.92
"""Share of a device's memory that a plan may use."""
_MAX_ACCUMULATION = 256
"""Most micro-batches of a step for a batch larger than the script's; the script's own batch may
have as many as memory requires."""
_SAMPLE_RULE = "every worker takes at least one sample of a batch"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataParallel:
    """`StepCost` from measured step times. Raises `ValueError` for an impossible job."""

    step_time: StepTimeModel
    script_batch_size: int
    """The script's batch: the largest micro-batch where memory is unknown, since it ran."""
    memory_model: MemoryModel | None = None
    device_memory_bytes: int | None = None
    largest_micro_batch: int | None = None
    """The script's own cap of the micro-batch; None: no cap."""

    def __post_init__(self) -> None:
        for what, size in (
            ("script_batch_size", self.script_batch_size),
            ("largest_micro_batch", self.largest_micro_batch),
        ):
            if size is not None and not is_count(size):
                raise ValueError(
                    f"a plan was requested with {what}={size}: it must be a whole number of at "
                    "least 1. Give the script's batch, and no cap where it has none."
                )
        room = self.device_memory_bytes or 0.0
        if not (isinstance(room, Real) and 0.0 <= room < math.inf):
            raise ValueError(
                f"a plan was requested with device_memory_bytes={room}: it must be finite and not "
                "negative. Give None for a memory that is unknown."
            )

    @property
    def measured_workers(self) -> tuple[int, ...]:
        """See `StepCost`."""
        return tuple(sorted({step.num_workers for step in self.step_time.steps}))

    def candidates(self, count: int, batch_size: int) -> Sequence[Candidate]:
        """Return the candidate with the largest micro-batch that fits; where memory is unknown,
        the script's batch is the limit, since it ran."""
        most = self._largest_micro_batch()
        if batch_size < count or most < 1:
            return ()
        share = -(-batch_size // count)
        accumulation = -(-share // most)
        if accumulation > _MAX_ACCUMULATION and batch_size > self.script_batch_size:
            return ()
        return (
            Candidate(
                layout=ParallelLayout(dp_replicate=count),
                batch_size=batch_size,
                micro_batch_size=-(-share // accumulation),
                num_accumulation_steps=accumulation,
            ),
        )

    def predict(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `StepCost`."""
        return [self.step_time.predict(*_shape(candidate)) for candidate in candidates]

    def by_form(self, candidate: Candidate) -> float:
        """See `StepCost`."""
        return self.step_time.by_form(*_shape(candidate))

    def ratio(self, one: Candidate, other: Candidate) -> Estimate:
        """See `StepCost`."""
        return self.step_time.ratio(_shape(one), _shape(other))

    def memory(self, candidate: Candidate) -> Estimate:
        """See `StepCost`; 0, `assumed`, without a memory model."""
        if self.memory_model is None:
            return Estimate(value=0.0, low=0.0, high=0.0, source="assumed")
        return self.memory_model.predict(candidate.micro_batch_size)

    def half_width(self, row: Plan, *, also: Plan | None = None) -> float:
        """See `StepCost`."""
        extra = [] if also is None else [_planned(also)]
        return self.step_time.half_width(*_planned(row), also=extra)

    def why_none(self, limits: Limits, counts: Sequence[int], batches: Sequence[int]) -> Infeasible:
        """See `StepCost`."""
        room = (self.device_memory_bytes or 0) * _MEMORY_SHARE
        if self.memory_model is not None and self._largest_micro_batch() < 1:
            one = self.memory_model.predict(1)
            return Infeasible(
                asked="a plan for this job",
                numbers=f"a micro-batch of 1 needs {_bytes(one.value)}, a worker has "
                f"{_bytes(room)} to use of {_bytes(self.device_memory_bytes or 0)}",
                rule="one sample must fit into one worker's memory",
                advice="Use a smaller model, recomputation, or a device with more memory.",
            )
        most = max(batches)
        return Infeasible(
            asked=f"a plan for at least {in_words(limits.min_workers)}",
            numbers=f"the largest batch this job may have is {most} sample{'s' * (most > 1)}",
            rule=_SAMPLE_RULE,
            advice="Request fewer workers, or give the job a larger batch.",
        )

    def remarks(self, rows: Sequence[Plan], without: Sequence[int], batches: Sequence[int]) -> str:
        """See `StepCost`."""
        if not without:
            return ""
        return f" Counts above {max(batches)} are left out: {_SAMPLE_RULE}."

    def _largest_micro_batch(self) -> int:
        """Largest micro-batch by memory and by the script's cap; 0 where not one sample fits."""
        most = self.script_batch_size
        if self.memory_model is not None and self.device_memory_bytes is not None:
            most = self.memory_model.largest_micro_batch(self.device_memory_bytes * _MEMORY_SHARE)
        return most if self.largest_micro_batch is None else min(most, self.largest_micro_batch)


def _shape(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.num_workers, candidate.micro_batch_size, candidate.num_accumulation_steps


def _planned(row: Plan) -> tuple[int, int, int]:
    return row.num_workers, row.batch.micro_batch_size, row.batch.num_accumulation_steps


def _bytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
