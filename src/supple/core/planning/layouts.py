"""Step cost of layouts: replicas, shards, tensor ranks and stages of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from supple.core.layouts.candidates import LayoutSpace, runs_for
from supple.core.layouts.memory import peak_memory
from supple.core.layouts.model import LayoutRun
from supple.core.planning.layout_refusals import left_out, none_fits, ran_unexpectedly
from supple.core.planning.view import Candidate
from supple.core.spec import Limits
from supple.core.types import Estimate, Infeasible, Plan


@final
@dataclass(frozen=True, slots=True)
class Layouts:
    """`StepCost` of all layouts in a space that divide and fit, and of those that ran."""

    space: LayoutSpace

    @property
    def measured_workers(self) -> tuple[int, ...]:
        """See `StepCost`."""
        return tuple(sorted({row.run.layout.world_size for row in self.space.times.measured}))

    def candidates(self, count: int, batch_size: int) -> Sequence[Candidate]:
        """Return every layout, every power-of-two micro-batch, with and without recomputation."""
        return [
            Candidate(
                layout=run.layout,
                batch_size=batch_size,
                micro_batch_size=run.micro_batch_size,
                num_accumulation_steps=run.num_micro_batches,
                recompute=run.recompute,
            )
            for run in runs_for(self.space, count, batch_size)
        ]

    def predict(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """See `StepCost`."""
        return self.space.times.predict_all([self._run(candidate) for candidate in candidates])

    def by_form(self, candidate: Candidate) -> float:
        """See `StepCost`."""
        return self.space.times.by_form(self._run(candidate))

    def ratio(self, one: Candidate, other: Candidate) -> Estimate:
        """See `StepCost`."""
        return self.space.times.ratio(self._run(one), self._run(other))

    def memory(self, candidate: Candidate) -> Estimate:
        """See `StepCost`."""
        return peak_memory(self._run(candidate), self.space.optimizer)

    def half_width(self, row: Plan, *, also: Plan | None = None) -> float:
        """See `StepCost`."""
        extra = [] if also is None else [self.run_of(also)]
        return self.space.times.half_width(self.run_of(row), also=extra)

    def why_none(self, limits: Limits, counts: Sequence[int], batches: Sequence[int]) -> Infeasible:
        """See `StepCost`."""
        return none_fits(self.space, limits, counts, batches[0])

    def remarks(self, rows: Sequence[Plan], without: Sequence[int], batches: Sequence[int]) -> str:
        """See `StepCost`."""
        counts = [row.num_workers for row in rows]
        return left_out(self.space, counts, without, batches) + ran_unexpectedly(self.space, rows)

    def run_of(self, row: Plan) -> LayoutRun:
        """Return the run of a table row."""
        return LayoutRun(
            model=self.space.model,
            layout=row.layout,
            micro_batch_size=row.batch.micro_batch_size,
            num_micro_batches=row.batch.num_accumulation_steps,
            recompute=row.recompute,
        )

    def _run(self, candidate: Candidate) -> LayoutRun:
        return LayoutRun(
            model=self.space.model,
            layout=candidate.layout,
            micro_batch_size=candidate.micro_batch_size,
            num_micro_batches=candidate.num_accumulation_steps,
            recompute=candidate.recompute,
        )
