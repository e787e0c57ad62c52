"""Choose a row of a plan: the cheapest that meets a deadline, the fastest within a budget, or the
knee of the speed-up curve; and give the reason in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from supple.core.spec import KNEE_RULE, KNEE_SHARE, LARGEST_COUNT, Limits, Objective
from supple.core.types import Estimate, Infeasible, Plan
from supple.core.words import accelerator_hours, in_digits, in_words

KEEP_SHARE = 0.8 * KNEE_SHARE
"""A running job releases workers only where they add less than this share. Between it and
`KNEE_SHARE` nothing changes, so that measurement noise causes no resizes (hysteresis)."""
_A_GUESS, _MEANINGLESS = 10.0, 1000.0
"""Ratios of high to low of a step time from which a recommendation is marked as a guess, and
refused."""
_DISAGREE = 2.0
"""The same ratio of a measured step time from which repeats are reported to disagree."""
_FEWEST = "the fewest here that the job fits on"
_LAST = "the largest count in the table"
_LARGEST = "the largest count looked at; --max-workers N looks further"


class Outcome(Protocol):
    """Fields of a row that the choice needs."""

    @property
    def num_workers(self) -> int: ...
    @property
    def speedup(self) -> Estimate: ...
    @property
    def time_to_end_s(self) -> Estimate: ...
    @property
    def accelerator_hours(self) -> Estimate: ...
    @property
    def cost(self) -> Estimate | None:
        """None without a price."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Index of the chosen row, and the reason in words."""

    recommended: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTable:
    """All rows by count, the index of the recommended one, and the reason in words."""

    rows: tuple[Plan, ...]
    recommended: int
    reason: str
    unit: int = 1
    """Reference count of the speed-ups: 1, or the fewest workers that the job fits on."""

    @property
    def choice(self) -> Plan:
        return self.rows[self.recommended]


def choose(
    rows: tuple[Plan, ...],
    limits: Limits,
    objective: Objective,
    *,
    unit: int = 1,
    last: str | None = None,
) -> PlanTable | Infeasible:
    """Choose a row as `take` does, and report an uncertain step time. A knee is refused where the
    interval is meaningless; a row that meets a deadline or a budget is not."""
    taken = take(rows, limits, objective, unit=unit, last=last)
    if isinstance(taken, Infeasible):
        return taken
    found = PlanTable(rows=rows, recommended=taken.recommended, reason=taken.reason, unit=unit)
    step = found.choice.step_time_s
    ends = f"a step may take {in_digits(step.low)} s or {in_digits(step.high)} s"
    has_limit = objective.deadline_s is not None or objective.budget is not None
    if step.high > _MEANINGLESS * step.low and not has_limit:
        return Infeasible(
            asked="a plan",
            numbers=f"on {in_words(found.choice.num_workers)} {ends}, as far as is known",
            rule=f"ends more than {_MEANINGLESS:,.0f} times apart decide nothing",
            advice="Check the measurements against each other (units, batches, sizes) and leave "
            "out what does not fit, or measure again.",
        )
    compared = found.rows[found.recommended :][: 1 if has_limit else 2]
    doubt = _disagreement(compared)
    if not doubt and is_a_guess(found.choice):
        doubt = f" This is a guess: {ends}. Measure first."
    return replace(found, reason=found.reason + doubt)


def take(
    rows: Sequence[Outcome],
    limits: Limits,
    objective: Objective,
    *,
    unit: int = 1,
    fewest: str = _FEWEST,
    last: str | None = None,
) -> Choice | Infeasible:
    """Choose a row by the objective: the cheapest that meets the deadline, the fastest within the
    budget, else the knee. `unit` workers have a speed-up of `unit`; `fewest` describes them,
    and `last` the last row."""
    if objective.deadline_s is not None:
        return _for_deadline(rows, objective.deadline_s, limits)
    if objective.budget is not None:
        return _for_budget(rows, objective.budget, limits)
    index = knee(rows)
    end = last or (_LARGEST if _ends_uncapped(rows, limits) else _LAST)
    return Choice(recommended=index, reason=_knee_reason(rows, index, unit, fewest, end))


def is_a_guess(row: Plan) -> bool:
    """Whether the step time is too uncertain to rely on."""
    return row.step_time_s.high > _A_GUESS * row.step_time_s.low


def _disagreement(rows: Sequence[Plan]) -> str:
    """A sentence about the first measured row whose repeats disagree; empty for none."""
    for row in rows:
        step = row.step_time_s
        if step.source == "measured" and step.high > _DISAGREE * step.low:
            return (
                f" Repeats disagree: a step of {in_words(row.num_workers)} may take "
                f"{in_digits(step.low)} s or {in_digits(step.high)} s. A busy machine does that: "
                "measure again when it is idle."
            )
    return ""


def knee(rows: Sequence[Outcome], *, held: int = 0) -> int:
    """Index of the knee by `KNEE_RULE`. Speeds are relative to one worker. Up to `held`, the count
    of a running job, `KEEP_SHARE` is enough. A row beyond the end of the curve is taken only if it
    beats the knee on time and on accelerator-hours: one slow row hides nothing better."""
    best, has_ended = 0, False
    for index in range(1, len(rows)):
        count, speed = rows[index].num_workers, rows[index].speedup.value
        best_count, best_speed = rows[best].num_workers, rows[best].speedup.value
        share = KNEE_SHARE if count > held else KEEP_SHARE
        has_ended |= (speed - best_speed) / (count - best_count) < share
        if not has_ended or (speed > best_speed and speed * best_count >= best_speed * count):
            best, has_ended = index, False
    return best


