"""The advisor turns progress into at most one request at a time, and knows when to keep quiet."""

import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from supple.core.job.advisor import AdvisorState, advise, start
from supple.core.planning.choice import PlanTable
from supple.core.planning.measured import ScriptMeasurements, job_view
from supple.core.planning.planner import plan
from supple.core.spec import Limits, Objective, TrainSpec
from supple.core.training.memory import MemoryMeasurement
from supple.core.types import (
    BatchChanged,
    Event,
    GroupFormed,
    JobId,
    Noticed,
    Progress,
    ProgressMade,
    ResizeAsked,
    TargetChanged,
    Ticked,
    WorkerId,
    WorkerStopped,
)
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured


def spec(**changes: Any) -> TrainSpec:
    fields = {"name": "job", "script": "train.py", "min_workers": 1, "max_workers": 4}
    return TrainSpec(**(fields | changes))


def progress(step: int, **changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "generation": 1,
        "step": step,
        "epoch": 0,
        "num_epochs": 10,
        "samples_done": step * 64,
        "samples_total": 10_000_000,
        "num_workers": 1,
        "global_batch_size": 64,
        "lr": 1e-3,
        "step_time_s": 0.2,
        "optimizer_time_s": 0.0,
        "sync_time_s": 0.0,
        "data_time_s": 0.0,
        "num_accumulation_steps": 1,
        "largest_micro_batch": 64,
        "num_nodes": 1,
        "noise_scale": None,
        "efficiency": None,
        "base_batch_size": 64,
        "base_lr": 1e-3,
        "optimizer": "AdamW",
        "gradient_bytes": 100_000,
    }
    fields |= changes
    compute_s = fields["step_time_s"] - fields["sync_time_s"] - fields["data_time_s"]
    workers, pieces = fields["num_workers"], fields["num_accumulation_steps"]
    of_it: dict[str, Any] = {
        "forward_time_s": max(1e-9, compute_s) / 3,
        "backward_time_s": max(1e-9, compute_s) * 2 / 3,
        "micro_batch_size": -(-fields["global_batch_size"] // (workers * pieces)),
        "most_per_node": -(-workers // fields["num_nodes"]),
    }
    return Progress(**(of_it | fields))


def begun(given: TrainSpec) -> AdvisorState:
    return start(given, 0.0)[0]


def told(state: AdvisorState, made: Progress, now: float) -> tuple[AdvisorState, list[Event]]:
    event = ProgressMade(job_id=JobId("job"), generation=made.generation, progress=made)
    state, events = advise(state, event, now)
    return state, list(events)


def asked(state: AdvisorState, **changes: Any) -> tuple[AdvisorState, list[Event]]:
    """The state after 60 s of ten steps a second, and everything that was asked for."""
    began = 100.0 * changes.get("generation", 1)
    found: list[Event] = []
    for step in range(600):
        state, events = told(state, progress(step, **changes), began + step / 10)
        found += events
    return state, found


def events_of(given: TrainSpec, **changes: Any) -> list[Event]:
    return asked(begun(given), **changes)[1]


def counts_of(events: Iterable[Event]) -> list[int]:
    return [event.num_workers for event in events if isinstance(event, TargetChanged)]


def test_a_job_of_long_steps_and_small_gradients_is_asked_to_grow_once_a_generation() -> None:
    state = begun(spec())
    for generation in (1, 2):
        state, events = asked(state, generation=generation)
        assert [type(event) for event in events] == [TargetChanged]
        assert counts_of(events) == [2]


def test_nothing_is_asked_before_twenty_steps_of_a_generation() -> None:
    state = begun(spec())
    for generation in range(1, 20):
        for step in range(20):
            now = 100.0 * generation + step
            state, events = told(state, progress(step, generation=generation), now)
            assert not events


def test_nothing_is_asked_of_a_run_whose_length_is_unknown() -> None:
    assert not events_of(spec(), samples_total=None)


def test_times_that_contradict_each_other_leave_the_newest_and_end_no_job() -> None:
    """One worker met a machine so busy that two seem to be a hundred times as fast."""
    state, events = asked(begun(spec()), generation=1, step_time_s=20.0)
    assert events
    _, events = asked(state, generation=2, num_workers=2, step_time_s=0.1)
    assert counts_of(events) == [4]


def test_a_count_that_a_person_or_a_schedule_chose_is_left_alone() -> None:
    wish = ResizeAsked(job_id=JobId("job"), generation=0, num_workers=3, reason="by hand")
    state, events = advise(begun(spec()), wish, 1.0)
    assert counts_of(events) == [3] and events[0].reason == "by hand"  # type: ignore[attr-defined]
    assert not asked(state)[1]
    assert not events_of(spec(schedule=((0.0, 1), (30.0, 2))))
    assert not events_of(spec(max_workers=1))


def test_an_adaptive_batch_is_asked_for_where_the_count_is_fixed() -> None:
    given = spec(min_workers=4, batch="adaptive")
    waiting = {"num_workers": 4, "sync_time_s": 0.15, "gradient_bytes": 40_000_000}
    assert not events_of(given, **waiting)
    events = events_of(given, noise_scale=1e6, **waiting)
    assert events
    for event in events:
        assert isinstance(event, BatchChanged)
        assert event.global_batch_size == 128
        assert "noise scale 1e+06 samples" in event.reason


def paused(state: AdvisorState, seconds: float) -> AdvisorState:
    """A resize whose first member stopped so long before the last had formed the next group."""
    for number, at_s in ((0, 10.0), (1, 10.0 + seconds / 2)):
        stopped = WorkerStopped(
            job_id=JobId("job"), generation=1, worker_id=WorkerId(f"w{number}"), step=5
        )
        state, _ = advise(state, stopped, at_s)
    formed = GroupFormed(job_id=JobId("job"), generation=2, worker_id=WorkerId("w0"), step=5)
    return advise(state, formed, 10.0 + seconds)[0]


def test_a_pause_that_was_measured_to_be_long_is_not_asked_for_near_the_end() -> None:
    near_the_end = {"samples_done": 9_998_000}
    assert events_of(spec(), **near_the_end)
    assert asked(paused(begun(spec()), 0.5), **near_the_end)[1]
    state = paused(begun(spec()), 60.0)
    assert state.pause_s == 60.0
    assert not asked(state, **near_the_end)[1]


def test_a_batch_that_is_accumulated_has_the_rate_that_was_measured_of_it() -> None:
    """1,024 samples in 1.6 s, as sixteen micro-batches of the script's 64."""
    grown = {
        "num_accumulation_steps": 16,
        "global_batch_size": 1024,
        "step_time_s": 1.6,
        "noise_scale": 1e9,
        "optimizer": "SGD",
    }
    (event,) = events_of(spec(batch="adaptive"), **grown)
    assert isinstance(event, TargetChanged)
    assert "640 at 1; saves" in event.reason


def test_a_job_that_waits_for_gradients_half_of_its_time_gives_workers_back() -> None:
    """By the wait: steps as long that are all compute are no reason to."""
    two = {"num_workers": 2, "gradient_bytes": 40_000_000}
    (event,) = events_of(spec(max_workers=2), sync_time_s=0.1, **two)
    assert isinstance(event, TargetChanged)
    assert event.num_workers == 1
    assert "320 at 2: the others add too little" in event.reason
    assert not events_of(spec(max_workers=2), sync_time_s=0.0, **two)


@pytest.mark.parametrize("part", ["sync_time_s", "data_time_s"])
def test_a_wait_far_longer_than_the_step_that_it_is_part_of_is_no_ground_to_ask(part: str) -> None:
    assert not events_of(spec(), num_workers=2, step_time_s=0.2, **{part: 0.5})


# --- the schedule, the start, an objective -------------------------------------------------------


def formed_at(state: AdvisorState, now: float) -> AdvisorState:
    event = GroupFormed(job_id=JobId("job"), generation=1, worker_id=WorkerId("w0"), step=0)
    return advise(state, event, now)[0]


def ticked(state: AdvisorState, now: float) -> tuple[AdvisorState, list[int]]:
    state, events = advise(state, Ticked(job_id=JobId("job"), generation=0), now)
    return state, counts_of(events)


def test_a_schedule_counts_from_the_first_group_and_asks_for_each_of_its_counts_once() -> None:
    state, initial, _ = start(spec(schedule=((0.0, 3), (10.0, 2), (20.0, 4))), 0.0)
    assert initial == 3
    state, early = ticked(state, 100.0)
    state = formed_at(state, 100.0)
    found = [early]
    for now in (109.9, 110.0, 111.0, 120.5, 130.0):
        state, counts = ticked(state, now)
        found.append(counts)
    assert found == [[], [], [2], [], [4], []]


MEASURED = ScriptMeasurements(
    steps=(*ALONE, measured(2, 32)),
    collectives=(),
    memory=(MemoryMeasurement(micro_batch_size=32, peak_bytes=10**9),),
    noise_scale=None,
    startups_s=(2.0, 3.0),
    gradient_bytes=GRADIENT_BYTES,
    dataset_size=100_000,
    epochs=10,
    base_batch_size=256,
    largest_micro_batch=None,
    base_lr=1e-3,
    optimizer_name="AdamW",
    device_memory_bytes=8 * 10**9,
)


@pytest.mark.parametrize("objective", [Objective(), Objective(deadline_s=700.0)])
def test_a_job_with_an_objective_begins_with_the_count_that_the_plan_recommends(
    objective: Objective,
) -> None:
    view = job_view(MEASURED, interconnect="ethernet-25", workers_per_node=8, lr_rule="auto")
    planned = plan(view, Limits(max_workers=8), objective)
    assert isinstance(planned, PlanTable)
    given = spec(max_workers=8, workers_per_node=8, objective=objective)
    _, initial, why = start(given, 0.0, MEASURED)
    assert initial == planned.choice.num_workers > 1
    assert planned.reason in why
    assert start(replace(given, objective=None), 0.0, MEASURED)[1] == 1, "nobody asked"
    assert start(given, 0.0)[1] == 1, "nothing is known"


def test_a_job_whose_objective_the_plan_cannot_keep_begins_with_what_comes_nearest() -> None:
    view = job_view(MEASURED, interconnect="ethernet-25", workers_per_node=8, lr_rule="auto")
    table = plan(view, Limits(max_workers=8), Objective())
    assert isinstance(table, PlanTable)
    fastest = min(table.rows, key=lambda row: row.time_to_end_s.high).num_workers
    given = spec(max_workers=8, workers_per_node=8, objective=Objective(deadline_s=1.0))
    _, initial, why = start(given, 0.0, MEASURED)
    assert initial == fastest and "the fastest, for the end within 1.0 s" in why
    poor = replace(given, objective=Objective(budget=1e-6))
    _, initial, why = start(poor, 0.0, MEASURED)
    assert initial == 1 and "the cheapest, for the end for a budget of" in why


@pytest.mark.parametrize("step_time_s", [-1.0, math.nan, 1e9])
def test_a_kept_measurement_that_cannot_be_ends_no_job_before_it_begins(step_time_s: float) -> None:
    odd = replace(MEASURED.steps[0], step_time_s=step_time_s)
    damaged = replace(MEASURED, steps=(odd, *MEASURED.steps[1:]))
    given = spec(max_workers=8, workers_per_node=8, objective=Objective())
    _, initial, why = start(given, 0.0, damaged)
    assert initial == 1 and "contradictory or damaged" in why


def test_a_deadline_that_has_passed_is_said() -> None:
    state = formed_at(begun(spec(max_workers=2, objective=Objective(deadline_s=90.0))), 0.0)
    _, events = asked(state, num_workers=2, step_time_s=20.0)
    (notice,) = [event.text for event in events if isinstance(event, Noticed)]
    assert notice.startswith("the deadline of 90 s passed 22 s ago"), "three looks agree"


def test_what_a_plan_measured_counts_until_the_job_measures_the_same_itself() -> None:
    """Two workers are four times as slow as the plan found them; of one, the plan knows."""
    given = spec(max_workers=2, workers_per_node=8, objective=Objective())
    slow_s = 4.0 * measured(2, 32).step_time_s
    changes = {"num_workers": 2, "step_time_s": slow_s, "gradient_bytes": GRADIENT_BYTES}
    _, (event,) = asked(start(given, 0.0, MEASURED)[0], **changes)
    assert isinstance(event, TargetChanged) and event.num_workers == 1
    assert f"(measured), {64 / slow_s:.0f} at 2" in event.reason
    assert not events_of(given, **changes), "of one worker it knows too little without the plan"


def test_a_lost_deadline_is_said_once_and_said_again_when_it_can_be_met() -> None:
    given = spec(max_workers=2, objective=Objective(deadline_s=50_000.0))
    state = formed_at(begun(given), 0.0)
    notices: list[str] = []
    for generation, step_time_s in ((1, 20.0), (2, 20.0), (3, 0.02)):
        state, events = asked(state, generation=generation, num_workers=2, step_time_s=step_time_s)
        notices += [event.text for event in events if isinstance(event, Noticed)]
    assert len(notices) == 2
    assert notices[0].startswith("the objective can no longer be met: the end within")
    assert notices[1].startswith("the objective can be met again")


def test_a_budget_is_what_the_workers_held_so_far_have_left_of_it() -> None:
    """Two workers for 100 s have used 200 worker-seconds, whatever they did."""
    given = spec(max_workers=2, objective=Objective(budget=1.0))
    state = formed_at(begun(given), 0.0)
    for now in (50.0, 100.0):
        state, _ = told(state, progress(1, num_workers=2), now)
    assert math.isclose(state.worker_s, 200.0)


def test_placement_and_parts_of_a_step_are_those_that_were_measured() -> None:
    made = progress(
        30,
        num_workers=6,
        num_nodes=2,
        most_per_node=4,
        micro_batch_size=8,
        num_accumulation_steps=2,
        forward_time_s=0.05,
        backward_time_s=0.08,
        optimizer_time_s=0.03,
        sync_time_s=0.02,
        data_time_s=0.01,
    )
    state, _ = told(begun(spec(max_workers=8)), replace(made, step=0), 1.0)
    state, _ = told(state, made, 2.0)
    (found,) = state.measured.values()
    assert (found.num_nodes, found.most_per_node) == (2, 4)
    assert (found.micro_batch_size, found.num_accumulation_steps) == (8, 2)
    assert (found.forward_s, found.backward_s, found.optimizer_s) == (0.05, 0.08, 0.03)
    assert (found.sync_s, found.data_s) == (0.02, 0.01)


def lived(
    given: TrainSpec, true_s: dict[int, float], begin: int, *, seed: int, seconds: float = 900.0
) -> list[int]:
    """The counts that a job had, whose steps take `true_s` and drift by 3 % each generation; a
    joiner takes 3 s and a resize 1 s."""
    rng = random.Random(seed)
    state = formed_at(replace(begun(given), held=begin), 0.0)
    now, step, count, generation, drift = 0.0, 0, begin, 1, 1.0
    counts, due = [begin], (math.inf, begin)
    while now < seconds:
        step_s = true_s[count] * drift * (1 + rng.gauss(0.0, 0.008))
        now, step = now + 1.0, step + round(1.0 / step_s)
        waits_s = max(0.0, step_s - true_s[1] / count) * 0.999 if count > 1 else 0.0
        made = progress(
            step,
            generation=generation,
            num_workers=count,
            step_time_s=step_s,
            sync_time_s=waits_s,
            samples_total=50_000_000,
        )
        state, events = told(state, made, now)
        for asked_for in counts_of(events):
            due = (now + 3.0, asked_for)
        if now >= due[0] and due[1] != count:
            count, now, generation, due = due[1], now + 1.0, generation + 1, (math.inf, 0)
            counts.append(count)
            drift = 1 + rng.gauss(0.0, 0.03)
    return counts


FLAT = {1: 0.2, 2: 0.12, 4: 0.1, 8: 0.1}
PERFECT = {1: 0.2, 2: 0.1, 4: 0.05, 8: 0.025}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("true_s", "objective", "begin"),
    [
        (FLAT, Objective(deadline_s=500.0), 4),
        (FLAT, Objective(budget=1e4), 4),
        (PERFECT, Objective(deadline_s=300_000.0), 2),
        (PERFECT, Objective(deadline_s=50_000.0), 4),
        (PERFECT, Objective(budget=1.0), 4),
    ],
)
def test_measurements_that_drift_move_no_job_back_and_forth(
    true_s: dict[int, float], objective: Objective, begin: int, seed: int
) -> None:
    counts = lived(spec(max_workers=8, objective=objective), true_s, begin, seed=seed)
    assert len(counts) <= 5, counts
    turns = [b for a, b, c in zip(counts, counts[1:], counts[2:], strict=False) if a == c]
    assert len(turns) <= 1, counts


def test_what_is_left_of_a_job_with_max_steps_are_its_steps() -> None:
    """20 s of work are left, and 200 s to the deadline; all the data would take hours."""
    given = spec(max_workers=2, max_steps=700, objective=Objective(deadline_s=400.0))
    state, events = asked(formed_at(begun(given), 100.0), samples_total=10**9)
    assert not events and state.is_feasible
    without = spec(max_workers=2, objective=Objective(deadline_s=400.0))
    assert any(isinstance(event, Noticed) for event in events_of(without, samples_total=10**9))


def test_time_that_has_passed_is_taken_off_the_deadline() -> None:
    """2,000 samples of 320 a second: 6.3 s. It is on time at first, and late in the end."""
    given = spec(max_workers=2, objective=Objective(deadline_s=120.0))
    late = {"samples_total": 100_000, "samples_done": 98_000}
    state = formed_at(begun(given), 0.0)
    for step in range(25):
        state, events = told(state, progress(step, **late), 30.0 + step)
        assert not events
    state, events = asked(state, generation=2, **late)
    texts = [event.text for event in events if isinstance(event, Noticed)]
    assert texts and texts[0].startswith("the deadline of 120 s passed")


@pytest.mark.parametrize(("price", "is_kept"), [(None, True), (0.5, True), (1000.0, False)])
def test_a_budget_in_money_is_compared_with_money(price: float | None, is_kept: bool) -> None:
    given = spec(max_workers=2, price_per_hour=price, objective=Objective(budget=20.0))
    state, _ = asked(begun(given), samples_total=1_000_000)
    assert state.is_feasible == is_kept


def test_what_was_spent_in_money_is_taken_off_a_budget_in_money() -> None:
    """Four workers for an hour at 5 an hour have used all of 20; the rest would cost 4 more."""
    given = spec(max_workers=4, price_per_hour=5.0, objective=Objective(budget=20.0))
    state, _ = told(begun(given), progress(0, num_workers=4), 3600.0)
    state, _ = asked(state, generation=36, samples_total=1_000_000)
    assert not state.is_feasible


def test_a_request_that_does_not_pay_any_more_is_taken_back() -> None:
    state, (event,) = asked(begun(spec()), generation=1)
    assert isinstance(event, TargetChanged) and event.num_workers == 2
    found: list[Event] = []
    for step in range(600, 700):
        made = progress(step, samples_done=9_999_900)
        state, events = told(state, made, 100.0 + step / 10)
        found += events
    assert counts_of(found) == [1]


def test_a_worker_that_stops_late_says_nothing_about_the_next_pause() -> None:
    state = paused(begun(spec()), 0.5)
    late = WorkerStopped(job_id=JobId("job"), generation=1, worker_id=WorkerId("w1"), step=5)
    state, _ = advise(state, late, 20.0)
    formed = GroupFormed(job_id=JobId("job"), generation=3, worker_id=WorkerId("w0"), step=900)
    state, _ = advise(state, formed, 3600.0)
    assert state.pause_s == 0.5


def test_data_of_unknown_length_is_said_once_where_an_objective_was_given() -> None:
    given = spec(objective=Objective(deadline_s=50.0))
    (event,) = events_of(given, samples_total=None)
    assert isinstance(event, Noticed) and "the length of the data is unknown" in event.text
    assert not events_of(spec(), samples_total=None)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"micro_batch_size": 8, "num_accumulation_steps": 8}, {"reproducible": True}),
        ({"micro_batch_size": 1, "num_accumulation_steps": 64, "largest_micro_batch": 1}, {}),
        ({"micro_batch_size": 16, "num_accumulation_steps": 4, "largest_micro_batch": 16}, {}),
    ],
)
def test_the_count_held_is_planned_as_it_was_measured(
    changes: dict[str, int], given: dict[str, Any]
) -> None:
    """However its batch is cut: 64 samples in 0.2 s."""
    (event,) = events_of(spec(**given), **changes)
    assert isinstance(event, TargetChanged) and "320 at 1; saves" in event.reason


