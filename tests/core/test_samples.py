"""Samples to target at another batch size."""

import math
import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supple.core.fitting.estimates import Z80
from supple.core.training.samples import Run, SamplesModel, fit_samples
from tests.examples import examples


def curve(batch: float) -> float:
    return 1e6 * (1.0 + batch / 2000.0)


def runs(*sizes: float) -> list[Run]:
    return [Run(batch_size=size, samples=curve(size)) for size in sizes]


def width(model: SamplesModel, batch: float) -> float:
    found = model.predict(batch)
    return math.log(found.high / found.low)


def test_the_plain_law_is_found_again_between_and_beyond_the_runs() -> None:
    model = fit_samples(runs(128, 512, 2048, 8192))
    assert model.predict(1024).value == pytest.approx(curve(1024), rel=0.03)
    beyond = model.predict(16384)
    assert beyond.low < curve(16384) < beyond.high
    assert beyond.value == pytest.approx(curve(16384), rel=0.15)


def test_more_runs_narrow_the_interval_and_distance_widens_it() -> None:
    few, many = fit_samples(runs(512, 2048)), fit_samples(runs(128, 256, 512, 1024, 2048, 4096))
    assert width(many, 1400) < width(few, 1400)
    assert width(many, 1400) < width(many, 65536)


def test_beyond_the_largest_size_there_is_a_doubt_that_no_run_below_it_removes() -> None:
    """On MLPerf's reference points the next larger size lay outside more often than one in five."""
    model = fit_samples(runs(*(16.0 * 2**k for k in range(9))))

    def ratio(base: float, batch: float) -> float:
        found = model.efficiency(base, batch)
        return math.log(found.high / found.low)

    for doublings in (1, 4):
        batch, least = 4096.0 * 2**doublings, 2 * Z80 * 0.06 * math.sqrt(doublings)
        assert width(model, batch) > least
        assert ratio(4096, batch) > least and ratio(batch, 4096) > least
        assert ratio(batch, 2 * batch) > 2 * Z80 * 0.06
    assert width(model, 4096) < 2 * Z80 * 0.06
    assert ratio(4096, 2048) < 2 * Z80 * 0.06


def test_a_stated_learning_rate_tells_a_tuned_batch_from_one_left_behind() -> None:
    """MLPerf training v4.0, reference convergence points of llama2_70b_lora: the rate was kept
    from batch 8 to 32 and raised for 128, which took 11,290 samples."""
    seen = [
        Run(batch_size=8, samples=3187, lr=0.0004),
        Run(batch_size=16, samples=4051, lr=0.0004),
        Run(batch_size=32, samples=6029, lr=0.0004),
    ]
    model = fit_samples(seen)
    raised, kept = model.predict(128, 0.001), model.predict(128, 0.0004)
    assert raised.value == pytest.approx(11290, rel=0.15)
    assert kept.value > 1.2 * raised.value


def test_the_bend_of_bert_is_followed() -> None:
    """MLPerf training, newest reference convergence points of bert: flat to 4,608, then steep."""
    points = {
        1536: 2777588,
        3072: 2768215,
        4608: 2794752,
        6912: 3596122,
        8704: 4278144,
        16384: 5504307,
    }
    seen = [Run(batch_size=size, samples=samples) for size, samples in points.items()]
    found = fit_samples(seen).predict(12288)
    assert found.low < 4470336 < found.high
    assert found.source == "fitted"


def test_a_run_that_stopped_short_says_that_the_target_is_further() -> None:
    seen = runs(256, 512, 1024)
    stopped = Run(batch_size=8192, samples=2e7, reached=False)
    without, known = fit_samples(seen), fit_samples([*seen, stopped])
    assert without.predict(8192).value < 2e7 < known.predict(8192).high
    assert known.predict(8192).value > 1.5 * without.predict(8192).value
    assert known.predict(512).value == pytest.approx(curve(512), rel=0.1)


def test_a_run_that_stopped_before_anyone_expected_it_to_end_says_nothing() -> None:
    seen = runs(256, 512, 1024)
    stopped = Run(batch_size=8192, samples=1e4, reached=False)
    assert fit_samples([*seen, stopped]).predict(8192) == fit_samples(seen).predict(8192)