def _ends_uncapped(rows: Sequence[Outcome], limits: Limits) -> bool:
    """Whether the table ends at `LARGEST_COUNT`, without a cap by the user."""
    return limits.max_workers is None and rows[-1].num_workers >= LARGEST_COUNT


def _knee_reason(rows: Sequence[Outcome], index: int, unit: int, fewest: str, end: str) -> str:
    row = rows[index]
    head = in_words(row.num_workers)
    if row.num_workers != unit:
        than = "one worker" if unit == 1 else f"{in_words(unit)}, {fewest}"
        head += f": {in_digits(row.speedup.value / unit)} times the speed of {than}"
    elif unit > 1:
        head += f", {fewest}"
    if index + 1 == len(rows):
        return f"{head}; it is {end}. Rule: {KNEE_RULE}."
    after = rows[index + 1]
    gained = after.speedup.value - row.speedup.value
    beyond = _faster_beyond(rows, index, unit)
    if gained <= 0.0:
        return f"{head}; {after.num_workers} would be slower{beyond}. Rule: {KNEE_RULE}."
    # Rounded down, so that 0.498 is not shown as the share 0.5.
    share = math.floor(100 * gained / (after.num_workers - row.num_workers)) / 100
    return (
        f"{head}; going to {after.num_workers} would add {share:.2f} of a worker's speed "
        f"for every worker added{beyond}. Rule: {KNEE_RULE}."
    )


def _faster_beyond(rows: Sequence[Outcome], index: int, unit: int) -> str:
    """The fastest count beyond a dip of the curve, where the knee ends at the dip; "" for none."""
    row, after = rows[index], rows[index + 1]
    fastest = max(rows[index + 1 :], key=lambda row: row.speedup.value)
    gained = fastest.speedup.value - row.speedup.value
    worth_it = gained >= KNEE_SHARE * (fastest.num_workers - row.num_workers)
    dips = after.speedup.value <= row.speedup.value
    if fastest is after or gained <= 0.0 or not (dips or worth_it):
        return ""
    times = in_digits(fastest.speedup.value / unit)
    than = "one worker" if unit == 1 else in_words(unit)
    return f", {fastest.num_workers} would be the fastest: {times} times the speed of {than}"


def _for_deadline(
    rows: Sequence[Outcome], deadline_s: float, limits: Limits
) -> Choice | Infeasible:
    good = [i for i, row in enumerate(rows) if row.time_to_end_s.high <= deadline_s]
    if not good:
        fastest = min(rows, key=lambda row: row.time_to_end_s.high)
        more = ""
        if fastest is rows[-1] and _ends_uncapped(rows, limits):
            more = f" {in_words(fastest.num_workers)} are {_LARGEST}."
        return Infeasible(
            asked=f"the end within {_time(deadline_s)}",
            numbers=f"the fastest is {in_words(fastest.num_workers)}: "
            f"{_time(fastest.time_to_end_s.value)}, with 90 % certainty within "
            f"{_time(fastest.time_to_end_s.high)}",
            rule="the upper end of the 80 % interval must meet the deadline",
            advice="Allow more time or workers, train on less, or measure more counts to narrow "
            f"the interval.{more}",
        )
    index = min(good, key=lambda i: rows[i].accelerator_hours.value)
    row = rows[index]
    return Choice(
        recommended=index,
        reason=f"{in_words(row.num_workers)}: ends in {_time(row.time_to_end_s.value)}, with 90 % "
        f"certainty within {_time(row.time_to_end_s.high)}; of all that meet the deadline of "
        f"{_time(deadline_s)} it uses the fewest accelerator-hours "
        f"({in_digits(row.accelerator_hours.value)}).",
    )


def _for_budget(rows: Sequence[Outcome], budget: float, limits: Limits) -> Choice | Infeasible:
    priced = limits.price_per_hour is not None

    def cost(row: Outcome) -> Estimate:
        return row.cost if row.cost is not None else row.accelerator_hours

    def amount(number: str) -> str:
        return number if priced else accelerator_hours(number)

    limit = amount(f"{budget:,.16g}")
    good = [i for i, row in enumerate(rows) if cost(row).high <= budget]
    if not good:
        cheapest = min(rows, key=lambda row: cost(row).high)
        find = "a cheaper accelerator" if priced else "a faster accelerator"
        return Infeasible(
            asked=f"the end for a budget of {limit}",
            numbers=f"the cheapest is {in_words(cheapest.num_workers)}: "
            f"{amount(in_digits(cost(cheapest).value))}, with 90 % certainty at most "
            f"{amount(in_digits(cost(cheapest).high))}",
            rule="the upper end of the 80 % interval must be within the budget",
            advice=f"Raise the budget, train on less, or find {find}.",
        )
    index = min(good, key=lambda i: rows[i].time_to_end_s.value)
    row = rows[index]
    end = ""
    if index + 1 == len(rows) and _ends_uncapped(rows, limits):
        end = f" It is {_LARGEST}."
    return Choice(
        recommended=index,
        reason=f"{in_words(row.num_workers)}: the fastest within {limit}; ends in "
        f"{_time(row.time_to_end_s.value)} for {amount(in_digits(cost(row).value))}, with 90 % "
        f"certainty at most {amount(in_digits(cost(row).high))}.{end}",
    )


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{in_digits(seconds)} s"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"