def held(
    state: AdvisorState, began: float, seconds: float, *, every_s: float = 1.0, **changes: Any
) -> tuple[AdvisorState, list[Event]]:
    """The state after `seconds` of thirty steps a second from `began` on, told every `every_s`."""
    found: list[Event] = []
    for tick in range(int(seconds / every_s)):
        state, events = told(
            state, progress(int(30 * tick * every_s), **changes), began + tick * every_s
        )
        found += events
    return state, found


ONE: dict[str, Any] = {"num_workers": 1, "step_time_s": 0.2}
TWO: dict[str, Any] = {"num_workers": 2, "step_time_s": 0.3, "sync_time_s": 0.2}
"""Two workers, slower than one: the machine is busy, or the job does not scale."""


def given_up() -> AdvisorState:
    """A job that was grown to two workers, measured them for 20 s, and gave one back at 130 s."""
    state, events = held(begun(spec(max_workers=2)), 100.0, 10.0, generation=1, **ONE)
    assert counts_of(events) == [2]
    state, events = held(state, 110.0, 20.0, generation=2, **TWO)
    assert counts_of(events) == [1]
    return state


def test_a_count_is_not_given_up_after_a_few_seconds() -> None:
    state, _ = held(begun(spec(max_workers=2)), 100.0, 10.0, generation=1, **ONE)
    state, events = held(state, 110.0, 14.0, generation=2, **TWO)
    assert not events
    _, events = held(state, 124.0, 6.0, generation=2, **TWO)
    assert counts_of(events) == [1]


