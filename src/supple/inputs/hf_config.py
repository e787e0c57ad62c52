"""Read the sizes of a language model from a Hugging Face `config.json`, as it is.

Every known architecture has its own parameters besides matrices and embeddings (norms, biases,
positions), so that the number of parameters is exact. An unknown one is refused by name: sizes with
the same names may mean another model.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from supple.core.spec import SpecError, is_count

if TYPE_CHECKING:  # numpy is imported by what plans, so that `--help` is immediate
    from supple.core.layouts.transformer import Transformer

_MOST_BYTES = 1 << 20
_DEFAULT_SEQ = 2048
_MOST_SIZE = 10**9
"""Far above any published size; more is no model."""
_BITS_OF_METHOD = {"fp8": 8, "fbgemm_fp8": 8, "awq": 4, "gptq": 4, "mxfp4": 4}
_BITS_OF_ALGORITHM = {"FP8": 8, "NVFP4": 4}
"""`quant_algo` of NVIDIA's ModelOpt."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """A model that a `config.json` describes."""

    name: str
    """Its `model_type`."""
    sizes: "Transformer"
    bits: int | None
    """Bits of a weight: 16, or those of its quantization; None: that is not known."""
    quantization: str
    """Its method, for messages."""
    cache_bits: int
    """Bits of a key or a value: 16, or 8."""


