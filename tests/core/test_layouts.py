"""The layout model keeps the laws of parallel training, recovers a known machine from a few runs,
and explains a few public measurements."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.hardware import lookup
from supple.core.layouts.model import (
    DEVICES,
    ImpossibleMeasurement,
    LayoutMeasurement,
    LayoutModel,
    LayoutRun,
    Transformer,
    fit_layouts,
)
from supple.core.layouts.stages import MeasuredLayer
from supple.core.spec import SpecError
from supple.core.types import ParallelLayout
from tests.examples import examples

GPT = Transformer(hidden_size=2048, num_layers=24, num_heads=16, seq_length=1024, vocab_size=51200)


def run(
    tp: int = 1, dp: int = 1, pp: int = 1, micro_batch: int = 4, num: int = 8, **rest: object
) -> LayoutRun:
    made = LayoutRun(
        model=GPT,
        layout=ParallelLayout(dp_replicate=dp, tp=tp, pp=pp),
        micro_batch_size=micro_batch,
        num_micro_batches=num,
    )
    return replace(made, **rest)  # type: ignore[arg-type]


def model_of(
    *measurements: LayoutMeasurement, per_node: int = 8, device: str = "a100"
) -> LayoutModel:
    return fit_layouts(
        measurements,
        device=DEVICES[device],
        link=lookup("infiniband-200"),
        local_link=lookup("nvlink-a100"),
        workers_per_node=per_node,
    )


UNMEASURED = model_of()


def time_of(asked: LayoutRun, model: LayoutModel = UNMEASURED) -> float:
    return model.predict(asked).value


RUNS = [
    run(tp, dp, pp, micro_batch, num)
    for tp, dp, pp in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (1, 2, 2))
    for micro_batch in (1, 2, 4, 8)
    for num in (2, 8)
]


def true_machine() -> LayoutModel:
    """Another machine than the priors': every parameter a third off, one way or the other."""
    rng = np.random.default_rng(3)
    off = 0.3 * rng.choice([-1.0, 1.0], size=len(UNMEASURED.log_parameters))
    moved = tuple(float(v) for v in np.asarray(UNMEASURED.log_parameters) + off)
    return replace(UNMEASURED, log_parameters=moved)


def measured(runs: Sequence[LayoutRun], noise: float = 0.0) -> list[LayoutMeasurement]:
    truth, rng = true_machine(), np.random.default_rng(5)
    return [
        LayoutMeasurement(
            run=asked, iteration_s=time_of(asked, truth) * math.exp(rng.normal(0.0, noise))
        )
        for asked in runs
    ]


def test_twenty_runs_teach_a_machine_that_is_not_the_catalogues() -> None:
    drawn = np.random.default_rng(1).choice(len(RUNS), 20, replace=False)
    model = model_of(*measured([RUNS[index] for index in drawn]))
    before = [abs(math.log(time_of(r) / time_of(r, true_machine()))) for r in RUNS]
    after = [abs(math.log(time_of(r, model) / time_of(r, true_machine()))) for r in RUNS]
    assert max(after) < 0.05 < max(before)


@pytest.mark.slow
def test_four_of_five_intervals_hold_the_truth() -> None:
    held: list[bool] = []
    for seed in range(10):
        drawn = np.random.default_rng(seed).choice(len(RUNS), 20, replace=False)
        rows = measured(RUNS, noise=0.08)
        model = model_of(*[rows[index] for index in drawn])
        for index in set(range(len(RUNS))) - set(drawn.tolist()):
            found = model.predict(RUNS[index])
            held.append(found.low <= rows[index].iteration_s <= found.high)
    assert 0.65 <= np.mean(held) <= 0.95


def test_measuring_narrows_the_interval_and_changes_the_source() -> None:
    asked = run(2, micro_batch=3)
    wide, narrow = UNMEASURED.predict(asked), model_of(*measured(RUNS[:20])).predict(asked)
    assert (wide.source, narrow.source) == ("assumed", "fitted")
    assert narrow.high / narrow.low < wide.high / wide.low