def test_most_runs_of_a_batch_decide_whether_it_reaches_the_target() -> None:
    seen = runs(256, 512, 1024)
    once = Run(batch_size=1024, samples=5e6, reached=False)
    same = fit_samples(seen).predict(2048)
    assert fit_samples([*seen, *runs(1024), once]).predict(2048).value == pytest.approx(
        same.value, rel=0.05
    )
    assert fit_samples([*seen, once, once]).predict(2048).value > same.value


def test_what_evaluations_round_up_is_given_back() -> None:
    """Epochs counted whole: three epochs means between two and three."""
    counted = [
        Run(batch_size=size, samples=math.ceil(exact), evaluated_every=1.0)
        for size, exact in [(32, 2.1), (64, 2.3), (128, 2.7), (256, 3.5), (512, 5.1), (1024, 8.3)]
    ]
    found = fit_samples(counted).predict(2048)
    assert found.low <= 15.0 <= found.high
    few = fit_samples([Run(batch_size=b, samples=1, evaluated_every=1.0) for b in (8, 16)])
    assert few.predict(32).low >= 0.5


def test_where_all_runs_end_at_the_second_evaluation_so_will_the_next() -> None:
    """Zeus, librispeech with deepspeech2: seeds of all sizes reach an easy target in epoch two."""
    counted = [
        Run(batch_size=size, samples=2.0, evaluated_every=1.0)
        for size in (8, 12, 24, 32, 56, 64, 72)
        for _ in range(5)
    ]
    found = fit_samples(counted).predict(48)
    assert (found.low, found.value) == (2.0, 2.0)
    assert found.high < 2.5


def test_many_evaluations_a_run_are_as_good_as_none() -> None:
    often = [
        Run(batch_size=size, samples=curve(size), evaluated_every=curve(size) / 1e6)
        for size in (128, 512, 2048)
    ]
    found, plain = fit_samples(often).predict(1024), fit_samples(runs(128, 512, 2048)).predict(1024)
    assert found.value == pytest.approx(plain.value, rel=1e-5)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), rel=1e-5)


def test_few_seeds_that_share_a_rounding_are_not_taken_for_many() -> None:
    """Ten seeds near 2.9 epochs end at three and four: their mean is no better than one phase."""

    def of(every: float) -> float:
        seen = [
            Run(batch_size=size, samples=samples, evaluated_every=every)
            for size in (32, 128, 512)
            for samples in (3.0, 3.0, 4.0, 3.0, 3.0)
        ]
        found = fit_samples(seen).predict(256)
        return math.log(found.high / found.low)

    assert of(1.0) > of(0.0)


def test_two_short_probes_tell_the_efficiency_but_not_the_samples() -> None:
    probes = [Run(batch_size=64, samples=1000.0), Run(batch_size=256, samples=1500.0)]
    model = fit_samples([], probes)
    assert model.efficiency(64, 256).value == pytest.approx(2 / 3, rel=0.15)
    assert "short probes" in model.why
    with pytest.raises(ValueError, match="Add one run that did"):
        model.predict(128)


def test_a_run_of_the_task_gives_probes_their_level() -> None:
    probes = [Run(batch_size=64, samples=1000.0), Run(batch_size=256, samples=1500.0)]
    model = fit_samples(runs(64), probes)
    assert model.predict(256).value == pytest.approx(1.5 * curve(64), rel=0.15)


def test_the_noise_scale_is_trusted_least_and_runs_overrule_it() -> None:
    alone = fit_samples(runs(256), noise_scale=2000.0)
    assert alone.efficiency(256, 256).value == 1.0
    assert "rough guide" in alone.why
    found = fit_samples(runs(256, 1024, 4096, 16384), noise_scale=200.0)
    assert found.source == "fitted"
    assert found.predict(8192).value == pytest.approx(curve(8192), rel=0.1)
    assert width(alone, 8192) > 3 * width(found, 8192)


