"""The sizes of a transformer from a model file, or from the `config.json` that it names."""

from pathlib import Path
from typing import TYPE_CHECKING

from supple.core.spec import SpecError
from supple.inputs.hf_config import HfModel, read_config
from supple.inputs.model_file import ModelTable

if TYPE_CHECKING:  # numpy is imported by what plans, so that `--help` is immediate
    from supple.core.layouts.transformer import Transformer

MOST = {
    "hidden": 10**6,
    "layers": 10**4,
    "heads": 10**5,
    "kv_heads": 10**5,
    "head_size": 10**5,
    "ffn": 10**8,
    "experts": 10**5,
    "experts_per_token": 10**5,
    "shared_ffn": 10**8,
    "seq": 10**9,
    "vocab": 10**8,
}
"""At least ten times what anybody published; more is a typing error."""
_SEQ, _VOCAB = 2048, 50_304


def in_range(described: ModelTable, key: str, most: int, default: int | None = None) -> int:
    """A whole number from 1 to `most`. Raises `SpecError`."""
    value = described.whole(key, default)
    assert value is not None, "required, or there is a default"
    if not 1 <= value <= most:
        raise SpecError(
            f"{described.named(key)} is {value}: it must be at least 1 and at most {most:,}."
        )
    return value


def described_transformer(described: ModelTable) -> "Transformer":
    """The transformer of a table, with the sequence length of training. Raises `SpecError`."""
    if "config" in described.values:
        return config_of(described).sizes
    from supple.core.layouts.transformer import Transformer

    hidden, layers, heads = (_size(described, key) for key in ("hidden", "layers", "heads"))
    head_size, kv_heads = _perhaps(described, "head_size"), _perhaps(described, "kv_heads")
    if head_size is None and hidden % heads:
        raise SpecError(
            f"{described.where}: hidden {hidden} does not divide into {heads} heads: the width of "
            "a head must be whole. Change one of them, or give head_size."
        )
    if heads % (kv_heads or heads):
        raise SpecError(
            f"{described.where}: {heads} heads do not divide into {kv_heads} kv_heads: each serves "
            "the same number of heads. Change one of them."
        )
    experts, used = (_size(described, key, 1) for key in ("experts", "experts_per_token"))
    if used > experts:
        raise SpecError(
            f"{described.where}: experts_per_token is {used} of {experts} experts: a token uses at "
            "most all of them. Change one of them."
        )
    return Transformer(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        ffn_size=_perhaps(described, "ffn"),
        is_gated=described.flag("gated", False),
        num_experts=experts,
        experts_per_token=used,
        shared_ffn_size=_perhaps(described, "shared_ffn") or 0,
        is_tied=described.flag("tied", True),
        seq_length=_seq(described) or _SEQ,
        vocab_size=_size(described, "vocab", _VOCAB),
        stores_scores=False,
    )


def config_of(described: ModelTable) -> HfModel:
    """The model of the `config.json` that a table names."""
    return read_config(Path(described.values["config"]), seq=_seq(described))


def _size(described: ModelTable, key: str, default: int | None = None) -> int:
    return in_range(described, key, MOST[key], default)


def _perhaps(described: ModelTable, key: str) -> int | None:
    return _size(described, key) if key in described.values else None


def _seq(described: ModelTable) -> int | None:
    return _perhaps(described, "seq")
