"""Choose the worker count and batch size of a running job: `advise(state, event, now) -> (state,
events)`. Automatic changes are made nowhere else.

Input events: the schedule, `supple resize`, the pauses of resizes, the progress of training. Output
events: requests to the lifecycle for another count or batch, at most one every `_EVERY_S` seconds
and only after `_MIN_STEPS` steps of the current generation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from supple.core.hardware import lookup
from supple.core.job.advice import Advice, better_batch, better_count
from supple.core.job.evidence import LEAST_S, Seen, record
from supple.core.planning.data_parallel import DataParallel
from supple.core.planning.measured import ScriptMeasurements, job_view
from supple.core.planning.planner import plan
from supple.core.planning.view import JobView
from supple.core.spec import Limits, Objective, TrainSpec
from supple.core.training.goodput import family_of
from supple.core.training.loop_time import LoopTime
from supple.core.training.measurements import (
    CollectiveMeasurement,
    Configuration,
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
"""Shortest time between two evaluations of the count and the batch, in s."""
_MIN_STEPS = 20
"""Fewest steps of a generation before its step time is used."""
_LOOKS = 3
"""Consecutive evaluations with the same result before a change of feasibility is reported."""
_UNMEASURED_PAUSE_S = 1.0
"""Assumed pause of a resize, in s, before the first is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvisorState:
    """State of the advisor of one job."""

    spec: TrainSpec
    may_resize: bool
    """False where a schedule or a person sets the count, or where only one count is allowed."""
    due: tuple[tuple[float, int], ...]
    """Remaining entries (seconds, workers) of the schedule."""
    started_at: float
    earlier: tuple[StepMeasurement, ...] = ()
    collectives: tuple[CollectiveMeasurement, ...] = ()
    """Measurements of `supple plan` for the same script on the same machine, as `earlier` is."""
    measured: Mapping[Configuration, StepMeasurement] = field(
        default_factory=dict[Configuration, StepMeasurement]
    )
    """The newest measurement of this run for every configuration."""
    seen: Mapping[Configuration, Seen] = field(default_factory=dict[Configuration, Seen])
    """How long every configuration of `measured` was measured."""
    pause_s: float = _UNMEASURED_PAUSE_S
    formed: int = 0
    """The newest generation that a member has formed."""
    running_since: float | None = None
    stopped_since: float | None = None
    """When the first worker stopped for a generation that has not formed yet."""
    evaluated_at: float = 0.0
    generation: int = -1
    first_step: int = 0
    began_at: float = 0.0
    """When the generation's first progress was reported."""
    wanted: tuple[int, int] | None = None
    """(generation, count) of the last request, valid until the next generation."""
    held: int = 0
    """Workers that run or are starting."""
    worker_s: float = 0.0
    """Worker-seconds used so far."""
    counted_at: float = 0.0
    is_feasible: bool = True
    """Whether the deadline or the budget can be met, as last reported."""
    looks: int = 0
    """Consecutive evaluations with the opposite result."""


def start(
    spec: TrainSpec, now: float, known: ScriptMeasurements | None = None
) -> tuple[AdvisorState, int, str]:
    """Return the initial state, the number of workers to start, and the reason. The number comes
    from the schedule; else, with an objective, from a plan by the `known` measurements; else it is
    MIN."""
    may_resize = not spec.schedule and spec.min_workers < spec.max_workers
    state = AdvisorState(
        spec=spec,
        may_resize=may_resize,
        due=tuple(entry for entry in spec.schedule if entry[0] > 0),
        started_at=now,
        counted_at=now,
        earlier=known.steps if known else (),
        collectives=known.collectives if known else (),
    )
    count, reason = _initial_count(state, known)
    return replace(state, held=count), count, reason


def _initial_count(state: AdvisorState, known: ScriptMeasurements | None) -> tuple[int, str]:
    spec = state.spec
    first = [count for at_s, count in spec.schedule if at_s == 0.0]
    if first:
        return first[0], "by the schedule"
    if state.may_resize and known is not None and spec.objective is not None:
        try:
            view = job_view(
                known,
                interconnect=spec.interconnect,
                workers_per_node=spec.workers_per_node or spec.max_workers,
                lr_rule=spec.lr_rule,
            )
        except ValueError:
            return (
                spec.min_workers,
                "the measurements of `supple plan` are contradictory or damaged",
            )
        count, why = _first_count(view, _limits(spec), spec.objective)
        if count is not None:
            return count, f"by the measurements of `supple plan`, {why}"
    return spec.min_workers, ""


