"""Rows of measurements that a user hands over as a CSV file; amounts as a person writes them."""

import csv
from collections.abc import Sequence
from pathlib import Path

from supple.core.spec import SpecError

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def read_rows(
    path: Path, columns: Sequence[str], *, what: str, besides: str
) -> list[dict[str, str]]:
    """The rows of a file that has at least one, with all `columns`; `besides` says in words what
    else it may have. Raises `SpecError` for any other file, calling it `what`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"{what} {path} cannot be read: {error}. Give a CSV file.") from None
    missing = [name for name in columns if not rows or name not in rows[0]]
    if missing:
        header = "".join(str(name) for name in rows[0]) if rows else ""
        hint = " Separate the columns with commas." if ";" in header or "\t" in header else ""
        raise SpecError(
            f"{what} {path} has {len(rows)} rows and no column {', '.join(missing)}: it needs "
            f"{', '.join(columns)}, and {besides}.{hint}"
        )
    return rows


def parse_amount(text: str) -> float:
    """`"10M"` as 10,000,000; NaN for what is no number."""
    scale = _SCALES.get(text[-1:].lower(), 1.0)
    try:
        return float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        return float("nan")
