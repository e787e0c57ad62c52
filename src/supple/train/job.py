"""`Job`: the object passed to the training function on a worker; see `supple.train.job_protocol`.

The function runs from top to bottom on every worker. A worker that joins later runs it up to its
first batch, rehearses one step on it (so that everything is imported, allocated and warm), undoes
the effects, and waits. When it becomes a member, it receives its peers' train state and goes on in
the middle of the run. All changes of the membership happen inside `job.step`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Unpack, final

from torch import Tensor, nn
from torch.optim import Optimizer

from supple.core.job.order import mix, share
from supple.core.spec import TrainSpec
from supple.core.types import Doing, Progress
from supple.train.checkpoint.saver import Saver
from supple.train.checkpoint.store import CheckpointStore
from supple.train.data.batches import Batches, refuse_adaptive
from supple.train.data.options import DataOptions
from supple.train.evaluation import Evaluation
from supple.train.generation.activity import Activity
from supple.train.generation.group import CollectiveFailed, Group
from supple.train.generation.member import Elastic, LeaveLoop, Membership
from supple.train.job_protocol import JobProtocol, Metric, Params, Schedule, Weight
from supple.train.ledger import Ledger
from supple.train.own_steps import refuse_curved_hooks, refuse_foreign_steps, refuse_sparse
from supple.train.recipe import Hand, Recipe
from supple.train.reporter import Reporter
from supple.train.start.script import StepShare
from supple.train.start.seeding import seed_everything
from supple.train.state.holder import StateHolder
from supple.train.state.optimizers import members_of
from supple.train.state.rehearsal import Rehearsal
from supple.train.step.carried import frames_of, refuse_carried
from supple.train.step.engine import TrainingError
from supple.train.step.unkept import Unkept
from supple.train.step.updates import Updates
from supple.train.step_loop import StepLoop

_LEFT = (
    "job.batches was called again after the loop was left early (break): the workers would read "
    "different batches. Let the loop run to its end, or leave the training function; "
    "--max-steps ends a run early."
)


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
        listeners = [elastic.mailbox.publish] if elastic else []
        self._reporter = Reporter(*listeners, *([observe] if observe else []))
        self._recipe = Recipe(self._spec.seed, self._spec.lr_rule)
        self.holder = StateHolder(self._spec, self._recipe, self.saver, lambda: self.generation)
        self._hand = Hand()
        self._workers_of_nodes: tuple[int, ...] = (1,)
        self._rehearsing = False
        self._in_turns = False
        """The script makes several updates in a step: found in the rehearsal."""
        self._in_loop = self._has_left = False
        self._loop = StepLoop(
            self.holder,
            self._hand,
            self._membership,
            self._activity,
            self.saver,
            ledger,
            rejoin=self._rejoin,
            publish=self._publish,
            check=lambda: self._unkept.check(self.step_count),
        )

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
        refuse_adaptive(batches, self._spec.batch)
        if self._has_left:
            raise TrainingError(_LEFT)
        is_first = not self.took_batches
        caller = sys._getframe().f_back
        if is_first:
            self.holder.prepare(batches)
            self._watch(frames_of(caller))
        else:
            self.holder.next_round(batches)
        with refuse_foreign_steps(self.holder.state.optimizer, caller):
            caller = None
            try:
                if is_first:
                    yield from self._begin()
                if not self.holder.is_behind:
                    yield from self._round()
            except GeneratorExit:
                self._has_left = True
                self.leave_loop()
                raise
        self._recipe.end_round()

    def _watch(self, frames: list[FrameType]) -> None:
        """Refuse, and find later, what the script's loop changes by itself."""
        state = self.holder.state
        refuse_carried(frames, self, state.kept.values())
        self._unkept = Unkept(frames, state)

    def _begin(self) -> Iterator[Any]:
        """Rehearse, and join or begin the run."""
        yield from self._rehearse()
        self._unkept.check()
        if self._membership is None:
            self.holder.begin(self._spec.resume)
            self._place()
        else:
            self._membership.ready()
            self._join()

    def _round(self) -> Iterator[Any]:
        """Train until all samples of the script's call of `batches` are used."""
        self._in_loop = True
        while True:
            self._evaluate_if_due()
            while not self.holder.is_done:
                yield from self._loop.one_step()
                self._evaluate_if_due()
            if self.holder.is_behind or (self._pass_fence() and self._save_last()):
                break
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
        return self._loop.step(loss, micro, weight, clip_norm, optimizer)

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
        return dict(self._recipe.evaluations.results)

    def report(self, **metrics: Tensor | float) -> None:
        if not self._rehearsing and not self.holder.is_behind:
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
        return self.holder.has_state and not self.holder.is_behind and self.rank == 0

    @property
    def micro_batch_size(self) -> int:
        return self._hand.size

    @property
    def activity(self) -> tuple[Doing, float]:
        """The training thread's activity, and its duration in seconds."""
        doing, since_s = self._activity.report
        return ("update" if self.holder.is_updating else doing), since_s

    @property
    def membership(self) -> Membership | None:
        """None without a controller."""
        return self._membership

    @property
    def took_batches(self) -> bool:
        return self._recipe.took_batches

    @property
    def step_count(self) -> int:
        return self.holder.step

    @property
    def epoch(self) -> int:
        return self.holder.loader.epoch if self.took_batches else 0

    @property
    def lr(self) -> float:
        return self._recipe.rate.at(self.step_count, self.holder.fraction)

    @property
    def step_share(self) -> StepShare:
        """This worker's part of the step in flight, or of the rehearsed one."""
        batch, ranks, rank = self.holder.global_batch, self.world_size, self.rank
        step = self.holder.loader.planned_samples
        if self._rehearsing and not self._recipe.batches.has_batch_sampler:
            ranks = 1 if self._elastic is None else self._elastic.rehearsal_size
            step = batch
        total = self.holder.loader.samples_total
        return StepShare(
            micro_batch=self._hand.size,
            own=share(step, ranks, rank)[1],
            step=step,
            batch_size=batch,
            num_workers=ranks,
            epoch=None if total is None else total // self._recipe.batches.epochs,
        )

    # -- generations -----------------------------------------------------------------------

    @property
    def _group(self) -> Group | None:
        return self._loop.group

    def _rehearse(self) -> Iterator[Any]:
        """Run one step on a real batch, undo its effects, and make the step engine."""
        rehearsal = Rehearsal(self.holder.state)
        size = 1 if self._elastic is None else self._elastic.rehearsal_size
        _, rehearsed = share(self.holder.global_batch, size, 0)
        ranks = size if self._recipe.batches.has_batch_sampler else 1
        self.holder.loader.place(
            self.holder.loader.position, 0, ranks, rehearsed, self.holder.micro_limit
        )
        self._activity.enter("data")
        micro = next(iter(self.holder.loader.feed()))
        self._activity.enter("script")
        self._rehearsing = True
        yield from self._hand.give(micro)
        self._rehearsing = False
        self.holder.make_engine(rehearsal.undo(), in_turns=self._in_turns)

    def _rehearse_update(self, loss: Tensor, optimizer: Optimizer | None) -> None:
        everything = self.holder.state.optimizer
        if optimizer is not None:
            Updates(members_of(everything)).index_of(optimizer)
        loss.backward()
        refuse_sparse(self.holder.state.model)
        refuse_curved_hooks(self.holder.state.model)
        (optimizer or everything).step()
        if self._in_turns:
            everything.zero_grad()

    def leave_loop(self) -> None:
        """If the script left its loop early (`break`, `return`, an exception), report it and save.
        The script may change the weights now, so rank 0 copies them at once and writes the copy in
        the background."""
        was_in_loop, self._in_loop = self._in_loop, False
        if self._membership is None or self.holder.committed_step is None or not was_in_loop:
            return
        self._activity.enter("after")
        self._membership.report_left_loop(self.step_count)
        self.holder.undo_step()
        self._publish(force=True)
        if self.rank == 0:
            self.saver.save_on_leave(self.holder.state, self.holder.scalars(), self.generation)

    def outlive(self) -> None:
        """After the script raised: save this worker's state on request, until it is stopped."""
        self._in_loop = False
        if self._membership is not None:
            self._membership.outlive(self.holder)

    def _rejoin(self, error: str) -> None:
        assert self._membership is not None
        self.holder.in_step = False
        self._membership.leave(self.step_count, error)
        self._join()

    def _join(self) -> None:
        assert self._membership is not None
        try:
            agreed = self._membership.join_next(self.holder)
        except LeaveLoop:
            self._in_loop = False
            raise
        self._workers_of_nodes = agreed.workers_of_nodes
        self.holder.set_global_batch(agreed.global_batch_size or self._recipe.rate.base_batch)
        self._place()
        if not self._spec.reproducible:
            seed_everything(mix(self._spec.seed, self.generation, self.rank))

    def _place(self) -> None:
        self.holder.place(self.rank, self.world_size)
        self._loop.is_replaced = True

    def _evaluate_if_due(self) -> None:
        """Make the evaluations that are due after the last step, again after a failure."""
        holder, evaluations = self.holder, self._recipe.evaluations
        while due := holder.due_evaluations:
            self._activity.enter("script")
            try:
                made = evaluations.make(due, self._recipe.modules, self._group, holder.step)
            except CollectiveFailed as failure:
                self._rejoin(str(failure))
                continue
            self._reporter.note(made)
            holder.engine.meter.restart()

    def _pass_fence(self) -> bool:
        """Wait until all ranks have the last step; return whether this rank may leave the loop."""
        heard = self._meet(float(self._loop.heard_of_next()))
        if heard is not None and heard > 0:
            self._rejoin("")
        return heard == 0.0

    def _save_last(self) -> bool:
        """Save on rank 0; return success. The others wait: if rank 0 dies, another one saves."""
        self._publish(force=True)
        if self.rank == 0:
            self._activity.enter("saving")
            self.saver.save_final(self.holder.state, self.holder.scalars(), self.generation)
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

    # -- progress ----------------------------------------------------------------------------

    def _publish(self, *, force: bool = False) -> None:
        if self.rank != 0 or not (force or self._reporter.is_due()):
            return
        self._reporter.report(
            self.holder.engine,
            self.holder.loader,
            self._recipe.rate,
            generation=self.generation,
            workers_of_nodes=self._workers_of_nodes,
            global_batch_size=self.holder.global_batch,
            micro_batches=self.holder.cut(self.rank, self.world_size),
            largest_micro_batch=self.holder.micro_limit,
            lr=self.lr,
        )
