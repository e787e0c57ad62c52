"""`JobProtocol`: everything that a training script may call or read on its `job`.

`Job` trains; `supple.train.probes.stand_in.StandIn` measures. The contract test of both is
`tests/train/test_job_protocol.py`. All other attributes of a `Job` are internal to Supple.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from supple.train.data.options import DataOptions

Schedule = Callable[[float], float] | None
"""Maps the fraction of the run done (0 to 1) to a factor of the learning rate."""

Params = Callable[[nn.Module], Iterable[Any]] | None
"""A function of the model: its parameters to train, or parameter groups, as torch.optim takes them.
"""
Metric = float | Tensor | tuple[float | Tensor, float | Tensor]
"""A mean over the samples of a batch, or (a mean, its weight)."""
Weight = float | Tensor | Literal["sum"] | None
"""What a loss is the mean over, as a number; "sum" for a loss that is a sum; None: over samples."""


class JobProtocol(Protocol):
    """The argument of the training function. Five calls; the rest is ordinary PyTorch.

    In this order: `model`, `optimizer`, perhaps `keep`, one loop over `batches`, and `step` for
    each of them. Invalid input is refused with a message that names what to change.
    """

    def model(self, build: Callable[[], nn.Module], *, name: str = "model") -> nn.Module:
        """Return the model that `build()` makes, with the same initial weights on every worker.

        Several models need a name each, which begins the names of their weights in a checkpoint.
        """
        ...

    def optimizer(
        self,
        cls: Callable[..., Optimizer],
        *,
        lr: float,
        params: Params = None,
        model: nn.Module | None = None,
        schedule: Schedule = None,
        **options: Any,
    ) -> Optimizer:
        """Make `cls(params(model), lr=lr, **options)`; default: all parameters that need gradients.

        `model`: the one of several models to train (default: all of them). A job may have several
        optimizers, of different parameters: `step` steps all of them, or the one it is given.

        `lr` is the learning rate tuned at the `batch_size` given to `batches`; it is scaled when
        the global batch changes, and multiplied by `schedule(fraction of the run done, 0 to 1)`.
        A parameter group with a rate of its own keeps its ratio to `lr`.

        `job.step` steps the optimizer. A `torch.optim.lr_scheduler`, a `GradScaler` or another call
        of its `step` raises `TrainingError`, as does an optimizer that needs a closure (LBFGS).
        """
        ...

    def keep(self, name: str, thing: Any) -> None:
        """Save and move `thing` (with `state_dict` and `load_state_dict`) with the train state.

        Call it before `batches`. Its changes in the loop's first turn are undone, as the model's.
        """
        ...

    def batches(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        shuffle: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        micro_batch_size: int | None = None,
        **options: Unpack[DataOptions],
    ) -> Iterator[Any]:
        """Yield this worker's micro-batches, in order, until all epochs are done.

        `dataset`: a map-style dataset, or a list of iterable shards. `batch_size`: samples of the
        global batch, all workers together. `shuffle`: by default true without a sampler.
        `micro_batch_size`: limit on the samples that one worker computes at once (default:
        `batch_size`). Every iteration must call `job.step`. A worker whose share of a step is empty
        is given data that counts nothing, so that the loop's other lines run on all workers.

        `options`, as of torch's `DataLoader`: `drop_last`, `sampler`, `weights` (one for each
        sample), `batch_sampler` (instead of `batch_size`), `generator`, `pin_memory`,
        `worker_init_fn`, `prefetch_factor`, `timeout`; see `supple.train.data.options`.
        """
        ...

    def step(
        self,
        loss: Tensor,
        *,
        weight: Weight = None,
        clip_norm: float | None = None,
        optimizer: Optimizer | None = None,
    ) -> bool:
        """Backward, and on the last micro-batch of a step: reduce, update, count.

        Without `weight`, `loss` is the mean over the samples of the micro-batch. A mean over
        something else, such as the tokens that are not padding, needs their number: `weight=`
        number of tokens. A sum needs `weight="sum"`. Then the gradient is that of the whole global
        batch, for any number of workers and micro-batches. Every step of a job has the same kind.

        Returns whether a step was committed by this call: applied, or left out by
        `--on-non-finite skip`. `clip_norm` bounds the gradient's norm over the global batch.

        `optimizer`: update the parameters of this one only, as in a GAN, whose discriminator and
        generator take turns: call it once for each update of a batch, in their order. The step
        counts when the next batch is taken; it has one micro-batch on every worker.

        Do not call `loss.backward()` yourself; that raises `TrainingError`. `zero_grad()` in the
        loop has no effect.
        """
        ...

    def evaluate(
        self,
        dataset: Any,
        compute: Callable[[Any], Mapping[str, Metric]],
        *,
        batch_size: int,
        every_steps: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        """Evaluate on `dataset` at the end of every epoch, or after `every_steps` steps and at the
        end of the run; call it before `batches`.

        Between two steps, all workers divide the samples: each is used once. `compute(batch)` runs
        in evaluation mode without gradients and returns metrics by name: means over the batch, or
        pairs (mean, weight) for means over something else, such as tokens. The results over all
        samples are in `evaluation` and beside the progress. It does not count as step time.
        """
        ...

    @property
    def evaluation(self) -> Mapping[str, float]:
        """The metrics of the last evaluations, equal on all workers; empty before the first."""
        ...

    def report(self, **metrics: Tensor | float) -> None:
        """Show numbers beside the progress; the last value of each is kept."""
        ...

    @property
    def rank(self) -> int:
        """This worker's number in its group, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of workers that train together now."""
        ...

    @property
    def generation(self) -> int:
        """Number of this worker's generation: 0 before the first, and without a controller."""
        ...

    @property
    def is_leading(self) -> bool:
        """Whether this is rank 0 past its first turn; False while memory or layers are measured."""
        ...

    @property
    def micro_batch_size(self) -> int:
        """Samples in the last micro-batch that was yielded; 0 before the first."""
        ...

    @property
    def step_count(self) -> int:
        """Number of committed steps."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0; the number of epochs when all are done."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate of the step in flight, after `optimizer` was called."""
        ...
