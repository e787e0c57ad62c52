"""`Job`: the object passed to the training function on a worker; see `supple.train.job_protocol`.

The function runs from top to bottom on every worker. A worker that joins later runs it up to its
first batch, rehearses one step on it (so that everything is imported, allocated and warm), undoes
the effects, and waits. When it becomes a member, it receives its peers' train state and goes on in
the middle of the run. All changes of the membership happen inside `job.step`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack, final

from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.job.order import micro_batches, mix, rank_shards, share
from supple.core.spec import TrainSpec
from supple.core.types import Doing, Progress
from supple.train.checkpoint.saver import Saver
from supple.train.checkpoint.store import CheckpointStore
from supple.train.data.batches import Batches, refuse_adaptive
from supple.train.data.loader import Loader, MicroBatch, fraction_done
from supple.train.data.options import DataOptions
from supple.train.generation.activity import Activity
from supple.train.generation.group import CollectiveFailed, Group
from supple.train.generation.member import Elastic, LeaveLoop, Membership
from supple.train.job_protocol import JobProtocol, Params, Schedule, Weight
from supple.train.ledger import Ledger
from supple.train.optimizers import members_of
from supple.train.own_steps import refuse_sparse
from supple.train.recipe import Hand, Recipe
from supple.train.rehearsal import Rehearsal
from supple.train.reporter import Reporter
from supple.train.script import StepShare
from supple.train.seeding import seed_everything
from supple.train.state import TrainState
from supple.train.step.engine import StepEngine, TrainingError
from supple.train.step.updates import MOST, Updates


@final
class Job(JobProtocol):
    """One worker's part of a training job.

    Without `elastic` it is a single worker, for debugging (`python script.py`).
    """

    def __init__(
        self,
        spec: TrainSpec | None = None,
        *,
        elastic: Elastic | None = None,
        checkpoints: CheckpointStore | None = None,
        ledger: Ledger | None = None,
        observe: Callable[[Progress], None] | None = None,
    ) -> None:
        self._spec = spec or TrainSpec(name="local", script="")
        self._elastic = elastic
        self._activity = Activity()
        me, mailbox = (elastic.identity, elastic.mailbox) if elastic else (None, None)
        self._membership = Membership(me, mailbox, self._activity) if me and mailbox else None
        self.saver = Saver(checkpoints, self._spec.checkpoint_every_s, me, mailbox)
        self._ledger = ledger
        listeners = [elastic.mailbox.publish] if elastic else []
        self._reporter = Reporter(*listeners, *([observe] if observe else []))
        self._recipe = Recipe(self._spec.seed, self._spec.lr_rule)
        self._hand = Hand()
        self._loader: Loader  # set by `batches`, as is `_state`
        self._state: TrainState
        self._micro_limit = 0
        self._global_batch = 0
        self._workers_of_nodes: tuple[int, ...] = (1,)
        self._engine: StepEngine | None = None
        self._has_state = False
        self._rehearsing = False
        self._in_turns = False
        """The script makes several updates in a step: found in the rehearsal."""
        self._in_loop = self._in_step = self._is_called = False
        self._replaced = False

    # -- the user's five lines -------------------------------------------------------------

    def model(self, build: Callable[[], nn.Module], *, name: str = "model") -> nn.Module:
        return self._recipe.build_model(build, name)

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
        return self._recipe.make_optimizer(cls, lr, params, schedule, options, model=model)

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
        recipe, batches = (
            self._recipe,
            Batches.of(
                dataset,
                batch_size=batch_size,
                epochs=epochs,
                shuffle=shuffle,
                collate_fn=collate_fn,
                num_workers=num_workers,
                micro_batch_size=micro_batch_size,
                options=options,
            ),
        )
        refuse_adaptive(batches, self._spec.batch)
        self._loader = recipe.take_batches(batches)
        self._global_batch = int(recipe.batches.batch_size)
        self._micro_limit = micro_batch_size or self._global_batch
        self._state = TrainState(recipe.model, recipe.optimizer, recipe.kept)
        yield from self._rehearse()
        if self._membership is None:
            self.begin(self._spec.resume)
            self._place()
        else:
            self._membership.ready()
            self._join()
        self._in_loop = True
        try:
            while True:
                while not self._is_done():
                    yield from self._one_step()
                if self._pass_fence() and self._save_last():
                    break
        except GeneratorExit:
            self.leave_loop()
            raise
        self._in_loop = False
        self._activity.enter("after")

    def step(
        self,
        loss: Tensor,
        *,
        weight: Weight = None,
        clip_norm: float | None = None,
        optimizer: Optimizer | None = None,
    ) -> bool:
        in_turns = optimizer is not None or self._in_turns
        micro = self._hand.take(again=in_turns)
        if self._rehearsing:
            self._in_turns = in_turns
            self._rehearse_update(loss, optimizer)
            return False
        if in_turns:
            committed = self._update(loss, micro, weight, clip_norm, optimizer)
            self._activity.enter("script")
            return committed
        self._activity.enter("backward")
        group = self._group
        if group is not None and group.is_aborted:  # the rest of this step would be wasted
            committed = self._abandon("the generation was aborted")
        else:
            self._steps.backward(loss, micro, group, self._heard_of_next, weight=weight)
            committed = self._commit(clip_norm) if micro.is_last else False
        self._activity.enter("script")
        return committed

    def report(self, **metrics: Tensor | float) -> None:
        if not self._rehearsing:
            self._reporter.note(metrics)

    @property
    def rank(self) -> int:
        group = self._group
        return 0 if group is None else group.rank

    @property
    def world_size(self) -> int:
        group = self._group
        return 1 if group is None else group.size

    @property
    def generation(self) -> int:
        return 0 if self._membership is None else self._membership.generation

    @property
    def is_leading(self) -> bool:
        return self._has_state and self.rank == 0

    @property
    def micro_batch_size(self) -> int:
        return self._hand.size

    @property
    def activity(self) -> tuple[Doing, float]:
        """The training thread's activity, and its duration in seconds."""
        doing, since_s = self._activity.report
        return ("update" if self._engine and self._engine.is_updating else doing), since_s

    @property
    def membership(self) -> Membership | None:
        """None without a controller."""
        return self._membership

    @property
    def took_batches(self) -> bool:
        return self._recipe.took_batches

    @property
    def step_count(self) -> int:
        return 0 if self._engine is None else self._engine.step

    @property
    def epoch(self) -> int:
        return self._loader.epoch if self.took_batches else 0

    @property
    def lr(self) -> float:
        return self._recipe.rate.at(self.step_count, self._fraction())

    @property
    def step_share(self) -> StepShare:
        """This worker's part of the step in flight, or of the rehearsed one."""
        batch, ranks, rank = self._global_batch, self.world_size, self.rank
        step = self._loader.planned_samples
        if self._rehearsing and not self._recipe.batches.has_batch_sampler:
            ranks = 1 if self._elastic is None else self._elastic.rehearsal_size
            step = batch
        total = self._loader.samples_total
        return StepShare(
            micro_batch=self._hand.size,
            own=share(step, ranks, rank)[1],
            step=step,
            batch_size=batch,
            num_workers=ranks,
            epoch=None if total is None else total // self._recipe.batches.epochs,
        )

    # -- one step --------------------------------------------------------------------------

    @property
    def _steps(self) -> StepEngine:
        assert self._engine is not None, "our bug: there are no steps before the first batch"
        return self._engine

    def _one_step(self) -> Iterator[Any]:
        self._replaced = False
        any_batch = False
        self._activity.enter("data")
        self._in_step = True
        for micro in self._steps.micro_batches(alone=self.world_size == 1):
            self._activity.enter("script")
            any_batch = True
            if self._ledger is not None:
                self._ledger.read(
                    self.generation, self.step_count, self.epoch, self.rank, micro.ids
                )
            yield from self._hand.give(micro)
            if self._replaced:
                return
            self._activity.enter("data")
        if self._steps.in_turns:
            if not self._end_updates(has_samples=any_batch):
                return
        elif not any_batch:
            self._steps.arm(self._group, self._heard_of_next)
            if not self._commit(None):
                return
        self._between_steps()

    def _commit(self, clip_norm: float | None) -> bool:
        return self._end_step(lambda: self._steps.commit(clip_norm, self._fraction()))

    def _end_updates(self, *, has_samples: bool) -> bool:
        """End a step of several updates; on a rank without samples, make them first."""
        steps = self._steps
        end = steps.end_updates if has_samples else steps.follow_updates
        return self._end_step(lambda: end(self._group, self._heard_of_next, self._fraction()))

    def _end_step(self, end: Callable[[], bool]) -> bool:
        """Call `end`, which returns whether a rank has heard of a next generation; return whether
        the step was committed."""
        self._activity.enter("waiting")
        try:
            someone_heard = end()
        except CollectiveFailed as failure:
            return self._abandon(str(failure))
        self._in_step, self._is_called = False, someone_heard
        self._publish()
        return True

    def _update(
        self,
        loss: Tensor,
        micro: MicroBatch,
        weight: Weight,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        """Make one of several updates of a step; return whether it was committed."""
        steps, group, heard = self._steps, self._group, self._heard_of_next
        if not steps.in_turns:
            raise TrainingError(
                "job.step(loss, optimizer=...) after a first batch without it: all workers must "
                "know from the first batch on that optimizers take turns. Give optimizer= in every "
                "step of the first batch too."
            )
        if self._replaced:  # the batch of this update was abandoned in an earlier one
            return False
        if group is not None and group.is_aborted:
            return self._abandon("the generation was aborted")
        try:
            self._activity.enter("waiting")
            if not steps.open_update(optimizer, micro, group, heard):
                return True
            self._activity.enter("backward")
            steps.backward(loss, micro, group, heard, weight=weight, optimizer=optimizer)
            self._activity.enter("waiting")
            steps.close_update(optimizer, clip_norm, self._fraction())
        except CollectiveFailed as failure:
            return self._abandon(str(failure))
        return True

    def _between_steps(self) -> None:
        """Save or rejoin between two steps. The script has finished its work on the last step, so
        its kept objects (`job.keep`) and the weights are of the same step."""
        if self.rank == 0 and self.saver.due():
            self.saver.save_async(self._state, self.scalars(), self.generation)
            self._steps.meter.restart()
        if self._is_called:
            self._is_called = False
            self._rejoin("")

    def _abandon(self, error: str) -> bool:
        self._steps.abandon()
        self._rejoin(error)
        return False

    def _heard_of_next(self) -> bool:
        return self._membership is not None and self._membership.heard_of_next()

    # -- generations -----------------------------------------------------------------------

    @property
    def _group(self) -> Group | None:
        return None if self._membership is None else self._membership.group

    def _rehearse(self) -> Iterator[Any]:
        """Run one step on a real batch, undo its effects, and make the step engine."""
        rehearsal = Rehearsal(self._state)
        size = 1 if self._elastic is None else self._elastic.rehearsal_size
        _, rehearsed = share(self._global_batch, size, 0)
        ranks = size if self._recipe.batches.has_batch_sampler else 1
        self._loader.place(self._loader.position, 0, ranks, rehearsed, self._micro_limit)
        self._activity.enter("data")
        micro = next(iter(self._loader.feed()))
        self._activity.enter("script")
        self._rehearsing = True
        yield from self._hand.give(micro)
        self._rehearsing = False
        recipe, changed = self._recipe, rehearsal.undo()
        self._engine = StepEngine(
            self._spec,
            recipe.model,
            self._state.optimizer,
            self._loader,
            recipe.rate,
            changed,
            in_turns=self._in_turns,
        )

    def _rehearse_update(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        everything = self._state.optimizer
        if optimizer is not None:
            Updates(members_of(everything)).index_of(optimizer)
        loss.backward()
        refuse_sparse(self._state.model)
        (optimizer or everything).step()
        if self._in_turns:
            everything.zero_grad()

    def leave_loop(self) -> None:
        """If the script left its loop early (`break`, `return`, an exception), report it and save.
        The script may change the weights now, so rank 0 copies them at once and writes the copy in
        the background."""
        was_in_loop, self._in_loop = self._in_loop, False
        if self._membership is None or self.committed_step is None or not was_in_loop:
            return
        self._activity.enter("after")
        self._membership.report_left_loop(self.step_count)
        self._undo_step()
        self._publish(force=True)
        if self.rank == 0:
            self.saver.save_on_leave(self._state, self.scalars(), self.generation)

    def outlive(self) -> None:
        """After the script raised: save this worker's state on request, until it is stopped."""
        self._in_loop = False
        if self._membership is not None:
            self._membership.outlive(self)

    def _undo_step(self) -> None:
        """Discard the step in flight, unless its update has begun."""
        if self._in_step and not self._steps.is_updating:
            self._in_step = False
            self._steps.abandon()

    def _rejoin(self, error: str) -> None:
        assert self._membership is not None
        self._in_step = False
        self._membership.leave(self.step_count, error)
        self._join()

    def _join(self) -> None:
        assert self._membership is not None
        try:
            agreed = self._membership.join_next(self)
        except LeaveLoop:
            self._in_loop = False
            raise
        self._workers_of_nodes = agreed.workers_of_nodes
        self._set_global_batch(agreed.global_batch_size or self._recipe.rate.base_batch)
        self._place()
        if not self._spec.reproducible:
            seed_everything(mix(self._spec.seed, self.generation, self.rank))

    def _place(self) -> None:
        place = self._loader.position, self.rank, self.world_size
        self._loader.place(*place, self._global_batch, self._micro_limit)
        self._replaced = True
        self._steps.meter.forget()

    def _is_done(self) -> bool:
        limit = self._spec.max_steps
        return self._loader.done or (limit is not None and self.step_count >= limit)

    def _pass_fence(self) -> bool:
        """Wait until all ranks have the last step; return whether this rank may leave the loop."""
        heard = self._meet(float(self._heard_of_next()))
        if heard is not None and heard > 0:
            self._rejoin("")
        return heard == 0.0

    def _save_last(self) -> bool:
        """Save on rank 0; return success. The others wait: if rank 0 dies, another one saves."""
        self._publish(force=True)
        if self.rank == 0:
            self._activity.enter("saving")
            self.saver.save_final(self._state, self.scalars(), self.generation)
        return self._meet(0.0) is not None

    def _meet(self, number: float) -> float | None:
        """Sum `number` over all ranks; None if that failed and another generation has formed."""
        group = self._group
        if group is None or self._membership is None:
            return number
        self._activity.enter("fence")
        try:
            return group.sum(number)
        except CollectiveFailed as failure:
            self._rejoin(str(failure))
            return None

    # -- the holder of the train state (see supple.train.generation.member.Holder) -----

    @property
    def committed_step(self) -> int | None:
        return self.step_count if self._has_state and not self._steps.is_updating else None

    @property
    def version(self) -> int | None:
        step = self.committed_step
        return None if step is None else step * MOST + self._steps.updates.done

    @property
    def state(self) -> TrainState:
        return self._state

    def scalars(self) -> dict[str, Any]:
        """Return the train state without tensors and optimizer settings, as JSON values."""
        return self._steps.to_json() | {
            "position": self._loader.position.to_json(),
            "global_batch_size": self._global_batch,
            "rate": self._recipe.rate.to_json(),
        }

    def adopt(self, scalars: Mapping[str, Any]) -> None:
        """Set the job's scalars to those of the received state, whose tensors are in place."""
        self._steps.from_json(scalars)
        self._loader.position = type(self._loader.position).from_json(scalars["position"])
        self._global_batch = int(scalars["global_batch_size"])
        self._recipe.rate.from_json(scalars["rate"])
        self._has_state = True

    def begin(self, restore: str | None) -> None:
        """Begin with the state of checkpoint `restore`, or with the initial state."""
        if restore is not None:
            is_named = restore == self._spec.resume
            self.saver.restore(restore, self._state, self._take, is_named=is_named)
        self._state.spare.clear()
        self._has_state = True

    def _take(self, scalars: Mapping[str, Any]) -> None:
        """Adopt a checkpoint's scalars. Raises `SpecError` if their position is of other data."""
        self.adopt(scalars)
        self._loader.place(self._loader.position, 0, 1, self._global_batch, self._micro_limit)

    def save(self) -> str | None:
        """Save durably and return the path; None if this step was saved and reported before."""
        self._undo_step()
        return self.saver.save_now(self._state, self.scalars(), self.generation)

    # -- batch size, learning rate, progress -------------------------------------------------

    def _set_global_batch(self, size: int) -> None:
        if size != self._global_batch:
            noise_scale = self._steps.noise.noise_scale
            self._recipe.rate.change_batch(size, step=self.step_count, noise_scale=noise_scale)
            self._global_batch = size

    def _fraction(self) -> float:
        if not self.took_batches:
            return 0.0
        return fraction_done(self._loader, self.step_count, self._spec.max_steps)

    def _publish(self, *, force: bool = False) -> None:
        if self.rank != 0 or not (force or self._reporter.is_due()):
            return
        self._reporter.report(
            self._steps,
            self._loader,
            self._recipe.rate,
            generation=self.generation,
            workers_of_nodes=self._workers_of_nodes,
            global_batch_size=self._global_batch,
            micro_batches=self._cut(),
            largest_micro_batch=self._micro_limit,
            lr=self.lr,
        )

    def _cut(self) -> list[int]:
        """Return the size in samples of each of this rank's micro-batches in a full step."""
        batch, size, rank = self._global_batch, self.world_size, self.rank
        if self._spec.reproducible:
            shards = rank_shards(batch, self._spec.num_logical_shards, size, rank)
            return [num_samples for _, _, num_samples in shards]
        return list(micro_batches(share(batch, size, rank)[1], self._micro_limit))
