"""Read a trace of request arrivals from a CSV file, for `supple simulate` and `supple load`."""

import csv
import math
from pathlib import Path

import numpy as np

from supple.core.service.scenario import Floats
from supple.core.spec import SpecError

COLUMN = "arrival_s"
_MOST_REQUESTS = 5_000_000


def read_trace(path: Path) -> Floats:
    """Return sorted arrival times in seconds, the first at 0. Raises `SpecError`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            numbered = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no CSV in UTF-8"
        raise SpecError(f"the trace {path} cannot be read: {reason}.") from None
    rows = [row for _, row in numbered]
    column, first = 0, 0
    if rows and not _is_number(rows[0][0]):
        names = [name.strip() for name in rows[0]]
        if COLUMN not in names:
            raise SpecError(
                f"the trace {path} has the columns {', '.join(names)[:200]}: none is {COLUMN}. "
                f"Rename the column of arrival times, in seconds, to {COLUMN}."
            )
        column, first = names.index(COLUMN), 1
    if len(rows) - first > _MOST_REQUESTS:
        raise SpecError(
            f"the trace {path} has {len(rows) - first} requests: at most {_MOST_REQUESTS} are "
            "simulated. Shorten it."
        )
    arrivals: list[float] = []
    for line, row in numbered[first:]:
        text = row[column].strip() if column < len(row) else ""
        if not _is_number(text):
            raise SpecError(
                f"the trace {path}, line {line}: {text!r} is not a time in seconds. Correct the "
                "line, or delete it."
            )
        arrivals.append(float(text))
    if not arrivals:
        raise SpecError(f"the trace {path} has no request: give at least one row.")
    found = np.sort(np.array(arrivals))
    return found - found[0]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
