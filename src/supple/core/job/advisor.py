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
_LOOKS = 3
"""Looks in a row that find the objective lost, or found again, before that is said."""
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
    formed: int = 0
    """The newest generation of which a member has formed."""
    running_since: float | None = None
    stopped_since: float | None = None
    """When the first worker stopped for a generation that has not formed yet."""
    asked_at: float = 0.0
    generation: int = -1
    first_step: int = 0
    wanted: tuple[int, int] | None = None
    """(generation, count) of the last request: it stands until a generation answers it."""
    held: int = 0
    """Workers that are there, or on their way."""
    worker_s: float = 0.0
    """Worker-seconds used so far."""
    counted_at: float = 0.0
    is_feasible: bool = True
    """Whether the deadline or the budget can be kept, as far as was said."""
    looks: int = 0
    """Looks in a row that found the opposite."""


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
        counted_at=now,
        earlier=known.steps if known else (),
        collectives=known.collectives if known else (),
    )
    count, reason = _beginning(state, known)
    return replace(state, held=count), count, reason


def _beginning(state: AdvisorState, known: ScriptMeasurements | None) -> tuple[int, str]:
    spec = state.spec
    first = [count for at_s, count in spec.schedule if at_s == 0.0]
    if first:
        return first[0], "the schedule says so"
    if state.may_resize and known is not None and spec.objective is not None:
        try:
            view = job_view(
                known,
                interconnect=spec.interconnect,
                workers_per_node=spec.workers_per_node or spec.max_workers,
                lr_rule=spec.lr_rule,
            )
        except ValueError:
            return spec.min_workers, "what `supple plan` measured contradicts itself, or is damaged"
        count, why = _first_count(view, _limits(spec), spec.objective)
        if count is not None:
            return count, f"by what `supple plan` measured, {why}"
    return spec.min_workers, ""


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
            if event.generation < state.formed:
                return state, ()  # it was late to say so
            return replace(state, stopped_since=state.stopped_since or now), ()
        case GroupFormed():
            return _formed(state, event.generation, now), ()
        case Ticked():
            return _on_schedule(state, now)
        case ResizeAsked():
            wish = _wish(state, event.num_workers, event.reason)
            held = max(state.held, event.num_workers)
            return replace(state, may_resize=False, held=held), (wish,)
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
    reason = f"the schedule says {in_words(count)} from {at_s:g} s on"
    return replace(state, due=tuple(rest)), (_wish(state, count, reason),)


def _on_progress(
    state: AdvisorState, progress: Progress, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Note the measurement; at times, ask for another count, or else for another batch."""
    used_s = (now - state.counted_at) * max(progress.num_workers, state.held)
    state = replace(state, worker_s=state.worker_s + used_s, counted_at=now)
    if progress.generation != state.generation:
        first = progress.step
        state = replace(state, generation=progress.generation, first_step=first, wanted=None)
        return replace(state, held=progress.num_workers), ()
    decides = state.may_resize or state.spec.batch == "adaptive"
    if not decides or progress.step - state.first_step < _MIN_STEPS or progress.step_time_s <= 0:
        return state, ()
    newest = _measurement(state.spec, progress)
    measured = {**state.measured, configuration(newest): newest}
    state = replace(state, measured=measured)
    if now - state.asked_at < _EVERY_S:
        return state, ()
    state = replace(state, asked_at=now)
    remaining = _remaining(state.spec, progress)
    if remaining is None:
        return _say_unknown(state)
    if remaining <= 0:
        return state, ()
    try:
        view = _view(state, progress, remaining)
    except ValueError:
        # The machine was busy for a while: what is newest counts, and is asked again.
        only = {configuration(newest): newest}
        return replace(state, measured=only, earlier=(), collectives=()), ()
    return _ask(state, view, progress, remaining, now)


def _remaining(spec: TrainSpec, progress: Progress) -> int | None:
    """Samples left: of the data, or of --max-steps where that comes first; None: unknown."""
    left: list[int] = []
    if progress.samples_total is not None:
        left.append(progress.samples_total - progress.samples_done)
    if spec.max_steps is not None:
        left.append((spec.max_steps - progress.step) * progress.global_batch_size)
    return min(left, default=None)


def _say_unknown(state: AdvisorState) -> tuple[AdvisorState, tuple[Event, ...]]:
    if state.spec.objective is None or not state.is_feasible:
        return state, ()
    text = (
        "the length of the data is not known before it was read once, so whether the objective can "
        "be met is not known either: the count stays. Give --max-steps, or shards with a length"
    )
    notice = Noticed(job_id=JobId(state.spec.name), generation=0, text=text)
    return replace(state, is_feasible=False), (notice,)


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
        state, told = _note_feasibility(state, found, now)
        wanted = (progress.generation, found.value)
        standing = progress.num_workers if state.wanted is None else state.wanted[1]
        if found.value != standing:
            held = max(progress.num_workers, found.value)
            state = replace(state, wanted=wanted, held=held)
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


def _note_feasibility(
    state: AdvisorState, found: Advice, now: float
) -> tuple[AdvisorState, tuple[Event, ...]]:
    """Say that the objective is lost, or can be met again, when several looks agree."""
    if found.objection is None or (not found.objection) == state.is_feasible:
        return replace(state, looks=0), ()
    if state.looks + 1 < _LOOKS:
        return replace(state, looks=state.looks + 1), ()
    asked, spent_s = state.spec.objective or Objective(), now - state.started_at
    if not found.objection:
        text = f"the objective can be met again: {found.reason}"
    elif asked.deadline_s is not None and spent_s >= asked.deadline_s:
        text = (
            f"the deadline of {asked.deadline_s:g} s passed {spent_s - asked.deadline_s:.0f} s "
            "ago: training goes on as fast as it can"
        )
    else:
        text = f"the objective can no longer be met: {found.objection}"
    notice = Noticed(job_id=JobId(state.spec.name), generation=0, text=text)
    return replace(state, is_feasible=not found.objection, looks=0), (notice,)


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
    )


def _measurement(spec: TrainSpec, progress: Progress) -> StepMeasurement:
    micro, accumulation = progress.micro_batch_size, progress.num_accumulation_steps
    if spec.reproducible:
        # Logical shards keep their size at any count; the planner cuts by the largest micro-batch.
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