def test_a_count_that_recovers_in_time_is_kept() -> None:
    state, _ = held(begun(spec(max_workers=2)), 100.0, 10.0, generation=1, **ONE)
    state, _ = held(state, 110.0, 10.0, generation=2, **TWO)
    good = TWO | {"step_time_s": 0.11, "sync_time_s": 0.01}
    _, events = held(state, 120.0, 60.0, generation=2, **good)
    assert not events


def test_a_count_that_was_given_up_is_left_alone_for_twenty_times_what_it_was_measured() -> None:
    state, events = held(given_up(), 130.0, 300.0, every_s=30, generation=3, **ONE)
    assert not events
    state, events = held(state, 430.0, 150.0, every_s=30, generation=3, **ONE)
    assert counts_of(events) == [2]


def test_each_further_trial_waits_longer() -> None:
    state, events = held(given_up(), 130.0, 450.0, every_s=50, generation=3, **ONE)
    assert counts_of(events) == [2]
    state, events = held(state, 580.0, 20.0, generation=4, **TWO)
    assert counts_of(events) == [1]
    state, events = held(state, 600.0, 700.0, every_s=50, generation=5, **ONE)
    assert not events
    _, events = held(state, 1300.0, 150.0, every_s=50, generation=5, **ONE)
    assert counts_of(events) == [2]


def test_it_is_tried_again_at_once_when_the_machine_has_changed() -> None:
    """One worker is twice as fast as before: whatever slowed two may have gone with it."""
    faster = ONE | {"step_time_s": 0.1}
    _, events = held(given_up(), 130.0, 30.0, generation=3, **faster)
    assert counts_of(events) == [2]


def test_a_little_faster_is_the_same_machine() -> None:
    _, events = held(given_up(), 130.0, 100.0, generation=3, **ONE | {"step_time_s": 0.16})
    assert not events
