"""Throughput and token latency: what physics demands, and a made-up device found again."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.layouts.model import DEVICES, Device
from supple.core.llm.decoding import (
    Decoder,
    DecodingRun,
    Groups,
    Rows,
    Workload,
    logs,
    weights_fit,
)
from supple.core.llm.inference import InferenceModel, ServingMeasurement, fit_inference
from supple.core.types import Estimate
from tests.examples import examples

H100, B200 = DEVICES["h100"], DEVICES["b200"]
CHAT = Workload(name="chat", prompt_tokens=300)
SMALL = Decoder(family="small", num_parameters=8e9, num_activated=8e9)
MIDDLE = Decoder(family="middle", num_parameters=27e9, num_activated=27e9)
LARGE = Decoder(family="large", num_parameters=70e9, num_activated=70e9)
EXPERTS = Decoder(family="experts", num_parameters=30e9, num_activated=3e9)
PRIORS = fit_inference([])


def run(model: Decoder = SMALL, concurrency: int = 32, **changes: object) -> DecodingRun:
    plain = DecodingRun(
        model=model,
        device=H100,
        num_devices=1,
        concurrency=concurrency,
        workload=CHAT,
        output_tokens=500,
    )
    return replace(plain, **changes)  # pyright: ignore[reportArgumentType]


def tokens(asked: DecodingRun, model: InferenceModel = PRIORS) -> float:
    return model.predict(asked).tokens_per_s.value


def wait(asked: DecodingRun, model: InferenceModel = PRIORS) -> float:
    return model.predict(asked).itl_p90_s.value


def measured(runs: list[DecodingRun], factor: float = 1.0) -> list[ServingMeasurement]:
    """A machine whose priors are right except that everything is `factor` times slower."""
    return [
        ServingMeasurement(run=one, tokens_per_s=tokens(one) / factor, itl_p90_s=wait(one) * factor)
        for one in runs
    ]


def sweep() -> list[DecodingRun]:
    return [
        run(model, concurrency, device=device)
        for model in (SMALL, MIDDLE, EXPERTS)
        for concurrency in (8, 32, 128)
        for device in (H100, B200)
    ]


def test_one_request_on_an_h100_is_near_the_time_to_read_the_weights() -> None:
    read_s = 16e9 / 3.35e12
    assert read_s < wait(run(concurrency=1)) < 4 * read_s


def test_without_measurements_the_numbers_are_assumed_and_wide() -> None:
    found = PRIORS.predict(run()).tokens_per_s
    assert found.source == "assumed"
    assert found.high / found.low > 2.5


@settings(max_examples=examples(40))
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_more_requests_at_once_never_wait_less(one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert wait(run(concurrency=few)) <= wait(run(concurrency=many)) * 1.000001


def test_throughput_grows_with_concurrency_until_the_cache_is_full() -> None:
    rates = [tokens(run(concurrency=b)) for b in (1, 8, 64, 256)]
    assert rates == sorted(rates)
    assert rates[3] < 256 * rates[0]
    long = replace(CHAT, prompt_tokens=30_000)
    full = [tokens(run(concurrency=b, workload=long)) for b in (512, 2048)]
    assert full[1] == pytest.approx(full[0], rel=0.02)


def test_more_devices_are_faster_and_each_does_less() -> None:
    one, four = (tokens(run(MIDDLE, num_devices=n)) for n in (1, 4))
    assert one < four < 4 * one


def test_few_tokens_touch_few_experts() -> None:
    dense = replace(EXPERTS, num_activated=30e9)
    assert wait(run(EXPERTS, 1)) < wait(run(dense, 1)) / 1.5
    assert wait(run(EXPERTS, 1)) < wait(run(EXPERTS, 64)) / 1.3


def test_a_faster_memory_gives_faster_tokens() -> None:
    assert wait(run(MIDDLE, device=B200)) < wait(run(MIDDLE))


def test_long_prompts_take_time_from_the_answers() -> None:
    long = replace(CHAT, prompt_tokens=8000)
    assert tokens(run(workload=long)) < tokens(run()) / 1.2


def test_a_slower_machine_is_learned_for_a_model_never_seen() -> None:
    model = fit_inference(measured(sweep(), factor=1.5))
    asked = run(replace(MIDDLE, family="new", num_parameters=14e9, num_activated=14e9))
    assert tokens(asked, model) == pytest.approx(tokens(asked) / 1.5, rel=0.2)
    found = model.predict(asked).tokens_per_s
    assert found.source == "fitted"
    assert found.low < found.value < found.high


def test_a_family_that_differs_from_the_others_widens_the_interval() -> None:
    odd = [replace(one, model=replace(SMALL, family="odd")) for one in sweep()[:6]]
    same = fit_inference(measured(sweep()) + measured(odd))
    mixed = fit_inference(measured(sweep()) + measured(odd, factor=4.0))
    asked = run(LARGE, num_devices=4)
    one, other = (m.predict(asked).tokens_per_s for m in (same, mixed))
    assert other.high / other.low > 1.2 * one.high / one.low


def test_a_single_absurd_row_moves_the_fit_little() -> None:
    rows = measured(sweep())
    wrong = replace(rows[0], tokens_per_s=rows[0].tokens_per_s / 1000)
    model = fit_inference([wrong, *rows[1:]])
    asked = run(LARGE, num_devices=4)
    assert tokens(asked, model) == pytest.approx(tokens(asked), rel=0.2)


def test_measurements_of_one_configuration_that_contradict_each_other_are_refused() -> None:
    row = measured([run()])[0]
    slower = replace(row, itl_p90_s=12.0 * row.itl_p90_s)
    with pytest.raises(ValueError, match="differ by less than 10 times"):
        fit_inference([row, slower])
    fit_inference([row, replace(row, itl_p90_s=3.0 * row.itl_p90_s)])


def test_the_order_of_measurements_does_not_matter() -> None:
    rows = measured(sweep(), factor=1.3)
    one, other = fit_inference(rows), fit_inference(rows[::-1])
    assert tokens(run(LARGE, num_devices=4), one) == pytest.approx(
        tokens(run(LARGE, num_devices=4), other), rel=1e-3
    )


def test_what_is_odd_about_a_session_stays_with_it() -> None:
    """One family on one machine is twice as slow as all else: it is told so of more requests, and
    a family never seen hardly is."""
    odd = replace(SMALL, family="odd")
    slow = measured([run(odd, b) for b in (8, 16, 64, 128)], factor=2.0)
    plain = measured(sweep())
    model = fit_inference([*plain, *slow])
    again, other = run(odd, 32), run(replace(MIDDLE, family="new"), 32)
    assert tokens(again, model) < 0.75 * tokens(again)
    assert tokens(other, model) == pytest.approx(tokens(other), rel=0.15)
    known, new = (model.predict(asked).tokens_per_s for asked in (again, other))
    assert known.high / known.low < new.high / new.low


def test_the_requests_that_ran_at_once_tell_how_large_the_cache_was() -> None:
    """A full cache, at other families twice as large as thought."""
    long = replace(CHAT, prompt_tokens=20_000)
    runs = [run(m, 512, workload=long) for m in (SMALL, MIDDLE)]
    held = [ServingMeasurement(run=r, tokens_per_s=tokens(r), itl_p90_s=wait(r)) for r in runs]
    groups = Groups(runs)
    at_once = np.exp(logs(np.zeros((1, len(groups.spreads()))), Rows(runs, groups))[0, 3])
    told = [replace(m, running=2.0 * n) for m, n in zip(held, at_once, strict=True)]
    asked = run(replace(SMALL, family="new"), 512, workload=long)
    assert tokens(asked, fit_inference(told)) > 1.05 * tokens(asked, fit_inference(held))


def test_a_run_that_was_measured_is_given_as_measured_whatever_the_fit_says() -> None:
    odd = measured([run(SMALL, 16)], factor=3.0)[0]
    model = fit_inference([*measured(sweep()), odd])
    found = model.predict(odd.run)
    assert found.tokens_per_s.value == odd.tokens_per_s
    assert (found.itl_p90_s.value, found.itl_p90_s.source) == (odd.itl_p90_s, "measured")
    assert found.tokens_per_s.high < 1.05 * odd.tokens_per_s
    assert 1.1 * odd.itl_p90_s < found.itl_p90_s.high < 1.2 * odd.itl_p90_s
    for change in ({"concurrency": 17}, {"output_tokens": 501}, {"device": B200}):
        other = model.predict(replace(odd.run, **change))  # type: ignore[arg-type]
        assert other.itl_p90_s.source == "fitted"


def test_an_interval_covers_what_measurements_of_one_configuration_differ_by() -> None:
    """Three times, which is not yet refused, beside others of the session that agree."""
    asked = run(SMALL, 16)
    others = [run(SMALL, n) for n in (1, 4, 64)]
    known = [*measured(others), *measured([asked]), *measured([asked], factor=3.0)]
    for rows in (known, known[-2:]):
        found = fit_inference(rows).predict(asked)
        assert found.tokens_per_s.low < tokens(asked) / 3.0
        assert found.tokens_per_s.high > tokens(asked)
        assert found.itl_p90_s.high > 3.0 * wait(asked) > wait(asked) > found.itl_p90_s.low


def test_a_median_latency_separates_plain_steps_from_those_with_prompts() -> None:
    busy = [run(m, 128, output_tokens=200) for m in (SMALL, MIDDLE)]
    plain = measured(busy)
    told = [replace(m, itl_p50_s=m.itl_p90_s) for m in plain]
    asked = run(replace(SMALL, family="new"), 8, output_tokens=200)
    assert wait(asked, fit_inference(told)) > wait(asked, fit_inference(plain))


def alone(asked: Decoder, bits: float, device: Device, num_devices: int) -> Estimate:
    """Tokens per second of a single request of no prompt."""
    one = run(
        replace(asked, bytes_per_weight=bits / 8),
        1,
        device=device,
        num_devices=num_devices,
        workload=replace(CHAT, prompt_tokens=1),
        output_tokens=2048,
    )
    return PRIORS.predict(one).tokens_per_s


@pytest.mark.parametrize(
    ("billions", "activated", "bits", "num_devices", "seen"),
    [
        *((8.2, 8.2, 16, 1, 82), (8.2, 8.2, 8, 1, 150), (32.8, 32.8, 16, 1, 21)),
        *((32.8, 32.8, 8, 1, 46), (0.6, 0.6, 16, 1, 414), (0.6, 0.6, 8, 1, 458)),
        *((30.5, 3.3, 16, 1, 137), (30.5, 3.3, 8, 1, 155), (235, 22, 8, 4, 72)),
    ],
)
def test_data_sheets_alone_hold_what_qwen_published_of_its_models_on_h20(
    billions: float, activated: float, bits: int, num_devices: int, seen: float
) -> None:
    """Qwen's speed benchmark: SGLang, one request, 2,048 tokens."""
    h20 = replace(H100, name="h20", flops_per_s=148e12, memory_bytes_per_s=4e12, memory_bytes=96e9)
    model = replace(SMALL, num_parameters=1e9 * billions, num_activated=1e9 * activated)
    found = alone(model, bits, h20, num_devices)
    assert found.low < seen < found.high


