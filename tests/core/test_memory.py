"""Memory is never under-predicted by the measurements it was fitted to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.memory import (
    FAR,
    FRAGMENTATION,
    RUNTIME_BYTES,
    LargestMicroBatch,
    MemoryMeasurement,
    TracedMemory,
    device_bytes,
    fit_memory,
    largest_that_fits,
    safe_bytes,
)

measured = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 10**11)), min_size=1, max_size=8)


@given(measured)
def test_no_measurement_lies_above_the_model(pairs: list[tuple[int, int]]) -> None:
    model = fit_memory(
        [MemoryMeasurement(micro_batch_size=size, peak_bytes=peak) for size, peak in pairs]
    )
    for size, peak in pairs:
        assert model.predict(size).high >= peak * 0.999999


@given(measured, st.integers(1, 10_000), st.integers(1, 10_000))
def test_more_samples_never_need_less(pairs: list[tuple[int, int]], one: int, other: int) -> None:
    model = fit_memory(
        [MemoryMeasurement(micro_batch_size=size, peak_bytes=peak) for size, peak in pairs]
    )
    low, high = (model.predict(size) for size in sorted((one, other)))
    assert low.value <= high.value * 1.000001
    assert low.high <= high.high * 1.000001


def line(fixed: int, slope: int, *sizes: int) -> list[MemoryMeasurement]:
    return [
        MemoryMeasurement(micro_batch_size=size, peak_bytes=fixed + slope * size) for size in sizes
    ]


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    model = fit_memory(line(1000, 10, 8, 16))
    largest = model.largest_micro_batch(3000)
    assert model.predict(largest).high <= 3000 < model.predict(largest + 1).high
    assert 100 <= largest <= 200


def test_nothing_fits_below_the_fixed_part() -> None:
    assert fit_memory(line(1000, 10, 8, 16)).largest_micro_batch(900) == 0


@pytest.mark.slow
@given(measured, st.integers(1, 10**12))
def test_no_size_that_fits_is_larger_than_the_largest(
    pairs: list[tuple[int, int]], limit_bytes: int
) -> None:
    model = fit_memory(
        [MemoryMeasurement(micro_batch_size=size, peak_bytes=peak) for size, peak in pairs]
    )
    largest = model.largest_micro_batch(limit_bytes)
    if largest > 0:
        assert model.predict(largest).high <= limit_bytes
    if model.grows:
        assert model.predict(largest + 1).high > limit_bytes


def test_beyond_the_only_size_measured_all_of_it_may_grow() -> None:
    model = fit_memory(line(1000, 10, 8))
    assert model.predict(8).source == "measured"
    assert model.predict(16).source == "assumed"
    assert model.predict(16).value == 2 * model.predict(8).value
    assert model.predict(4).value == model.predict(8).value
    assert model.largest_micro_batch(1.05 * 1080) == 8
    assert model.largest_micro_batch(1.05 * 100 * 1080) == 800


@pytest.mark.parametrize("more", [0, 1, 40_000])
def test_peaks_alike_within_fragmentation_tell_nothing_beyond_twice_the_largest(more: int) -> None:
    """A byte more at 1,024 samples is not what a sample needs."""
    model = fit_memory(
        [
            MemoryMeasurement(micro_batch_size=1, peak_bytes=10**6),
            MemoryMeasurement(micro_batch_size=1024, peak_bytes=10**6 + more),
        ]
    )
    assert model.largest_micro_batch(8e9) == 2048
    assert model.largest_micro_batch(1e6) == 0


def test_growth_beyond_fragmentation_is_followed_as_far_as_the_memory_goes() -> None:
    model = fit_memory(line(10**6, 100, 1, 1024))
    assert model.largest_micro_batch(8e9) > 10**7


def test_an_empty_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fit_memory([])


@pytest.mark.parametrize(
    ("size", "peak"),
    [(8, float("nan")), (float("nan"), 100), (8, -5), (8, float("inf")), (0, 100)],
)
def test_sizes_and_bytes_that_are_no_counts_are_refused(size: float, peak: float) -> None:
    wrong = MemoryMeasurement(micro_batch_size=size, peak_bytes=peak)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes and bytes of at least 1"):
        fit_memory([*line(1000, 10, 8), wrong])
    with pytest.raises(ValueError, match="noise=nan"):
        fit_memory(line(1000, 10, 8), noise=float("nan"))


# --- from a trace ----------------------------------------------------------------------------


def traced(micro: int, *, activations: int = 10**8, states: int = 10**9) -> TracedMemory:
    return TracedMemory(
        micro_batch_size=micro,
        peak_bytes=4 * states + micro * activations,
        parameter_bytes=states,
        gradient_bytes=states,
        optimizer_bytes=2 * states,
        largest_block_bytes=states // 50,
    )


def test_a_device_needs_the_trace_and_what_it_cannot_see() -> None:
    found = device_bytes(traced(8))
    assert found.low == traced(8).peak_bytes
    assert found.high == found.low * (1 + FRAGMENTATION) + RUNTIME_BYTES
    assert found.source == "assumed"


@given(shards=st.sampled_from([1, 2, 4, 8, 64]), micro=st.integers(1, 64))
def test_more_shards_never_need_more_and_never_less_than_their_share(
    shards: int, micro: int
) -> None:
    one, more = device_bytes(traced(micro)), device_bytes(traced(micro), shards=shards)
    doubled = device_bytes(traced(micro), shards=2 * shards)
    assert doubled.high <= more.high <= one.high
    assert more.low >= traced(micro).peak_bytes - traced(micro).state_bytes * (1 - 1 / shards)


@given(limit=st.floats(5e9, 1e11), shards=st.sampled_from([1, 4]))
def test_what_is_said_to_fit_fits_and_the_next_size_hardly(limit: float, shards: int) -> None:
    traces = [traced(size) for size in (32, 16, 8, 4)]
    size = largest_that_fits(traces, limit, shards=shards).num_samples
    if size:
        assert device_bytes(traced(size), shards=shards).high <= limit * 1.001
    bigger = device_bytes(traced(size + 1 + size // 5 + 4), shards=shards)
    assert bigger.high > limit * 0.9


def test_a_trace_is_computed_so_that_even_little_growth_is_followed() -> None:
    """The runtime is a hundred times what the four samples more need."""
    traces = [traced(size, activations=10**6, states=10**7) for size in (4, 8)]
    assert largest_that_fits(traces, 40e9).num_samples > 10_000


@given(
    fixed=st.integers(0, 10**9),
    slope=st.integers(1, 10**7),
    curve=st.integers(0, 10**5),
    size=st.integers(1, 64 * 8),
)
def test_a_size_up_to_the_largest_traced_is_never_said_to_need_less_than_it_does(
    fixed: int, slope: int, curve: int, size: int
) -> None:
    """Whatever bends upwards: a peak of the optimizer's step below, pairs of samples above."""

    def really(micro: int) -> TracedMemory:
        peak = max(4 * 10**9 + fixed, 4 * 10**9 + slope * micro + curve * micro**2)
        return replace(traced(micro), peak_bytes=peak)

    known = [really(micro) for micro in (64, 32, 16, 8)]
    if 8 <= size <= 64 or not curve:
        assert safe_bytes(known, size) >= device_bytes(really(size)).high * (1 - 1e-9)