def test_far_from_the_base_batch_a_noise_scale_is_read_as_half_of_the_critical_batch() -> None:
    """Pollux's convergence traces (OSDI 2021), imagenet: noise scale 6,870 samples along the run
    at batch 200; at 12,800 it took 1.80 times the samples, where Pollux's formula says 2.78."""
    found = fit_samples([Run(batch_size=200, samples=1.0)], noise_scale=6870.0).predict(12800)
    assert found.low < 1.80 < found.high
    assert found.value == pytest.approx(1.80, rel=0.12)


def test_an_absurd_run_is_left_out_and_named() -> None:
    seen = runs(128, 256, 512, 1024, 2048)
    absurd = Run(batch_size=700, samples=100 * curve(700))
    found = fit_samples([*seen, absurd])
    assert found.predict(800) == fit_samples(seen).predict(800)
    assert found.why.endswith("left out, because most others contradict it: batch 700")
    with pytest.raises(ValueError, match=r"batch 256 and 700 took .* 3 batch sizes are too few"):
        fit_samples([*runs(256, 1024), absurd])


@pytest.mark.parametrize(
    ("lr", "said"),
    [
        (None, "at batch 512 took 1000 and 1e\\+08 samples.*or give their learning rates"),
        (0.1, "at batch 512 and learning rate 0.1 took 1000 and 1e\\+08 .* the same target.$"),
    ],
)
def test_repeats_that_differ_by_more_than_any_seed_are_refused(lr: float | None, said: str) -> None:
    apart = [Run(batch_size=512, samples=samples, lr=lr) for samples in (1e8, 1e3)]
    other = Run(batch_size=1024, samples=1e6, lr=lr)
    with pytest.raises(ValueError, match=f"runs {said}"):
        fit_samples([*apart, other])
    with pytest.raises(
        ValueError, match=r"probes at batch 512.*one run differ by no more.*same loss"
    ):
        fit_samples([], [*apart, other])
    near = [Run(batch_size=512, samples=samples, lr=lr) for samples in (1e5, 9e5)]
    stopped = replace(apart[0], reached=False)
    assert fit_samples([*near, stopped, other]).compares_sizes


def test_one_odd_repeat_of_many_is_left_out_and_named() -> None:
    """As the mistyped seed of gpt3 in MLPerf v4.1, ten times the others."""
    seeds = [Run(batch_size=512, samples=1e5 + n) for n in range(5)]
    odd, other = Run(batch_size=512, samples=2e6), Run(batch_size=1024, samples=1.2e5)
    found = fit_samples([*seeds, odd, other])
    assert found.predict(700) == fit_samples([*seeds, other]).predict(700)
    assert found.why.endswith(
        "left out, because most others contradict it: 2e+06 samples at batch 512"
    )
    probed = fit_samples([], [*seeds, odd, other]).why
    assert probed.endswith("2e+06 samples of a probe at batch 512")
    halves = [*seeds[:2], odd, replace(odd, samples=2.1e6)]
    with pytest.raises(ValueError, match="repeats of one run differ by no more"):
        fit_samples([*halves, other])


def test_probes_contradict_each_other_as_runs_do() -> None:
    absurd = Run(batch_size=700, samples=100 * curve(700))
    with pytest.raises(ValueError, match=r"^probes at batch 256 and 700 took .* the same loss"):
        fit_samples([], [*runs(256, 1024), absurd])
    seen = runs(128, 256, 512, 1024, 2048)
    found = fit_samples([], [*seen, absurd])
    assert found.efficiency(128, 800) == fit_samples([], seen).efficiency(128, 800)
    assert found.why.endswith("left out, because most others contradict it: probe at batch 700")


def test_a_badly_tuned_run_beside_a_good_one_does_not_make_its_size_look_worse() -> None:
    good = [Run(batch_size=64, samples=1e4, lr=1e-3), Run(batch_size=256, samples=1.1e4, lr=2e-3)]
    bad = Run(batch_size=64, samples=9e4, lr=1e-5)
    swept, plain = fit_samples([*good, bad]), fit_samples(good)
    assert swept.efficiency(64, 256) == plain.efficiency(64, 256)
    assert swept.predict(512) == plain.predict(512)
    # Asked with a rate, it counts: so slow a rate costs samples at any size.
    assert swept.predict(256, 2e-5).value > 2.0 * swept.predict(256, 2e-3).value


