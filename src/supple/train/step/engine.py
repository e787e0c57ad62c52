"""`StepEngine`: one optimizer step: micro-batches, gradient reduction, update. No generations here.

Changes before a commit (gradients, sums) are undone by `abandon`. Weights, optimizer, step count,
position and noise scale change only in `commit`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.job.order import mix
from supple.core.spec import SpecError, TrainSpec
from supple.core.training.noise import NoiseState, update
from supple.train.data.loader import Loader, MicroBatch
from supple.train.generation.group import Group
from supple.train.job_protocol import Weight
from supple.train.own_steps import Unfrozen, refuse_other_steps
from supple.train.state.names import named_buffers, named_params
from supple.train.state.optimizers import AnyOptimizer, members_of, name_of, params_of
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.finite import FiniteSteps, TrainingError
from supple.train.step.guard import GradientGuard
from supple.train.step.meter import Meter
from supple.train.step.noise_meter import NoiseMeter
from supple.train.step.rate import AnyRate
from supple.train.step.reduce import GradientReducer
from supple.train.step.reproducible import TreeReducer
from supple.train.step.updates import Updates
from supple.train.step.weights import LossWeights

_SAMPLES, _WEIGHT, _IS_SUM, _HEARD, _LOSS, _SQ_NORM, _NUM_PARTS = range(7)
_NUM_CLIPS, _CLIP_NORM, _NUM_STATS = range(7, 10)
"""Indices of the statistics that are reduced with the gradients; the loader's numbers follow."""
_CHECK_WEIGHTS_EVERY = 16
"""Steps between two checks that all weights are finite, each a pass over the weights."""

__all__ = ["StepEngine", "TrainingError"]


