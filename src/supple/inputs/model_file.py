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

TRAIN = {
    "hidden": "width",
    "layers": "equal decoder layers",
    "heads": "attention heads",
    "samples": 'sequences to train on, such as "10M"',
    "batch_size": 'global batch, in sequences, such as "4K"',
    "seq": "tokens of a sequence; default: 2048",
    "vocab": "entries of the vocabulary; default: 50304",
    "attention": '"flash" keeps no scores, as scaled_dot_product_attention (default); "full" does',
    "optimizer": "adam (default), adam-8bit, adafactor, sgd-momentum or sgd",
    "lr": "learning rate tuned at batch_size; default: the history's, or 3e-4",
    "noise_scale": "gradient noise scale, in sequences",
}
SERVE = {
    "parameters": 'of the model, such as "8B"',
    "activated": "per token, of a mixture of experts; default: all",
    "bits": "of a weight: 16 (default), 8 or 4",
    "layers": "equal decoder layers; default: what is usual at the size",
    "prompt": "tokens of a prompt, on average; default: 500",
    "answer": "tokens of an answer, on average; default: 300",
}
_KEYS = {"train": TRAIN, "serve": SERVE}
_REQUIRED = {
    "train": ("hidden", "layers", "heads", "samples", "batch_size"),
    "serve": ("parameters",),
}
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
    missing = [f"{key} ({known[key]})" for key in _REQUIRED[table] if key not in values]
    if missing:
        raise SpecError(f"{where} lacks {', '.join(missing)}. Add what is missing.")
    return ModelTable(where, values)


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
