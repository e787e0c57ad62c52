"""One term of a step at a time: devices on which all else costs nothing, and data-sheet priors."""

from dataclasses import replace

import numpy as np
import pytest

from supple.core.layouts.model import DEVICES
from supple.core.llm.decoding import Decoder, DecodingRun, Groups, Rows, Workload, logs
from supple.core.llm.inference import fit_inference

PRIORS = fit_inference([])
FREE = replace(
    DEVICES["h100"], flops_per_s=1e30, memory_bytes_per_s=3.35e24, memory_bytes=1e24, name="free"
)
"""Neither arithmetic nor memory takes time on it."""
READS = replace(FREE, memory_bytes_per_s=3.35e12)
COMPUTES = replace(FREE, flops_per_s=1e10)
DENSE = Decoder(family="a", num_parameters=4e12, num_activated=4e12, num_layers=1)
EXPERTS = replace(DENSE, num_parameters=4e14, num_activated=2e13)
"""So large and so flat that launching a layer does not count."""
PLAIN = DecodingRun(
    model=DENSE,
    device=READS,
    num_devices=1,
    concurrency=1,
    workload=Workload(name="chat", prompt_tokens=1),
    output_tokens=1e4,
)


def step_s(run: DecodingRun) -> float:
    """Mean seconds of a step in which as many run as are allowed."""
    return run.concurrency / PRIORS.predict(run).tokens_per_s.value


@pytest.mark.parametrize("device", [READS, COMPUTES])
def test_twice_the_device_is_faster_by_less_than_two(device: object) -> None:
    """Whether weights are read or numbers multiplied, the share reached falls with the speed of the
    device: by 2^0.3, by the prior."""
    run = replace(PLAIN, device=device)  # pyright: ignore[reportArgumentType]
    twice = replace(
        run.device,
        flops_per_s=2 * run.device.flops_per_s,
        memory_bytes_per_s=2 * run.device.memory_bytes_per_s,
    )
    assert step_s(run) / step_s(replace(run, device=twice)) == pytest.approx(2**0.7, rel=0.02)


def test_tensor_ranks_wait_for_the_bytes_that_their_link_carries() -> None:
    run = replace(PLAIN, device=FREE, num_devices=2, concurrency=256)
    fast, slow, slower = (
        step_s(replace(run, device=replace(FREE, local_link=link)))
        for link in ("nvlink-h100", "pcie4", "pcie3")
    )
    # 360, 12 and 6 GB/s: 30 and 60 times the reference's time.
    assert (slower - fast) / (slow - fast) == pytest.approx(59 / 29, rel=0.01)
    assert slow > 2 * fast


def test_where_weights_are_read_half_the_bytes_take_half_the_time() -> None:
    eight = replace(PLAIN, model=replace(DENSE, bytes_per_weight=1.0))
    assert step_s(PLAIN) / step_s(eight) == pytest.approx(2.0, rel=0.02)


def test_eight_bits_are_multiplied_twice_as_fast_as_sixteen_and_four_no_faster() -> None:
    sixteen, eight, four = (
        step_s(replace(PLAIN, device=COMPUTES, model=replace(DENSE, bytes_per_weight=width)))
        for width in (2.0, 1.0, 0.55)
    )
    assert sixteen / eight == pytest.approx(2.0, rel=0.01)
    assert four == pytest.approx(eight, rel=0.01)


def test_uneven_draws_slow_experts_by_a_tenth_a_doubling_and_a_dense_model_not() -> None:
    def waste(model: Decoder, num_devices: int) -> float:
        one = replace(PLAIN, model=model)
        return num_devices * step_s(replace(one, num_devices=num_devices)) / step_s(one)

    assert [waste(DENSE, n) for n in (2, 8)] == pytest.approx([1.0, 1.0], rel=0.01)
    assert [waste(EXPERTS, n) for n in (2, 8)] == pytest.approx([1.1, 1.3], rel=0.01)


def exchange_s(num_devices: int, concurrency: int, times_wider: int) -> float:
    """Seconds that a layer so many times wider takes longer on a free device; parameters grow as
    the square of the width."""
    wider = replace(
        DENSE,
        num_parameters=times_wider**2 * DENSE.num_parameters,
        num_activated=times_wider**2 * DENSE.num_activated,
    )
    run = replace(PLAIN, device=FREE, num_devices=num_devices, concurrency=concurrency)
    return step_s(replace(run, model=wider)) - step_s(run)


def test_devices_that_share_a_layer_exchange_its_activations() -> None:
    """In proportion to the width and to the requests, and one device alone none."""
    exchanged = exchange_s(2, 16, 2)
    assert exchanged > 1e-5
    assert exchange_s(1, 16, 2) < 0.01 * exchanged
    assert exchange_s(2, 16, 3) == pytest.approx(2 * exchanged, rel=0.01)
    assert exchange_s(2, 32, 2) == pytest.approx(2 * exchanged, rel=0.01)


def media_s(output_tokens: float, media_s: float) -> float:
    """Seconds of a mean step that pictures of so many seconds add."""
    plain = replace(PLAIN, device=FREE, output_tokens=output_tokens)
    shown = replace(plain, workload=replace(plain.workload, media_s=media_s))
    return step_s(shown) - step_s(plain)


def test_a_step_that_takes_in_pictures_takes_their_time_once_and_a_fifth_for_each() -> None:
    """A step in 1e4 takes one in; where an answer has one token, all but e^-1 of them do."""
    assert 1e4 * media_s(1e4, 0.5) == pytest.approx(0.5 * (1 + 1 / 5), rel=0.01)
    assert media_s(1, 0.5) == pytest.approx(0.5 * (1 - 0.368 + 1 / 5), rel=0.15)
    assert media_s(100, 1.0) == pytest.approx(2 * media_s(100, 0.5), rel=0.01)


def test_no_more_run_at_once_than_the_cache_has_room_for() -> None:
    model = replace(DENSE, num_parameters=4e9, num_activated=4e9)
    taken = 4e3 * (1 + 1e4 / 2)  # bytes of a token in the one layer, tokens of a request
    ample, small = (
        replace(
            PLAIN,
            model=model,
            concurrency=4096,
            device=replace(READS, memory_bytes=(8e9 + requests * taken) / 0.9),
        )
        for requests in (1e5, 100)
    )
    assert PRIORS.cache_room([ample, small]) == [
        (pytest.approx(1e5 * taken), pytest.approx(taken)),
        (pytest.approx(100 * taken), pytest.approx(taken)),
    ]
    groups = Groups([ample])
    at_once = np.exp(logs(np.zeros((1, len(groups.spreads()))), Rows([ample, small], groups))[0, 3])
    assert at_once == pytest.approx([4096, 100], rel=0.01)
