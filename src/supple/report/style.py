"""Look of all pictures: colours, titles, axes, and ticks at round values with exact labels."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from supple.report.live import duration

INK, QUIET, ACCENT, GOOD, WARN = "#1f2933", "#9aa5b1", "#2f6fde", "#2f9e44", "#d64545"
SERIES = (ACCENT, "#e8890c", "#7048e8", GOOD, "#0c8599", WARN, "#e64980", INK)
"""Colours of several curves in one picture, in this order."""
DPI = 140
LOG_FROM = 3.0
"""Ratio of the largest to the smallest value above which an axis is logarithmic."""
ROUND_TIMES_S = (
    *(seconds for seconds in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30)),
    *(60 * minutes for minutes in (1, 2, 5, 10, 20, 30)),
    *(3600 * hours for hours in (1, 2, 4, 8, 16)),
    *(86_400 * days for days in (1, 2, 4, 7, 14, 30, 60, 120, 365)),
)
"""Distances of ticks on a linear time axis, and ticks of a logarithmic one, in s."""
_MOST_TICKS = 9
_UNITS_MS = (86_400_000, 3_600_000, 60_000, 1_000)
_UNIT_NAMES = ("d", "h", "min", "s")
_SUBS = ((10.0, (1.0, 2.0, 3.0, 5.0, 7.0)), (1000.0, (1.0, 2.0, 5.0)))
"""Digits with a tick in every decade of a logarithmic axis, for ends up to this ratio apart; beyond
the last there is one tick a decade."""
_CLOSEST = 1.15
"""Ratio of two counts below which only one of them has a label."""


def tidy(axes: Axes) -> None:
    """Give the axes the common look: a quiet frame on two sides, and a grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK)
    axes.grid(color=QUIET, alpha=0.25, lw=0.6)


def title(figure: Figure, head: str, below: str) -> None:
    """Set a bold headline and a line below it, above the first axes."""
    above = figure.axes[0]
    above.set_title(below, loc="left", color=INK, fontsize=10, pad=10, parse_math=False)
    headline = figure.suptitle(
        head, x=0.01, ha="left", color=INK, fontsize=15, fontweight="bold", parse_math=False
    )
    figure.draw_without_rendering()
    headline.set_x(above.get_position().x0)


def plain_log(axis: Axis, label: Callable[[float], str], low: float, high: float) -> None:
    """Label a logarithmic axis from `low` to `high` with plain numbers, not powers of ten."""
    subs = next((subs for ratio, subs in _SUBS if high <= ratio * low), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def count_ticks(axis: Axis, counts: Sequence[int], keep: int) -> None:
    """Label the counts on a logarithmic axis; those too close to the label before, or to that of
    `keep`, have none."""
    shown: list[int] = []
    for count in sorted(set(counts)):
        near_keep = count != keep and 1 / _CLOSEST < count / keep < _CLOSEST
        if not near_keep and (not shown or count >= _CLOSEST * shown[-1]):
            shown.append(count)
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    axis.set_minor_locator(NullLocator())


def time_ticks(axis: Axis, low_s: float, high_s: float) -> None:
    """Put ticks at round times, from `low_s` to `high_s` on a linear axis, with exact labels."""
    found = round_times(low_s, high_s)
    axis.set_major_locator(FixedLocator(found))
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: exact_time(seconds)))


def round_times(low_s: float, high_s: float) -> list[float]:
    """Return the multiples of a round time between both ends: at most `_MOST_TICKS`, except beyond
    ten years."""
    span = max(high_s - low_s, 1e-9)
    step = next((s for s in ROUND_TIMES_S if span / s < _MOST_TICKS), ROUND_TIMES_S[-1])
    first, last = math.ceil(low_s / step - 1e-6), math.floor(high_s / step + 1e-6)
    return [round(step * number, 3) for number in range(first, last + 1)]


def exact_time(seconds: float) -> str:
    """Format a time without rounding, from its largest unit to its smallest: "20 s", "5 min",
    "1m20s", "2h00m30s", "1d08h"."""
    left, parts = round(seconds * 1000), list[int]()
    for unit in _UNITS_MS:
        parts.append(left // unit)
        left %= unit
    found = [index for index, part in enumerate(parts) if part]
    fraction = f"{left / 1000:.3f}".rstrip("0")[1:] if left else ""
    if not found or (len(found) == 1 and not fraction) or (fraction and found == [3]):
        index = found[0] if found else 3
        return f"{parts[index]}{fraction} {_UNIT_NAMES[index]}"
    last = 3 if fraction else found[-1]
    text = "".join(
        f"{parts[index]:02d}{fraction if index == 3 else ''}{_UNIT_NAMES[index][0]}"
        for index in range(found[0], last + 1)
    )
    return text.removeprefix("0")


def time_label(seconds: float) -> str:
    """Format a time in short: "2 h", "12.3 s", "1h41m", "4.5 d"."""
    if seconds >= 3600 and seconds % 3600 == 0 and seconds < 86_400:
        return f"{seconds / 3600:.0f} h"
    if seconds >= 60 and seconds % 60 == 0 and seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 24 * 3600:
        return duration(seconds)
    return f"{seconds / 86_400:.3g} d"


def number_label(number: float) -> str:
    """Format a number for an axis or a legend: "0.005", "2.5", "40,000"."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
