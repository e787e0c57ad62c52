"""Peak memory from sizes: known cases of the literature, and what must hold for any layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.layout_memory import memory_parts, num_parameters, peak_memory
from supple.core.layouts import LayoutRun, Transformer
from supple.core.stages import MeasuredLayer
from supple.core.types import ParallelLayout

# Korthikanti et al. 2022, table 3: sizes, and the layouts they were trained with.
GPT_22B = Transformer(
    hidden_size=6144, num_layers=48, num_heads=64, seq_length=2048, vocab_size=51200
)
GPT_175B = Transformer(
    hidden_size=12288, num_layers=96, num_heads=96, seq_length=2048, vocab_size=51200
)
A100 = 80e9


def run(model: Transformer, *, recompute: bool, micro: int, tp: int = 8, pp: int = 1) -> LayoutRun:
    return LayoutRun(
        model=model,
        layout=ParallelLayout(tp=tp, pp=pp),
        micro_batch_size=micro,
        num_micro_batches=64,
        recompute=recompute,
    )


@pytest.mark.parametrize(("model", "billions"), [(GPT_22B, 22), (GPT_175B, 175)])
def test_parameters_are_as_many_as_the_names_say(model: Transformer, billions: int) -> None:
    assert num_parameters(model) / 1e9 == pytest.approx(billions, rel=0.02)


def test_twenty_two_billion_fit_on_eight_only_with_recomputation() -> None:
    assert peak_memory(run(GPT_22B, recompute=False, micro=4)).high > A100
    assert peak_memory(run(GPT_22B, recompute=True, micro=4)).high < A100


def test_one_hundred_and_seventy_five_billion_fit_on_eight_stages_of_eight() -> None:
    assert peak_memory(run(GPT_175B, recompute=False, micro=1, pp=8)).high > A100
    assert peak_memory(run(GPT_175B, recompute=True, micro=1, pp=8)).high < A100


def test_activations_of_a_layer_are_those_of_the_published_formula() -> None:
    one = replace(GPT_22B, num_layers=1)
    parts = memory_parts(run(one, recompute=False, micro=1, tp=1))
    s, h, a = 2048, 6144, 64
    assert parts.activations == pytest.approx(s * h * (34 + 5 * a * s / h))


def test_sharded_replicas_hold_a_share_of_the_states() -> None:
    small = replace(GPT_22B, num_layers=4)
    whole = memory_parts(run(small, recompute=True, micro=1, tp=1))
    sharded = memory_parts(
        replace(run(small, recompute=True, micro=1, tp=1), layout=ParallelLayout(dp_shard=8))
    )
    assert whole.states / 8 < sharded.states < whole.states / 3


def test_an_optimizer_that_keeps_less_needs_less() -> None:
    states = [
        memory_parts(run(GPT_22B, recompute=True, micro=1), name).states
        for name in ("adam", "sgd-momentum", "adam-8bit", "adafactor", "sgd")
    ]
    assert states == sorted(states, reverse=True)
    assert states[0] / states[-1] == pytest.approx(18 / 10)


@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    pp=st.sampled_from([1, 2, 4, 8]),
    micro=st.integers(1, 8),
    recompute=st.booleans(),
)
def test_more_ranks_never_need_more_and_larger_batches_never_less(
    tp: int, pp: int, micro: int, recompute: bool
) -> None:
    here = peak_memory(run(GPT_22B, recompute=recompute, micro=micro, tp=tp, pp=pp))
    assert here.low < here.value == here.high
    wider = peak_memory(run(GPT_22B, recompute=recompute, micro=micro, tp=2 * tp, pp=pp))
    larger = peak_memory(run(GPT_22B, recompute=recompute, micro=micro + 1, tp=tp, pp=pp))
    assert wider.value < here.value < larger.value


LAYER = MeasuredLayer(
    host_s=0.0,
    device_s_per_sample=1e-3,
    num_parameters=10**9,
    output_bytes_per_sample=10**7,
    state_bytes=16e9,
    activation_bytes_per_sample=2e8,
)


def of_layers(pp: int = 1, shard: int = 1, recompute: bool = False, micro: int = 8) -> LayoutRun:
    return LayoutRun(
        model=(LAYER,) * 8,
        layout=ParallelLayout(pp=pp, dp_shard=shard),
        micro_batch_size=micro,
        num_micro_batches=32,
        recompute=recompute,
    )


def test_measured_layers_need_their_states_and_what_they_keep() -> None:
    parts = memory_parts(of_layers())
    assert parts.states == 8 * 16e9
    assert parts.activations == pytest.approx(8 * 8 * 2e8)


def test_stages_and_shards_divide_the_states_of_measured_layers() -> None:
    assert memory_parts(of_layers(pp=4)).states == 2 * 16e9
    assert memory_parts(of_layers(shard=8)).states == 16e9 + 16e9
    whole, again = memory_parts(of_layers()), memory_parts(of_layers(recompute=True))
    assert again.activations < 0.2 * whole.activations
    # One in four stages, four micro-batches in flight in the first.
    assert memory_parts(of_layers(pp=4)).activations == pytest.approx(whole.activations)
