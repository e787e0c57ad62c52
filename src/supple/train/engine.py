"""One optimizer step: micro-batches, one reduction, one update. Knows nothing of generations.

What it changes before a step has committed (gradients, sums) is thrown away with `abandon`; what a
commit changes (weights, optimizer, count, position, noise scale) changes nowhere else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.noise import NoiseState, update
from supple.core.order import mix
from supple.core.spec import TrainSpec
from supple.train.group import Group
from supple.train.loader import Loader, MicroBatch
from supple.train.meter import Meter
from supple.train.noise_meter import NoiseMeter
from supple.train.rate import LearningRate
from supple.train.reduce import GradientReducer
from supple.train.reproducible import TreeReducer

_SAMPLES, _HEARD, _LOSS, _SQ_NORM, _NUM_PARTS, _NUM_STATS = range(6)
"""What rides along with the gradients, before the loader's own numbers."""


class TrainingError(Exception):
    """The user's script asked for something that cannot work. The message is complete."""


@final
class StepEngine:
    """The steps of one model. `changed_buffers` are those that a forward pass changes."""

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        optimizer: Optimizer,
        loader: Loader,
        rate: LearningRate,
        changed_buffers: Sequence[Tensor],
    ) -> None:
        self.step = 0
        self.is_updating = False
        """The train state is between two steps: half of an update may have been applied."""
        self.noise = NoiseState()
        self.meter = Meter()
        self._spec = spec
        self._model = model
        self._optimizer = optimizer
        self._loader = loader
        self._rate = rate
        params = [param for group in optimizer.param_groups for param in group["params"]]
        num_stats = _NUM_STATS + loader.num_stats
        self._tree = (
            TreeReducer(params, changed_buffers, num_stats, spec.num_logical_shards)
            if spec.reproducible
            else None
        )
        self._reducer = self._tree or GradientReducer(params, changed_buffers, num_stats)
        self._noise_meter = NoiseMeter(self._reducer.buckets, optimizer)
        self.optimizer_name = type(optimizer).__name__
        self.gradient_bytes = sum(param.numel() * param.element_size() for param in params)
        self._loss_sum, self._num_samples = 0.0, 0

    def micro_batches(self, *, alone: bool) -> Iterator[MicroBatch]:
        """Begin a step: this rank's micro-batches of it, possibly none. `alone`: no other rank."""
        self._loss_sum, self._num_samples = 0.0, 0
        self._reducer.zero()
        if self._tree is not None:
            for micro in self._loader.feed_shards(self._spec.num_logical_shards):
                torch.manual_seed(mix(self._spec.seed, self.step, micro.shard_id or 0))
                self.meter.lap("data")
                yield micro
            return
        begun = False
        for micro in self._loader.feed():
            if not begun:
                count = 1 if micro.is_last else 2
                self._noise_meter.begin(self.step, alone=alone, num_micro_batches=count)
                begun = True
            self.meter.lap("data")
            yield micro
        if not begun:
            self._noise_meter.begin(self.step, alone=False, num_micro_batches=0)

    def backward(
        self, loss: Tensor, micro: MicroBatch, group: Group | None, heard: Callable[[], bool]
    ) -> None:
        """Add the gradient of one micro-batch; with the step's last, start the reduction."""
        self.meter.lap("forward")
        weight = micro.num_samples / self._loader.planned_samples
        self._loss_sum += float(loss.detach()) * micro.num_samples
        self._num_samples += micro.num_samples
        if micro.is_last:
            self.arm(group, heard)
        (loss * weight).backward()
        self.meter.lap("backward")
        if self._tree is not None:
            self._tree.add(micro.shard_id or 0, weight)
        else:
            self._noise_meter.after_micro_batch(weight)

    def arm(self, group: Group | None, heard: Callable[[], bool]) -> None:
        """Let buckets reduce as they fill. `heard()`: is a next generation announced?"""
        self._reducer.arm(
            group,
            before_launch=self._noise_meter.before_launch,
            stats=lambda: self._stats(heard()),
            buffer_weight=float(self._num_samples),
        )

    def commit(self, clip_norm: float | None, fraction: float) -> bool:
        """Wait for the reduction, update, count. True if some rank has heard of a next generation.

        Raises `CollectiveFailed` with nothing changed (call `abandon`), and `TrainingError` for a
        loss that is not a finite number, before the update.
        """
        stats = self._reducer.finish()
        self.meter.lap("sync")
        lr = self._rate.at(self.step, fraction)
        self._refuse_nonsense(stats, lr)
        self._correct_weights(stats[_SAMPLES])
        sample = self._noise_meter.sample(stats[_SQ_NORM], stats[_NUM_PARTS], stats[_SAMPLES])
        if sample is not None:
            self.noise = update(self.noise, sample)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self.is_updating = True
        self._optimizer.step()
        self.step += 1
        self._loader.commit(stats[_NUM_STATS:])
        self.is_updating = False
        self.meter.lap("optimizer")
        self.meter.end_step()
        return stats[_HEARD] > 0

    def measure_noise(self, every: int) -> None:
        """Take the gradients' norms every so many steps from now on; between two steps."""
        self._noise_meter.every(every)

    def abandon(self) -> None:
        """The step in flight did not commit: as if it had not begun."""
        self._reducer.abandon()
        self.meter.restart()

    def _stats(self, heard: bool) -> Sequence[float]:
        share = self._num_samples / self._loader.planned_samples
        sq_norm, num_parts = self._noise_meter.local_stats(share)
        mine = (float(self._num_samples), float(heard), self._loss_sum, sq_norm, num_parts)
        return (*mine, *self._loader.stats())

    def _refuse_nonsense(self, stats: Sequence[float], lr: float) -> None:
        loss = stats[_LOSS] / max(stats[_SAMPLES], 1.0)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.step + 1} (learning rate {lr:g}, batch of "
                f"{stats[_SAMPLES]:.0f}). A step with such a loss is not applied, the last "
                "checkpoint is intact. Lower the learning rate, clip gradients "
                "(job.step(loss, clip_norm=1.0)) or check the data."
            )

    def _correct_weights(self, num_samples: float) -> None:
        """Iterable shards may run dry before the planned batch is full."""
        planned = self._loader.planned_samples
        if num_samples not in (0, planned):
            for bucket in self._reducer.buckets:
                bucket.grads.mul_(planned / num_samples)
