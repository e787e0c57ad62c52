"""`StepEngine`: one optimizer step: micro-batches, gradient reduction, update. No generations here.

Changes before a commit (gradients, sums) are undone by `abandon`. Weights, optimizer, step count,
position and noise scale change only in `commit`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.job.order import mix
from supple.core.spec import TrainSpec
from supple.core.training.noise import NoiseState, update
from supple.train.data.loader import Loader, MicroBatch
from supple.train.generation.group import Group
from supple.train.job_protocol import Weight
from supple.train.own_steps import refuse_other_steps
from supple.train.step.finite import FiniteSteps, TrainingError
from supple.train.step.guard import GradientGuard
from supple.train.step.meter import Meter
from supple.train.step.noise_meter import NoiseMeter
from supple.train.step.rate import LearningRate
from supple.train.step.reduce import GradientReducer
from supple.train.step.reproducible import TreeReducer
from supple.train.step.weights import LossWeights

_SAMPLES, _WEIGHT, _IS_SUM, _HEARD, _LOSS, _SQ_NORM, _NUM_PARTS, _NUM_STATS = range(8)
"""Indices of the statistics that are reduced with the gradients; the loader's numbers follow."""
_CHECK_WEIGHTS_EVERY = 16
"""Steps between two checks that all weights are finite, each a pass over the weights."""

__all__ = ["StepEngine", "TrainingError"]


