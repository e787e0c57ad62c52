"""Batch latency of diffusion models: what physics demands, and refusals."""

from dataclasses import replace

import pytest

from benchmarks.accuracy.diffusion_form import (
    DiffusionMeasurement,
    DiffusionModel,
    DiffusionRun,
    fit_diffusion,
)
from supple.core.layouts.model import DEVICES

PICTURE = DiffusionRun(
    family="one",
    num_parameters=2e9,
    device=DEVICES["h100"],
    ulysses_degree=1,
    ring_degree=1,
    batch_size=1,
    num_pixels=1024 * 1024,
    num_frames=1,
    num_steps=20,
)
PRIORS = fit_diffusion([])
FILM = replace(PICTURE, num_frames=81)
EXCHANGED = replace(
    PICTURE, device=replace(DEVICES["h100"], flops_per_s=1e30), num_tokens=1e6, num_steps=1000
)
"""Arithmetic costs nothing, and the sequence is so long that launches hardly count."""


def seconds(run: DiffusionRun, model: DiffusionModel = PRIORS) -> float:
    return model.predict(run).value


def test_twice_the_batch_takes_longer_and_at_most_twice_as_long() -> None:
    one, two = seconds(PICTURE), seconds(replace(PICTURE, batch_size=2))
    assert one < two <= 2 * one


def test_a_video_takes_longer_than_its_frames_would() -> None:
    film = replace(PICTURE, num_frames=81)
    assert film.tokens == 21 * PICTURE.tokens
    assert seconds(film) > 21 * seconds(PICTURE)


def test_devices_make_a_video_faster_but_never_in_proportion() -> None:
    film = replace(PICTURE, num_frames=81)
    one, eight = seconds(film), seconds(replace(film, ulysses_degree=4, ring_degree=2))
    assert one / 8 < eight < one / 2


def test_steps_and_parameters_take_time() -> None:
    assert seconds(replace(PICTURE, num_steps=40)) > 1.5 * seconds(PICTURE)
    assert seconds(replace(PICTURE, num_parameters=8e9)) > 2 * seconds(PICTURE)


def test_a_faster_device_is_faster_by_less_than_its_peak() -> None:
    ratio = seconds(FILM) / seconds(replace(FILM, device=DEVICES["b200"]))
    assert 1.0 < ratio < 2250 / 989


def test_the_share_of_its_peak_that_a_device_reaches_falls_as_a_power_of_it() -> None:
    """By arithmetic alone ten times the peak would be ten times as fast; by the prior it is
    10^0.6."""
    faster = replace(FILM.device, flops_per_s=10 * FILM.device.flops_per_s)
    long = replace(FILM, num_tokens=1e6)
    assert seconds(long) / seconds(replace(long, device=faster)) == pytest.approx(10**0.6, rel=0.03)


def test_in_a_ring_every_device_gets_what_each_of_the_others_holds() -> None:
    """A device of n holds a message of 1/n and receives n-1 of them: 3/4 against 1/2."""
    two, four = (seconds(replace(EXCHANGED, ring_degree=n)) for n in (2, 4))
    assert four / two == pytest.approx(1.5, rel=0.03)


def test_among_heads_a_device_keeps_its_own_share_of_a_message() -> None:
    """A device of n sends (n-1)/n of a message of 1/n: 3/16 against 1/4."""
    two, four = (seconds(replace(EXCHANGED, ulysses_degree=n)) for n in (2, 4))
    assert four / two == pytest.approx(0.75, rel=0.03)


def test_one_device_exchanges_nothing_and_twice_the_tokens_are_twice_the_message() -> None:
    shorter = replace(EXCHANGED, num_tokens=5e5)
    for degree in ("ulysses_degree", "ring_degree"):
        one, other = (seconds(replace(run, **{degree: 4})) for run in (EXCHANGED, shorter))  # type: ignore[arg-type]
        assert one / other == pytest.approx(2.0, rel=0.05)
    assert seconds(EXCHANGED) == pytest.approx(seconds(shorter))
    assert seconds(EXCHANGED) < 0.1 * seconds(replace(EXCHANGED, ring_degree=2))


def test_a_slower_world_is_learned_for_a_model_never_seen() -> None:
    runs = [
        replace(PICTURE, family=f"of {size:g}", num_parameters=size, batch_size=batch)
        for size in (1e9, 2e9, 4e9, 8e9)
        for batch in (1, 4, 16)
    ]
    model = fit_diffusion(
        [DiffusionMeasurement(run=run, batch_s=1.6 * seconds(run)) for run in runs]
    )
    asked = replace(PICTURE, family="new", num_parameters=3e9, batch_size=8)
    found = model.predict(asked)
    assert found.value == pytest.approx(1.6 * seconds(asked), rel=0.15)
    assert found.source == "fitted"
    assert PRIORS.predict(asked).source == "assumed"


def measured(*times_s: float) -> list[DiffusionMeasurement]:
    return [DiffusionMeasurement(run=PICTURE, batch_s=seconds) for seconds in times_s]


def test_a_batch_that_was_measured_is_given_as_measured() -> None:
    found = fit_diffusion(measured(6.5)).predict(PICTURE)
    assert (found.value, found.source) == (6.5, "measured")
    assert found.high < 1.05 * 6.5


def test_an_interval_covers_what_two_measurements_of_one_batch_differ_by() -> None:
    found = fit_diffusion(measured(3.0, 9.0)).predict(PICTURE)
    assert found.low < 3.0 < 9.0 < found.high


def test_times_of_one_batch_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one on h100 was measured at 6\.5 and at 6,500 s"):
        fit_diffusion(measured(6.5, 6500.0))
    fit_diffusion([*measured(6.5), replace(measured(6500.0)[0], run=FILM)])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="a positive number is needed"):
        fit_diffusion([DiffusionMeasurement(run=PICTURE, batch_s=value)])


COUNTS = ["ulysses_degree", "ring_degree", "batch_size", "num_pixels", "num_frames", "num_steps"]


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -5, 1.5, float("nan"), float("inf")])
def test_a_count_of_a_run_is_whole_and_at_least_1(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value:g}: it must be a whole number"):
        replace(PICTURE, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["num_tokens", "num_parameters"])
@pytest.mark.parametrize("value", [0.0, -5, float("nan"), float("inf")])
def test_a_size_of_a_run_is_positive_and_finite(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value:g}: it must be positive and finite"):
        replace(PICTURE, **{field: value})  # type: ignore[arg-type]
