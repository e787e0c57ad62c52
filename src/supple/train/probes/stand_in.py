"""`StandIn`: replaces `Job` as the training function's argument, to measure the script.

It records the script's arguments with the checks of a job. An instrument supplies the loop's
batches and executes the steps: the timing of `supple plan`, or the memory trace and layer times of
`supple plan --accelerator`. Nothing is written and nothing is kept.
"""

import operator
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Protocol, Unpack, final

from torch import Tensor, nn
from torch.optim import Optimizer

from supple.train.data.batches import Batches
from supple.train.data.loader import MicroBatch
from supple.train.data.options import DataOptions
from supple.train.evaluation import Evaluation
from supple.train.job_protocol import JobProtocol, Metric, Params, Schedule, Weight
from supple.train.recipe import Hand, Recipe, no_batch_taken
from supple.train.reporter import numbers
from supple.train.start.script import PLAIN, Start, StepShare, run, single_sample_advice

_DIVIDED = 4
"""Workers for whose share of a batch a script is measured, see `supple.cluster.measure`."""


class Instrument(Protocol):
    """Measures a script's loop: supplies its micro-batches and executes its steps."""

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        """Yield the loop's micro-batches, each stepped before the next is requested; their end
        completes the measurement. Called when the loop begins, closed when the script leaves it."""
        ...

    def step(
        self,
        loss: Tensor,
        micro: MicroBatch,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        """Execute a step for `loss`, of `optimizer` (None: all of the script's); return whether it
        completes an optimizer step."""
        ...


class MeasurementComplete(BaseException):
    """Unwinds the user's training function when everything is measured. Not an error."""


@final
class StandIn:
    """One run of a script, up to the end of its measurement.

    `build(f)` makes the model from the script's factory, and `make(cls, params, lr=..., ...)` its
    optimizer. `leads`: whether rank 0 leads after its first step, as in a job, so that what the
    script does there is measured too. `epoch_of()` is the epoch that the script reads.
    `in_loop` is entered before the loop's first batch.
    """

    def __init__(
        self,
        instrument: Instrument,
        *,
        rank: int = 0,
        world_size: int = 1,
        build: Callable[..., Any] = operator.call,
        make: Callable[..., Any] = operator.call,
        leads: bool = False,
        epoch_of: Callable[[], int] = int,
        in_loop: AbstractContextManager[None] | None = None,
    ) -> None:
        self._instrument = instrument
        self.rank, self.world_size = rank, world_size
        self.generation = self.step_count = 0
        self._in_loop = in_loop or nullcontext()
        self._leads, self._epoch_of = leads and rank == 0, epoch_of
        self._build, self._make = build, make
        self._recipe = Recipe(seed=0)
        self._hand = Hand()
        self._in_turns = self._has_update = False

    def run(
        self,
        script: str,
        function: str,
        needed: str = "all was measured",
        start: Start = PLAIN,
    ) -> str:
        """Call the training function; return why the measurement is incomplete, else an empty text.
        Raises the script's errors, and `TrainingError` or `SpecError` as a job does."""
        job: JobProtocol = self
        try:
            run(script, function, job, start)
        except MeasurementComplete:
            return ""
        except ValueError as error:
            if self._recipe.took_batches:
                advice = single_sample_advice(error, self._smallest_share())
                if advice:
                    error.add_note(advice)
            raise
        if not self._recipe.took_batches:
            return no_batch_taken(script, function)
        return (
            f"the loop over job.batches(...) was left before {needed}: let it go on for as long as "
            "there are batches"
        )

    def model(self, build: Callable[[], nn.Module], *, name: str = "model") -> nn.Module:
        return self._recipe.build_model(partial(self._build, build), name)

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
        make = self._make
        return self._recipe.make_optimizer(cls, lr, params, schedule, options, make, model=model)

    def keep(self, name: str, thing: Any) -> None:
        self._recipe.keep(name, thing)

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
        batches = Batches.of(
            dataset,
            batch_size=batch_size,
            epochs=epochs,
            shuffle=shuffle,
            collate_fn=collate_fn,
            num_workers=num_workers,
            micro_batch_size=micro_batch_size,
            options=options,
        )
        self._recipe.take_batches(batches)
        with self._in_loop, closing(self._instrument.micro_batches(self._recipe)) as given:
            for micro in given:
                yield from self._hand.give(micro)
                self.step_count += self._has_update
                self._has_update = False
        raise MeasurementComplete

    def step(
        self,
        loss: Tensor,
        *,
        weight: Weight = None,
        clip_norm: float | None = None,
        optimizer: Optimizer | None = None,
    ) -> bool:
        self._in_turns |= optimizer is not None
        micro = self._hand.take(again=self._in_turns)
        committed = self._instrument.step(loss, micro, clip_norm, optimizer)
        if self._in_turns:
            self._has_update |= committed
        else:
            self.step_count += committed
        return committed

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
        self._recipe.evaluate(
            Evaluation(
                dataset=dataset,
                compute=compute,
                batch_size=batch_size,
                every_steps=every_steps,
                collate_fn=collate_fn,
                num_workers=num_workers,
            )
        )

    @property
    def evaluation(self) -> Mapping[str, float]:
        return {}

    def report(self, **metrics: Tensor | float) -> None:
        numbers(metrics)

    def save(self) -> None:
        """A job's own saving, which a script has no need to call; nothing is saved here."""

    @property
    def is_leading(self) -> bool:
        return self._leads and self.step_count > 0

    @property
    def epoch(self) -> int:
        return self._epoch_of()

    def _smallest_share(self) -> StepShare:
        """The smallest part of a step that is measured: a quarter of a batch, or of a micro-batch
        that is smaller."""
        batches = self._recipe.batches
        batch, limit = batches.batch_size, batches.micro_batch_size
        is_cut = limit is not None and limit < min(batch, 2 * _DIVIDED)
        return StepShare(
            micro_batch=self._hand.size,
            own=batch if is_cut else 1,
            step=batch,
            batch_size=batch,
            num_workers=1 if is_cut else _DIVIDED,
            epoch=None,
        )

    @property
    def micro_batch_size(self) -> int:
        return self._hand.size

    @property
    def lr(self) -> float:
        return self._recipe.rate.at(self.step_count, 0.0)