def _first_count(view: JobView, limits: Limits, objective: Objective) -> tuple[int | None, str]:
    """Return the count that the plan recommends, or the nearest to the objective, and the reason;
    None where the plan has no rows."""
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
    """Return the state after `event`, and the requests to the lifecycle. Defined for all events."""
    match event:
        case NodeReported():
            requests: tuple[Event, ...] = ()
            for one in event.events:
                state, more = advise(state, one, now)
                requests += more
            return state, requests
        case WorkerStopped():
            if event.generation < state.formed:
                return state, ()  # a late report
            return replace(state, stopped_since=state.stopped_since or now), ()
        case GroupFormed():
            return _formed(state, event.generation, now), ()
        case Ticked():
            return _on_schedule(state, now)
        case ResizeAsked():
            request = _request(state, event.num_workers, event.reason)
            held = max(state.held, event.num_workers)
            return replace(state, may_resize=False, held=held), (request,)
        case ProgressMade():
            return _on_progress(state, event.progress, now)
        case _:
            return state, ()


def _formed(state: AdvisorState, generation: int, now: float) -> AdvisorState:
    began = state.stopped_since
    return replace(
        state,
        formed=max(state.formed, generation),
        running_since=now if state.running_since is None else state.running_since,
        pause_s=state.pause_s if began is None else now - began,
        stopped_since=None,
    )


def _on_schedule(state: AdvisorState, now: float) -> tuple[AdvisorState, tuple[Event, ...]]:
    since = state.running_since
    if since is None or not state.due or now - since < state.due[0][0]:
        return state, ()
    (at_s, count), *rest = state.due
    reason = f"the schedule sets {in_words(count)} from {at_s:g} s on"
    return replace(state, due=tuple(rest)), (_request(state, count, reason),)


