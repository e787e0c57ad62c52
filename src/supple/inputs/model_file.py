"""Read a model description from a TOML file: `[train]` is a transformer to train, `[serve]` a
language model to serve. Messages name the file, the table and the key."""

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from supple.core.spec import SpecError
from supple.inputs.rows import parse_amount

SIZES = {
    "config": "a Hugging Face config.json, instead of all other sizes",
    "hidden": "width",
    "layers": "equal decoder layers",
    "heads": "attention heads",
    "kv_heads": "key and value heads; default: as many as heads",
    "head_size": "default: hidden / heads",
    "ffn": "feed-forward width, of one expert; default: 4 * hidden",
    "gated": "true for a feed-forward part of three matrices (SwiGLU); default: false",
    "experts": "of a mixture; default: 1",
    "experts_per_token": "how many of them a token uses; default: 1",
    "shared_ffn": "width of an expert that every token uses besides; default: 0",
    "vocab": "entries of the vocabulary; default: 50304",
    "tied": "false for a head with weights of its own; default: true",
}
"""Sizes of a transformer, in both tables."""
TRAIN = SIZES | {
    "samples": 'sequences to train on, such as "10M"',
    "batch_size": 'global batch, in sequences, such as "4K"',
    "seq": "tokens of a sequence; default: 2048",
    "attention": '"flash" keeps no scores, as scaled_dot_product_attention (default); "full" does',
    "optimizer": "adam (default), adam-8bit, adafactor, sgd-momentum or sgd",
    "lr": "learning rate tuned at batch_size; default: the history's, or 3e-4",
    "noise_scale": "gradient noise scale, in sequences",
}
SERVE = SIZES | {
    "parameters": 'of the model, such as "8B"; default: what the sizes say',
    "activated": "per token, of a mixture of experts; default: all",
    "bits": "of a weight: 16 (default), 8 or 4",
    "layers": "equal decoder layers; default: what is usual at the parameters",
    "cache_bits": "of a key or a value in the cache: 16 (default) or 8",
    "prompt": "tokens of a prompt, on average; default: 500",
    "answer": "tokens of an answer, on average; default: 300",
}
_KEYS = {"train": TRAIN, "serve": SERVE}
_REQUIRED = {
    "train": ("samples", "batch_size"),
    "serve": (),
}
_REQUIRED_SIZES = ("hidden", "layers", "heads")
_MOST_BYTES = 1 << 20


@final
@dataclass(frozen=True, slots=True)
class ModelTable:
    """One table of a model file, with validated keys."""

    where: str
    values: Mapping[str, Any]

    def named(self, key: str) -> str:
        """Return the name of a key for messages."""
        return f"{self.where}: {key}"

    def whole(self, key: str, default: int | None = None) -> int | None:
        """Return a whole number, written as one or as an amount: 512, "4K"."""
        if key not in self.values:
            return default
        value: Any = self.values[key]
        if isinstance(value, str):
            amount = parse_amount(value)
            whole = math.isfinite(amount) and math.isclose(amount, round(amount))
            value = round(amount) if whole else None
        if not isinstance(value, int) or isinstance(value, bool):
            raise SpecError(
                f"{self.named(key)} is {self.values[key]!r}: give a whole number, such as 512, "
                '"4K" or "10M".'
            )
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.values.get(key, default)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise SpecError(f"{self.named(key)} is {value!r}: give a number.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise SpecError(f"{self.named(key)} is {value!r}: give true or false.")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a string, or a number as it is written."""
        value = self.values.get(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None and not isinstance(value, str):
            raise SpecError(f"{self.named(key)} is {value!r}: give a word in quotes.")
        return value


def table_of(path: Path, name: str) -> str:
    """Return the table to use, "train" or "serve": `name`, or by default the only one in the file.
    Raises `SpecError` if it is missing or ambiguous."""
    if path.suffix.lower() == ".json":
        return name or "serve"
    tables = [key for key in _KEYS if key in _read(path)]
    if name in tables:
        return name
    if name or not tables:
        has = f"has {' and '.join(f'[{key}]' for key in tables)}" if tables else "has neither"
        raise SpecError(
            f"{path}: {f'[{name}] was requested, and ' if name else ''}the file {has}. Describe "
            "the model in [train], to train it, or [serve], to serve it."
        )
    if len(tables) > 1:
        raise SpecError(
            f"{path} has [train] and [serve], and one can be planned at a time: give {path}:train "
            f"or {path}:serve."
        )
    return tables[0]


def read_model(path: Path, table: str) -> ModelTable:
    """Read the table `table` of a model file. Raises `SpecError` for unknown or missing keys."""
    if path.suffix.lower() == ".json":
        return _of_config(path, table)
    values = _read(path)[table]
    where = f"{path} [{table}]"
    known = _KEYS[table]
    if not isinstance(values, dict):
        raise SpecError(f"{path}: {table} is not a table. Write [{table}], and its keys below.")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Do you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
            raise SpecError(f"{where} has an unknown key {key!r}. {hint}")
    required = _REQUIRED[table]
    if table == "train" or ("parameters" not in values and "config" not in values):
        required = () if "config" in values else _REQUIRED_SIZES
        required += _REQUIRED[table]
    missing = [f"{key} ({known[key]})" for key in required if key not in values]
    if missing:
        raise SpecError(f"{where} lacks {', '.join(missing)}. Add what is missing.")
    if "config" in values:
        values = _with_config(values, where, path.parent)
    return ModelTable(where, values)


def _with_config(values: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """The values with the path of `config` from the file's folder. Raises `SpecError` for sizes
    beside it."""
    twice = [key for key in (*SIZES, "parameters", "activated") if key in values]
    twice.remove("config")
    if twice:
        raise SpecError(
            f"{where} has config and {', '.join(twice)}: the sizes are those of the config.json. "
            "Leave one of the two out."
        )
    if not isinstance(values["config"], str):
        raise SpecError(f"{where}: config is {values['config']!r}: give a path in quotes.")
    return values | {"config": str(folder / values["config"])}


def _of_config(path: Path, table: str) -> ModelTable:
    """A `config.json` as the table [serve] that names it."""
    if table != "serve":
        raise SpecError(
            f"{path} has a model's sizes, and training needs more. Write a model.toml: [train], "
            f'config = "{path.name}", samples and batch_size.'
        )
    return ModelTable(str(path), {"config": str(path)})


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SpecError(f"{path} is larger than {_MOST_BYTES} bytes: it is no model file.")
        if not path.is_file() and not path.is_dir():  # reading would wait for a writer
            raise SpecError(f"{path} is not a regular file. Give another.")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except SpecError:
        raise
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}. Give another file.") from None
    except (ValueError, RecursionError) as error:  # tomllib's own error is a ValueError
        raise SpecError(f"{path} is not valid TOML: {error}. Correct it.") from None
