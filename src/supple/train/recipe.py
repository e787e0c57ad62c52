"""`Recipe`: a script's model, optimizer, kept objects and batches, validated before any work.

`Job` and its stand-in for measurements use the same checks.
"""

import math
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from supple.core.spec import LrRule, SpecError
from supple.train.data.batches import Batches
from supple.train.data.loader import Loader, MicroBatch
from supple.train.evaluation import Evaluation, Evaluations
from supple.train.job_protocol import Params, Schedule
from supple.train.own_steps import refuse_closure, refuse_scheduler, refuse_wrapper
from supple.train.state.optimizers import AnyOptimizer, Optimizers, params_of
from supple.train.state.rehearsal import check_kept
from supple.train.step.engine import TrainingError
from supple.train.step.rate import AnyRate, LearningRate, LearningRates, constant

BUILT = weakref.WeakSet[nn.Module]()
"""Models that jobs of this process have: threads may share variables that hold all of them."""


@final
class Recipe:
    """Records what a script wants to train. Every method raises for invalid arguments."""

    batches: Batches

    def __init__(self, seed: int, lr_rule: LrRule = "auto") -> None:
        self.seed = seed
        self.kept: dict[str, Any] = {}
        self._lr_rule: LrRule = lr_rule
        self.evaluations = Evaluations()
        self._stated: set[str] = set()
        """Whether "batches" has been set."""
        self._models: dict[str, nn.Module] = {}
        self._optimizers: list[Optimizer] = []
        self._rates: list[LearningRate] = []
        self._random_state: torch.Tensor | None = None
        self._in_round = False

    def build_model(self, build: Callable[[], nn.Module], name: str = "model") -> nn.Module:
        self._refuse_in_loop("model")
        if name in self._models:
            raise TrainingError(
                f"job.model was called twice for the name {name!r}: a job may train several "
                'models, each with its own name. Write job.model(build, name="generator").'
            )
        is_text = isinstance(name, str) and name != "" and "." not in name
        if not is_text or hasattr(nn.ModuleDict, name):
            raise TrainingError(
                f"job.model(name={name!r}): the name begins the names of the weights in the "
                "checkpoint: it must be a text without dots that is no method of a ModuleDict. "
                'Choose one such as "generator".'
            )
        # As in a script that seeds once and then builds its models one after another.
        if self._random_state is None:
            torch.manual_seed(self.seed)
        else:
            torch.set_rng_state(self._random_state)
        built = self._models[name] = build()
        BUILT.add(built)
        self._random_state = torch.get_rng_state()
        return built

    @property
    def model(self) -> nn.Module:
        """The model; of several, a `ModuleDict` by name."""
        models = list(self._models.values())
        return models[0] if len(models) == 1 else nn.ModuleDict(self._models)

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and what is kept beside it and is a module, such as an average of it."""
        return [self.model, *(kept for kept in self.kept.values() if isinstance(kept, nn.Module))]

    @property
    def optimizer(self) -> AnyOptimizer:
        made = self._optimizers
        return made[0] if len(made) == 1 else Optimizers(made)

    def make_optimizer(
        self,
        cls: Callable[..., Optimizer],
        lr: Any,
        params: Params,
        schedule: Schedule,
        options: Mapping[str, Any],
        make: Callable[..., Any] = operator.call,
        *,
        model: nn.Module | None = None,
    ) -> Optimizer:
        if not self._models:
            raise TrainingError("job.optimizer was called before job.model: swap the two lines.")
        self._refuse_in_loop("optimizer")
        if model is not None and not any(model is built for built in self._models.values()):
            raise TrainingError(
                "job.optimizer(model=...) was given a module that job.model did not return: only "
                "those are saved and moved to a worker that joins. Give one of them, and a part "
                "of it by params=lambda model: model.part.parameters()."
            )
        model = model or self.model
        trained = [param for param in model.parameters() if param.requires_grad]
        if not trained:
            raise TrainingError("the model has no parameter that requires a gradient.")
        _check_rate(lr)
        if params is not None and not callable(params):
            raise TrainingError(
                f"job.optimizer(params=...) was given a {type(params).__name__}: it takes a "
                "function of the model. Write params=lambda model: model.parameters()."
            )
        given = trained if params is None else list(params(model))
        optimizer: Optimizer = make(cls, given, lr=float(lr), **options)
        refuse_closure(optimizer)
        refuse_wrapper(optimizer)
        self._refuse_parameters(optimizer)
        rate = LearningRate(self._lr_rule, type(optimizer).__name__)
        rate.base_lr = float(lr)
        rate.schedule = schedule or constant
        self._optimizers.append(optimizer)
        self._rates.append(rate)
        return optimizer

    def keep(self, name: str, thing: Any) -> None:
        check_kept(name, thing, self.kept, in_loop=self.took_batches)
        self.kept[name] = thing

    def evaluate(self, evaluation: Evaluation) -> None:
        """Record an evaluation. Raises `SpecError` for invalid arguments."""
        self._refuse_in_loop("evaluate")
        self.evaluations.add(evaluation)

    def take_batches(self, batches: Batches) -> Loader:
        """Record the arguments of `job.batches` and return their loader: the loop begins."""
        if not self._optimizers:
            raise TrainingError("job.batches was called before job.model and job.optimizer.")
        self._refuse_in_round()
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            refuse_scheduler(optimizer)
            rate.take_from(optimizer)
        loader = batches.loader(self.seed)
        self.batches = batches.sized(loader)
        self.rate.base_batch = int(self.batches.batch_size)
        self._stated.add("batches")
        return loader

    def take_round(self, batches: Batches, max_steps: int | None) -> None:
        """Record a further call of `job.batches`. Raises `TrainingError` if it differs from the
        first, or if a schedule needs the length of the run."""
        self._refuse_in_round()
        first = self.batches
        if not batches.is_like(first):
            raise TrainingError(
                "job.batches was called again with other arguments: a job trains on one dataset, "
                "with one batch size. Give the same object and the same options in every epoch, "
                "made before the loop over epochs."
            )
        if max_steps is None and any(rate.schedule is not constant for rate in self._rates):
            raise TrainingError(
                "job.batches was called once for each epoch, and the schedule of the learning rate "
                "is a function of the fraction of the run: nobody knows how many epochs follow. "
                "Write one loop, for batch in job.batches(..., epochs=10), and read the epoch as "
                "job.epoch; or give --max-steps."
            )

    def end_round(self) -> None:
        """The loop over the batches has ended."""
        self._in_round = False

    def _refuse_in_round(self) -> None:
        """Begin a loop. Raises `TrainingError` if another has not ended."""
        if self._in_round:
            raise TrainingError(
                "job.batches was called again before its loop had ended: a job has one loop at a "
                "time. Call it once for the whole run, or once for each epoch after the other."
            )
        self._in_round = True

    @property
    def took_batches(self) -> bool:
        """Whether the loop has begun."""
        return "batches" in self._stated

    @property
    def rate(self) -> AnyRate:
        if not self._rates:
            raise TrainingError("job.lr was read before job.optimizer gave one: swap the lines.")
        if len(self._rates) == 1:
            return self._rates[0]
        return LearningRates(list(zip(self._optimizers, self._rates, strict=True)))

    def _refuse_in_loop(self, call: str) -> None:
        if self.took_batches:
            raise TrainingError(
                f"job.{call} was called in the loop: put it before job.batches, so that what is "
                "trained is known before the first step."
            )

    def _refuse_parameters(self, optimizer: Optimizer) -> None:
        """Raise `TrainingError` for parameters of no model, or of another optimizer."""
        names = {id(param): name for name, param in self.model.named_parameters()}
        strange = [param for param in params_of(optimizer) if id(param) not in names]
        if strange:
            raise TrainingError(
                f"job.optimizer was given a parameter of shape {list(strange[0].shape)} that no "
                "model of the job has: it would be neither saved nor moved to a worker that joins. "
                "Make it a part of a model, such as self.scale = nn.Parameter(...) in its __init__."
            )
        taken = {id(param) for other in self._optimizers for param in params_of(other)}
        both = [param for param in params_of(optimizer) if id(param) in taken]
        if both:
            raise TrainingError(
                f"two optimizers were given {names.get(id(both[0]), 'a parameter')} (and "
                f"{len(both) - 1} more): each would step it. Give each optimizer its own, by "
                "job.optimizer(..., model=generator) or params=lambda model: "
                "model.head.parameters(); for other settings in one optimizer, give parameter "
                "groups."
            )


@final
class Hand:
    """The micro-batch given to the script; it must be stepped before the next one is given."""

    def __init__(self) -> None:
        self.size = 0
        """Samples in the last micro-batch that was given; 0 before the first."""
        self._micro: MicroBatch | None = None
        self._stepped: MicroBatch | None = None
        self._unstepped = (
            "the loop took a batch and did not call job.step(loss): nothing would be learned."
        )

    def give(self, micro: MicroBatch) -> Iterator[Any]:
        """Yield the data. Raises `TrainingError` if the script goes on without a step."""
        self._micro, self.size = micro, micro.num_samples or self.size
        yield micro.data
        self._stepped = None
        if self._micro is not None:
            raise TrainingError(self._unstepped)
        self._unstepped = (
            "a batch was taken and job.step(loss) was not called for it: every batch that "
            "job.batches yields must be stepped, or it would not count."
        )

    def take(self, *, again: bool = False) -> MicroBatch:
        """Return the micro-batch to step; `again`: also one that was taken before. Raises
        `TrainingError` if there is none."""
        micro = self._micro or (self._stepped if again else None)
        if micro is None:
            raise TrainingError(
                "job.step was called without a batch, or twice for one: call it once for every "
                "batch that job.batches yields. For several updates with one batch, name the "
                "optimizer of each: job.step(loss, optimizer=first)."
            )
        self._micro, self._stepped = None, micro
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
