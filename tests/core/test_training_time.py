"""Time of a training run on more workers."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.training.training_time import TimedRun, fit_training_time
from supple.core.types import Estimate
from tests.examples import examples


def seconds(workers: int, batch: float, samples: float) -> float:
    """Made up: 1 ms a sample, 10 ms a step besides, 2 ms a doubling, 5 s at the start."""
    step = 1e-3 * batch / workers + 0.010 + 0.002 * math.log2(workers)
    return 5.0 + samples / batch * step


def run(workers: int, batch: float = 2048, samples: float = 1e6) -> TimedRun:
    return TimedRun(
        num_workers=workers,
        global_batch_size=batch,
        samples=samples,
        time_s=seconds(workers, batch, samples),
    )


def test_a_made_up_machine_is_extrapolated() -> None:
    found = fit_training_time([run(8), run(16), run(32)]).predict(64, 2048, 1e6)
    assert found.value == pytest.approx(seconds(64, 2048, 1e6), rel=0.07)
    assert found.low < seconds(64, 2048, 1e6) < found.high
    assert found.source == "fitted"


def test_a_larger_batch_keeps_more_workers_busy() -> None:
    model = fit_training_time([run(8), run(32)])
    kept, grown = model.predict(256, 2048, 1e6), model.predict(256, 16384, 1e6)
    assert kept.value > 1.5 * grown.value
    assert grown.low < seconds(256, 16384, 1e6) < grown.high


def test_what_the_samples_do_not_tell_widens_the_minutes() -> None:
    model = fit_training_time([run(8), run(16)])
    sure = model.predict(32, 2048, 1e6)
    doubtful = model.predict(32, 2048, Estimate(value=1e6, low=0.7e6, high=1.4e6, source="fitted"))
    assert doubtful.value == sure.value
    assert doubtful.low < sure.low and doubtful.high > sure.high


def test_distance_and_fewer_runs_widen_the_interval() -> None:
    def width(workers: int, *counts: int) -> float:
        model = fit_training_time([run(count) for count in counts])
        found = model.predict(workers, 2048, 1e6)
        return math.log(found.high / found.low)

    assert width(32, 8, 16) < width(1024, 8, 16)
    assert width(64, 8, 16, 32) < width(64, 8)


def test_resnet_on_h100_is_foretold_from_two_smaller_systems() -> None:
    """MLPerf training v3.0, NVIDIA, resnet on H100: 8 and 64 accelerators at batch 3,200, then
    512 at 20,480, which took 0.4975 minutes for 64.06 million samples."""
    seen = [
        TimedRun(num_workers=8, global_batch_size=3200, samples=44840845, time_s=60 * 13.5915),
        TimedRun(num_workers=64, global_batch_size=3200, samples=44840845, time_s=60 * 2.6632),
    ]
    found = fit_training_time(seen).predict(512, 20480, 64058350.0)
    assert found.value == pytest.approx(60 * 0.4975, rel=0.25)
    assert found.low < 60 * 0.4975 < found.high


def test_one_absurd_run_hardly_bends_the_others() -> None:
    seen = [run(count) for count in (8, 16, 32, 64, 128)]
    absurd = TimedRun(num_workers=24, global_batch_size=2048, samples=1e6, time_s=1e5)
    plain = fit_training_time(seen).predict(256, 2048, 1e6)
    found = fit_training_time([*seen, absurd]).predict(256, 2048, 1e6)
    assert found.value == pytest.approx(plain.value, rel=0.25)


@pytest.mark.slow
@settings(max_examples=examples(12))
@given(
    st.lists(
        st.tuples(st.integers(1, 4096), st.floats(1, 1e5), st.floats(1, 1e6)),
        min_size=1,
        max_size=6,
    )
)
def test_contradictory_runs_give_a_finite_answer(rows: list[tuple[int, float, float]]) -> None:
    runs = [TimedRun(num_workers=n, global_batch_size=b, samples=1e6, time_s=t) for n, b, t in rows]
    found = fit_training_time(runs).predict(512, 1000.0, 1e6)
    assert 0.0 < found.low <= found.value <= found.high < math.inf


def test_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="0 finished runs"):
        fit_training_time([])


@pytest.mark.parametrize("time_s", [0.0, -1.0, math.nan, math.inf])
def test_a_time_without_meaning_is_refused(time_s: float) -> None:
    bad = TimedRun(num_workers=8, global_batch_size=32, samples=1e6, time_s=time_s)
    with pytest.raises(ValueError, match=r"cannot be fitted.*leave it out"):
        fit_training_time([run(8), bad])


def test_samples_that_were_guessed_do_not_bend_the_scaling() -> None:
    """The larger run's samples are said to be three times too many: as if counted, each of its
    steps took a third, and the smaller run was held up by a fixed part that is not there."""
    true = seconds(128, 2048, 1e6)
    counted = replace(run(32), samples=3e6)
    bent = fit_training_time([run(8), counted]).predict(128, 2048, 1e6).value
    guessed = replace(counted, samples_error=1.0)
    found = fit_training_time([run(8), guessed]).predict(128, 2048, 1e6)
    assert abs(math.log(found.value / true)) < 0.5 * abs(math.log(bent / true))
    assert found.low <= true <= found.high


@pytest.mark.parametrize(
    "odd", [{"num_workers": 2.5}, {"num_workers": 0}, {"time_s": 1e300}, {"samples": math.nan}]
)
def test_a_run_that_cannot_be_is_refused(odd: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="workers must be a whole number"):
        fit_training_time([run(8), replace(run(16), **odd)])  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [-0.1, float("nan"), float("inf")])
def test_a_samples_error_that_cannot_be_is_refused(error: float) -> None:
    with pytest.raises(ValueError, match="samples' error"):
        fit_training_time([replace(run(8), samples_error=error)])


def test_two_runs_that_contradict_each_other_promise_little() -> None:
    once, again = run(8), replace(run(8), time_s=100 * run(8).time_s)
    found = fit_training_time([once, again]).predict(16, 2048, 1e6)
    assert found.high / found.low > 100


@pytest.mark.slow
@settings(max_examples=examples(15))
@given(
    st.lists(
        st.tuples(st.integers(8, 10), st.sampled_from([1024.0, 2048.0]), st.floats(50, 500)),
        min_size=2,
        max_size=4,
    )
)
def test_the_order_in_which_runs_are_told_changes_nothing(
    rows: list[tuple[int, float, float]],
) -> None:
    runs = [TimedRun(num_workers=n, global_batch_size=b, samples=1e6, time_s=t) for n, b, t in rows]
    found = {fit_training_time(told).predict(64, 2048, 1e6) for told in permutations(runs)}
    assert len(found) == 1


@pytest.mark.parametrize("samples", [np.int64(10**6), np.float32(1e6), Fraction(10**6), 10**6])
def test_samples_may_be_any_number(samples: Any) -> None:
    model = fit_training_time([run(8)])
    assert model.predict(16, 2048, samples) == model.predict(16, 2048, 1e6)


@pytest.mark.parametrize(
    "asked",
    [
        (0, 64, 1e6),
        (-8, 64, 1e6),
        (0.5, 64, 1e6),
        (8, 0.0, 1e6),
        (8, math.inf, 1e6),
        (8, 64, 0.0),
        (8, 64, -1.0),
        (8, 64, math.nan),
        (8, 64, np.int64(0)),
        (8, 64, Estimate(value=1.0, low=0.0, high=2.0, source="fitted")),
        (8, 64, Estimate(value=1.0, low=0.5, high=math.inf, source="fitted")),
    ],
)
def test_a_run_that_cannot_be_has_no_time(asked: tuple[float, float, Any]) -> None:
    model = fit_training_time([run(8)])
    with pytest.raises(ValueError, match=r"on [-\d.]+ workers.*positive and finite.*Give"):
        model.predict(*asked)