@final
class StepEngine:
    """Runs the steps of one model. `changed_buffers`: names of those that a forward pass changes.

    `in_turns`: the script makes several updates in a step (`update`, then `end_updates`).
    """

    def __init__(
        self,
        spec: TrainSpec,
        model: nn.Module,
        optimizer: AnyOptimizer,
        loader: Loader,
        rate: AnyRate,
        changed_buffers: Collection[str] = (),
        *,
        in_turns: bool = False,
    ) -> None:
        self.in_turns = in_turns
        self.updates = Updates(members_of(optimizer))
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
        params = params_of(optimizer)
        num_stats = _NUM_STATS + loader.num_stats
        if spec.reproducible:  # a change must not be found only when some ranks have seen it
            changed_buffers = list(named_buffers(model))
        buffers = ChangedBuffers(model, changed_buffers)
        self._tree = (
            TreeReducer(params, buffers, num_stats, spec.num_logical_shards, self._guard)
            if spec.reproducible
            else None
        )
        self._reducer = self._tree or GradientReducer(params, buffers, num_stats, self._guard)
        for member in members_of(optimizer):
            refuse_other_steps(member, lambda: self.is_updating)
        self._noise_meter = NoiseMeter(self._reducer.buckets, optimizer)
        trained = set(params)
        names = {param: name for name, param in named_params(model).items() if param in trained}
        self.finite = FiniteSteps(spec.on_non_finite, names, buffers.floating)
        self.optimizer_name = name_of(optimizer)
        self.gradient_bytes = sum(param.numel() * param.element_size() for param in params)
        self._unfrozen = Unfrozen(model, trained)
        self._weights: dict[int | None, LossWeights] = {}
        self._loss_sum, self._weight_sum, self._num_samples = 0.0, 0.0, 0
        self._is_sum = False
        self._clip_norm: float | None = None

    def micro_batches(self, *, alone: bool) -> Iterator[MicroBatch]:
        """Begin a step: yield this rank's micro-batches; without one, data that counts nothing, as
        the loop's other lines may change what all ranks share. `alone`: no other rank."""
        begun = False
        self._begin()
        self.updates.begin()
        if self._tree is not None:
            for micro in self._loader.feed_shards(self._spec.num_logical_shards):
                torch.manual_seed(mix(self._spec.seed, self.step, micro.shard_id or 0))
                begun = True
                self.meter.lap("data")
                yield micro
                self.meter.lap("loop")
            if not begun:
                yield self._loader.again()
            return
        for micro in self._loader.feed():
            if not begun and not self.in_turns:
                count = 1 if micro.is_last else 2
                self._noise_meter.begin(self.step, alone=alone, num_micro_batches=count)
            begun = True
            self.meter.lap("data")
            yield micro
            self.meter.lap("loop")
        if not begun:
            if not self.in_turns:
                self._noise_meter.begin(self.step, alone=False, num_micro_batches=0)
            self.meter.lap("data")
            yield self._loader.again()
            self.meter.lap("loop")

    def backward(
        self,
        loss: Tensor,
        micro: MicroBatch,
        group: Group | None,
        heard: Callable[[], bool],
        *,
        weight: Weight = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Add the gradient of one micro-batch; with the last of a step, start the reduction."""
        self.meter.lap("forward")
        is_zero = self._tree is not None or self._num_samples == 0
        self._guard.begin_backward(self._reducer.buckets, is_zero=is_zero)
        if micro.num_samples == 0:
            self.arm(group, heard)
            return
        planned = self._loader.planned_samples
        weights = self._weight_of(optimizer)
        own, factor = weights.of(weight, micro.num_samples)
        self._is_sum = weights.is_sum
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
        stats = self._finish(clip_norm, fraction, self._optimizer)
        self._end_step(stats[_NUM_STATS:], fraction)
        return stats[_HEARD] > 0

    def open_update(
        self,
        optimizer: Optimizer | None,
        micro: MicroBatch,
        group: Group | None,
        heard: Callable[[], bool],
    ) -> bool:
        """Begin one of several updates of a step, of `optimizer` (None: of all): `backward` and
        `close_update` follow. Returns False if it was committed before a failure: then it is not
        made again. Raises `CollectiveFailed`, and if the step has several micro-batches."""
        if not micro.is_last or self._tree is not None:
            raise TrainingError(
                "job.step(loss, optimizer=...) in a step of several micro-batches: each optimizer "
                "must see the whole batch before the next one takes its turn. Set micro_batch_size "
                "to batch_size, or train with more workers, and without --reproducible."
            )
        if self.updates.is_repeated():
            self._reducer.discard()
            self._begin()
            return False
        self.updates.agree_on(group, optimizer, heard=heard(), stats=self._loader.stats())
        return True

    def close_update(
        self, optimizer: Optimizer | None, clip_norm: float | None, fraction: float
    ) -> None:
        """Wait for the reduction and update; raises as `commit`."""
        self._finish(clip_norm, fraction, optimizer or self._optimizer)
        self.is_updating = True
        self.updates.done += 1
        self.is_updating = False
        self._begin()
        self.meter.lap("optimizer")

    def end_updates(self, group: Group | None, heard: Callable[[], bool], fraction: float) -> bool:
        """End a step of several updates; returns and raises as `commit`."""
        self.updates.agree_on_end(group, heard=heard(), stats=self._loader.stats())
        self._end_step(self.updates.loader_stats, fraction)
        return self.updates.heard

    def to_json(self) -> dict[str, Any]:
        """Return the engine's part of the train state, without tensors and optimizer settings."""
        skipped = [self.finite.num_skipped, self.finite.num_skipped_in_a_row]
        return {
            "step": self.step,
            "updates": self.updates.done,
            "noise": self.noise.to_json(),
            "skipped": skipped,
        }

    def from_json(self, values: Mapping[str, Any]) -> None:
        self.step = int(values["step"])
        self.noise = NoiseState.from_json(values["noise"])
        # Checkpoints of earlier versions have neither.
        self.updates.done = int(values.get("updates", 0))
        self.finite.num_skipped, self.finite.num_skipped_in_a_row = values.get("skipped", (0, 0))

    def measure_noise(self, every: int) -> None:
        """Measure the gradients' norms every `every` steps from now on; call it between steps."""
        self._noise_meter.every(every)

    def abandon(self) -> None:
        """Undo the step in flight, which did not commit."""
        self._guard.forget()
        self._reducer.abandon()
        self.meter.restart()

    def _begin(self) -> None:
        """Set gradients and sums to zero: nothing is computed of the next update yet."""
        self._loss_sum, self._weight_sum, self._num_samples = 0.0, 0.0, 0
        self._is_sum = False
        self._guard.refuse_late_changes(self._reducer.buckets)
        self._reducer.zero()
        self._guard.begin_step(self._reducer.buckets)

    def _finish(
        self, clip_norm: float | None, fraction: float, optimizer: AnyOptimizer
    ) -> Sequence[float]:
        """Wait for the reduction and update; return the summed statistics. See `commit`."""
        self._clip_norm = clip_norm
        stats = self._reducer.finish()
        self.meter.lap("sync")
        self._refuse_other_data(stats)
        self._correct_weights(stats[_WEIGHT])
        if self._must_skip(stats, self._rate.at(self.step, fraction)):
            self._reducer.discard()
            self._noise_meter.discard()
        else:
            self._update(stats, fraction, optimizer)
        self._guard.end_step(self._reducer.buckets)
        return stats

    def _end_step(self, loader_stats: Sequence[float], fraction: float) -> None:
        self.is_updating = True
        self.step += 1
        self.updates.done = 0
        self._loader.commit(loader_stats)
        self.is_updating = False
        last = self._loader.done or self.step == self._spec.max_steps
        if last or self.step % _CHECK_WEIGHTS_EVERY == 0:
            self.finite.check_weights(self.step, self._rate.at(self.step - 1, fraction))
        self.meter.lap("optimizer")
        self.meter.end_step()

    def _weight_of(self, optimizer: Optimizer | None) -> LossWeights:
        """Return the weights of the losses of one optimizer: another may have another kind."""
        key = None if optimizer is None else self.updates.index_of(optimizer)
        return self._weights.setdefault(key, LossWeights(self._spec.batch))

    def _stats(self, heard: bool) -> Sequence[float]:
        share = self._weight_sum / self._loader.planned_samples
        sq_norm, num_parts = self._noise_meter.local_stats(share)
        weights = float(self._num_samples), self._weight_sum, float(self._is_sum)
        clip = (0.0, 0.0) if self._clip_norm is None else (1.0, self._clip_norm)
        measured = self._loss_sum, sq_norm, num_parts
        return *weights, float(heard), *measured, *clip, *self._loader.stats()

    def _refuse_other_data(self, stats: Sequence[float]) -> None:
        """Raise `SpecError` if ranks read their data in different orders; nothing is changed."""
        try:
            self._loader.check(stats[_NUM_STATS:])
        except SpecError:
            self._reducer.discard()
            raise

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

    def _update(
        self,
        stats: Sequence[float],
        fraction: float,
        optimizer: AnyOptimizer,
    ) -> None:
        sample = self._noise_meter.sample(stats[_SQ_NORM], stats[_NUM_PARTS], stats[_SAMPLES])
        if sample is not None:
            self.noise = update(self.noise, sample)
        if stats[_IS_SUM] > 0:
            self._scale_gradients(stats[_SAMPLES])
        for param in self._reducer.unused:
            param.grad = None
        self._unfrozen.check()
        if stats[_NUM_CLIPS] > 0:
            clip_norm = stats[_CLIP_NORM] / stats[_NUM_CLIPS]
            everything = optimizer is self._optimizer
            clipped = self._model.parameters() if everything else params_of(optimizer)
            nn.utils.clip_grad_norm_(clipped, clip_norm)
        self._rate.set_in(optimizer, self.step, fraction)
        self.is_updating = True
        optimizer.step()

    def _correct_weights(self, weight: float) -> None:
        """Make gradients the mean: losses were divided by the planned number of samples, while the
        weights may be tokens, and iterable shards may end before the planned batch is full."""
        planned = self._loader.planned_samples
        if weight not in (0, planned):
            self._scale_gradients(planned / weight)

    def _scale_gradients(self, factor: float) -> None:
        for bucket in self._reducer.buckets:
            bucket.grads.mul_(factor)
