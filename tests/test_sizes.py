"""A transformer as people know it, in a model.toml or a config.json, and the plan made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from supple.cli.app import app
from supple.core.layouts.form import LayoutRun
from supple.core.layouts.memory import memory_parts
from supple.core.layouts.transformer import Transformer
from supple.core.spec import SpecError
from supple.core.types import ParallelLayout
from supple.inputs.model_file import ModelTable, read_model
from supple.inputs.served import described_decoder
from supple.inputs.sizes import described_transformer
from tests.test_hf_config import PUBLISHED

LLAMA_3_8B = {
    "hidden": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "ffn": 14336,
    "gated": True,
    "vocab": 128_256,
    "tied": False,
}
GPT = Transformer(hidden_size=1024, num_layers=4, num_heads=16, seq_length=1024, vocab_size=50_304)


def table(**values: Any) -> ModelTable:
    return ModelTable("m.toml [serve]", values)


def config(folder: Path, **more: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(PUBLISHED["Llama-3-8B"][0] | more))
    return path


def supple(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


# -- the sizes -----------------------------------------------------------------------------------


def test_what_gpt_has_is_the_default() -> None:
    h = GPT.hidden_size
    assert GPT.layer_weights == GPT.active_weights == 12 * h * h
    assert GPT.kept_bytes == 34 * h
    assert GPT.cache_bytes == 4 * h


def test_grouped_query_heads_a_gate_and_experts_change_weights_and_kept_bytes() -> None:
    """Mixtral's layer: 8 experts of which a token uses 2."""
    mixtral = Transformer(
        hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_size=14336,
        is_gated=True, num_experts=8, experts_per_token=2, vocab_size=32_000, seq_length=2048,
    )  # fmt: skip
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024
    expert = 3 * 4096 * 14336
    assert mixtral.layer_weights == attention + 8 * expert + 8 * 4096
    assert mixtral.active_weights == attention + 2 * expert + 8 * 4096
    assert mixtral.kept_bytes == 10 * 4096 + 4 * 4096 + 4 * 1024 + 8 * 2 * 14336


def test_a_head_of_its_own_is_held_once_on_a_stage_and_twice_where_there_is_one() -> None:
    own = Transformer(
        hidden_size=1024, num_layers=4, num_heads=16, seq_length=1024, vocab_size=50_304,
        is_tied=False,
    )  # fmt: skip
    one = 50_304 * 1024
    assert own.num_parameters == GPT.num_parameters + one
    for stages, copies in ((1, 2), (2, 1)):
        run = LayoutRun(
            model=own,
            layout=ParallelLayout(pp=stages),
            micro_batch_size=1,
            num_micro_batches=4,
        )
        held = (4 // stages * own.layer_weights + copies * one) * 18
        assert memory_parts(run).states == held


def test_a_described_model_has_the_weights_of_the_known_one(tmp_path: Path) -> None:
    described = described_transformer(table(**LLAMA_3_8B))
    read = described_transformer(table(config=str(config(tmp_path))))
    assert described.layer_weights == read.layer_weights
    assert described.embedding_weights() == read.embedding_weights()
    assert described.num_parameters == read.num_parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 5}, "32 heads do not divide into 5 kv_heads"),
        ({"kv_heads": 64}, "32 heads do not divide into 64 kv_heads"),
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token is 5 of 4 experts"),
        ({"heads": 33, "kv_heads": 33}, "does not divide into 33 heads"),
        ({"gated": "yes"}, "gated is 'yes': give true or false"),
        ({"ffn": 0}, "ffn is 0: it must be at least 1"),
        ({"cache_bits": 4}, "cache_bits is 4: a cache has 16 bits or 8"),
    ],
)
def test_impossible_sizes_are_refused_with_the_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        described_decoder(table(**LLAMA_3_8B | change))
    assert words in str(refused.value)


# -- the served model ----------------------------------------------------------------------------


def test_a_served_model_has_the_parameters_layers_and_cache_of_its_sizes(tmp_path: Path) -> None:
    for values in (LLAMA_3_8B, {"config": str(config(tmp_path))}):
        model = described_decoder(table(**values))
        assert model.num_parameters == pytest.approx(8.03e9, rel=2e-3)
        assert (model.num_layers, model.cache_bytes, model.bytes_per_weight) == (32, 4096.0, 2.0)


