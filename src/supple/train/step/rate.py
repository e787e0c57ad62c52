"""Learning rate of a step: base rate, batch-size rule, warm-up after an increase, schedule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from torch.optim import Optimizer

from supple.core.spec import LrRule
from supple.core.training.goodput import OptimizerFamily, family_of, learning_rate, warmup_steps
from supple.train.state.optimizers import AnyOptimizer, members_of
from supple.train.step.finite import TrainingError


@final
class LearningRate:
    """Computes a step's learning rate from `base_lr`, which was tuned at `base_batch` samples;
    `schedule` maps the fraction of the run done to a factor."""

    def __init__(self, rule: LrRule, optimizer_name: str) -> None:
        self._rule: LrRule = rule
        self._optimizer_name = optimizer_name
        self._family: OptimizerFamily = family_of(optimizer_name)
        self.base_lr = 0.0
        self.ratios: list[float] = []
        """Ratio of each parameter group's own rate to `base_lr`, in the script's order."""
        self.base_batch = 1
        self.schedule: Callable[[float], float] = constant
        self._written: list[float] = []
        """Rates that the parameter groups had last; empty if they come from elsewhere."""
        self._factor = 1.0
        self._jumped_from = 1.0
        self._jumped_at = 0

    def take_from(self, optimizer: Optimizer) -> None:
        """Take the rates of the parameter groups as the base: the loop begins."""
        self._written = [float(group["lr"]) for group in optimizer.param_groups]
        if len(self._written) == 1 and self._written[0] > 0:
            self.base_lr = self._written[0]
        self.ratios = [lr / self.base_lr for lr in self._written]

    def to_measure(self, batch: int) -> "LearningRate":
        """Return the rate for timing steps of `batch` samples: constant, as a schedule may begin
        with 0."""
        rate = LearningRate("auto", self._optimizer_name)
        rate.base_lr, rate.base_batch, rate.ratios = self.base_lr, batch, self.ratios
        return rate

    def change_batch(self, batch: int, *, step: int, noise_scale: float | None) -> None:
        """Set the global batch to `batch` samples from `step` on."""
        scaled, _ = learning_rate(
            rule=self._rule,
            family=self._family,
            base_lr=self.base_lr,
            base_batch=self.base_batch,
            batch=batch,
            noise_scale=noise_scale,
        )
        self._jumped_from = self._factor_at(step)
        self._jumped_at = step
        self._factor = scaled / self.base_lr

    def at(self, step: int, fraction: float) -> float:
        """Return the learning rate of `step`, with `fraction` (0 to 1) of the run done."""
        # A schedule may return another number type, which could not be saved.
        return float(self.base_lr * self._factor_at(step) * self.schedule(fraction))

    def set_in(self, optimizer: AnyOptimizer, step: int, fraction: float) -> None:
        """Write the learning rate of `step` into the optimizer's parameter groups. Raises
        `TrainingError` if the script has changed the rates, or added a group, in its loop."""
        groups = optimizer.param_groups
        refuse_changed_rates([float(group["lr"]) for group in groups], self._written, self.ratios)
        lr = self.at(step, fraction)
        for group, ratio in zip(groups, self.ratios, strict=True):
            group["lr"] = lr * ratio
        self._written = [lr * ratio for ratio in self.ratios]

    def to_json(self) -> dict[str, Any]:
        return {
            "factor": self._factor,
            "jumped_from": self._jumped_from,
            "jumped_at": self._jumped_at,
        }

    def from_json(self, values: Mapping[str, Any]) -> None:
        self._written = []
        self._factor = float(values["factor"])
        self._jumped_from = float(values["jumped_from"])
        self._jumped_at = int(values["jumped_at"])

    def _factor_at(self, step: int) -> float:
        """Return the batch-size factor at `step`: increases are linear over `warmup_steps`."""
        length = warmup_steps(self._factor / self._jumped_from)
        if length == 0:
            return self._factor
        walked = min(1.0, max(0, step - self._jumped_at + 1) / length)
        return self._jumped_from + (self._factor - self._jumped_from) * walked


@final
class LearningRates:
    """The learning rates of several optimizers, with the interface of one: `at` is the first's."""

    def __init__(self, rates: Sequence[tuple[Optimizer, LearningRate]]) -> None:
        self._rates = list(rates)

    @property
    def base_lr(self) -> float:
        return self._rates[0][1].base_lr

    @property
    def base_batch(self) -> int:
        return self._rates[0][1].base_batch

    @base_batch.setter
    def base_batch(self, batch: int) -> None:
        for _, rate in self._rates:
            rate.base_batch = batch

    def to_measure(self, batch: int) -> "LearningRates":
        return LearningRates([(member, rate.to_measure(batch)) for member, rate in self._rates])

    def change_batch(self, batch: int, *, step: int, noise_scale: float | None) -> None:
        for _, rate in self._rates:
            rate.change_batch(batch, step=step, noise_scale=noise_scale)

    def at(self, step: int, fraction: float) -> float:
        return self._rates[0][1].at(step, fraction)

    def set_in(self, optimizer: AnyOptimizer, step: int, fraction: float) -> None:
        """Write the learning rates of `step` into the parameter groups of `optimizer`: one of the
        optimizers, or all."""
        chosen = {id(member) for member in members_of(optimizer)}
        for member, rate in self._rates:
            if id(member) in chosen:
                rate.set_in(member, step, fraction)

    def to_json(self) -> dict[str, Any]:
        return {"of": [rate.to_json() for _, rate in self._rates]}

    def from_json(self, values: Mapping[str, Any]) -> None:
        for (_, rate), saved in zip(self._rates, values["of"], strict=True):
            rate.from_json(saved)


def refuse_changed_rates(
    now: Sequence[float], written: Sequence[float], ratios: Sequence[float]
) -> None:
    """Raise `TrainingError` unless the groups' rates are those that were `written` last."""
    if len(now) != len(ratios):
        raise TrainingError(
            "add_param_group was called in the loop: what is trained must be known before the "
            "first step. Call it before job.batches, and let the loop set requires_grad when the "
            "group's parameters shall learn."
        )
    changed = [number for number, lr in enumerate(written) if now[number] != lr]
    if changed:
        raise TrainingError(
            f"the loop changed the learning rate of the optimizer's parameter group {changed[0]} "
            f"from {written[changed[0]]:g} to {now[changed[0]]:g}, by param_groups or by a "
            "ReduceLROnPlateau: the job sets the rates at every step. Give them as a factor of the "
            "fraction of the run that is done: job.optimizer(..., schedule=lambda done: 1 - done)."
        )


AnyRate = LearningRate | LearningRates


def constant(_fraction: float) -> float:
    """Return 1.0: the constant schedule."""
    return 1.0
