"""The planner's view of a job, from `supple plan`, a running job, a tuner or a pool."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, get_args

from supple.core.spec import Limits, LrRule, check_one_of, is_count
from supple.core.training.goodput import OptimizerFamily, check_family
from supple.core.training.learning_rate import TunedRate
from supple.core.training.loop_time import NO_LOOP_TIME, LoopTime
from supple.core.training.samples import SamplesModel
from supple.core.types import Estimate, Infeasible, ParallelLayout, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to compute a step of a global batch."""

    layout: ParallelLayout
    batch_size: int
    """The global batch."""
    micro_batch_size: int
    num_accumulation_steps: int
    recompute: bool = False

    @property
    def num_workers(self) -> int:
        return self.layout.world_size


class StepCost(Protocol):
    """Time and memory of a step, for any parallelism.

    Two implementations: `supple.core.planning.data_parallel` and `supple.core.planning.layouts`.
    """

    @property
    def measured_workers(self) -> tuple[int, ...]:
        """Counts with a measured step time, in increasing order."""
        ...

    def candidates(self, count: int, batch_size: int) -> Sequence[Candidate]:
        """Return every way to compute a global batch on `count` workers; empty if none."""
        ...

    def predict(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Predict the seconds of a step of each candidate; measured ones as measured."""
        ...

    def by_form(self, candidate: Candidate) -> float:
        """Predict the seconds of a step from the fitted form alone, to compare batches without the
        noise of single measurements."""
        ...

    def ratio(self, one: Candidate, other: Candidate) -> Estimate:
        """Predict the step time of `other` over that of `one`; common errors cancel in the
        interval."""
        ...

    def memory(self, candidate: Candidate) -> Estimate:
        """Predict the peak bytes of the fullest worker."""
        ...

    def half_width(self, row: Plan, *, also: Plan | None = None) -> float:
        """Relative half-width of the interval of a row's step time if `also` were measured too."""
        ...

    def why_none(self, limits: Limits, counts: Sequence[int], batches: Sequence[int]) -> Infeasible:
        """Explain why none of `counts` has a candidate for any of `batches`."""
        ...

    def remarks(self, rows: Sequence[Plan], without: Sequence[int], batches: Sequence[int]) -> str:
        """Return sentences, each after a space, about a table of `rows`: why the counts `without` a
        candidate have no row, and other remarks; empty for none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """Everything that a plan needs about a job. Raises `ValueError` for impossible numbers."""

    cost: StepCost
    dataset_size: int
    """Samples per epoch; the last batch of an epoch may be smaller."""
    epochs: int
    base_batch_size: int
    """The global batch of the script, at which `base_lr` was tuned."""
    base_lr: float
    optimizer_family: OptimizerFamily
    lr_rule: LrRule = "auto"
    noise_scale: float | None = None
    """In samples; None: unknown, and without `samples` the batch is fixed."""
    samples: SamplesModel | None = None
    """From previous runs of the task; preferred to the noise scale."""
    tuned: tuple[TunedRate, ...] = ()
    """Learning rates of those runs; preferred to the rule `auto`."""
    startup_s: float = 0.0
    loop: LoopTime = NO_LOOP_TIME
    """What the script does outside of its steps, on every count alike."""
    startup_range_s: tuple[float, float] | None = None
    """Shortest and longest measured start; None: exactly `startup_s`."""

    def __post_init__(self) -> None:
        if not all(map(is_count, (self.dataset_size, self.epochs, self.base_batch_size))):
            raise ValueError(
                f"a plan was requested with dataset_size={self.dataset_size}, "
                f"epochs={self.epochs}, base_batch_size={self.base_batch_size}: all must be whole "
                "numbers of at least 1. Give a job that has data to train on."
            )
        check_family(self.optimizer_family)
        check_one_of(self.lr_rule, get_args(LrRule), what="lr_rule")
        phi = 0.0 if self.noise_scale is None else self.noise_scale
        numbers = (phi, self.startup_s, self.base_lr)
        if not all(isinstance(n, Real) and 0.0 <= n < math.inf for n in numbers):
            raise ValueError(
                f"a plan was requested with noise_scale={self.noise_scale}, "
                f"startup_s={self.startup_s}, base_lr={self.base_lr}: all must be finite and not "
                "negative. Give None for a noise scale that is unknown, and measure the rest again."
            )
        shortest, longest = self.startup_range_s or (self.startup_s, self.startup_s)
        if not 0.0 <= shortest <= self.startup_s <= longest < math.inf:
            raise ValueError(
                f"a plan was requested with startup_s={self.startup_s}, startup_range_s="
                f"{self.startup_range_s}: the range must be finite, not negative, and hold "
                "startup_s. Give the shortest and the longest start."
            )
