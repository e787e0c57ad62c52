"""Nouns a user writes, and the refusal of nonsense before any work starts.

`parse_*` turn command-line text into numbers and raise `SpecError`, whose text says what was
asked, the numbers, the rule that broke and what to do.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Literal, get_args

BatchMode = Literal["fixed", "adaptive"]
LrRule = Literal["auto", "linear", "sqrt", "adascale", "constant"]
OnNonFinite = Literal["stop", "skip"]
MAX_WORKERS = 65_536
"""More than any pool known; a larger count is a typing error."""
_SEEDS_END = 2**63
"""What a random generator's seed fits into."""
LARGEST_COUNT = 4096
"""Where a plan ends that nobody gave a cap."""

_MOST_S, _MOST_MONEY = 8.64e9, 1e15
"""The same of times, 100,000 days, and of money."""

_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")

KNEE_SHARE = 0.5
KNEE_RULE = (
    "the knee: the largest count up to which every doubling still adds at least "
    f"{KNEE_SHARE:g} of a worker's speed for every worker added"
)


class SpecError(ValueError):
    """The user asked for something that cannot be. The message is complete."""


LONGEST_NAME = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")


def check_name(name: str) -> None:
    """Raise `SpecError` unless a job or a service may be called so: the name is a folder's and a
    socket's too."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"the name {name!r} is not usable as a folder: use up to {LONGEST_NAME} letters, "
            "digits, '.', '_' and '-', and begin with a letter or digit."
        )


def check_one_of(value: object, known: Iterable[str], *, what: str, advice: str = "") -> None:
    """Raise `SpecError` with all of `known` unless `value` is one of them, letter for letter."""
    names = tuple(known)
    if value not in names:
        more = f" {advice}" if advice else ""
        raise SpecError(
            f"{what}={value!r} was given: it must be one of {', '.join(names)}. "
            f"Choose one of them.{more}"
        )


def is_count(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


def check_counts(asked: str, **counts: float) -> None:
    """Raise `SpecError` naming the first that is no whole number of at least 1; `asked` says what
    was asked for."""
    for what, count in counts.items():
        if not is_count(count):
            raise SpecError(
                f"{asked} with {what}={count:g}: it must be a whole number of at least 1. Correct "
                "the number."
            )


def is_positive(value: float) -> bool:
    """Whether it is a number above 0 and finite."""
    return isinstance(value, Real) and 0 < value < math.inf


def parse_count(text: str, *, what: str) -> int:
    """A whole number from 1 to `MAX_WORKERS`, or a `SpecError` naming `what`."""
    try:
        count = int(text)
    except ValueError:
        raise SpecError(
            f"{what} is {text!r}: not a whole number. Give a count such as 4."
        ) from None
    if not 1 <= count <= MAX_WORKERS:
        raise SpecError(f"{what} is {count}: it must be between 1 and {MAX_WORKERS}.")
    return count


def parse_workers(text: str) -> tuple[int, int]:
    """`"2:8"` or `"4"` as (min, max)."""
    low, colon, high = text.partition(":")
    minimum = parse_count(low, what=f"--workers {text}: MIN")
    maximum = parse_count(high, what=f"--workers {text}: MAX") if colon else minimum
    if minimum > maximum:
        raise SpecError(
            f"--workers {text}: MIN {minimum} is above MAX {maximum}. "
            f"Write the smaller first: --workers {maximum}:{minimum}."
        )
    return minimum, maximum


def parse_batch(text: str) -> BatchMode:
    """`"fixed"` or `"adaptive"`."""
    for mode in get_args(BatchMode):
        if text == mode:
            return mode
    raise SpecError(f"--batch {text}: choose {' or '.join(get_args(BatchMode))}.")


def parse_rule(text: str) -> LrRule:
    """The learning-rate rule of this name, or a `SpecError` with the valid ones."""
    for rule in get_args(LrRule):
        if text == rule:
            return rule
    raise SpecError(f"--lr-rule {text}: no such rule. Choose one of {', '.join(get_args(LrRule))}.")


def parse_on_non_finite(text: str) -> OnNonFinite:
    """`"stop"` or `"skip"`."""
    for choice in get_args(OnNonFinite):
        if text == choice:
            return choice
    raise SpecError(f"--on-non-finite {text}: choose {' or '.join(get_args(OnNonFinite))}.")


def parse_name(text: str, known: Iterable[str], *, what: str) -> str:
    """Which of `known` is named, capitals or not; else a `SpecError` with all of them, and those
    that are probably meant."""
    names = {name.casefold(): name for name in known}
    asked = text.strip().casefold()
    if asked in names:
        return names[asked]
    near = [name for name in names if asked and name.startswith(asked)]
    near = near or [name for name in names if asked.startswith(name)]
    near = near or get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f" Do you mean {' or '.join(names[name] for name in near)}?" if near else ""
    raise SpecError(f"{what} {text}: unknown. Known: {', '.join(names.values())}.{hint}")


def parse_duration(text: str, *, what: str, such_as: str = "90s, 15m, 2h or 1h30m") -> float:
    """`"90s"`, `"2h"`, `"1h30m"` or plain seconds, as positive finite seconds; a `SpecError` names
    times `such_as` may be written."""
    stripped = text.strip()
    if _DURATION.fullmatch(stripped):
        seconds = sum(
            float(part[:-1]) * _UNIT_S[part[-1]] for part in re.findall(r"[\d.]+[smhd]", stripped)
        )
    else:
        try:
            seconds = float(stripped)
        except ValueError:
            raise SpecError(f"{what} is {text!r}: not a time. Write {such_as}.") from None
    if not is_positive(seconds):
        raise SpecError(f"{what} is {text}: a time must be positive and finite.")
    if seconds > _MOST_S:
        raise SpecError(f"{what} is {text}: that is more than {_MOST_S / 86_400:,.0f} days.")
    return seconds


def parse_money(text: str, *, what: str) -> float:
    """A positive finite amount."""
    try:
        amount = float(text)
    except ValueError:
        raise SpecError(f"{what} is {text!r}: not a number. Write it as 2.50.") from None
    if not is_positive(amount):
        raise SpecError(f"{what} is {text}: it must be positive and finite.")
    if amount > _MOST_MONEY:
        raise SpecError(f"{what} is {text}: it must be at most {_MOST_MONEY:,.0f}.")
    return amount


def parse_schedule(text: str, *, minimum: int, maximum: int) -> tuple[tuple[float, int], ...]:
    """`"20s:2,40s:4"` as ((20.0, 2), (40.0, 4)), in order of time and within MIN:MAX."""
    steps: list[tuple[float, int]] = []
    for part in text.split(","):
        when, colon, count_text = part.strip().rpartition(":")
        if not colon:
            raise SpecError(
                f"--schedule {text}: {part!r} has no count. Write TIME:COUNT, as in 20s:2,40s:4."
            )
        at_s = 0.0 if when in {"0", "0s"} else parse_duration(when, what=f"--schedule {text}: time")
        count = parse_count(count_text, what=f"--schedule {text}: count")
        if not minimum <= count <= maximum:
            raise SpecError(
                f"--schedule {text}: {count} workers at {when} is outside --workers "
                f"{minimum}:{maximum}. Change one of the two."
            )
        if steps and at_s <= steps[-1][0]:
            raise SpecError(
                f"--schedule {text}: {when} does not come after {steps[-1][0]:g}s. "
                "Put the times in increasing order."
            )
        steps.append((at_s, count))
    return tuple(steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """One elastic training job, as asked for. Times in seconds."""

    name: str
    script: str
    function: str = "train"
    min_workers: int = 1
    max_workers: int = 1
    schedule: tuple[tuple[float, int], ...] = ()
    """(time since training began, count) pairs; where empty, the planner decides the count."""
    batch: BatchMode = "fixed"
    lr_rule: LrRule = "auto"
    reproducible: bool = False
    num_logical_shards: int = 8
    seed: int = 0
    run_dir: str = "supple-runs"
    resume: str | None = None
    """A checkpoint's path."""
    checkpoint_every_s: float = 300.0
    ledger: bool = False
    address: str | None = None
    port: int = 0
    """Where the workers of a generation find each other; 0: any free port."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    heartbeat_timeout_s: float = 4.0
    """A worker whose process is stopped, or out of reach, is given up after so long."""
    unresponsive_timeout_s: float = 600.0
    """The same of one whose process runs while its interpreter does not answer."""
    stall_timeout_s: float = 60.0
    """A worker that fetches data for so long while others wait for it is replaced; ten times as
    long for one in the script's own code."""
    max_failures: int = 3
    """Losses in a row without a committed step between them, after which a job is not retried."""
    on_non_finite: OnNonFinite = "stop"
    """What a step does whose loss or gradient is not a finite number."""
    max_steps: int | None = None
    """End after so many committed steps (None: after all epochs)."""
    price_per_hour: float | None = None
    objective: "Objective | None" = None
    """What the count is decided by while it trains. None: the knee, beginning with MIN."""
    interconnect: str = "ethernet-25"
    """Between nodes: what counts on more nodes than were measured are predicted with."""
    workers_per_node: int | None = None
    """None: all of them fit on one."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_one_of(self.batch, get_args(BatchMode), what="batch")
        check_one_of(self.lr_rule, get_args(LrRule), what="lr_rule")
        check_one_of(self.on_non_finite, get_args(OnNonFinite), what="on_non_finite")
        for what, value, least in (
            ("--logical-shards", self.num_logical_shards, 1),
            ("--max-failures", self.max_failures, 0),
            ("--max-steps", 1 if self.max_steps is None else self.max_steps, 1),
            ("--rendezvous-port", self.port, 0),
            ("--seed", self.seed, 0),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
        ):
            if value < least:
                raise SpecError(f"{what} is {value}: it must be at least {least}.")
        if self.port > 65_535:
            raise SpecError(f"--rendezvous-port is {self.port}: ports end at 65535.")
        if self.seed >= _SEEDS_END:
            raise SpecError(f"--seed is {self.seed}: seeds end at {_SEEDS_END - 1}.")
        if not 0 < self.cpus_per_worker <= 1024:
            raise SpecError(
                f"--cpus-per-worker is {self.cpus_per_worker:g}: give more than 0, at most 1024."
            )
        if not 0 <= self.gpus_per_worker <= 1024:
            raise SpecError(f"--gpus-per-worker is {self.gpus_per_worker:g}: give 0 to 1024.")
        if self.min_workers > self.max_workers:
            raise SpecError(
                f"MIN workers {self.min_workers} is above MAX {self.max_workers}: swap them."
            )
        if self.objective is not None and (self.schedule or self.min_workers == self.max_workers):
            decided = "--schedule" if self.schedule else f"--workers {self.min_workers}"
            raise SpecError(
                f"{decided} decides the count already: a deadline, a budget or the knee would "
                "change nothing. Leave one of the two out, or give --workers MIN:MAX."
            )
        if self.reproducible and self.max_workers > self.num_logical_shards:
            raise SpecError(
                f"--reproducible cuts a batch into {self.num_logical_shards} logical shards, so "
                f"{self.max_workers} workers would leave some idle. Raise --logical-shards (it "
                "changes the bits) or lower MAX."
            )
        if self.reproducible and self.batch == "adaptive":
            raise SpecError(
                "--reproducible promises the same bits for any history, --batch adaptive changes "
                "the batch with the history: choose one."
            )

    def clamp(self, count: int) -> int:
        """The count nearest to `count` that the job may have."""
        return min(max(count, self.min_workers), self.max_workers)

    def check_count(self, count: int) -> None:
        """Raise `SpecError` for a count that the job may not have."""
        if self.clamp(count) != count:
            low, high = self.min_workers, self.max_workers
            raise SpecError(
                f"{count} worker{'s' * (count != 1)} asked for, the job has --workers {low}:{high}."
                f" Ask for a count from {low} to {high}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a plan may use."""

    min_workers: int = 1
    max_workers: int | None = None
    price_per_hour: float | None = None
    batch: BatchMode = "fixed"

    def __post_init__(self) -> None:
        for what, count in (("least", self.min_workers), ("most", self.max_workers)):
            if count is not None and not is_count(count):
                raise SpecError(
                    f"a plan was asked for with {count} as the {what} workers: it must be a whole "
                    "number of at least 1. Give None as the most for no cap."
                )
        check_one_of(self.batch, get_args(BatchMode), what="batch")
        _check_positive("a price per hour", self.price_per_hour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a plan is for; neither: the knee. `budget` is money, or accelerator-hours without a
    price."""

    deadline_s: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and self.budget is not None:
            raise SpecError(
                f"a deadline of {self.deadline_s:g} s and a budget of {self.budget:g} were both "
                "given: a plan is for one of them. Choose the one that binds."
            )
        _check_positive("a deadline", self.deadline_s)
        _check_positive("a budget", self.budget)


def _check_positive(what: str, value: float | None) -> None:
    if value is not None and not is_positive(value):
        raise SpecError(f"{what} of {value}: it must be positive and finite. Give None for none.")


def parse_limits(max_workers: str | None, price: str | None, batch: str) -> Limits:
    """The limits of a plan from `--max-workers`, `--price` and `--batch`."""
    return Limits(
        max_workers=parse_count(max_workers, what="--max-workers")
        if max_workers is not None
        else None,
        price_per_hour=parse_money(price, what="--price") if price is not None else None,
        batch=parse_batch(batch),
    )


def parse_objective(deadline: str | None, budget: str | None) -> Objective:
    """What a plan is for, from `--deadline` or `--budget`; `SpecError` for both."""
    if deadline is not None and budget is not None:
        raise SpecError("--deadline and --budget were both given: choose the one that binds.")
    return Objective(
        deadline_s=parse_duration(deadline, what="--deadline") if deadline is not None else None,
        budget=parse_money(budget, what="--budget") if budget is not None else None,
    )
