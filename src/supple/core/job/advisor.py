"""The only place a running job's count or batch is changed without a person:
`advise(state, event, now) -> (state, events)`.

A schedule, a person's choice, the pauses of resizes and the progress of training come in as
events; requests for another count or another batch go out as events, for the lifecycle. It asks
again at most every few seconds, and only after enough steps of the current generation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from supple.core.hardware import lookup
from supple.core.job.advice import Advice, better_batch, better_count
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.measured import ScriptMeasurements, job_view
from supple.core.planning.planner import plan
from supple.core.planning.view import JobView
from supple.core.spec import Limits, Objective, TrainSpec
from supple.core.training.goodput import family_of
from supple.core.training.measurements import (
    CollectiveMeasurement,
    ContradictoryMeasurements,
    StepMeasurement,
    configuration,
)
from supple.core.training.throughput import fit
from supple.core.types import (
    BatchChanged,
    Event,
    GroupFormed,
    Infeasible,
    JobId,
    NodeReported,
    Noticed,
    Progress,
    ProgressMade,
    ResizeAsked,
    TargetChanged,
    Ticked,
    WorkerStopped,
)
from supple.core.words import in_words

_EVERY_S = 5.0
_MIN_STEPS = 20
"""Steps of one generation before its step time is believed."""
_UNMEASURED_PAUSE_S = 1.0
"""What a resize is taken to cost before the first was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvisorState:
    """What advice to one job depends on."""

    spec: TrainSpec
    may_resize: bool
    """False where a schedule or a person decides the count, or there is one count only."""
    due: tuple[tuple[float, int], ...]
    """What is left of the schedule."""
    started_at: float
    earlier: tuple[StepMeasurement, ...] = ()
    collectives: tuple[CollectiveMeasurement, ...] = ()
    """What `supple plan` measured of the same script on the same machine."""
    measured: Mapping[tuple[int, ...], StepMeasurement] = field(
        default_factory=dict[tuple[int, ...], StepMeasurement]
    )
    """The newest of this run for every configuration."""
    pause_s: float = _UNMEASURED_PAUSE_S
    running_since: float | None = None
    stopped_since: float | None = None
    """When the first worker stopped for a generation that has not formed yet."""
    asked_at: float = 0.0
    generation: int = -1
    first_step: int = 0
    wanted: tuple[int, int] | None = None
    """(generation, count) of the last request: it stands until a generation answers it."""
    worker_s: float = 0.0
    """Worker-seconds used so far."""
    counted_at: float | None = None
    is_feasible: bool = True
    """Whether the deadline or the budget could be kept when that was last looked at."""


def start(
    spec: TrainSpec, now: float, known: ScriptMeasurements | None = None
) -> tuple[AdvisorState, int, str]:
    """(the state, how many workers to start, why): by the schedule; else, with an objective, by the
    plan from what is `known` of the script; else MIN."""
    may_resize = not spec.schedule and spec.min_workers < spec.max_workers
    state = AdvisorState(
        spec=spec,
        may_resize=may_resize,
        due=tuple(entry for entry in spec.schedule if entry[0] > 0),
        started_at=now,
        earlier=known.steps if known else (),
        collectives=known.collectives if known else (),
    )
    first = [count for at_s, count in spec.schedule if at_s == 0.0]
    if first:
        return state, first[0], "the schedule says so"
    if may_resize and known is not None and spec.objective is not None:
        view = job_view(
            known,
            interconnect=spec.interconnect,
            workers_per_node=spec.workers_per_node or spec.max_workers,
            lr_rule=spec.lr_rule,
        )
        count, why = _first_count(view, _limits(spec), spec.objective)
        if count is not None:
            return state, count, f"by what `supple plan` measured, {why}"
    return state, spec.min_workers, ""


