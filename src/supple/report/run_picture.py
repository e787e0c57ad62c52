"""Draw a training run: workers, speed and reported metrics against time, and why they changed.

A resumed run is drawn behind the runs whose checkpoint it went on from, as far as these are in the
same event log. Work after that checkpoint was done again, and is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from supple.core.words import in_words
from supple.report.eventlog import all_runs
from supple.report.live import duration
from supple.report.style import ACCENT, DPI, GOOD, INK, QUIET, SERIES, WARN, tidy, time_ticks, title

_KINDS = {
    "start": ACCENT,
    "grow": GOOD,
    "regrow": GOOD,
    "shrink": "#e8890c",
    "recover": WARN,
    "wait": WARN,
    "failed": WARN,
    "batch": "#7048e8",
    "keep": QUIET,
}
_NUM_EXPLAINED = 10  # changes listed below the picture
_REASON_LENGTH = 118  # characters of a reason that fit on a line
_START_SHARE = 0.15
"""Largest share of the width for the start of the first run."""
_FEW_POINTS = 12
"""Points of a curve up to which each is marked, so that one alone is visible."""
_EARLIER = 0.45
"""Opacity of earlier runs."""

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of the group to `num_workers` (0: waiting for workers) at `t` seconds."""

    t: float
    num_workers: int
    kind: str
    reason: str