def test_a_rate_that_some_runs_do_not_say_does_not_switch_off_the_sweep_of_others() -> None:
    seen = [*runs(256, 1024), Run(batch_size=512, samples=curve(512), lr=1e-3)]
    worse = Run(batch_size=512, samples=5 * curve(512), lr=1e-5)
    assert fit_samples([*seen, worse]).predict(700) == fit_samples(seen).predict(700)


def test_a_sweep_is_no_contradiction_and_counts_as_one_size() -> None:
    sweep = [
        Run(batch_size=64, samples=1e4, lr=1e-3),
        Run(batch_size=64, samples=1.1e5, lr=1e-5),
        Run(batch_size=256, samples=1.1e4, lr=4e-3),
    ]
    assert "2 batch sizes" in fit_samples(sweep).why
    with pytest.raises(ValueError, match="runs at 1 batch size"):
        fit_samples(sweep[:2])


def test_rates_that_all_failed_leave_the_size_beyond_the_shortest_of_them() -> None:
    seen = runs(256, 512, 1024)
    failed = [
        Run(batch_size=8192, samples=s, lr=lr, reached=False) for s, lr in ((2e7, 1), (9e7, 2))
    ]
    assert fit_samples([*seen, *failed]).predict(8192) == fit_samples(
        [*seen, replace(failed[0], lr=None)]
    ).predict(8192)


def test_runs_of_which_most_stopped_at_every_size_are_refused() -> None:
    mostly = [
        Run(batch_size=size, samples=1e4, reached=reached)
        for size in (64, 128)
        for reached in (True, False, False)
    ]
    with pytest.raises(ValueError, match=r"2 of 6 runs reached.*Give one run that reached"):
        fit_samples(mostly)
    probes = [Run(batch_size=64, samples=10.0), Run(batch_size=256, samples=15.0, reached=False)]
    with pytest.raises(ValueError, match="probes at batch 256 did not reach their loss"):
        fit_samples(runs(64), probes)


def test_a_size_of_which_only_an_uninformative_bound_is_known_is_no_second_size() -> None:
    stopped = Run(batch_size=128, samples=10.0, reached=False)
    with pytest.raises(ValueError, match=r"runs at 1 batch size.*none of these compares"):
        fit_samples([Run(batch_size=64, samples=1e4), stopped])
    alone = fit_samples([Run(batch_size=64, samples=1e4), stopped], noise_scale=500.0)
    assert "rough guide" in alone.why
    assert not alone.compares_sizes


def test_probes_are_believed_less_than_whole_runs() -> None:
    seen = runs(64, 256, 1024, 4096)
    of_runs, of_probes = fit_samples(seen), fit_samples([], seen)

    def doubt(model: SamplesModel) -> float:
        found = model.efficiency(64, 4096)
        return math.log(found.high / found.low)

    assert doubt(of_probes) > 1.5 * doubt(of_runs)


def test_a_mean_of_few_seeds_pulls_less_than_one_of_many() -> None:
    """The same surprise, with a standard error of 40 % and of none."""
    seen = runs(128, 512, 2048, 4096)
    odd = Run(batch_size=1024, samples=1.8 * curve(1024))
    rough = fit_samples([*seen, replace(odd, relative_error=0.4)]).predict(1024).value
    assert curve(1024) < rough < 0.85 * fit_samples([*seen, odd]).predict(1024).value


def test_runs_and_a_noise_scale_are_both_named() -> None:
    model = fit_samples(runs(256, 1024), noise_scale=2000.0)
    assert model.why.endswith("256 to 1024, guided by the gradient noise scale, 2e+03 samples")
    assert model.compares_sizes