def test_bits_of_weights_and_cache_are_those_of_the_file_or_of_the_quantization(
    tmp_path: Path,
) -> None:
    quantized = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}
    path = str(config(tmp_path, quantization_config=quantized))
    model = described_decoder(table(config=path))
    assert (model.bytes_per_weight, model.cache_bytes) == (1.0, 2048.0)
    model = described_decoder(table(config=path, bits=16, cache_bits=16))
    assert (model.bytes_per_weight, model.cache_bytes) == (2.0, 4096.0)


def test_parameters_with_key_value_heads_have_a_cache_and_without_the_usual_one() -> None:
    assert described_decoder(table(parameters="8B")).cache_bytes is None
    known = table(parameters="8B", kv_heads=8, head_size=128, cache_bits=8)
    assert described_decoder(known).cache_bytes == 2048.0
    with pytest.raises(SpecError, match="the size of the cache is not known"):
        described_decoder(table(parameters="8B", cache_bits=8))


# -- the files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden": 4096}, "has parameters and hidden: beside"),
        ({"experts": 8, "experts_per_token": 2}, "has parameters and experts, experts_per_token"),
        ({"kv_heads": 8}, "kv_heads and head_size together"),
        ({"head_size": 128}, "Give both, or neither"),
        ({"kv_heads": -8, "head_size": 128}, "kv_heads is -8: it must be at least 1"),
        ({"kv_heads": 8, "head_size": 0}, "head_size is 0: it must be at least 1"),
    ],
)
def test_a_size_that_means_nothing_beside_the_parameters_is_refused(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError) as refused:
        described_decoder(table(parameters="8B", **values))
    assert words in str(refused.value)


def test_a_quantization_without_known_bits_needs_them_from_the_file(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
    sizes |= {"n_positions": 1024, "vocab_size": 50257}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sizes | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(SpecError, match="a weight quantized by hqq are not known"):
        described_decoder(table(config=str(path)))
    assert described_decoder(table(config=str(path), bits=4)).bytes_per_weight == 0.55


def test_a_model_file_names_a_config_beside_it_and_no_other_sizes(tmp_path: Path) -> None:
    config(tmp_path)
    file = tmp_path / "m.toml"
    file.write_text('[train]\nconfig = "config.json"\nsamples = "1M"\nbatch_size = 64\n')
    assert read_model(file, "train").values["config"] == str(tmp_path / "config.json")
    file.write_text('[serve]\nconfig = "config.json"\nhidden = 8\n')
    with pytest.raises(SpecError, match="has config and hidden"):
        read_model(file, "serve")


def test_a_table_without_sizes_says_which_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[serve]\nhidden = 8\n")
    with pytest.raises(SpecError, match=r"lacks layers .*, heads .*\. Add"):
        read_model(file, "serve")


def test_a_config_is_planned_as_it_is_and_for_training_it_is_told_what_is_wanting(
    tmp_path: Path,
) -> None:
    path = config(tmp_path)
    found = supple(path, "--json", "--max-workers", 1)
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["recommended"]["num_devices"] == 1
    refused = supple(f"{path}:train")
    assert refused.exit_code == 2
    assert 'Write a model.toml: [train], config = "config.json", samples and' in refused.stderr
    unknown = config(tmp_path, model_type="mamba")
    assert "describes a mamba, which is not known: llama" in supple(unknown).stderr


def test_a_mixture_trains_faster_than_a_dense_model_of_as_many_parameters(tmp_path: Path) -> None:
    """A token uses two of eight experts."""

    def step_s(**sizes: Any) -> float:
        given = {"hidden": 2048, "layers": 16, "heads": 16, "samples": "1M", "batch_size": 256}
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in (given | sizes).items())
        (tmp_path / "m.toml").write_text(f"[train]\n{text}\n")
        found = supple(tmp_path / "m.toml", "--json", "--max-workers", 8)
        assert found.exit_code == 0, found.stderr
        return json.loads(found.stdout)["rows"][-1]["step_time_s"]["value"]

    mixture = step_s(ffn=8192, experts=8, experts_per_token=2)
    assert mixture < 0.6 * step_s(ffn=65536)