def changes(records: Sequence[Record]) -> list[Change]:
    """Return the changes of the group from the records of one run: each new generation with the
    decision that is logged next to it, and each wait for workers."""
    found: list[Change] = []
    formed: Record | None = None
    for record in records:
        if record["type"] == "FormGroup":
            formed = record
        elif record["type"] == "Decision":
            kind, reason = record["decision_kind"], record["reason"]
            if formed is not None and formed["generation"] == record["generation"]:
                count = len(formed["members"])
                found.append(Change(t=formed["t"], num_workers=count, kind=kind, reason=reason))
                formed = None
            elif kind == "wait":
                found.append(Change(t=record["t"], num_workers=0, kind=kind, reason=reason))
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One run of a job, placed on the time axis of all of them."""

    records: Sequence[Record]
    begins_at: float
    """Seconds on that axis at which it was started."""
    until: float
    """Its own time, in s, up to which it is drawn: its end, or the checkpoint resumed from."""
    last_step: int | None
    """The step of that checkpoint; None for the newest run."""

    @property
    def progress(self) -> list[Record]:
        last = self.last_step
        return [
            record
            for record in self.records
            if record["kind"] == "progress" and (last is None or record["step"] <= last)
        ]

    @property
    def changes(self) -> list[Change]:
        return [change for change in changes(self.records) if change.t <= self.until]

    @property
    def ends_at(self) -> float:
        return self.begins_at + self.until


def parts_of(log: Path) -> list[Part]:
    """Return the newest run of an event log, behind those whose checkpoints it went on from."""
    runs = all_runs(log)
    if not runs:
        return []
    chain: list[tuple[Sequence[Record], int | None]] = [(runs[-1], None)]
    for earlier in reversed(runs[:-1]):
        path = Path(chain[0][0][0].get("resume") or "")
        if path.parent != (log.parent / "checkpoints").resolve():
            break  # a new beginning, or it went on from another run's checkpoint
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            chain.insert(0, (earlier, int(number)))
    parts: list[Part] = []
    for records, last_step in chain:
        until = records[-1]["t"] if last_step is None else _time_of(records, last_step)
        begins_at = parts[-1].ends_at if parts else 0.0
        part = Part(records=records, begins_at=begins_at, until=until, last_step=last_step)
        parts.append(part)
    return parts


def _time_of(records: Sequence[Record], step: int) -> float:
    """Return the time at which a run had committed `step`, as far as it was reported."""
    reached = [r["t"] for r in records if r["kind"] == "progress" and r["step"] <= step]
    return max(reached, default=records[-1]["t"])


def draw_run(log: Path, target: Path) -> bool:
    """Draw the newest run in an event log: workers, speed and reported metrics against time, with a
    numbered list of the changes of the group. Return False, without a picture, if no step of it was
    reported."""
    parts = parts_of(log)
    if not parts or not parts[-1].progress or not parts[-1].changes:
        return False
    newest = parts[-1]
    listed = [*newest.changes[:_NUM_EXPLAINED], *_failure(newest)]
    text_height = 0.24 * (len(listed) + 1)
    figure = Figure(figsize=(11, 6.9 + text_height), dpi=DPI, layout="constrained")
    axes = figure.subplots(4, 1, gridspec_kw={"height_ratios": [2.3, 1.9, 1.9, text_height]})
    workers, speed, metric, text = axes
    for part in parts:
        _draw_workers(workers, part, is_newest=part is newest)
    _draw_curves(speed, metric, parts)
    first = parts[0].changes[0].t if parts[0].changes else 0.0
    end = newest.ends_at
    begin = max(0.0, first - _START_SHARE * (end - first) / (1 - _START_SHARE))
    for shared in (workers, speed, metric):
        tidy(shared)
        shared.set_xlim(begin, end + 0.01 * (end - begin))
        time_ticks(shared.xaxis, begin, end)
        _mark_changes(shared, parts)
    for above in (workers, speed):
        above.tick_params(labelbottom=False)
    top = max(change.num_workers for part in parts for change in part.changes)
    _number_changes(workers, newest, top)
    _label_starts(workers, parts, begin, top)
    _explain(text, listed, len(newest.changes) - min(_NUM_EXPLAINED, len(newest.changes)))
    title(figure, *_headline(parts))
    figure.savefig(target)
    return True


def _draw_workers(axes: Axes, part: Part, *, is_newest: bool) -> None:
    happened = part.changes
    if not happened:
        return
    begins = part.begins_at
    times = [*(begins + change.t for change in happened), part.ends_at]
    sizes = [*(change.num_workers for change in happened), happened[-1].num_workers]
    opacity = 1.0 if is_newest else _EARLIER
    axes.step(times, sizes, where="post", color=ACCENT, lw=2.2, alpha=opacity)
    axes.fill_between(times, sizes, step="post", color=ACCENT, alpha=0.13 * opacity, lw=0)
    axes.axvspan(begins, times[0], color=QUIET, alpha=0.12, lw=0)
    axes.set_ylabel("workers")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _draw_curves(speed: Axes, metric: Axes, parts: Sequence[Part]) -> None:
    """Draw the speed and the reported metrics of every part, one colour a metric."""
    names = sorted({name for part in parts for r in part.progress for name in r["metrics"]})
    for part in parts:
        progress, begins = part.progress, part.begins_at
        look: dict[str, Any] = {"alpha": 1.0 if part is parts[-1] else _EARLIER}
        look |= {"marker": "o", "ms": 3.5} if len(progress) <= _FEW_POINTS else {}
        timed = [r for r in progress if r["step_time_s"] > 0.0]
        rates = [r["global_batch_size"] / r["step_time_s"] for r in timed]
        speed.plot([begins + r["t"] for r in timed], rates, color=INK, lw=1.3, **look)
        for index, name in enumerate(names):
            rows = [(begins + r["t"], r["metrics"].get(name)) for r in progress]
            label = name if part is parts[-1] else None
            colour = SERIES[index % len(SERIES)]
            metric.plot(*zip(*rows, strict=True), lw=1.5, label=label, color=colour, **look)
    speed.set_ylabel("samples/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    metric.set_ylabel(", ".join(names[:3]) or "nothing reported")
    if len(names) > 1:
        metric.legend(frameon=False, loc="upper right")


def _mark_changes(axes: Axes, parts: Sequence[Part]) -> None:
    newest = parts[-1]
    for change in newest.changes[1:]:
        colour = _KINDS.get(change.kind, QUIET)
        axes.axvline(newest.begins_at + change.t, color=colour, lw=0.9, alpha=0.55)
    for part in parts[1:]:
        axes.axvline(part.begins_at, color=INK, lw=0.9, ls=":")
    if _failure(newest):
        axes.axvline(newest.ends_at, color=WARN, lw=1.6)


def _number_changes(axes: Axes, newest: Part, top: int) -> None:
    axes.set_ylim(0, top * 1.3 + 0.2)
    for number, change in enumerate(newest.changes[:_NUM_EXPLAINED], start=1):
        # Alternating heights keep close changes readable.
        height = top * (1.2 if number % 2 else 1.1) + 0.1
        axes.text(
            newest.begins_at + change.t,
            height,
            str(number),
            ha="center",
            va="center",
            fontsize=8,
            color="white",
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.25", "fc": _KINDS.get(change.kind, QUIET), "lw": 0},
        )


def _label_starts(axes: Axes, parts: Sequence[Part], begin: float, top: int) -> None:
    for part in parts:
        if not part.changes:
            continue
        took = part.changes[0].t
        middle = (max(begin, part.begins_at) + part.begins_at + took) / 2
        words = f"starting\n{duration(took)}"
        axes.text(
            middle,
            top / 2,
            words,
            ha="center",
            va="center",
            color=QUIET,
            fontsize=8.5,
            clip_on=True,
        )


def _failure(part: Part) -> list[Change]:
    """Return the failure of a run as an entry of the list, with the last line of its error."""
    ending = _ending(part)
    if ending is None or ending["status"] != "failed":
        return []
    lines = [line for line in ending["detail"].splitlines() if line[:1].strip()]
    error = next((line for line in reversed(lines) if ": " in line), "")
    reason = f"{error or ending['reason']}"
    return [Change(t=part.until, num_workers=0, kind="failed", reason=reason)]


def _explain(axes: Axes, listed: Sequence[Change], num_more: int) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(listed) + 1, 0)
    for row, change in enumerate(listed):
        colour = _KINDS.get(change.kind, QUIET)
        reason = " ".join(change.reason.split())
        if len(reason) > _REASON_LENGTH:
            reason = reason[: _REASON_LENGTH - 1] + "…"
        y = row + 0.5
        mark = "×" if change.kind == "failed" else str(row + 1)
        axes.text(0.012, y, mark, color=colour, fontweight="bold", ha="right", fontsize=8.5)
        axes.text(0.06, y, f"{change.t:.1f} s", color=QUIET, ha="right", fontsize=8.5)
        axes.text(0.072, y, change.kind, color=colour, fontweight="bold", fontsize=8.5)
        axes.text(0.132, y, reason, color=INK, fontsize=8.5, parse_math=False)
    if num_more:
        more = f"… and {num_more} more changes in the event log"
        axes.text(0.072, len(listed) + 0.5, more, color=QUIET, fontsize=8.5)


def _headline(parts: Sequence[Part]) -> tuple[str, str]:
    newest = parts[-1]
    name = next((r["name"] for r in newest.records if r["kind"] == "begin"), "run")
    sizes = {change.num_workers for change in newest.changes if change.num_workers}
    span = in_words(max(sizes)) if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)} workers"
    steps = max(record["step"] for record in newest.progress)
    began = _first_step(newest.records)
    took = duration(newest.until)
    head = f"{name}: {steps - began:,} step{'s' * (steps - began != 1)} in {took}, {span}"
    kinds = [change.kind for change in newest.changes]
    num_changes = len(kinds) - 1
    below = f"{num_changes or 'no'} change{'s' * (num_changes != 1)} of the group while training"
    if losses := kinds.count("recover"):
        below += f", {losses} because a worker was lost"
    if began:
        below = f"from step {began:,} to {steps:,}; {below}"
    if num_earlier := len(parts) - 1:
        many = "an earlier run" if num_earlier == 1 else f"{num_earlier} earlier runs"
        below = f"{below}; pale: {many}, {duration(newest.begins_at)}"
    ending = _ending(newest)
    return head, below + (f"; {ending['status']}" if ending else "")


def _first_step(records: Sequence[Record]) -> int:
    """Return the step at which the run's first group began: above 0 for a resumed run."""
    formed = (r["step"] for r in records if r["type"] == "GroupFormed")
    return next(formed, 0)


def _ending(part: Part) -> Record | None:
    return next((r for r in part.records if r["kind"] == "end"), None)
