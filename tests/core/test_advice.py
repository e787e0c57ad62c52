"""What a running job is told to change, and when it is told to leave things as they are."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import lookup
from supple.core.job.advice import Advice, better_batch, better_count, rows_left, should_resize
from supple.core.planning.planner import plan
from supple.core.spec import Limits, Objective
from supple.core.training.goodput import MAX_ADAM_RATIO
from supple.core.training.loop_time import LoopTime
from supple.core.training.measurements import StepMeasurement
from supple.core.training.throughput import StepTimeModel, fit
from supple.core.types import Plan
from tests.core.test_planner import job, table
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured
from tests.examples import examples

KNEE = Objective()
ADAPTIVE = Limits(max_workers=8, batch="adaptive")


def measured_at(count: int) -> StepTimeModel:
    """Nothing is known but the count that a job has."""
    return fit(
        [measured(count, -(-256 // count))],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )


def ask(
    current: int,
    remaining: int,
    cost_s: float,
    maximum: int = 8,
    objective: Objective = KNEE,
    step_time: StepTimeModel | None = None,
) -> Advice:
    return better_count(
        job(step_time=step_time or measured_at(current)),
        Limits(max_workers=maximum),
        objective,
        current_workers=current,
        remaining_samples=remaining,
        resize_cost_s=cost_s,
    )


def is_worth(current: int, target: int, remaining: int, cost_s: float) -> tuple[bool, str]:
    now, then = (rows_left(job(), Limits(), [n], remaining)[0] for n in (current, target))
    return should_resize(now, then, resize_cost_s=cost_s)


def test_a_running_job_grows_to_at_most_twice_what_was_measured() -> None:
    found = ask(1, 10**7, 0.2)
    assert found.value == 2
    assert "samples/s expected at 2 workers" in found.reason


def test_a_resize_that_does_not_pay_back_is_not_made() -> None:
    found = ask(1, 500, 1000.0)
    assert found.value == 1
    assert "the resize costs 1000.00 s" in found.reason


def test_a_job_above_its_knee_gives_workers_back() -> None:
    found = ask(64, 10**7, 0.2, maximum=64)
    assert found.value < 64
    assert "add too little" in found.reason


@pytest.mark.parametrize("current", [1, 2, 3])
def test_advice_stays_within_the_limits(current: int) -> None:
    assert 1 <= ask(current, 10**7, 0.1, maximum=3).value <= 3


def test_more_than_the_limits_allow_is_given_back_whatever_it_costs() -> None:
    found = ask(6, 10**7, 1e9, maximum=4)
    assert found.value == 4
    assert "1 to 4 are allowed" in found.reason


def test_a_shrink_must_free_more_than_its_pause_takes() -> None:
    assert is_worth(64, 4, 10**7, 5.0)[0]
    worth, reason = is_worth(64, 4, 1000, 5.0)
    assert not worth
    assert "the resize costs 320.0" in reason


def test_a_slow_shrink_is_weighed_in_worker_seconds_not_in_seconds() -> None:
    """8 s are left and the pause takes 5, but half the workers of half the use free too little."""
    rows = table(plan(job(), Limits(max_workers=4), Objective())).rows
    worth, reason = is_worth(4, 2, int(8.0 * rows[-1].goodput.value), 5.0)
    assert not worth
    assert "worker-seconds" in reason


def test_a_count_without_a_sample_for_each_worker_is_left_for_one_that_has() -> None:
    found = better_count(
        job(base_batch_size=4, step_time=measured_at(8)),
        Limits(max_workers=8),
        KNEE,
        current_workers=8,
        remaining_samples=10**7,
        resize_cost_s=1e9,
    )
    assert found.value == 4 and "no sample for each of 8" in found.reason


def expected(remaining: int, most: int) -> dict[int, Plan]:
    """What is predicted of the rest on 1, 2, 4, ... workers, all of which were measured."""
    counts = [1 << power for power in range(most.bit_length())]
    rows = rows_left(job(step_time=known(most)), Limits(), counts, remaining)
    return {row.num_workers: row for row in rows}


def known(most: int) -> StepTimeModel:
    counts = [1 << power for power in range(most.bit_length())]
    return fit(
        [measured(count, -(-256 // count)) for count in counts],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        local_link=lookup("loopback"),
        workers_per_node=64,
    )


def test_a_deadline_that_the_count_held_would_miss_asks_for_the_fewest_that_keep_it() -> None:
    rows = expected(10**7, 8)
    deadline = Objective(deadline_s=rows[4].time_to_end_s.high * 1.01)
    found = ask(1, 10**7, 0.2, objective=deadline, step_time=known(8))
    assert found.value == 4 and found.objection == ""
    assert f"{deadline.deadline_s:.0f} s to the deadline" in found.reason


def test_a_deadline_kept_with_time_to_spare_gives_workers_back_and_a_narrow_one_does_not() -> None:
    rows = expected(10**7, 8)

    def at_four(seconds: float) -> int:
        objective = Objective(deadline_s=seconds)
        return ask(4, 10**7, 0.2, objective=objective, step_time=known(8)).value

    assert at_four(rows[1].time_to_end_s.high * 1.2) == 1
    assert at_four(rows[1].time_to_end_s.high * 1.05) == 4, "it would be close"
    assert at_four(rows[4].time_to_end_s.high * 1.01) == 4


def test_a_deadline_that_nothing_keeps_is_said_and_the_fastest_count_is_taken() -> None:
    found = ask(2, 10**7, 0.2, objective=Objective(deadline_s=1.0), step_time=known(8))
    rows = expected(10**7, 8)
    fastest = min(rows.values(), key=lambda row: row.time_to_end_s.value).num_workers
    assert found.value == fastest > 2
    assert found.objection and "the end within 1.0 s: the fastest is" in found.objection


def test_a_deadline_that_counts_not_measured_yet_may_keep_is_no_objection() -> None:
    large = job(step_time=known(2), base_batch_size=2048)
    rows = rows_left(large, Limits(), [4, 8], 10**7)
    four, eight = (row.time_to_end_s.high for row in rows)
    assert eight < four

    def at_two(seconds: float) -> Advice:
        return better_count(
            large,
            Limits(max_workers=8),
            Objective(deadline_s=seconds),
            current_workers=2,
            remaining_samples=10**7,
            resize_cost_s=0.2,
        )

    late, never = at_two(eight * 1.01), at_two(1.0)
    assert late.value == never.value == 4, "twice what was measured, for now"
    assert late.objection == "" and never.objection


def test_a_deadline_that_only_another_count_keeps_is_worth_any_pause() -> None:
    """The resize costs more than it saves, and the deadline is kept all the same."""
    rows = expected(10**7, 8)
    deadline = Objective(deadline_s=rows[4].time_to_end_s.high * 1.01)
    saved_s = rows[1].time_to_end_s.value - rows[4].time_to_end_s.value
    found = ask(1, 10**7, 2 * saved_s, objective=deadline, step_time=known(8))
    assert found.value == 4 and "the resize costs" in found.reason


def test_a_budget_takes_the_fastest_count_within_what_is_left_of_it() -> None:
    rows = expected(10**7, 8)
    enough = Objective(budget=rows[2].accelerator_hours.high * 1.01)
    assert rows[4].accelerator_hours.high > enough.budget  # type: ignore[operator]
    found = ask(1, 10**7, 0.2, objective=enough, step_time=known(8))
    assert found.value == 2 and "what is left of the budget" in found.reason
    poor = ask(4, 10**7, 0.2, objective=Objective(budget=1e-6), step_time=known(8))
    assert poor.value == 1 and poor.objection and "for a budget of" in poor.objection


def test_between_the_two_shares_a_job_keeps_what_it_has() -> None:
    """A machine on which the fourth worker's half adds 0.45 of a worker: no reason to go there,
    none to leave."""

    def at(current: int) -> int:
        speeds = {1: 1.0, 2: 1.8, 4: 1.8 + 2 * 0.45}
        steps = [
            StepMeasurement(
                num_workers=workers,
                num_nodes=1,
                micro_batch_size=256 // workers,
                num_accumulation_steps=1,
                forward_s=0.1 / workers,
                backward_s=0.2 / workers,
                optimizer_s=0.0,
                data_s=0.0,
                sync_s=0.0,
                step_time_s=0.3 / speed,
            )
            for workers, speed in speeds.items()
        ]
        model = fit(
            steps, gradient_bytes=GRADIENT_BYTES, link=lookup("loopback"), workers_per_node=64
        )
        return ask(current, 10**7, 0.1, maximum=4, step_time=model).value

    assert at(2) == 2
    assert at(4) == 4


@pytest.mark.slow
@settings(max_examples=examples(40))
@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 10**8), st.floats(0.0, 1e4))
def test_what_does_not_pay_back_today_does_not_pay_back_with_less_left(
    current: int, target: int, remaining: int, cost_s: float
) -> None:
    def worth(samples: int, seconds: float) -> bool:
        return is_worth(current, target, samples, seconds)[0]

    if worth(remaining // 2, cost_s):
        assert worth(remaining, cost_s)
        assert worth(remaining // 2, cost_s / 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_scatter_of_measurements_does_not_send_a_job_to_and_fro(seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps: dict[int, StepMeasurement] = {}
    current, visited = 1, [1]
    for _ in range(25):
        size = -(-256 // current)
        steps[current] = measured(current, size, factor=math.exp(rng.normal(0.0, 0.03)))
        model = fit(
            list(steps.values()),
            gradient_bytes=GRADIENT_BYTES,
            link=lookup("loopback"),
            workers_per_node=64,
        )
        current = ask(current, 10**7, 0.3, maximum=32, step_time=model).value
        visited.append(current)
    moves = sum(before != after for before, after in itertools.pairwise(visited))
    assert moves <= 5
    assert len(set(visited[-10:])) == 1


def ask_batch(
    current: int,
    *,
    remaining: int = 10**7,
    cost_s: float = 0.2,
    limits: Limits = ADAPTIVE,
    **of: object,
) -> tuple[int, str]:
    found = better_batch(
        job(**of),
        limits,
        current_workers=2,
        current_batch=current,
        remaining_samples=remaining,
        resize_cost_s=cost_s,
    )
    return found.value, found.reason


def test_a_batch_far_below_the_noise_scale_is_doubled() -> None:
    size, reason = ask_batch(256, noise_scale=1e5)
    assert size == 512
    assert "batch 256 to 512: noise scale 1e+05 samples" in reason
    assert "useful samples/s expected at 512" in reason


def test_a_batch_far_above_the_noise_scale_is_halved() -> None:
    assert ask_batch(1024, noise_scale=1.0)[0] == 512


def test_no_batch_is_below_that_of_the_script_or_above_what_the_optimizer_bears() -> None:
    assert ask_batch(256, noise_scale=1e-3)[0] == 256
    largest = int(256 * MAX_ADAM_RATIO)
    assert ask_batch(largest, noise_scale=1e9)[0] == largest


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("it is fixed", {"limits": Limits(max_workers=8)}),
        ("not known yet", {"noise_scale": None}),
        ("expected at 512", {"noise_scale": 1e5, "remaining": 100}),
        ("expected at 512", {"noise_scale": 1e5, "cost_s": 1e9}),
    ],
)
def test_a_batch_is_kept_with_the_reason(words: str, changes: dict[str, object]) -> None:
    size, reason = ask_batch(256, **changes)  # type: ignore[arg-type]
    assert size == 256
    assert "keep batch 256" in reason
    assert words in reason


@pytest.mark.slow
@settings(max_examples=examples(60))
@given(st.floats(0.0, 1e7), st.integers(256, 1024))
def test_following_the_advice_comes_to_rest(noise_scale: float, start: int) -> None:
    seen = [start]
    for _ in range(12):
        size, _ = ask_batch(seen[-1], noise_scale=noise_scale)
        assert math.ceil(seen[-1] / 2) <= size <= 2 * seen[-1]
        if size == seen[-1]:
            return
        seen.append(size)
    raise AssertionError(f"the batch went {seen}")


@pytest.mark.parametrize("noise_scale", [100.0, 200.0, 300.0])
def test_one_unlucky_measurement_of_a_batch_does_not_move_a_job_off_it(noise_scale: float) -> None:
    """Every batch nobody measured looks half as fast again, and is not."""
    steps = [measured(2, size, factor=1.5 if size == 64 else 1.0) for size in (16, 32, 64)]
    unlucky = fit(
        [*ALONE, *steps],
        gradient_bytes=GRADIENT_BYTES,
        link=lookup("infiniband-200"),
        workers_per_node=64,
    )
    size, _ = ask_batch(128, step_time=unlucky, base_batch_size=64, noise_scale=noise_scale)
    assert size == 128


def test_what_the_loop_does_around_its_steps_is_part_of_what_is_left() -> None:
    """A deadline is measured on the clock, not in steps."""
    around = replace(job(), loop=LoopTime(every_s=1.0))
    plain, slow = (rows_left(view, Limits(), [1], 10**5)[0] for view in (job(), around))
    num_steps = 10**5 / plain.batch.global_batch_size
    longer_s = slow.time_to_end_s.value - plain.time_to_end_s.value
    assert longer_s == pytest.approx(num_steps)
    assert slow.step_time_s == plain.step_time_s
