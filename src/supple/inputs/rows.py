"""Read rows of measurements from a user's CSV file; parse amounts such as "10M" and "80GB"."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from supple.core.spec import MAX_WORKERS, SpecError

_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_MOST = 1e15
"""Largest valid number, above any count or time used here; a larger one is a typing error."""
_MOST_GIGABYTES = 10_000
"""Largest valid accelerator memory in GB, over ten times that of any accelerator."""
_LARGEST_BATCH = 10**12
"""Largest valid batch size, in samples or tokens."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its nonempty cells by column, stripped of spaces."""

    where: str
    """The file and its first line, for messages."""
    cells: Mapping[str, str]

    def __contains__(self, column: str) -> bool:
        return column in self.cells

    def text(self, column: str) -> str:
        """Return a cell as text. Raises `SpecError` if it is empty."""
        if column not in self.cells:
            raise self.refusal(f"{column} is empty", "Fill it in, or delete the line")
        return self.cells[column]

    def number(self, column: str, *, most: float = _MOST) -> float:
        """Parse a number above 0 and at most `most`. Raises `SpecError`."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            raise self.refusal(f"{column} is {text!r}: not a number, such as 1250 or 0.5") from None
        if not 0 < value < math.inf:
            raise self.refusal(f"{column} is {text}: it must be positive and finite")
        if value > most:
            raise self.refusal(f"{column} is {text}: it must be at most {most:,.16g}")
        return value

    def count(self, column: str, *, most: int = MAX_WORKERS) -> int:
        """Parse a whole number from 1 to `most`. Raises `SpecError`."""
        value = self.number(column, most=most)
        if not value.is_integer():
            raise self.refusal(f"{column} is {self.cells[column]}: it must be a whole number")
        return int(value)

    def batch(self, column: str = "batch_size") -> int:
        """Parse a global batch size. Raises `SpecError`."""
        return self.count(column, most=_LARGEST_BATCH)

    def refusal(self, reason: str, advice: str = "Correct the line, or delete it") -> SpecError:
        """Return an error about this row, with the file, the line, and the advice."""
        return SpecError(f"{self.where}: {reason.rstrip('.')}. {advice}.")


def read_rows(path: Path, columns: Sequence[str], *, what: str, besides: str) -> list[Row]:
    """Read the rows of a CSV file with a header that has all `columns`, in upper or lower case;
    `besides` describes the other columns in messages. Blank lines are skipped, but counted. Raises
    `SpecError` for an invalid file, or one without rows, with `what` as its name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            records = list(_records(file, f"{what} {path}"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise SpecError(f"{what} {path} cannot be read: {reason}. Give a CSV file.") from None
    except UnicodeDecodeError:
        raise SpecError(
            f"{what} {path} cannot be read: it is not text in UTF-8. Save it as CSV in UTF-8."
        ) from None
    needed = f"it needs {', '.join(columns)}, and {besides}."
    if not records:
        raise SpecError(f"{what} {path} is empty: {needed}")
    (_, head), *rows = records
    head = [name.casefold() for name in head]
    while not head[-1]:  # a comma at the end of the line
        head.pop()
    missing = [name for name in columns if name not in head]
    if missing:
        mixed = ";" in "".join(head) or "\t" in "".join(head)
        hint = " Separate the columns with commas." if mixed else ""
        raise SpecError(f"{what} {path} has no column {', '.join(missing)}: {needed}{hint}")
    twice = sorted({name for name in head if name and head.count(name) > 1})
    if twice:
        raise SpecError(
            f"{what} {path} has more than one column {', '.join(twice)}: it is unclear which to "
            "use. Delete one, or give it another name."
        )
    if not rows:
        raise SpecError(
            f"{what} {path} has a header and no rows: at least one is needed. Add a row for each "
            "measurement."
        )
    return [_row(head, cells, f"{what} {path}, line {line}") for line, cells in rows]


def _records(file: TextIO, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the first line and the cells of every record that is not blank."""
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise SpecError(
                f"{where}, line {line}: not a valid CSV row ({error}). Check its quotes."
            ) from None
        cells = [cell.strip() for cell in cells]
        if any(cells):
            yield line, cells


def _row(head: Sequence[str], cells: Sequence[str], where: str) -> Row:
    row = Row(where, {name: cell for name, cell in zip(head, cells, strict=False) if cell})
    # Empty cells at the end, as spreadsheets write them, are ignored.
    if len(cells) < len(head) or any(cells[len(head) :]):
        raise row.refusal(
            f"the row has {len(cells)} cell{'s' * (len(cells) != 1)} and the header {len(head)}: "
            "it is unclear which cell belongs to which column. A decimal comma splits a cell in "
            "two; an empty cell still needs its comma"
        )
    return row


def parse_gigabytes(text: str, *, what: str) -> float:
    """Parse `"80"`, `"80GB"` or `"74.5 GiB"` as bytes, with the unit in upper or lower case. Raises
    `SpecError` naming `what`, also for more than `_MOST_GIGABYTES`."""
    number, unit = text.strip().lower(), 1e9
    for name, size in (("gib", 2.0**30), ("gb", 1e9)):
        if number.endswith(name):
            number, unit = number.removesuffix(name).rstrip(), size
            break
    try:
        count = float(number)
    except ValueError:
        raise SpecError(
            f"{what} is {text!r}: not a number of gigabytes. Give one such as 80, 80GB or 74.5GiB."
        ) from None
    if not 0 < count * unit <= _MOST_GIGABYTES * 1e9:
        raise SpecError(
            f"{what} is {text}: it must be above 0 and at most {_MOST_GIGABYTES:,} GB. Give the "
            "gigabytes of one accelerator, such as 80."
        )
    return count * unit


def parse_amount(text: str) -> float:
    """Parse an amount such as `"10M"`, 10,000,000; NaN if it is no number."""
    scale = _SCALES.get(text[-1:].lower(), 1.0)
    try:
        return float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        return float("nan")
