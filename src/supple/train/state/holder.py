"""`StateHolder`: the state of a run on one worker: what is saved, and moved to a worker that joins.

It is the `Holder` of `supple.train.generation.member`. `Job` steers it: it never communicates, and
calls nothing of the script.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from supple.core.job.order import micro_batches, rank_shards, share
from supple.core.spec import Change, TrainSpec
from supple.train.checkpoint.saver import Saver
from supple.train.data.batches import Batches
from supple.train.data.loader import Loader, fraction_done
from supple.train.evaluation import Evaluation
from supple.train.recipe import Recipe
from supple.train.state.optimizers import members_of
from supple.train.state.same_run import changes, data_identity
from supple.train.state.train_state import TrainState, private
from supple.train.step.engine import StepEngine
from supple.train.step.updates import MOST

_NO_EVALUATIONS: Mapping[str, Any] = {"made_at": 0, "results": {}}
"""What a checkpoint of an earlier version stands for."""


@final
class StateHolder:
    """Weights, optimizer, position in the data, step count, batch size and learning rate.

    A script may call `job.batches` once for each epoch; a *round* is one of these calls. A worker
    that joins or resumes in a later round runs through the script's earlier ones without a batch.
    """

    loader: Loader
    state: TrainState
    engine: StepEngine

    def __init__(
        self, spec: TrainSpec, recipe: Recipe, saver: Saver, generation: Callable[[], int]
    ) -> None:
        self.global_batch = self.micro_limit = 0
        """Samples of a global batch; limit of a micro-batch."""
        self.has_state = False
        self.in_step = False
        """A step has begun and is not committed."""
        self.round = 0
        """Number of the script's current call of `job.batches`, from 0."""
        self._reached_round = 0
        self._kept: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}
        self._has_engine = False
        self._spec, self._recipe, self._saver = spec, recipe, saver
        self._generation = generation

    def prepare(self, batches: Batches) -> None:
        """Take the arguments of the first `job.batches`. Raises `SpecError`."""
        recipe = self._recipe
        self.loader = recipe.take_batches(batches)
        self.global_batch = int(recipe.batches.batch_size)
        self.micro_limit = batches.micro_batch_size or self.global_batch
        self.state = TrainState(recipe.model, recipe.optimizer, recipe.kept)
        names = [type(member).__name__ for member in members_of(self.state.optimizer)]
        self._identity = {"data": data_identity(batches.dataset), "optimizers": names}

    def make_engine(self, changed_buffers: list[str], *, in_turns: bool) -> None:
        """Make the step engine, after the rehearsal."""
        recipe = self._recipe
        self.engine = StepEngine(
            self._spec,
            recipe.model,
            self.state.optimizer,
            self.loader,
            recipe.rate,
            changed_buffers,
            in_turns=in_turns,
        )
        self._has_engine = True

    # -- rounds ----------------------------------------------------------------------------

    def next_round(self, batches: Batches) -> None:
        """Take the arguments of a further `job.batches`. Raises `TrainingError` if they differ."""
        self._recipe.take_round(batches, self._spec.max_steps)
        self.round += 1
        self.loader.extend((self.round + 1) * batches.epochs)
        if self.round == self._reached_round and self._kept:
            for name, saved in self._kept.items():
                self._recipe.kept[name].load_state_dict(saved)
            self._kept = {}

    @property
    def generation(self) -> int:
        """Number of this worker's generation."""
        return self._generation()

    @property
    def is_behind(self) -> bool:
        """Whether the run has passed the script's current round: it has no batch for it."""
        return self.round < self._reached_round

    # -- the train state -------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Number of committed steps."""
        return self.engine.step if self._has_engine else 0

    @property
    def is_updating(self) -> bool:
        return self._has_engine and self.engine.is_updating

    @property
    def committed_step(self) -> int | None:
        return self.step if self.has_state and not self.is_updating else None

    @property
    def version(self) -> int | None:
        step = self.committed_step
        if step is None:
            return None
        # All grow: of two workers at the same step, one may have evaluated, or begun a round.
        within = self.engine.updates.done + (self._recipe.evaluations.made_at == step)
        return (step + self._own_round) * MOST + within

    def scalars(self) -> dict[str, Any]:
        """Return the train state without tensors and optimizer settings, as JSON values."""
        return self.engine.to_json() | {
            "position": self.loader.position.to_json(),
            "global_batch_size": self.global_batch,
            "rate": self._recipe.rate.to_json(),
            "round": self._own_round,
            "evaluations": self._recipe.evaluations.to_json(),
            **self._identity,
        }

    def adopt(self, scalars: Mapping[str, Any]) -> None:
        """Set the scalars to those of the received state, whose tensors are in place."""
        self.engine.from_json(scalars)
        self.loader.position = type(self.loader.position).from_json(scalars["position"])
        self.global_batch = int(scalars["global_batch_size"])
        self._recipe.rate.from_json(scalars["rate"])
        self._recipe.evaluations.from_json(scalars.get("evaluations", _NO_EVALUATIONS))
        self._reached_round = int(scalars.get("round", 0))
        if self.is_behind:  # the script's code between the rounds may change what is kept
            kept = self._recipe.kept.items()
            self._kept = {name: private(thing.state_dict()) for name, thing in kept}
        self.has_state = True

    def begin(self, restore: str | None) -> None:
        """Begin with the state of checkpoint `restore`, or with the initial state."""
        if restore is not None:
            is_named = restore == self._spec.resume
            self._saver.restore(restore, self.state, self._take, self._changes, is_named=is_named)
        self.state.spare.clear()
        self.has_state = True

    def save(self) -> str | None:
        """Save durably and return the path; None if this step was saved and reported before."""
        self.undo_step()
        return self._saver.save_now(self.state, self.scalars(), self.generation)

    def undo_step(self) -> None:
        """Discard the step in flight, unless its update has begun."""
        if self.in_step and not self.is_updating:
            self.in_step = False
            self.engine.abandon()

    # -- place in the data, batch size, progress ---------------------------------------------

    def place(self, rank: int, world_size: int) -> None:
        """Go on reading from the position as `rank` of `world_size`."""
        sizes = self.global_batch, self.micro_limit
        self.loader.place(self.loader.position, rank, world_size, *sizes)
        self.engine.meter.forget()

    def set_global_batch(self, size: int) -> None:
        if size != self.global_batch:
            noise_scale = self.engine.noise.noise_scale
            self._recipe.rate.change_batch(size, step=self.step, noise_scale=noise_scale)
            self.global_batch = size

    @property
    def is_done(self) -> bool:
        """Whether all samples of the round have been used, or all steps of the run made."""
        limit = self._spec.max_steps
        return self.loader.done or (limit is not None and self.step >= limit)

    @property
    def due_evaluations(self) -> Sequence[Evaluation]:
        """Evaluations to make after the last committed step, before the next."""
        if self.is_behind:
            return ()
        is_over = self._spec.max_steps is not None and self.step >= self._spec.max_steps
        return self._recipe.evaluations.due(
            self.step, at_epoch_end=self.loader.at_epoch_start, at_end=is_over
        )

    @property
    def fraction(self) -> float:
        """Fraction of the run done, 0 to 1."""
        if not self._recipe.took_batches:
            return 0.0
        return fraction_done(self.loader, self.step, self._spec.max_steps)

    def cut(self, rank: int, world_size: int) -> list[int]:
        """Return the size in samples of each of the rank's micro-batches in a full step."""
        batch = self.global_batch
        if self._spec.reproducible:
            shards = rank_shards(batch, self._spec.num_logical_shards, world_size, rank)
            return [num_samples for _, _, num_samples in shards]
        return list(micro_batches(share(batch, world_size, rank)[1], self.micro_limit))

    @property
    def _own_round(self) -> int:
        return max(self.round, self._reached_round)

    def _changes(self, scalars: Mapping[str, Any]) -> set[Change]:
        """Return what has changed since the checkpoint. Raises `SpecError` unless it is allowed."""
        return changes(scalars, self._identity, self._spec.allow_changes)

    def _take(self, scalars: Mapping[str, Any], changed: set[Change]) -> None:
        """Adopt a checkpoint's scalars. Raises `SpecError` if their position is of other data."""
        self.adopt(scalars)
        if "data" in changed:
            self.loader.restart_epoch()
        sizes = self.global_batch, self.micro_limit
        self.loader.place(self.loader.position, 0, 1, *sizes)
