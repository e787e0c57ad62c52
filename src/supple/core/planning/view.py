"""A job as the planner sees it, whoever asks: `supple plan`, a running job, a tuner, a pool."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, get_args

from supple.core.spec import Limits, LrRule, check_one_of, is_count
from supple.core.training.goodput import OptimizerFamily, check_family
from supple.core.training.learning_rate import TunedRate
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
    """What a step costs in time and memory, however the work is divided.

    Two implementations: `supple.core.planning.data_parallel` and `supple.core.planning.layouts`.
    """

    @property
    def measured_workers(self) -> tuple[int, ...]:
        """The counts whose step time was measured, in increasing order."""
        ...

    def candidates(self, count: int, batch_size: int) -> Sequence[Candidate]:
        """Every way to compute a global batch on `count` workers; empty where there is none."""
        ...

    def predict(self, candidates: Sequence[Candidate]) -> list[Estimate]:
        """Seconds of a step of each, as measured where it was."""
        ...

    def by_form(self, candidate: Candidate) -> float:
        """Seconds of a step by the fitted form alone: what batches are compared by, so that no
        single measurement decides."""
        ...

    def ratio(self, one: Candidate, other: Candidate) -> Estimate:
        """The step time of `other` over that of `one`: what makes both long or both short divides
        out of the interval."""
        ...

    def memory(self, candidate: Candidate) -> Estimate:
        """Bytes of the fullest worker."""
        ...

    def half_width(self, row: Plan, *, also: Plan | None = None) -> float:
        """Half-width of the interval of a row's step time, as a fraction of it, if `also` were
        measured too."""
        ...

    def why_none(self, limits: Limits, counts: Sequence[int], batches: Sequence[int]) -> Infeasible:
        """Why none of `counts` has a candidate for any of `batches`."""
        ...

    def remarks(self, rows: Sequence[Plan], without: Sequence[int], batches: Sequence[int]) -> str:
        """Sentences, each after a space, on a table of `rows`: why the counts `without` a candidate
        have no row, and what else is odd; empty for nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """What is known of one job. Raises `ValueError` for what no job can be."""

    cost: StepCost
    dataset_size: int
    """Samples of an epoch; the last batch of each is smaller where the batch does not divide it."""
    epochs: int
    base_batch_size: int
    """The global batch of the script, at which `base_lr` was tuned."""
    base_lr: float
    optimizer_family: OptimizerFamily
    lr_rule: LrRule = "auto"
    noise_scale: float | None = None
    """In samples; None: unknown, and without `samples` the batch stays."""
    samples: SamplesModel | None = None
    """From previous runs of the task: trusted before the noise scale."""
    tuned: tuple[TunedRate, ...] = ()
    """Learning rates of those runs: trusted before the rule, where that is `auto`."""
    startup_s: float = 0.0
    startup_range_s: tuple[float, float] | None = None
    """The shortest and the longest start that was seen; exactly `startup_s` where not given."""

    def __post_init__(self) -> None:
        if not all(map(is_count, (self.dataset_size, self.epochs, self.base_batch_size))):
            raise ValueError(
                f"a plan was asked for with dataset_size={self.dataset_size}, "
                f"epochs={self.epochs}, base_batch_size={self.base_batch_size}: all must be whole "
                "numbers of at least 1. Give a job that has something to train on."
            )
        check_family(self.optimizer_family)
        check_one_of(self.lr_rule, get_args(LrRule), what="lr_rule")
        phi = 0.0 if self.noise_scale is None else self.noise_scale
        numbers = (phi, self.startup_s, self.base_lr)
        if not all(isinstance(n, Real) and 0.0 <= n < math.inf for n in numbers):
            raise ValueError(
                f"a plan was asked for with noise_scale={self.noise_scale}, "
                f"startup_s={self.startup_s}, base_lr={self.base_lr}: all must be finite and not "
                "negative. Give None for a noise scale that is unknown, and measure the rest again."
            )
        shortest, longest = self.startup_range_s or (self.startup_s, self.startup_s)
        if not 0.0 <= shortest <= self.startup_s <= longest < math.inf:
            raise ValueError(
                f"a plan was asked for with startup_s={self.startup_s}, startup_range_s="
                f"{self.startup_range_s}: the range must be finite, not negative, and hold "
                "startup_s. Give the shortest and the longest start."
            )