def _first_count(view: JobView, limits: Limits, objective: Objective) -> tuple[int | None, str]:
    """The count that the plan recommends, or that comes nearest to the objective; None where it has
    no row."""
    found = plan(view, limits, objective)
    if not isinstance(found, Infeasible):
        return found.choice.num_workers, found.reason
    table = plan(view, limits, Objective())
    if isinstance(table, Infeasible):
        return None, ""
    if objective.deadline_s is not None:
        best = min(table.rows, key=lambda row: row.time_to_end_s.high)
        return best.num_workers, f"the fastest, for {found}"
    best = min(table.rows, key=lambda row: row.accelerator_hours.high)
    return best.num_workers, f"the cheapest, for {found}"


def advise(state: AdvisorState, event: Event, now: float) -> tuple[AdvisorState, tuple[Event, ...]]:
    """The state after `event`, and what to ask the lifecycle for. Total: any event has an
    answer."""
    match event:
        case NodeReported():
            wishes: tuple[Event, ...] = ()
            for one in event.events:
                state, more = advise(state, one, now)
                wishes += more
            return state, wishes
        case WorkerStopped():
            return replace(state, stopped_since=state.stopped_since or now), ()
        case GroupFormed():
            return _formed(state, now), ()
        case Ticked():
            return _on_schedule(state, now)
        case ResizeAsked():
            wish = _wish(state, event.num_workers, event.reason)
            return replace(state, may_resize=False), (wish,)
        case ProgressMade():
            return _on_progress(state, event.progress, now)
        case _:
            return state, ()


def _formed(state: AdvisorState, now: float) -> AdvisorState:
    began = state.stopped_since
    return replace(
        state,
        running_since=now if state.running_since is None else state.running_since,
        counted_at=now if state.counted_at is None else state.counted_at,
        pause_s=state.pause_s if began is None else now - began,
        stopped_since=None,
    )


def _on_schedule(state: AdvisorState, now: float) -> tuple[AdvisorState, tuple[Event, ...]]:
    since = state.running_since
    if since is None or not state.due or now - since < state.due[0][0]:
        return state, ()
    (at_s, count), *rest = state.due
    reason = f"the schedule says {in_words(count)} from {at_s:g} s on"
    return replace(state, due=tuple(rest)), (_wish(state, count, reason),)