@final
class _Config:
    """The keys of a `config.json`, with messages that name the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of `names` that is there, as a whole number."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if not is_count(value) or isinstance(value, bool) or value > _MOST_SIZE:
                raise SpecError(
                    f"{self.path}: {name} is {reprlib.repr(value)}: it must be a whole number of "
                    f"at least 1 and at most {_MOST_SIZE:,}. Correct the file."
                )
            return int(value)
        if default is None:
            raise SpecError(
                f"{self.path} lacks {' or '.join(names)}: it is not the config.json of a "
                f"{self.values['model_type']}. Give the file of the model's repository."
            )
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise SpecError(
                f"{self.path}: {name} is {reprlib.repr(value)}: it must be true or false. Correct "
                "the file."
            )
        return default if value is None else value

    def refuse_unless(self, name: str, wanted: Any, why: str) -> None:
        """Raise `SpecError` where a key has another value than the one that is understood."""
        value = self.values.get(name)
        if value is not None and value != wanted:
            raise SpecError(
                f"{self.path}: {name} is {reprlib.repr(value)}: {why}. Describe the model in a "
                "model.toml."
            )


def _llama(config: _Config, **more: Any) -> dict[str, Any]:
    """The sizes of a Llama and of what is built like it: RMS norms, gated, rotary positions."""
    h, layers = config.size("hidden_size"), config.size("num_hidden_layers")
    heads = config.size("num_attention_heads")
    sizes: dict[str, Any] = {
        "hidden_size": h,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": config.size("num_key_value_heads", default=heads),
        "head_size": config.size("head_dim", default=h // heads),
        "ffn_size": config.size("intermediate_size"),
        "is_gated": True,
        "vocab_size": config.size("vocab_size"),
        "is_tied": config.flag("tie_word_embeddings", False),
        "num_other": (2 * layers + 1) * h,
    }
    q, kv = heads * sizes["head_size"], sizes["num_kv_heads"] * sizes["head_size"]
    if config.flag("attention_bias", False):
        sizes["num_other"] += layers * (q + 2 * kv + h)
    if config.flag("mlp_bias", False):
        sizes["num_other"] += layers * (2 * sizes["ffn_size"] + h)
    return sizes | more


def _mixtral(config: _Config) -> dict[str, Any]:
    return _llama(
        config,
        num_experts=config.size("num_local_experts"),
        experts_per_token=config.size("num_experts_per_tok"),
    )


def _qwen2(config: _Config) -> dict[str, Any]:
    """Biases of queries, keys and values."""
    sizes = _llama(config)
    biases = sizes["head_size"] * (sizes["num_heads"] + 2 * sizes["num_kv_heads"])
    return sizes | {"num_other": sizes["num_other"] + sizes["num_layers"] * biases}


def _qwen3(config: _Config) -> dict[str, Any]:
    """Norms of queries and keys."""
    sizes = _llama(config)
    norms = 2 * sizes["head_size"] * sizes["num_layers"]
    return sizes | {"num_other": sizes["num_other"] + norms}


def _experts(config: _Config) -> dict[str, Any]:
    why = "its layers are not equal, and a plan takes equal ones"
    config.refuse_unless("decoder_sparse_step", 1, why)
    config.refuse_unless("mlp_only_layers", [], why)
    return {
        "num_experts": config.size("num_experts"),
        "experts_per_token": config.size("num_experts_per_tok"),
        "ffn_size": config.size("moe_intermediate_size"),
    }


def _qwen2_moe(config: _Config) -> dict[str, Any]:
    """A shared expert with a gate of its own, one weight per width."""
    sizes = _qwen2(config) | _experts(config)
    gates = sizes["num_layers"] * sizes["hidden_size"]
    sizes["shared_ffn_size"] = config.size("shared_expert_intermediate_size")
    return sizes | {"num_other": sizes["num_other"] + gates}


def _qwen3_moe(config: _Config) -> dict[str, Any]:
    return _qwen3(config) | _experts(config)


def _gemma(config: _Config) -> dict[str, Any]:
    return _llama(config, is_tied=config.flag("tie_word_embeddings", True))


def _gpt2(config: _Config) -> dict[str, Any]:
    """Learned positions, biases everywhere, two norms with a bias a layer and one at the end."""
    h, layers = config.size("n_embd", "hidden_size"), config.size("n_layer", "num_hidden_layers")
    ffn = config.size("n_inner", default=4 * h)
    positions = config.size("n_positions", "max_position_embeddings")
    return {
        "hidden_size": h,
        "num_layers": layers,
        "num_heads": config.size("n_head", "num_attention_heads"),
        "ffn_size": ffn,
        "vocab_size": config.size("vocab_size"),
        "is_tied": config.flag("tie_word_embeddings", True),
        "num_other": layers * (9 * h + ffn) + 2 * h + positions * h,
    }


def _gpt_neox(config: _Config) -> dict[str, Any]:
    """As GPT-2 with rotary positions and a head of its own."""
    h, layers = config.size("hidden_size"), config.size("num_hidden_layers")
    ffn = config.size("intermediate_size")
    biases = 5 * h if config.flag("attention_bias", True) else h
    return {
        "hidden_size": h,
        "num_layers": layers,
        "num_heads": config.size("num_attention_heads"),
        "ffn_size": ffn,
        "vocab_size": config.size("vocab_size"),
        "is_tied": config.flag("tie_word_embeddings", False),
        "num_other": layers * (4 * h + biases + ffn) + 2 * h,
    }


def _gptj(config: _Config) -> dict[str, Any]:
    """One norm a layer, no bias in attention, and one in the head."""
    h, layers = config.size("n_embd"), config.size("n_layer")
    ffn, vocab = config.size("n_inner", default=4 * h), config.size("vocab_size")
    return {
        "hidden_size": h,
        "num_layers": layers,
        "num_heads": config.size("n_head"),
        "ffn_size": ffn,
        "vocab_size": vocab,
        "is_tied": config.flag("tie_word_embeddings", False),
        "num_other": layers * (3 * h + ffn) + 2 * h + vocab,
    }


def _opt(config: _Config) -> dict[str, Any]:
    """Learned positions with an offset of two, and biases everywhere."""
    h, layers = config.size("hidden_size"), config.size("num_hidden_layers")
    why = "its embedding has another width than its layers"
    config.refuse_unless("word_embed_proj_dim", h, why)
    ffn, positions = config.size("ffn_dim"), config.size("max_position_embeddings") + 2
    return {
        "hidden_size": h,
        "num_layers": layers,
        "num_heads": config.size("num_attention_heads"),
        "ffn_size": ffn,
        "vocab_size": config.size("vocab_size"),
        "is_tied": config.flag("tie_word_embeddings", True),
        "num_other": layers * (9 * h + ffn) + 2 * h + positions * h,
    }


_KNOWN: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "phi3": _llama,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "opt": _opt,
}


def read_config(path: Path, *, seq: int | None = None) -> HfModel:
    """Read a `config.json`; `seq`: tokens of a sequence to train on (default: 2,048, or the model's
    context if that is shorter). Raises `SpecError` for another file or an unknown architecture."""
    from supple.core.layouts.transformer import Transformer

    values = _read(path)
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise SpecError(
            f"{path} has no model_type: it is not the config.json of a Hugging Face model. Give "
            "that, or describe the model in a model.toml."
        )
    if kind not in _KNOWN:
        raise SpecError(
            f"{path} describes a {kind:.50}, which is not known: {', '.join(_KNOWN)} are. Describe "
            "its sizes in a model.toml."
        )
    config = _Config(path, values)
    sizes = _KNOWN[kind](config)
    context = config.size("max_position_embeddings", "n_positions", default=_DEFAULT_SEQ)
    try:
        model = Transformer(
            seq_length=seq or min(context, _DEFAULT_SEQ), stores_scores=False, **sizes
        )
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from None
    quantized = values.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    return HfModel(
        name=kind,
        sizes=model,
        bits=_bits(quantized),
        quantization=method if isinstance(method, str) else reprlib.repr(quantized),
        cache_bits=_cache_bits(values),
    )


def _bits(quantized: Any) -> int | None:
    """Bits of a weight; None: the quantization does not say it in a way that is known."""
    if quantized is None:
        return 16
    if not isinstance(quantized, Mapping):
        return None
    if "bits" in quantized:
        bits = quantized["bits"]
        return bits if is_count(bits) and not isinstance(bits, bool) else None
    if quantized.get("load_in_4bit") or quantized.get("load_in_8bit"):
        return 4 if quantized.get("load_in_4bit") else 8
    algorithm, method = quantized.get("quant_algo"), quantized.get("quant_method")
    if isinstance(algorithm, str):
        return _BITS_OF_ALGORITHM.get(algorithm)
    if method == "compressed-tensors":
        return _bits_of_groups(quantized.get("config_groups"))
    return _BITS_OF_METHOD.get(method) if isinstance(method, str) else None


def _bits_of_groups(groups: Any) -> int | None:
    """Bits of the weights of all groups of layers; None where they differ."""
    each = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in each]
    found = {part.get("num_bits") if isinstance(part, Mapping) else None for part in weights}
    bits = found.pop() if len(found) == 1 else None
    return bits if is_count(bits) and not isinstance(bits, bool) else None


def _cache_bits(values: Mapping[str, Any]) -> int:
    quantized = values.get("quantization_config")
    scheme = quantized.get("kv_cache_scheme") if isinstance(quantized, Mapping) else None
    return 8 if isinstance(scheme, Mapping) and scheme.get("num_bits") == 8 else 16


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SpecError(f"{path} is larger than {_MOST_BYTES} bytes: it is no config.json.")
        if not path.is_file() and not path.is_dir():  # reading would wait for a writer
            raise SpecError(f"{path} is not a regular file. Give another.")
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except SpecError:
        raise
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}. Give another file.") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not valid JSON: {error}. Correct it.") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path} holds no JSON object: it is no config.json. Give another file.")
    return values