history = st.lists(
    st.builds(
        Run,
        batch_size=st.sampled_from([16.0, 32.0, 64.0, 128.0, 512.0]),
        samples=st.floats(1e4, 9e4),
        reached=st.booleans(),
        lr=st.sampled_from([None, 0.1, 0.2]),
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(history, st.randoms(use_true_random=False))
def test_the_order_of_the_runs_does_not_matter(seen: list[Run], random: Random) -> None:
    assert asked(random.sample(seen, len(seen))) == asked(seen)


def asked(seen: list[Run]) -> tuple[object, ...]:
    try:
        model = fit_samples(seen)
    except ValueError as refusal:
        return (str(refusal),)
    return model.why, model.predict(256.0), model.predict(256.0, 0.15), model.efficiency(16, 2048)


@settings(max_examples=examples(20))
@given(st.floats(1e-3, 1e6), st.floats(1e-2, 1e4))
def test_units_do_not_matter(samples_unit: float, batch_unit: float) -> None:
    seen = runs(100, 400, 1600)
    scaled = [
        Run(batch_size=run.batch_size * batch_unit, samples=run.samples * samples_unit)
        for run in seen
    ]
    plain = fit_samples(seen).predict(800)
    other = fit_samples(scaled).predict(800 * batch_unit)
    assert other.value == pytest.approx(plain.value * samples_unit, rel=1e-6)
    assert other.high == pytest.approx(plain.high * samples_unit, rel=1e-6)


def test_where_no_two_runs_agree_all_are_kept() -> None:
    wild = [Run(batch_size=100.0 + k, samples=1000.0**k) for k in range(6)]
    found = fit_samples(wild)
    assert "left out" not in found.why
    assert 0.0 < found.predict(103.0).low < found.predict(103.0).high < math.inf


@settings(max_examples=examples(30))
@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e9)), min_size=2, max_size=8))
def test_contradictory_runs_give_a_finite_answer_or_are_refused(
    history: list[tuple[float, float]],
) -> None:
    seen = [Run(batch_size=batch, samples=samples) for batch, samples in history]
    told = ""
    try:
        found = fit_samples(seen).predict(1000.0)
    except ValueError as refusal:
        told = str(refusal)
    if told:
        assert re.search(
            "compares two sizes|too few to identify the wrong one|repeats of one", told
        )
        return
    assert 0.0 < found.low <= found.value <= found.high < math.inf


@pytest.mark.parametrize(
    "bad",
    [
        Run(batch_size=0, samples=10),
        Run(batch_size="64", samples=10),  # type: ignore[arg-type]
        Run(batch_size=64, samples=10, evaluated_every="2"),  # type: ignore[arg-type]
        Run(batch_size=8, samples=math.nan),
        Run(batch_size=8, samples=-1.0),
        Run(batch_size=8, samples=1e300),
        Run(batch_size=8, samples=1e-300),
        Run(batch_size=8, samples=10, lr=0.0),
        Run(batch_size=8, samples=10, relative_error=2.0),
        Run(batch_size=8, samples=10, evaluated_every=11),
    ],
)
def test_a_run_without_meaning_is_refused_with_its_numbers(bad: Run) -> None:
    with pytest.raises(ValueError, match=r"cannot be used.*leave it out"):
        fit_samples([*runs(16, 32), bad])


def test_one_batch_size_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="none of these compares two sizes"):
        fit_samples(runs(128, 128))


def test_runs_that_never_reached_the_target_are_refused() -> None:
    stopped = [Run(batch_size=size, samples=1e6, reached=False) for size in (16, 32)]
    with pytest.raises(ValueError, match="the distance to it is unknown"):
        fit_samples(stopped)


@pytest.mark.parametrize("odd", [math.nan, 0.0, 1e-300, 1e300])
def test_a_noise_scale_without_meaning_is_refused(odd: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"noise_scale={odd}:")):
        fit_samples(runs(16, 32), noise_scale=odd)


def test_two_runs_that_no_law_reconciles_are_refused() -> None:
    runs = [Run(batch_size=64, samples=1e6), Run(batch_size=128, samples=1e9)]
    with pytest.raises(ValueError, match="too few to identify the wrong one"):
        fit_samples(runs)
    steep = [Run(batch_size=64, samples=1e6), Run(batch_size=1024, samples=16e6)]
    assert fit_samples(steep).predict(256).value > 2e6


@pytest.mark.parametrize("odd", [0, -64.0, math.nan, math.inf])
def test_samples_at_a_batch_that_nobody_can_run_are_refused(odd: float) -> None:
    model = fit_samples(runs(16, 32))
    for ask in (
        lambda: model.predict(odd),
        lambda: model.predict(64, odd),
        lambda: model.efficiency(odd, 64),
        lambda: model.efficiency(64, odd),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            ask()
