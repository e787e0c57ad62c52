"""`Recipe`: a script's model, optimizer, kept objects and batches, validated before any work.

`Job` and its stand-in for measurements use the same checks.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from supple.core.spec import LrRule, SpecError
from supple.train.data.batches import Batches
from supple.train.data.loader import Loader, MicroBatch
from supple.train.job_protocol import Params, Schedule
from supple.train.own_steps import refuse_closure, refuse_scheduler
from supple.train.rehearsal import check_kept
from supple.train.step.engine import TrainingError
from supple.train.step.rate import LearningRate, constant


@final
class Recipe:
    """Records what a script wants to train. Every method raises for invalid arguments."""

    model: nn.Module
    optimizer: Optimizer
    batches: Batches

    def __init__(self, seed: int, lr_rule: LrRule = "auto") -> None:
        self.seed = seed
        self.kept: dict[str, Any] = {}
        self._lr_rule: LrRule = lr_rule
        self._stated: set[str] = set()
        """Which of model, optimizer and batches have been set."""

    def build_model(self, build: Callable[[], nn.Module]) -> nn.Module:
        if "model" in self._stated:
            raise TrainingError("job.model was called twice: a job trains one model.")
        torch.manual_seed(self.seed)
        self.model = build()
        self._stated.add("model")
        return self.model

    def make_optimizer(
        self,
        cls: Callable[..., Optimizer],
        lr: Any,
        params: Params,
        schedule: Schedule,
        options: Mapping[str, Any],
        make: Callable[..., Any] = operator.call,
    ) -> Optimizer:
        if "model" not in self._stated:
            raise TrainingError("job.optimizer was called before job.model: swap the two lines.")
        if "optimizer" in self._stated:
            raise TrainingError(
                "job.optimizer was called twice: a job has one optimizer. Give parts of the model "
                "their own settings as parameter groups: job.optimizer(..., params=lambda model: "
                '[{"params": model.a.parameters()}, {"params": model.b.parameters(), "lr": 1e-4}]).'
            )
        trained = [param for param in self.model.parameters() if param.requires_grad]
        if not trained:
            raise TrainingError("the model has no parameter that requires a gradient.")
        _check_rate(lr)
        if params is not None and not callable(params):
            raise TrainingError(
                f"job.optimizer(params=...) was given a {type(params).__name__}: it takes a "
                "function of the model. Write params=lambda model: model.parameters()."
            )
        given = trained if params is None else list(params(self.model))
        self.optimizer = make(cls, given, lr=float(lr), **options)
        refuse_closure(self.optimizer)
        self._rate = LearningRate(self._lr_rule, type(self.optimizer).__name__)
        self._rate.base_lr = float(lr)
        self._rate.ratios = [
            float(group["lr"]) / float(lr) for group in self.optimizer.param_groups
        ]
        self._rate.schedule = schedule or constant
        self._stated.add("optimizer")
        return self.optimizer

    def keep(self, name: str, thing: Any) -> None:
        check_kept(name, thing, self.kept, in_loop=self.took_batches)
        self.kept[name] = thing

    def take_batches(self, batches: Batches) -> Loader:
        """Record the arguments of `job.batches` and return their loader: the loop begins."""
        if "optimizer" not in self._stated:
            raise TrainingError("job.batches was called before job.model and job.optimizer.")
        if self.took_batches:
            raise TrainingError("job.batches was called twice: a job has one training loop.")
        refuse_scheduler(self.optimizer)
        loader = batches.loader(self.seed)
        self.batches = batches.sized(loader)
        self.rate.base_batch = int(self.batches.batch_size)
        self._stated.add("batches")
        return loader

    @property
    def took_batches(self) -> bool:
        """Whether the loop has begun."""
        return "batches" in self._stated

    @property
    def rate(self) -> LearningRate:
        if "optimizer" not in self._stated:
            raise TrainingError("job.lr was read before job.optimizer gave one: swap the lines.")
        return self._rate


@final
class Hand:
    """The micro-batch given to the script; it must be stepped before the next one is given."""

    def __init__(self) -> None:
        self.size = 0
        """Samples in the last micro-batch that was given; 0 before the first."""
        self._micro: MicroBatch | None = None
        self._unstepped = (
            "the loop took a batch and did not call job.step(loss): nothing would be learned."
        )

    def give(self, micro: MicroBatch) -> Iterator[Any]:
        """Yield the data. Raises `TrainingError` if the script goes on without a step."""
        self._micro, self.size = micro, micro.num_samples
        yield micro.data
        if self._micro is not None:
            raise TrainingError(self._unstepped)
        self._unstepped = (
            "a batch was taken and job.step(loss) was not called for it: every batch that "
            "job.batches yields must be stepped, or it would not count."
        )

    def take(self) -> MicroBatch:
        """Return the micro-batch to step. Raises `TrainingError` if there is none."""
        micro, self._micro = self._micro, None
        if micro is None:
            raise TrainingError(
                "job.step was called without a batch: call it once for every batch that "
                "job.batches yields."
            )
        return micro


def no_batch_taken(script: str, function: str) -> str:
    """Return the message for a training function that returned without entering its loop."""
    return (
        f"{function}(job) in {script} returned without taking a batch: loop over job.batches(...) "
        "and call job.step(loss) for each."
    )


def _check_rate(lr: Any) -> None:
    try:
        rate = math.nan if isinstance(lr, str) else float(lr)
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise SpecError(
            f"job.optimizer(lr={lr!r}): a learning rate must be above 0 and finite, or nothing is "
            "learned. Give the one that was tuned at batch_size."
        )
