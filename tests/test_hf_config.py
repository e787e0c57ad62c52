"""A Hugging Face config.json, read as it is: the published numbers of parameters, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from supple.core.spec import SpecError
from supple.inputs.hf_config import read_config

W8 = {"num_bits": 8, "type": "float"}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False}
NEOX = {"model_type": "gpt_neox", "tie_word_embeddings": False}


def llama(h: int, layers: int, heads: int, kv: int, ffn: int, vocab: int, **more: Any) -> Any:
    return LLAMA | {
        "hidden_size": h,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **more,
    }


MIXTRAL = llama(
    4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2
)
QWEN3_MOE = llama(
    2048, 48, 32, 4, 6144, 151936, model_type="qwen3_moe", head_dim=128,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
    decoder_sparse_step=1, mlp_only_layers=[], attention_bias=False,
)  # fmt: skip
QWEN2_MOE = llama(
    2048, 24, 16, 16, 5632, 151936, model_type="qwen2_moe",
    num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
    shared_expert_intermediate_size=5632, decoder_sparse_step=1,
)  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "vocab_size": 50257,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (llama(4096, 32, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama-2-70B": (llama(8192, 80, 64, 8, 28672, 32000), 68_976_648_192),
    "Llama-3-8B": (llama(4096, 32, 32, 8, 14336, 128256), 8_030_261_248),
    "Llama-3-70B": (llama(8192, 80, 64, 8, 28672, 128256), 70_553_706_496),
    "Llama-3.2-1B": (
        llama(2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Mistral-7B": (
        llama(4096, 32, 32, 8, 14336, 32000, model_type="mistral"),
        7_241_732_096,
    ),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "Qwen2.5-7B": (llama(3584, 28, 28, 4, 18944, 152064, model_type="qwen2"), 7_615_616_512),
    "Qwen2.5-0.5B": (
        llama(896, 24, 14, 2, 4864, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3-8B": (
        llama(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128),
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30_532_122_624),
    "Qwen1.5-MoE-A2.7B": (QWEN2_MOE, 14_315_784_192),
    "Gemma-7B": (
        llama(
            3072, 28, 16, 16, 24576, 256000, model_type="gemma", head_dim=256,
            tie_word_embeddings=None,
        ),
        8_537_680_896,
    ),
    "Phi-3-mini": (llama(3072, 32, 32, 32, 8192, 32064, model_type="phi3"), 3_821_079_552),
    "GPT-2": (GPT2, 124_439_808),
    "GPT-2 XL": (GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "Pythia-6.9B": (
        NEOX | {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "intermediate_size": 16384, "vocab_size": 50432,
        },
        6_857_302_016,
    ),
    "GPT-NeoX-20B": (
        NEOX | {
            "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64,
            "intermediate_size": 24576, "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "GPT-J-6B": (
        {
            "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": None,
            "vocab_size": 50400, "tie_word_embeddings": False, "n_positions": 2048,
        },
        6_050_882_784,
    ),
    "OPT-125M": (
        {
            "model_type": "opt", "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "ffn_dim": 3072, "vocab_size": 50272,
            "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
        },
        125_239_296,
    ),
}  # fmt: skip


def config(folder: Path, values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(tmp_path: Path, name: str) -> None:
    values, number = PUBLISHED[name]
    assert read_config(config(tmp_path, values)).sizes.num_parameters == number


@pytest.mark.parametrize(
    ("values", "billions"), [(MIXTRAL, 12.88), (QWEN3_MOE, 3.35), (QWEN2_MOE, 2.69)]
)
def test_the_activated_parameters_of_a_mixture_are_too(
    tmp_path: Path, values: Any, billions: float
) -> None:
    sizes = read_config(config(tmp_path, values)).sizes
    assert sizes.num_active_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_llama_with_biases_has_more_parameters(tmp_path: Path) -> None:
    plain = PUBLISHED["Llama-3-8B"][0]
    biased = plain | {"attention_bias": True}
    more = read_config(config(tmp_path, biased)).sizes.num_parameters
    assert more - PUBLISHED["Llama-3-8B"][1] == 32 * (4096 + 2 * 1024 + 4096)


def test_the_cache_of_a_token_follows_from_the_key_value_heads(tmp_path: Path) -> None:
    """Llama-3-8B keeps 128 KiB a token."""
    sizes = read_config(config(tmp_path, PUBLISHED["Llama-3-8B"][0])).sizes
    assert sizes.cache_bytes * sizes.num_layers == 131_072


@pytest.mark.parametrize(
    ("quantized", "bits"),
    [
        (None, 16),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"load_in_8bit": True}, 8),
        ({"load_in_4bit": True}, 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": W8}}}, 8),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4),
        # Not known, and 16 would be a guess.
        ({"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": None}}}, None),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"0": {"weights": W8}, "1": {"weights": {"num_bits": 4}}},
            },
            None,
        ),
        ({"quant_method": "unknown"}, None),
        ({"quant_method": "gptq", "bits": 4.5}, None),
        ({"quant_method": "gptq", "bits": True}, None),
        ({"quant_method": ["awq"]}, None),
        ([], None),
    ],
)
def test_the_bits_are_those_of_the_quantization(
    tmp_path: Path, quantized: Any, bits: int | None
) -> None:
    values = GPT2 | {"quantization_config": quantized}
    assert read_config(config(tmp_path, values)).bits == bits


def test_a_sequence_is_at_most_the_context_unless_one_is_given(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, GPT2)).sizes.seq_length == 1024
    assert read_config(config(tmp_path, GPT2), seq=4096).sizes.seq_length == 4096


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "deepseek_v3"}, "describes a deepseek_v3, which is not known: llama, mis"),
        ({"hidden_size": 64}, "has no model_type"),
        ([], "holds no JSON object"),
        (LLAMA, "lacks hidden_size: it is not the config.json of a llama"),
        (GPT2 | {"n_embd": 0}, "n_embd is 0: it must be a whole number of at least 1"),
        (GPT2 | {"n_embd": "768"}, "n_embd is '768'"),
        (GPT2 | {"n_layer": True}, "n_layer is True: it must be a whole number"),
        (GPT2 | {"n_layer": 10**400}, "at most 1,000,000,000"),
        (GPT2 | {"n_layer": float("nan")}, "n_layer is nan"),
        (LLAMA | {"hidden_size": "x" * 10**5}, "hidden_size is 'xxxxxxxxxxxx...xxxxxxxxxxxxx': it"),
        (GPT2 | {"tie_word_embeddings": "false"}, "is 'false': it must be true or false"),
        (GPT2 | {"n_head": 7}, "768 does not divide into 7 heads"),
        (QWEN3_MOE | {"mlp_only_layers": [0]}, "its layers are not equal"),
        (PUBLISHED["OPT-125M"][0] | {"word_embed_proj_dim": 512}, "embedding has another width"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, values: Any, words: str) -> None:
    with pytest.raises(SpecError) as refused:
        read_config(config(tmp_path, values))
    assert words in str(refused.value)


def test_a_file_that_cannot_be_read_or_parsed_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_config(tmp_path / "none.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match="is not valid JSON"):
        read_config(tmp_path / "config.json")
    with pytest.raises(SpecError, match="cannot be read"):
        read_config(tmp_path)