def _on_progress(
    state: AdvisorState, progress: Progress, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Note the measurement; at times, ask for another count, or else for another batch."""
    held_s = 0.0 if state.counted_at is None else now - state.counted_at
    state = replace(state, worker_s=state.worker_s + held_s * progress.num_workers, counted_at=now)
    if progress.generation != state.generation:
        return replace(state, generation=progress.generation, first_step=progress.step), ()
    decides = state.may_resize or state.spec.batch == "adaptive"
    if not decides or progress.step - state.first_step < _MIN_STEPS or progress.step_time_s <= 0:
        return state, ()
    newest = _measurement(progress)
    measured = {**state.measured, configuration(newest): newest}
    state = replace(state, measured=measured)
    if now - state.asked_at < _EVERY_S or progress.samples_total is None:
        return state, ()
    state = replace(state, asked_at=now)
    try:
        view = _view(state, progress, progress.samples_total)
    except ContradictoryMeasurements:
        # The machine was busy for a while: what is newest counts, and is asked again.
        only = {configuration(newest): newest}
        return replace(state, measured=only, earlier=(), collectives=()), ()
    return _ask(state, view, progress, progress.samples_total - progress.samples_done, now)


def _ask(
    state: AdvisorState, view: JobView, progress: Progress, remaining: int, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """At most one request, and a word where the objective is lost or found again."""
    job_id, limits = JobId(state.spec.name), _limits(state.spec)
    told: tuple[Event, ...] = ()
    if state.may_resize:
        found = better_count(
            view,
            limits,
            _objective_left(state, now),
            current_workers=progress.num_workers,
            remaining_samples=remaining,
            resize_cost_s=state.pause_s,
        )
        if found.is_feasible != state.is_feasible:
            state = replace(state, is_feasible=found.is_feasible)
            text = _feasibility(found, state, now)
            told = (Noticed(job_id=job_id, generation=0, text=text),)
        wanted = (progress.generation, found.value)
        if found.value != progress.num_workers and wanted != state.wanted:
            state = replace(state, wanted=wanted)
            return state, (*told, _wish(state, found.value, found.reason))
    batch = better_batch(
        view,
        limits,
        current_workers=progress.num_workers,
        current_batch=progress.global_batch_size,
        remaining_samples=remaining,
        resize_cost_s=state.pause_s,
    )
    if batch.value == progress.global_batch_size:
        return state, told
    change = BatchChanged(
        job_id=job_id, generation=0, global_batch_size=batch.value, reason=batch.reason
    )
    return state, (*told, change)


def _feasibility(found: Advice, state: AdvisorState, now: float) -> str:
    if found.is_feasible:
        return f"the objective can be met again: {found.reason}"
    asked, spent_s = state.spec.objective or Objective(), now - state.started_at
    if asked.deadline_s is not None and spent_s >= asked.deadline_s:
        late_s = spent_s - asked.deadline_s
        return (
            f"the deadline of {asked.deadline_s:g} s passed {late_s:.0f} s ago: training goes on "
            "as fast as it can"
        )
    return f"the objective can no longer be met: {found.objection}"


def _objective_left(state: AdvisorState, now: float) -> Objective:
    """What is left of the deadline, or of the budget."""
    asked, least = state.spec.objective or Objective(), 1e-3
    if asked.deadline_s is not None:
        return Objective(deadline_s=max(least, asked.deadline_s - (now - state.started_at)))
    if asked.budget is not None:
        hours = state.worker_s / 3600.0
        return Objective(
            budget=max(least, asked.budget - hours * (state.spec.price_per_hour or 1.0))
        )
    return asked


def _wish(state: AdvisorState, count: int, reason: str) -> TargetChanged:
    return TargetChanged(
        job_id=JobId(state.spec.name), generation=0, num_workers=count, reason=reason
    )


def _limits(spec: TrainSpec) -> Limits:
    return Limits(
        min_workers=spec.min_workers,
        max_workers=spec.max_workers,
        price_per_hour=spec.price_per_hour,
        batch=spec.batch,
    )


def _view(state: AdvisorState, progress: Progress, samples_total: int) -> JobView:
    spec = state.spec
    earlier = [step for step in state.earlier if configuration(step) not in state.measured]
    per_node = spec.workers_per_node or spec.max_workers
    if progress.num_nodes > 1:
        per_node = progress.most_per_node
    return JobView(
        cost=DataParallel(
            step_time=fit(
                [*earlier, *state.measured.values()],
                state.collectives,
                gradient_bytes=progress.gradient_bytes,
                link=lookup(spec.interconnect),
                local_link=lookup("loopback"),
                workers_per_node=per_node,
            ),
            script_batch_size=progress.base_batch_size,
        ),
        noise_scale=progress.noise_scale,
        dataset_size=max(1, samples_total // progress.num_epochs),
        epochs=progress.num_epochs,
        base_batch_size=progress.base_batch_size,
        base_lr=progress.base_lr,
        optimizer_family=family_of(progress.optimizer),
        lr_rule=spec.lr_rule,
    )


def _measurement(progress: Progress) -> StepMeasurement:
    return StepMeasurement(
        num_workers=progress.num_workers,
        num_nodes=progress.num_nodes,
        most_per_node=progress.most_per_node,
        micro_batch_size=progress.micro_batch_size,
        num_accumulation_steps=progress.num_accumulation_steps,
        forward_s=progress.forward_time_s,
        backward_s=progress.backward_time_s,
        optimizer_s=progress.optimizer_time_s,
        data_s=progress.data_time_s,
        sync_s=progress.sync_time_s if progress.num_workers > 1 else 0.0,
        step_time_s=progress.step_time_s,
    )