def _on_progress(
    state: AdvisorState, progress: Progress, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Record the measurement; if due, request another count, or else another batch."""
    used_s = (now - state.counted_at) * max(progress.num_workers, state.held)
    state = replace(state, worker_s=state.worker_s + used_s, counted_at=now)
    if progress.generation != state.generation:
        first = progress.step
        state = replace(state, generation=progress.generation, first_step=first, wanted=None)
        return replace(state, held=progress.num_workers, began_at=now), ()
    decides = state.may_resize or state.spec.batch == "adaptive"
    if not decides or progress.step - state.first_step < _MIN_STEPS or progress.step_time_s <= 0:
        return state, ()
    newest = _measurement(state.spec, progress)
    state = _record(state, newest, now)
    if now - state.evaluated_at < _EVERY_S:
        return state, ()
    state = replace(state, evaluated_at=now)
    remaining = _remaining(state.spec, progress)
    if remaining is None:
        return _report_unknown(state)
    if remaining <= 0:
        return state, ()
    try:
        view = _view(state, progress, remaining)
    except ValueError:
        # Contradictory measurements, from a busy machine: keep only the newest one.
        key = configuration(newest)
        state = replace(state, measured={key: newest}, seen={key: state.seen[key]})
        return replace(state, earlier=(), collectives=()), ()
    return _evaluate(state, view, progress, remaining, now)


def _record(state: AdvisorState, newest: StepMeasurement, now: float) -> AdvisorState:
    measured, seen = record(
        state.measured,
        state.seen,
        newest,
        generation=state.generation,
        began_at=state.began_at,
        now=now,
    )
    return replace(state, measured=measured, seen=seen)


def _remaining(spec: TrainSpec, progress: Progress) -> int | None:
    """Samples left in the data, or until --max-steps if that is sooner; None if unknown."""
    left: list[int] = []
    if progress.samples_total is not None:
        left.append(progress.samples_total - progress.samples_done)
    if spec.max_steps is not None:
        left.append((spec.max_steps - progress.step) * progress.global_batch_size)
    return min(left, default=None)


def _report_unknown(state: AdvisorState) -> tuple[AdvisorState, tuple[Event, ...]]:
    if state.spec.objective is None or not state.is_feasible:
        return state, ()
    text = (
        "the length of the data is unknown until it has been read once, so it is also unknown "
        "whether the objective can be met: the count stays. Give --max-steps, or shards with a "
        "length"
    )
    notice = Noticed(job_id=JobId(state.spec.name), generation=0, text=text)
    return replace(state, is_feasible=False), (notice,)


def _evaluate(
    state: AdvisorState, view: JobView, progress: Progress, remaining: int, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Return at most one request, and a notice where the feasibility of the objective changes."""
    job_id, limits = JobId(state.spec.name), _limits(state.spec)
    notices: tuple[Event, ...] = ()
    if state.may_resize:
        found = better_count(
            view,
            limits,
            _objective_left(state, now),
            current_workers=progress.num_workers,
            remaining_samples=remaining,
            resize_cost_s=state.pause_s,
        )
        state, notices = _note_feasibility(state, found, now)
        wanted = (progress.generation, found.value)
        standing = progress.num_workers if state.wanted is None else state.wanted[1]
        is_known = now - state.began_at >= LEAST_S or not _may_wait(state, found, progress)
        if found.value != standing and is_known:
            held = max(progress.num_workers, found.value)
            state = replace(state, wanted=wanted, held=held)
            return state, (*notices, _request(state, found.value, found.reason))
    batch = better_batch(
        view,
        limits,
        current_workers=progress.num_workers,
        current_batch=progress.global_batch_size,
        remaining_samples=remaining,
        resize_cost_s=state.pause_s,
    )
    if batch.value == progress.global_batch_size:
        return state, notices
    change = BatchChanged(
        job_id=job_id, generation=0, global_batch_size=batch.value, reason=batch.reason
    )
    return state, (*notices, change)


def _may_wait(state: AdvisorState, found: Advice, progress: Progress) -> bool:
    """Whether the advice is to give up a count for its speed: that is decided after `LEAST_S`, as
    the first seconds of a count may be those of a busy machine."""
    within = state.spec.min_workers <= progress.num_workers <= state.spec.max_workers
    return within and found.value < progress.num_workers


def _note_feasibility(
    state: AdvisorState, found: Advice, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Report a change of the objective's feasibility after `_LOOKS` equal evaluations in a row."""
    if found.objection is None or (not found.objection) == state.is_feasible:
        return replace(state, looks=0), ()
    if state.looks + 1 < _LOOKS:
        return replace(state, looks=state.looks + 1), ()
    objective, spent_s = state.spec.objective or Objective(), now - state.started_at
    if not found.objection:
        text = f"the objective can be met again: {found.reason}"
    elif objective.deadline_s is not None and spent_s >= objective.deadline_s:
        text = (
            f"the deadline of {objective.deadline_s:g} s passed "
            f"{spent_s - objective.deadline_s:.0f} s ago: training goes on as fast as it can"
        )
    else:
        text = f"the objective can no longer be met: {found.objection}"
    notice = Noticed(job_id=JobId(state.spec.name), generation=0, text=text)
    return replace(state, is_feasible=not found.objection, looks=0), (notice,)


def _objective_left(state: AdvisorState, now: float) -> Objective:
    """The objective with the remaining time or budget."""
    objective, least = state.spec.objective or Objective(), 1e-3
    if objective.deadline_s is not None:
        return Objective(deadline_s=max(least, objective.deadline_s - (now - state.started_at)))
    if objective.budget is not None:
        hours = state.worker_s / 3600.0
        return Objective(
            budget=max(least, objective.budget - hours * (state.spec.price_per_hour or 1.0))
        )
    return objective


def _request(state: AdvisorState, count: int, reason: str) -> TargetChanged:
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


def _view(state: AdvisorState, progress: Progress, remaining: int) -> JobView:
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
            largest_micro_batch=progress.largest_micro_batch,
        ),
        noise_scale=progress.noise_scale,
        dataset_size=max(1, (progress.samples_total or remaining) // progress.num_epochs),
        epochs=progress.num_epochs,
        base_batch_size=progress.base_batch_size,
        base_lr=progress.base_lr,
        optimizer_family=family_of(progress.optimizer),
        lr_rule=spec.lr_rule,
        loop=LoopTime(every_s=progress.loop_time_s),
    )


def _measurement(spec: TrainSpec, progress: Progress) -> StepMeasurement:
    micro, accumulation = progress.micro_batch_size, progress.num_accumulation_steps
    if spec.reproducible:
        # Logical shards do not depend on the count; the planner cuts by the largest micro-batch.
        share = -(-progress.global_batch_size // progress.num_workers)
        accumulation = -(-share // progress.largest_micro_batch)
        micro = -(-share // accumulation)
    return StepMeasurement(
        num_workers=progress.num_workers,
        num_nodes=progress.num_nodes,
        most_per_node=progress.most_per_node,
        micro_batch_size=micro,
        num_accumulation_steps=accumulation,
        forward_s=progress.forward_time_s,
        backward_s=progress.backward_time_s,
        optimizer_s=progress.optimizer_time_s,
        data_s=progress.data_time_s,
        sync_s=progress.sync_time_s if progress.num_workers > 1 else 0.0,
        step_time_s=progress.step_time_s,
    )