@final
class StepEngine:
    """Runs the steps of one model. `changed_buffers` are those that a forward pass changes."""

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
        """An update is in progress: it may have been applied in part."""
        self.noise = NoiseState()
        self.meter = Meter()
        self._spec = spec
        self._model = model
        self._optimizer = optimizer
        self._loader = loader
        self._rate = rate
        self._guard = GradientGuard()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        num_stats = _NUM_STATS + loader.num_stats
        self._tree = (
            TreeReducer(params, changed_buffers, num_stats, spec.num_logical_shards, self._guard)
            if spec.reproducible
            else None
        )
        self._reducer = self._tree or GradientReducer(
            params, changed_buffers, num_stats, self._guard
        )
        refuse_other_steps(optimizer, lambda: self.is_updating)
        self._noise_meter = NoiseMeter(self._reducer.buckets, optimizer)
        trained = set(params)
        names = {param: name for name, param in model.named_parameters() if param in trained}
        changed = {id(buffer) for buffer in changed_buffers if buffer.is_floating_point()}
        buffers = {b: name for name, b in model.named_buffers() if id(b) in changed}
        self.finite = FiniteSteps(spec.on_non_finite, names, buffers)
        self.optimizer_name = type(optimizer).__name__
        self.gradient_bytes = sum(param.numel() * param.element_size() for param in params)
        self._weights = LossWeights(spec.batch)
        self._loss_sum, self._weight_sum, self._num_samples = 0.0, 0.0, 0

    def micro_batches(self, *, alone: bool) -> Iterator[MicroBatch]:
        """Begin a step: yield this rank's micro-batches, possibly none. `alone`: no other rank."""
        self._loss_sum, self._weight_sum, self._num_samples = 0.0, 0.0, 0
        self._reducer.zero()
        self._guard.begin_step(self._reducer.buckets)
        if self._tree is not None:
            for micro in self._loader.feed_shards(self._spec.num_logical_shards):
                torch.manual_seed(mix(self._spec.seed, self.step, micro.shard_id or 0))
                self.meter.lap("data")
                yield micro
                self.meter.lap("loop")
            return
        begun = False
        for micro in self._loader.feed():
            if not begun:
                count = 1 if micro.is_last else 2
                self._noise_meter.begin(self.step, alone=alone, num_micro_batches=count)
                begun = True
            self.meter.lap("data")
            yield micro
            self.meter.lap("loop")
        if not begun:
            self._noise_meter.begin(self.step, alone=False, num_micro_batches=0)

    def backward(
        self,
        loss: Tensor,
        micro: MicroBatch,
        group: Group | None,
        heard: Callable[[], bool],
        *,
        weight: Weight = None,
    ) -> None:
        """Add the gradient of one micro-batch; with the last of a step, start the reduction."""
        self.meter.lap("forward")
        planned = self._loader.planned_samples
        own, factor = self._weights.of(weight, micro.num_samples)
        is_zero = self._tree is not None or self._num_samples == 0
        self._guard.begin_backward(self._reducer.buckets, is_zero=is_zero)
        self._num_samples += micro.num_samples
        self._weight_sum += own
        if own > 0.0:  # a mean over nothing may be NaN
            self._loss_sum += float(loss.detach()) * factor * own
        if micro.is_last:
            self.arm(group, heard)
        if own > 0.0:
            (loss * (own * factor / planned)).backward()
        self.meter.lap("backward")
        if self._tree is not None:
            self._tree.add(micro.shard_id or 0, micro.num_samples / planned)
        else:
            self._noise_meter.after_micro_batch(own / planned)
        self._guard.end_backward(self._reducer.buckets)

    def arm(self, group: Group | None, heard: Callable[[], bool]) -> None:
        """Reduce buckets as they fill. `heard()` returns whether a next generation is announced."""
        self._reducer.arm(
            group,
            before_launch=self._noise_meter.before_launch,
            stats=lambda: self._stats(heard()),
            buffer_weight=float(self._num_samples),
        )

    def commit(self, clip_norm: float | None, fraction: float) -> bool:
        """Wait for the reduction, update, count; return whether any rank has heard of a next
        generation.

        A step that is left out because it is not finite counts, with its samples, and updates
        nothing. Raises `CollectiveFailed` with nothing changed (call `abandon`). Raises
        `TrainingError` if a step that is not finite must stop the job (with the state of the step
        before), or if the weights are no longer finite.
        """
        stats = self._reducer.finish()
        self.meter.lap("sync")
        lr = self._rate.at(self.step, fraction)
        self._correct_weights(stats[_WEIGHT])
        if self._must_skip(stats, lr):
            self._reducer.discard()
            self._noise_meter.discard()
        else:
            self._update(stats, clip_norm, lr)
        self.is_updating = True
        self.step += 1
        self._loader.commit(stats[_NUM_STATS:])
        self.is_updating = False
        last = self._loader.done or self.step == self._spec.max_steps
        if last or self.step % _CHECK_WEIGHTS_EVERY == 0:
            self.finite.check_weights(self.step, lr)
        self.meter.lap("optimizer")
        self.meter.end_step()
        return stats[_HEARD] > 0

    def to_json(self) -> dict[str, Any]:
        """Return the engine's part of the train state, without tensors and optimizer settings."""
        skipped = [self.finite.num_skipped, self.finite.num_skipped_in_a_row]
        return {"step": self.step, "noise": self.noise.to_json(), "skipped": skipped}

    def from_json(self, values: Mapping[str, Any]) -> None:
        self.step = int(values["step"])
        self.noise = NoiseState.from_json(values["noise"])
        # Checkpoints of earlier versions do not have it.
        self.finite.num_skipped, self.finite.num_skipped_in_a_row = values.get("skipped", (0, 0))

    def measure_noise(self, every: int) -> None:
        """Measure the gradients' norms every `every` steps from now on; call it between steps."""
        self._noise_meter.every(every)

    def abandon(self) -> None:
        """Undo the step in flight, which did not commit."""
        self._reducer.abandon()
        self.meter.restart()

    def _stats(self, heard: bool) -> Sequence[float]:
        share = self._weight_sum / self._loader.planned_samples
        sq_norm, num_parts = self._noise_meter.local_stats(share)
        weights = float(self._num_samples), self._weight_sum, float(self._weights.is_sum)
        return *weights, float(heard), self._loss_sum, sq_norm, num_parts, *self._loader.stats()

    def _must_skip(self, stats: Sequence[float], lr: float) -> bool:
        loss = 0.0
        if stats[_SAMPLES] > 0:
            loss = stats[_LOSS] / stats[_WEIGHT] if stats[_WEIGHT] > 0 else math.nan
        try:
            return self.finite.must_skip(
                loss,
                self._reducer.buckets,
                step=self.step + 1,
                lr=lr,
                num_samples=stats[_SAMPLES],
            )
        except TrainingError:
            self._reducer.discard()
            raise

    def _update(self, stats: Sequence[float], clip_norm: float | None, lr: float) -> None:
        sample = self._noise_meter.sample(stats[_SQ_NORM], stats[_NUM_PARTS], stats[_SAMPLES])
        if sample is not None:
            self.noise = update(self.noise, sample)
        if stats[_IS_SUM] > 0:
            self._scale_gradients(stats[_SAMPLES])
        for param in self._reducer.unused:
            param.grad = None
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), clip_norm)
        self._rate.set_in(self._optimizer, lr)
        self.is_updating = True
        self._optimizer.step()

    def _correct_weights(self, weight: float) -> None:
        """Make gradients the mean: losses were divided by the planned number of samples, while the
        weights may be tokens, and iterable shards may end before the planned batch is full."""
        planned = self._loader.planned_samples
        if weight not in (0, planned):
            self._scale_gradients(planned / weight)

    def _scale_gradients(self, factor: float) -> None:
        for bucket in self._reducer.buckets:
            bucket.grads.mul_(factor)
