"""Peak memory from sizes: known cases of the literature, and what must hold for any layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.layouts.memory import memory_parts, num_parameters, peak_memory
from supple.core.layouts.model import LayoutRun, Transformer
from supple.core.layouts.stages import MeasuredLayer
from supple.core.training.memory import FRAGMENTATION, RUNTIME_BYTES
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


def test_attention_that_keeps_no_scores_needs_none_of_their_bytes() -> None:
    """Llama 3 of 8 billion at 128k tokens: the scores are fifty times all the rest."""
    llama = Transformer(
        hidden_size=4096, num_layers=32, num_heads=32, seq_length=131072, vocab_size=128256
    )
    full = memory_parts(run(llama, recompute=True, micro=1, tp=1))
    flash = memory_parts(run(replace(llama, stores_scores=False), recompute=True, micro=1, tp=1))
    scores = 5 * 32 * 131072**2
    assert full.activations - flash.activations == pytest.approx(scores)
    assert flash.activations == pytest.approx(131072 * 4096 * (2 * 32 + 34))
    assert (flash.states, flash.head) == (full.states, full.head)


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


def test_an_optimizer_nobody_knows_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'AdamW'.*unknown.*adam, adam-8bit, adafactor"):
        memory_parts(run(GPT_22B, recompute=True, micro=1), "AdamW")


def test_the_head_keeps_logits_and_their_gradient_in_four_bytes_each() -> None:
    parts = memory_parts(run(GPT_22B, recompute=True, micro=4, tp=8))
    logits = 4 * 2048 * 51200 / 8
    assert parts.head == 2 * 4 * logits
    assert parts.total == parts.states + parts.activations + parts.head + parts.overhead


def test_the_runtime_takes_what_a_traced_model_is_charged_and_two_communicators_more() -> None:
    parts = memory_parts(run(GPT_22B, recompute=True, micro=4, tp=8))
    rest = FRAGMENTATION * (parts.states + parts.activations + parts.head)
    assert parts.overhead - rest == pytest.approx(RUNTIME_BYTES + 2**30)


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
    whole = memory_parts(of_layers())
    # One in four stages, four micro-batches in flight in the first.
    assert memory_parts(of_layers(pp=4)).activations == pytest.approx(whole.activations)


def test_a_gathered_layer_is_whole_in_weights_and_gradients_only() -> None:
    sharded = memory_parts(of_layers(shard=8)).states
    assert sharded == 8 * 16e9 / 8 + 10**9 * (4 + 4)
    # A layer cannot have more gathered than it has.
    bare = replace(of_layers(shard=8), model=(replace(LAYER, state_bytes=1e9),) * 8)
    assert memory_parts(bare).states == 8 * 1e9 / 8 + 1e9


def test_recomputed_layers_keep_every_input_and_one_layer_whole_once() -> None:
    """Eight equal layers in four stages of two: four micro-batches in flight in the first, of which
    one layer of one is being recomputed."""
    one, four = (memory_parts(of_layers(pp, recompute=True)).activations for pp in (1, 4))
    inputs, whole = 8 * 1e7, 8 * 2e8
    assert one == 8 * inputs + whole
    assert four == 4 * 2 * inputs + whole
    few = replace(of_layers(4, recompute=True), num_micro_batches=2)
    assert memory_parts(few).activations == 2 * 2 * inputs + whole


def test_recomputing_a_layer_whose_input_is_all_it_keeps_is_no_loss() -> None:
    thin = (replace(LAYER, activation_bytes_per_sample=1e7),) * 8
    kept, again = (
        memory_parts(replace(of_layers(pp=4, recompute=r), model=thin)) for r in (False, True)
    )
    assert again.activations == kept.activations


def test_the_last_stage_holds_one_micro_batch_and_the_first_as_many_as_stages() -> None:
    """All activations are the last layer's, so its stage is the fullest, with one in flight."""
    quiet = replace(LAYER, activation_bytes_per_sample=0.0)
    loud = replace(LAYER, activation_bytes_per_sample=4e9)
    last = replace(of_layers(pp=4), model=(*(quiet,) * 7, loud))
    first = replace(of_layers(pp=4), model=(loud, *(quiet,) * 7))
    assert memory_parts(last).activations == 8 * 4e9
    assert memory_parts(first).activations == 4 * 8 * 4e9
