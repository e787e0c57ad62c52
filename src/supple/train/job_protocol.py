"""`JobProtocol`: everything that a training script may call or read on its `job`.

`Job` trains; `supple.train.probes.stand_in.StandIn` measures. One contract test holds both to this:
`tests/train/test_job_protocol.py`. Whatever else a `Job` has is for Supple itself.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

Schedule = Callable[[float], float] | None
"""The learning rate's factor at a fraction of the run done, 0 to 1."""


class JobProtocol(Protocol):
    """What the training function is handed. Five calls; the rest is ordinary PyTorch.

    In this order: `model`, `optimizer`, perhaps `keep`, one loop over `batches`, and `step` for
    each of them. What cannot be trained is refused with a message that says what to change.
    """

    def model(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The model that `build()` makes, with the same initial weights on every worker."""
        ...

    def optimizer(
        self, cls: Callable[..., Optimizer], *, lr: float, schedule: Schedule = None, **options: Any
    ) -> Optimizer:
        """`cls(model.parameters(), lr=lr, **options)`.

        `lr` is the learning rate tuned at the `batch_size` given to `batches`; it is scaled when
        the global batch changes, and multiplied by `schedule(fraction of the run done, 0 to 1)`.
        """
        ...

    def keep(self, name: str, thing: Any) -> None:
        """Let `thing` (with `state_dict` and `load_state_dict`) travel with the train state.

        Call it before `batches`. What the loop's first turn does to it is undone, as for the model.
        """
        ...

    def batches(
        self,
        dataset: Any,
        *,
        batch_size: int,
        epochs: int = 1,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        micro_batch_size: int | None = None,
    ) -> Iterator[Any]:
        """This worker's micro-batches, in order, until all epochs are done.

        `batch_size` is the global batch: all workers together. A map-style dataset, or a list of
        iterable shards. `micro_batch_size` caps what one worker computes at once (default:
        `batch_size`, which is known to fit). Every iteration must call `job.step`.
        """
        ...

    def step(self, loss: Tensor, *, clip_norm: float | None = None) -> bool:
        """Backward, and on the last micro-batch of a step: reduce, update, count.

        True if a step was committed by this call: applied, or left out by `--on-non-finite skip`.
        `clip_norm` bounds the gradient's norm over the whole global batch.
        """
        ...

    def report(self, **metrics: Tensor | float) -> None:
        """Numbers to show beside the progress: the last value of each is kept."""
        ...

    @property
    def rank(self) -> int:
        """This worker's place in its group, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Workers that train together now."""
        ...

    @property
    def generation(self) -> int:
        """The generation this worker is in: 0 before the first, and without a controller."""
        ...

    @property
    def is_leading(self) -> bool:
        """Is this rank 0 of a running group, past its rehearsal? Never while a script is measured,
        since none of those steps counts."""
        ...

    @property
    def micro_batch_size(self) -> int:
        """Samples in the last micro-batch that was handed out; 0 before the first."""
        ...

    @property
    def step_count(self) -> int:
        """Committed steps."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0; the number of epochs when all are done."""
        ...

    @property
    def lr(self) -> float:
        """The learning rate of the step in flight. Known once `optimizer` was called."""
        ...
