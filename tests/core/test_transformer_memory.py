"""Peak memory from sizes: known cases of the literature, and what must hold for any layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.layouts import LayoutRun, Transformer
from supple.core.stages import MeasuredLayer
from supple.core.transformer_memory import memory_parts, num_parameters, peak_memory
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


def test_measured_layers_are_refused() -> None:
    layer = MeasuredLayer(
        host_s=0.0, device_s_per_sample=1e-3, num_parameters=10, output_bytes_per_sample=4
    )
    made = LayoutRun(
        model=(layer,), layout=ParallelLayout(), micro_batch_size=1, num_micro_batches=1
    )
    with pytest.raises(ValueError, match="only a transformer's is known from its sizes"):
        peak_memory(made)