def test_a_layout_across_nodes_is_assumed_until_one_was_measured() -> None:
    model = model_of(*measured(RUNS[:20]))
    assert model.predict(run(8, 2)).source == "assumed"
    assert model.predict(run(8, 1)).source == "fitted"
    crossed = LayoutMeasurement(run=run(8, 2), iteration_s=1.0)
    assert model_of(*measured(RUNS[:20]), crossed).predict(run(8, 4)).source == "fitted"


def test_a_group_that_leaves_the_node_pays_for_it() -> None:
    apart = model_of(per_node=2)
    assert time_of(run(tp=4), apart) > 1.2 * time_of(run(tp=4))
    assert time_of(run(dp=4), apart) > time_of(run(dp=4))
    assert time_of(run(pp=4), apart) > time_of(run(pp=4))
    assert time_of(run(tp=2), apart) == time_of(run(tp=2))


def test_a_card_for_every_accelerator_spares_the_gradients_the_queue() -> None:
    def seconds(link: str, tp: int) -> float:
        model = fit_layouts(
            [],
            device=DEVICES["h100"],
            link=lookup(link),
            local_link=lookup("nvlink-h100"),
            workers_per_node=8,
        )
        return model.predict(run(tp=tp, dp=64 // tp)).value

    assert seconds("infiniband-400x8", 8) < seconds("infiniband-400", 8)
    assert seconds("infiniband-400x8", 1) == seconds("infiniband-400", 1)


def test_the_pipeline_bubble_shrinks_with_more_micro_batches() -> None:
    def loss(num: int) -> float:
        return 4 * time_of(run(pp=4, num=num)) / time_of(run(num=num))

    assert loss(1) > loss(4) > loss(16) > loss(64) > 1.0


def test_a_tiny_micro_batch_costs_what_its_launches_cost() -> None:
    small = replace(GPT, hidden_size=256)
    one, two = (time_of(run(micro_batch=size, model=small)) for size in (1, 2))
    assert two < 1.1 * one
    one, two = (time_of(run(micro_batch=size)) for size in (16, 32))
    assert two > 1.8 * one


def test_recomputing_and_sharding_cost_time() -> None:
    assert time_of(run(recompute=True)) > 1.1 * time_of(run())
    sharded = run(layout=ParallelLayout(dp_shard=4))
    assert time_of(sharded) > time_of(run(dp=4))


def test_sharded_ranks_gather_the_weights_for_every_micro_batch() -> None:
    """Forward and backward, and scatter the gradients: over a slow network that is all they do."""
    link = lookup("ethernet-25")
    slow = fit_layouts(
        [], device=DEVICES["h100"], link=link, local_link=lookup("pcie4"), workers_per_node=8
    )
    parameters = 12 * 2048**2 * 24 + 51200 * 2048
    gather = 63 / 64 * 2 * parameters / link.bandwidth_bytes_per_s
    shards = run(layout=ParallelLayout(dp_shard=64), micro_batch=1)

    def seconds(num: int, asked: LayoutRun = shards) -> float:
        return time_of(replace(asked, num_micro_batches=num), slow) / 1.06  # six doublings

    assert seconds(8) > 8 * 3 * gather
    assert seconds(9) - seconds(8) == pytest.approx(3 * gather, rel=0.05)
    # Replicas of eight shards inside a node gather there, and all-reduce an eighth each.
    both = run(layout=ParallelLayout(dp_replicate=8, dp_shard=8), micro_batch=1)
    assert seconds(9, both) < seconds(9) / 3


def test_gathers_hide_behind_arithmetic_that_takes_longer() -> None:
    shards, whole = run(layout=ParallelLayout(dp_shard=4)), run(dp=4)
    more = [
        time_of(replace(asked, num_micro_batches=9)) - time_of(asked) for asked in (shards, whole)
    ]
    assert more[1] < more[0] < 1.01 * more[1]


@settings(max_examples=examples(60))
@given(
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([1, 2, 8, 64]),
    st.integers(1, 24),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_every_prediction_is_positive_finite_and_grows_with_the_work(
    tp: int, dp: int, pp: int, micro_batch: int, num: int
) -> None:
    asked = run(tp, dp, pp, micro_batch, num)
    found = UNMEASURED.predict(asked)
    assert 0 < found.low <= found.value <= found.high < math.inf
    assert time_of(replace(asked, num_micro_batches=num + 1)) > found.value
    assert time_of(replace(asked, micro_batch_size=micro_batch + 1)) > found.value
    assert time_of(replace(asked, model=replace(GPT, num_layers=48))) > found.value


def test_a_time_that_no_device_can_reach_is_refused() -> None:
    row = LayoutMeasurement(run=run(), iteration_s=time_of(run()) / 20.0)
    with pytest.raises(ValueError, match=r"TFLOP/s: the data sheet of a100 states 312"):
        model_of(row)


def test_no_low_end_is_faster_than_the_data_sheet_until_something_was_measured() -> None:
    """96 h^2 tok and the head: of such a width that the matrices are all there is."""
    wide = replace(GPT, hidden_size=65536, num_layers=8)
    asked = run(model=wide, micro_batch=4, num=64, recompute=True)
    layers = 8 * 96 * 65536**2 * (1 + 1024 / (12 * 65536))
    operations = 64 * 4 * 1024 * (layers + 6 * 65536 * 51200)
    found = UNMEASURED.predict(asked)
    assert found.low == pytest.approx(operations / 312e12)
    assert found.low < found.value < found.high
    # Whoever computes in 8 bits is not told that it cannot be.
    fast = model_of(LayoutMeasurement(run=asked, iteration_s=0.6 * found.low))
    more = fast.predict(replace(asked, num_micro_batches=128))
    assert more.low < 0.99 * more.value < more.value < 2 * found.low


def test_milliseconds_given_as_seconds_are_refused_by_the_row_and_the_rule() -> None:
    good = LayoutMeasurement(run=run(2), iteration_s=time_of(run(2)))
    wrong = LayoutMeasurement(run=run(), iteration_s=1000.0 * time_of(run()))
    with pytest.raises(ValueError, match=r"measurement 2: .* less than 0\.1% .* not milliseconds"):
        model_of(good, wrong)
    with pytest.raises(ImpossibleMeasurement) as refused:
        model_of(good, wrong)
    assert refused.value.index == 1


@pytest.mark.parametrize("factor", [0.2, 0.5, 3.0])
def test_one_odd_run_of_many_is_left_out_as_if_it_had_not_been_measured(factor: float) -> None:
    rows = measured(RUNS[:20], noise=0.02)
    wrong = replace(rows[7], iteration_s=factor * rows[7].iteration_s)
    found = model_of(*rows[:7], wrong, *rows[8:])
    assert found.odd == (wrong,)
    assert found.predict(wrong.run) == model_of(*rows[:7], *rows[8:]).predict(wrong.run)
    assert model_of(*rows).odd == ()


@pytest.mark.parametrize(
    "odd",
    [{"micro_batch_size": 1.5}, {"num_micro_batches": math.nan}, {"layout": ParallelLayout(tp=0)}],
)
def test_a_run_is_counted_in_whole_numbers(odd: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="each must be a whole number of at least 1"):
        replace(run(), **odd)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"workers_per_node=2.5: it must be a whole number"):
        model_of(per_node=2.5)  # type: ignore[arg-type]


def test_an_accelerator_is_joined_by_a_link_of_the_catalogue() -> None:
    assert replace(DEVICES["h100"], local_link="PCIe4").local_link == "PCIe4"
    with pytest.raises(SpecError, match="the local_link of h100 warp: unknown"):
        replace(DEVICES["h100"], local_link="warp")
    with pytest.raises(ValueError, match="must be positive and finite"):
        replace(DEVICES["h100"], flops_per_s=math.nan)


def test_of_few_runs_a_surprising_one_is_news() -> None:
    rows = measured(RUNS[:4])
    wrong = replace(rows[1], iteration_s=3.0 * rows[1].iteration_s)
    found = model_of(rows[0], wrong, *rows[2:])
    assert found.odd == () and found.predict(wrong.run).value == wrong.iteration_s


def test_a_tiny_model_may_use_next_to_nothing_of_its_accelerator() -> None:
    """Its launches are all it does: a millionth of the data sheet is no reason to refuse it."""
    tiny = Transformer(hidden_size=64, num_layers=2, num_heads=2, seq_length=64, vocab_size=300)
    asked = run(model=tiny, micro_batch=1)
    model = model_of(LayoutMeasurement(run=asked, iteration_s=10.0 * time_of(asked)))
    assert time_of(asked, model) == pytest.approx(10.0 * time_of(asked))


def test_a_slow_link_that_nobody_named_is_no_reason_to_refuse() -> None:
    asked = run(dp=8, micro_batch=1, num=1)
    seconds = 50.0 * time_of(asked)
    model = model_of(LayoutMeasurement(run=asked, iteration_s=seconds))
    assert time_of(asked, model) == pytest.approx(seconds)


@pytest.mark.parametrize("times", [0.3, 0.9, 5.0, 40.0])
def test_what_was_measured_is_given_as_measured_however_far_from_expected(times: float) -> None:
    seconds = times * time_of(run(2))
    found = model_of(LayoutMeasurement(run=run(2), iteration_s=seconds)).predict(run(2))
    assert (found.value, found.source) == (pytest.approx(seconds), "measured")
    assert 1.05 < found.high / found.low < 1.12


def test_repeats_that_contradict_each_other_are_no_better_known_than_they_differ() -> None:
    twice = [LayoutMeasurement(run=run(2), iteration_s=seconds) for seconds in (1.0, 2.0)]
    found = model_of(*twice).predict(run(2))
    assert found.low < 1.0 < 2.0 < found.high


def test_measuring_the_very_run_leaves_the_error_of_a_measurement() -> None:
    promised = UNMEASURED.half_width(run(2), also=[run(2)])
    row = LayoutMeasurement(run=run(2), iteration_s=time_of(run(2)))
    assert promised == pytest.approx(model_of(row).half_width(run(2)))
    assert promised < UNMEASURED.half_width(run(2), also=[run(4)]) < UNMEASURED.half_width(run(2))


def test_what_makes_two_runs_slow_divides_out_of_their_ratio() -> None:
    one, other = run(1), run(2)
    found = UNMEASURED.ratio(one, other)
    under, over = UNMEASURED.predict(one), UNMEASURED.predict(other)
    assert found.value == pytest.approx(over.value / under.value)
    apart = math.hypot(*(math.log(row.high / row.value) for row in (under, over)))
    assert 0.1 * apart < math.log(found.high / found.value) < 0.5 * apart
    assert UNMEASURED.ratio(one, one).low == UNMEASURED.ratio(one, one).high == 1.0


def test_two_measured_runs_have_the_errors_of_both() -> None:
    rows = [LayoutMeasurement(run=asked, iteration_s=time_of(asked)) for asked in (run(1), run(2))]
    model = model_of(*rows)
    width = math.log(model.ratio(run(1), run(2)).high / model.ratio(run(1), run(2)).value)
    alone = math.log(model.predict(run(1)).high / model.predict(run(1)).value)
    assert width == pytest.approx(math.sqrt(2.0) * alone)
    assert model.ratio(run(1), run(2)).source == "measured"


@pytest.mark.slow
def test_four_of_five_ratios_of_two_runs_hold_the_truth() -> None:
    held: list[bool] = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = measured(RUNS, noise=0.08)
        rest = rng.permutation(len(RUNS))
        model = model_of(*[rows[index] for index in rest[:20]])
        for one, other in zip(rest[20::2], rest[21::2], strict=False):
            found = model.ratio(RUNS[one], RUNS[other])
            held.append(found.low <= rows[other].iteration_s / rows[one].iteration_s <= found.high)
    assert 0.65 <= np.mean(held) <= 0.95


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_a_slower_clock_scales_the_prediction(scale: float) -> None:
    rows = measured(RUNS)
    slow = [replace(row, iteration_s=row.iteration_s * scale) for row in rows]
    plain, scaled = model_of(*rows), model_of(*slow)
    for asked in (run(2, micro_batch=2), run(1, 2, 2)):
        assert time_of(asked, scaled) == pytest.approx(scale * time_of(asked, plain), rel=0.25)


def test_an_outlier_bends_the_fit_little() -> None:
    rows = measured(RUNS[:30])
    bent = [replace(rows[0], iteration_s=10 * rows[0].iteration_s), *rows[1:]]
    for asked in (run(2, 2), run(1, 2, 2)):
        assert time_of(asked, model_of(*bent)) == pytest.approx(
            time_of(asked, model_of(*rows)), rel=0.15
        )


LAYERS = tuple(
    MeasuredLayer(
        host_s=1e-3,
        device_s_per_sample=per_sample,
        num_parameters=1_000_000,
        output_bytes_per_sample=1 << 20,
    )
    for per_sample in (1e-3, 1e-3, 2e-3, 4e-3)
)


def test_any_module_is_planned_by_its_measured_layers() -> None:
    whole = time_of(run(model=LAYERS, micro_batch=2, num=16))
    assert whole == pytest.approx(16 * (4 * 1e-3 + 2 * 8e-3), rel=0.1)
    # Stages of three layers and of one: 11 ms and 9 ms.
    halves = time_of(run(pp=2, model=LAYERS, micro_batch=2, num=16))
    assert halves == pytest.approx(20e-3 + 15 * 11e-3, rel=0.1)


def test_tensor_ranks_share_the_layers_that_say_what_it_takes() -> None:
    shared = tuple(replace(layer, num_collectives=2) for layer in LAYERS)
    alone, replicated = time_of(run(model=LAYERS)), time_of(run(tp=4, model=LAYERS))
    assert replicated == pytest.approx(alone * 1.02, rel=1e-3), "nothing shared, two doublings"
    host, device = 4 * 1e-3, 4 * 8e-3 / 4
    # Two collectives of every layer's output of 4 MiB, at 2e-5 s and the speed of the link.
    moved = 8 * (2e-5 + 2 * 3 / 4 * 4 * 2**20 / lookup("nvlink-a100").bandwidth_bytes_per_s)
    expected = 8 * (host + device + moved) * 1.02
    assert time_of(run(tp=4, model=shared)) == pytest.approx(expected, rel=0.05)


def test_recomputing_repeats_the_collectives_of_the_forward_pass() -> None:
    """A layer whose time is all collectives: six of them where there were four."""
    tiny = replace(LAYERS[0], host_s=1e-12, device_s_per_sample=0.0, num_parameters=0)
    many = (replace(tiny, num_collectives=40_000),)
    plain, again = (time_of(run(tp=2, model=many, recompute=r)) for r in (False, True))
    assert again == pytest.approx(1.5 * plain, rel=0.01)


def test_every_parameter_is_updated_at_the_speed_of_the_memory() -> None:
    small, large = (
        (replace(LAYERS[0], num_parameters=number), *LAYERS[1:]) for number in (0, 10**9)
    )
    added = time_of(run(model=large)) - time_of(run(model=small))
    assert added == pytest.approx(16 * 10**9 / (0.5 * 1.56e12), rel=1e-6)


def test_stragglers_cost_one_percent_a_doubling() -> None:
    weightless = tuple(replace(layer, num_parameters=0) for layer in LAYERS)
    alone = time_of(run(model=weightless))
    for doublings in (1, 3, 6):
        together = time_of(run(dp=2**doublings, model=weightless))
        assert together == pytest.approx(alone * (1.0 + 0.01 * doublings), rel=1e-6)


def test_the_head_multiplies_and_its_logits_go_through_the_memory() -> None:
    def added(**rates: float) -> float:
        """Seconds of 100,000 more words, with a network and an optimizer that cost nothing."""
        model = fit_layouts(
            [],
            device=replace(DEVICES["a100"], **rates),  # type: ignore[arg-type]
            link=lookup("infiniband-200"),
            local_link=lookup("nvlink-a100"),
            workers_per_node=8,
        )
        wide = replace(GPT, vocab_size=151_200)
        return time_of(run(model=wide), model) - time_of(run(), model)

    tok = 4 * 1024
    arithmetic = 8 * 6 * tok * 2048 * 100_000 / (0.6 * 312e12)
    assert added(memory_bytes_per_s=1e20) == pytest.approx(arithmetic, rel=1e-3)
    memory = (8 * 36 * tok * 100_000 + 16 * 2048 * 100_000) / (0.5 * 1.56e12)
    assert added(flops_per_s=1e25) == pytest.approx(memory, rel=1e-3)


def test_attention_that_keeps_no_scores_moves_none_through_the_memory() -> None:
    long = replace(GPT, seq_length=16384)
    full, flash = (
        time_of(run(model=replace(long, stores_scores=kept), micro_batch=1))
        for kept in (True, False)
    )
    moved = 8 * 24 * 3 * 5 * 16 * 16384**2 / (0.5 * 1.56e12)
    assert full - flash == pytest.approx(moved, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layout": ParallelLayout(cp=2)}, "Give cp=1"),
        ({"layout": ParallelLayout(pp=25)}, "pp of 1 to 24"),
        ({"layout": ParallelLayout(tp=0)}, "at least 1"),
        ({"layout": ParallelLayout(tp=-2, dp_shard=-2)}, "tp=-2.*each must be a whole number"),
        ({"layout": ParallelLayout(pp=-1, dp_replicate=-1)}, "each must be a whole number"),
        ({"model": ()}, "0 measured layers was given: it needs at least 1"),
        ({"model": (replace(LAYERS[0], host_s=0.0, device_s_per_sample=0.0),) * 2}, "all of 0 s"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"num_micro_batches": 0}, "at least 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 0}, "at least 1"),
        ({"num_layers": -3}, "at least 1"),
        ({"num_heads": 0}, "at least 1"),
        ({"seq_length": 0}, "at least 1"),
        ({"vocab_size": 0}, "at least 1"),
        ({"num_heads": 15}, "2048 does not divide into 15 heads"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(fields: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(GPT, **fields)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_time_that_cannot_be_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        model_of(LayoutMeasurement(run=run(), iteration_s=seconds))


def test_a_node_without_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="workers_per_node=0"):
        model_of(per_node=0)


def test_a_public_row_is_foretold_by_the_others() -> None:
    """Eight rows of vTrain's ground truth (VIA-Research, MIT licence): GPT, h = 1024, 12 layers,
    two A100. Each is asked of a model fitted to the seven others."""
    rows = [
        (4, 1, 1, 2, 1, 0.0924),
        (16, 4, 1, 2, 1, 0.1643),
        (16, 1, 2, 1, 1, 0.6986),
        (16, 1, 1, 1, 2, 0.4098),
        (2, 1, 1, 1, 2, 0.0700),
        (16, 8, 2, 1, 1, 0.1595),
        (4, 1, 2, 1, 1, 0.1762),
        (8, 1, 1, 1, 2, 0.2156),
    ]
    measurements = [
        LayoutMeasurement(
            run=run(
                tp, dp, pp, size, batch // dp // size,
                model=replace(GPT, hidden_size=1024, num_layers=12), recompute=True,
            ),
            iteration_s=seconds,
        )
        for batch, size, tp, dp, pp, seconds in rows
    ]  # fmt: skip
    told: list[float] = []
    untold: list[float] = []
    for row in measurements:
        seven = model_of(*[other for other in measurements if other is not row])
        told.append(abs(math.log(time_of(row.run, seven) / row.iteration_s)))
        untold.append(abs(math.log(time_of(row.run) / row.iteration_s)))
    assert max(told) < 0.15
    assert np.mean(told) < 0.06 < np.mean(untold) / 3