def test_eight_bits_are_not_slower_than_sixteen_before_anything_was_measured() -> None:
    for model in (SMALL, EXPERTS, replace(EXPERTS, num_parameters=60e9, num_activated=6e9)):
        assert alone(model, 8, H100, 2).value > 0.99 * alone(model, 16, H100, 2).value


@pytest.mark.parametrize(("concurrency", "seen"), [(256, 9_000), (512, 14_500)])
def test_data_sheets_alone_hold_what_an_engine_does_with_8b_on_an_h100(
    concurrency: int, seen: float
) -> None:
    short = run(SMALL, concurrency, workload=replace(CHAT, prompt_tokens=200), output_tokens=200)
    found = PRIORS.predict(short).tokens_per_s
    assert found.low < seen < found.high


def test_the_tail_is_flat_until_a_tenth_of_the_steps_take_in_prompts() -> None:
    def over_the_median(concurrency: int) -> float:
        runs = [run(concurrency=concurrency, output_tokens=500)]
        groups = Groups(runs)
        found = logs(np.zeros((1, len(groups.spreads()))), Rows(runs, groups))
        return float(np.exp(found[0, 1, 0] - found[0, 2, 0]))

    assert over_the_median(8) < 1.1
    assert over_the_median(128) > 1.3


@pytest.mark.parametrize("extra", ["itl_p50_s", "running"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_an_extra_figure_that_is_no_positive_number_is_refused(extra: str, value: float) -> None:
    good = ServingMeasurement(run=run(), tokens_per_s=100.0, itl_p90_s=0.01)
    with pytest.raises(ValueError, match="must be positive"):
        fit_inference([replace(good, **{extra: value})])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_measurement_that_is_no_positive_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        fit_inference([ServingMeasurement(run=run(), tokens_per_s=value, itl_p90_s=0.01)])
    with pytest.raises(ValueError, match="must be positive"):
        fit_inference([ServingMeasurement(run=run(), tokens_per_s=100.0, itl_p90_s=value)])


def test_weights_that_do_not_fit_are_refused_with_the_arithmetic() -> None:
    assert not weights_fit(run(LARGE))
    told = r"140 GB of weights on 1 accelerator \(h100\): 80 GB, of which engines use 90%, 72 GB\."
    with pytest.raises(ValueError, match=told):
        PRIORS.predict(run(LARGE))
    assert weights_fit(run(LARGE, num_devices=2))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("noun", "field", "values"),
    [
        (run(), "num_devices", (0, 1.5, NAN, INF)),
        (run(), "concurrency", (0, 1.5, NAN, INF)),
        (run(), "output_tokens", (0.5, NAN, INF)),
        (SMALL, "num_parameters", (0, -8e9, NAN, INF)),
        (SMALL, "num_activated", (0, 9e9, NAN, INF)),
        (SMALL, "bytes_per_weight", (0, -2, NAN, INF)),
        (SMALL, "num_layers", (0, -5, 32.5, NAN)),
        (CHAT, "prompt_tokens", (0.5, -5, NAN, INF)),
        (CHAT, "media_s", (-1, NAN, INF)),
    ],
)
def test_a_number_that_no_run_model_or_workload_has_is_refused_where_it_is_given(
    noun: DecodingRun | Decoder | Workload, field: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=r"Correct the number\."):
            replace(noun, **{field: value})  # type: ignore[arg-type]


def test_more_parameters_activated_than_there_are_are_refused_by_the_rule() -> None:
    with pytest.raises(ValueError, match="no more parameters activated than there are"):
        replace(SMALL, num_activated=9e9)


def test_layers_follow_the_size_unless_they_are_given() -> None:
    assert SMALL.layers == pytest.approx(34)
    assert replace(SMALL, num_layers=32).layers == 32


def test_a_group_never_measured_is_at_its_prior() -> None:
    groups = Groups(sweep())
    other = run(workload=replace(CHAT, name="other"))
    x = 0.0 * groups.spreads()
    blocks = 4 * len(groups.workloads) + 3 * len(groups.sites)
    x[-blocks:] = 1.0
    found = logs(x[None], Rows([other], groups))
    assert found == pytest.approx(logs(0.0 * x[None], Rows([other], groups)))
    assert logs(x[None], Rows([run()], groups)) != pytest.approx(
        logs(0.0 * x[None], Rows([run()], groups))
    )