def test_beyond_the_traces_the_steepest_line_counts_not_the_mean_one() -> None:
    """Below 32 samples the peak is the optimizer's; a line through all would rise too slowly."""
    traces = [
        replace(traced(size), peak_bytes=max(7 * 10**9, 4 * 10**9 + size * 10**8))
        for size in (64, 32, 16, 8)
    ]
    truth = device_bytes(replace(traced(640), peak_bytes=4 * 10**9 + 640 * 10**8)).high
    assert truth < safe_bytes(traces, 640) < 1.06 * truth


def test_one_traced_size_is_all_fixed_below_and_all_but_its_states_grow_beyond() -> None:
    only = [traced(8)]
    here = device_bytes(traced(8)).high
    assert safe_bytes(only, 1) == safe_bytes(only, 8) == here
    assert safe_bytes(only, 16) >= device_bytes(traced(16)).high
    assert largest_that_fits(only, here - 1).num_samples == 0
    assert largest_that_fits(only, here) == LargestMicroBatch(
        num_samples=8, limited_by="memory", is_guess=False
    )
    assert largest_that_fits(only, 2 * here).is_guess


def test_no_more_samples_fit_than_there_are() -> None:
    found = largest_that_fits([traced(8), traced(4)], 8e10, dataset_size=100)
    assert found == LargestMicroBatch(num_samples=100, limited_by="dataset", is_guess=True)


def test_far_beyond_the_largest_traced_size_is_a_guess() -> None:
    traces = [traced(8), traced(4)]
    near, far = (device_bytes(traced(size)).high * 1.005 for size in (8 * FAR - 4, 8 * FAR + 4))
    assert not largest_that_fits(traces, near).is_guess
    assert largest_that_fits(traces, 1.1 * far).is_guess


def test_traces_that_all_need_the_same_tell_nothing_beyond_twice_the_largest() -> None:
    traces = [replace(traced(size), peak_bytes=5 * 10**9) for size in (8, 4)]
    assert largest_that_fits(traces, 80e9) == LargestMicroBatch(
        num_samples=16, limited_by="traces", is_guess=False
    )
    assert largest_that_fits(traces, 1e9).num_samples == 0


@pytest.mark.parametrize("limit", [float("nan"), float("inf")])
def test_what_fits_no_finite_memory_is_not_asked(limit: float) -> None:
    with pytest.raises(ValueError, match="the limit must be finite"):
        largest_that_fits([traced(8)], limit)
    with pytest.raises(ValueError, match="the limit must be finite"):
        fit_memory(line(1000, 10, 8, 16)).largest_micro_batch(limit)
    with pytest.raises(ValueError, match="from 0 traces"):
        largest_that_fits([], 1e9)


def test_no_replica_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 replica"):
        device_bytes(traced(1), shards=0)


@pytest.mark.parametrize("size", [0, -5, 2.5, math.nan])
def test_the_memory_of_a_batch_that_nobody_can_run_is_refused(size: float) -> None:
    model = fit_memory([MemoryMeasurement(micro_batch_size=8, peak_bytes=10**9)])
    asks = (
        lambda: model.predict(size),  # type: ignore[arg-type]
        lambda: safe_bytes([traced(8)], size),  # type: ignore[arg-type]
    )
    for ask in asks:
        with pytest.raises(ValueError, match=f"of a micro-batch of {size} was requested"):
            ask()
