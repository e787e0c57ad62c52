"""Specification of jobs and plans: options, limits and objectives, validated before work starts.

`parse_*` turn command-line text into numbers and raise `SpecError`, whose text gives the request,
the numbers, the rule that broke and what to do.
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
Shown = Literal["leader", "all"]
Change = Literal["data", "optimizer"]
MAX_WORKERS = 65_536
"""Largest allowed count: a larger one is a typing error."""
_SEEDS_END = 2**63
"""Upper bound of seeds: random generators accept 63 bits."""
LARGEST_COUNT = 4096
"""Largest count of a plan without a cap."""

_MOST_S, _MOST_MONEY = 8.64e9, 1e15
"""Largest allowed time (100,000 days) and amount of money."""

_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")

KNEE_SHARE = 0.5
"""Least speed that an added worker must add, in workers."""
KNEE_RULE = (
    "the knee: the largest count up to which every doubling still adds at least "
    f"{KNEE_SHARE:g} of a worker's speed for every worker added"
)


class SpecError(ValueError):
    """An invalid request by the user, with a complete message."""


LONGEST_NAME = 64
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}")


def check_name(name: str) -> None:
    """Raise `SpecError` unless the name is valid for a job, its folder and its socket."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"the name {name!r} is not usable as a folder: use up to {LONGEST_NAME} letters, "
            "digits, '.', '_' and '-', and begin with a letter or digit."
        )


def check_one_of(value: object, known: Iterable[str], *, what: str, advice: str = "") -> None:
    """Raise `SpecError` with all of `known` unless `value` is exactly one of them."""
    names = tuple(known)
    if value not in names:
        more = f" {advice}" if advice else ""
        raise SpecError(
            f"{what}={value!r} was given: it must be one of {', '.join(names)}. "
            f"Choose one of them.{more}"
        )


def is_count(value: object) -> bool:
    """Whether the value is a whole number of at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


def check_counts(request: str, **counts: float) -> None:
    """Raise `SpecError` for the first count that is not a whole number of at least 1; the message
    begins with `request`."""
    for what, count in counts.items():
        if not is_count(count):
            raise SpecError(
                f"{request} with {what}={count:g}: it must be a whole number of at least 1. "
                "Correct the number."
            )


def is_positive(value: float) -> bool:
    """Whether the value is a finite number above 0."""
    return isinstance(value, Real) and 0 < value < math.inf


def parse_count(text: str, *, what: str) -> int:
    """Parse a whole number from 1 to `MAX_WORKERS`; `SpecError` naming `what` for any other."""
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
    """Parse `"2:8"` or `"4"` as (min, max)."""
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
    """Parse `"fixed"` or `"adaptive"`."""
    for mode in get_args(BatchMode):
        if text == mode:
            return mode
    raise SpecError(f"--batch {text}: choose {' or '.join(get_args(BatchMode))}.")


def parse_rule(text: str) -> LrRule:
    """Parse the name of a learning-rate rule; `SpecError` with the valid ones for any other."""
    for rule in get_args(LrRule):
        if text == rule:
            return rule
    raise SpecError(f"--lr-rule {text}: no such rule. Choose one of {', '.join(get_args(LrRule))}.")


def parse_on_non_finite(text: str) -> OnNonFinite:
    """Parse `"stop"` or `"skip"`."""
    for choice in get_args(OnNonFinite):
        if text == choice:
            return choice
    raise SpecError(f"--on-non-finite {text}: choose {' or '.join(get_args(OnNonFinite))}.")


def parse_changes(text: str) -> tuple[Change, ...]:
    """Parse `"data"`, `"optimizer"` or `"data,optimizer"`."""
    parts = [part.strip() for part in text.split(",")]
    changes = tuple(choice for choice in get_args(Change) if choice in parts)
    if len(changes) != len(set(parts)):
        raise SpecError(
            f"--allow-changes {text}: name what may differ from the run that is resumed: "
            f"{', '.join(get_args(Change))}, or both with a comma."
        )
    return changes


def parse_output(text: str) -> Shown:
    """Parse `"leader"` or `"all"`."""
    for choice in get_args(Shown):
        if text == choice:
            return choice
    raise SpecError(f"--output {text}: choose {' or '.join(get_args(Shown))}.")


def parse_name(text: str, known: Iterable[str], *, what: str) -> str:
    """Look up one of `known`, ignoring case; else `SpecError` with all of them and hints."""
    names = {name.casefold(): name for name in known}
    given = text.strip().casefold()
    if given in names:
        return names[given]
    near = [name for name in names if given and name.startswith(given)]
    near = near or [name for name in names if given.startswith(name)]
    near = near or get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Do you mean {' or '.join(names[name] for name in near)}?" if near else ""
    raise SpecError(f"{what} {text}: unknown. Known: {', '.join(names.values())}.{hint}")


def parse_duration(text: str, *, what: str, such_as: str = "90s, 15m, 2h or 1h30m") -> float:
    """Parse `"90s"`, `"2h"` or `"1h30m"` as positive finite seconds. A number without a unit is
    refused; a `SpecError` gives `such_as` as examples."""
    stripped = text.strip()
    if _DURATION.fullmatch(stripped):
        parts = re.findall(r"[\d.]+[smhd]", stripped)
        seconds = sum(float(part[:-1]) * _UNIT_S[part[-1]] for part in parts)
        return check_duration(seconds, text, what=what)
    try:
        number = float(stripped)
    except ValueError:
        raise SpecError(f"{what} is {text!r}: not a time. Write {such_as}.") from None
    check_duration(number, text, what=what)
    choices = f"{stripped}h? {stripped}m? {stripped}s?"
    raise SpecError(f"{what} is {stripped}, a number without a unit: {choices} Write {such_as}.")


def duration_option(seconds: float) -> str:
    """Format positive seconds as an option takes them: `90.5` as `"90.5s"`."""
    return f"{seconds:f}".rstrip("0").rstrip(".") + "s"


def check_duration(seconds: float, text: str, *, what: str) -> float:
    """Return `seconds`, written as `text`. Raises `SpecError` unless they are positive and at most
    100,000 days."""
    if not is_positive(seconds):
        raise SpecError(f"{what} is {text}: a time must be positive and finite.")
    if seconds > _MOST_S:
        raise SpecError(f"{what} is {text}: that is more than {_MOST_S / 86_400:,.0f} days.")
    return seconds


def parse_money(text: str, *, what: str) -> float:
    """Parse a positive finite amount of money."""
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
    """Parse `"20s:2,40s:4"` as ((20.0, 2), (40.0, 4)), in order of time and within MIN:MAX."""
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
    """Specification of one elastic training job. Times in seconds."""

    name: str
    script: str
    function: str = "train"
    module: str = ""
    """Dotted name of the script as a module of a package; empty: run by its path."""
    arguments: tuple[str, ...] = ()
    """The script's command line, `sys.argv[1:]` on every worker."""
    min_workers: int = 1
    max_workers: int = 1
    schedule: tuple[tuple[float, int], ...] = ()
    """(time since training began, count) pairs; if empty, the planner chooses the count."""
    batch: BatchMode = "fixed"
    lr_rule: LrRule = "auto"
    reproducible: bool = False
    num_logical_shards: int = 8
    seed: int = 0
    run_dir: str = "supple-runs"
    resume: str | None = None
    """Path of a checkpoint."""
    checkpoint_every_s: float = 300.0
    ledger: bool = False
    address: str | None = None
    port: int = 0
    """Port of the rendezvous of a generation's workers; 0: any free port."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    heartbeat_timeout_s: float = 4.0
    """Time without a heartbeat until a worker is killed whose process is stopped or unreachable."""
    unresponsive_timeout_s: float = 600.0
    """The same for a worker whose process runs but whose interpreter does not answer."""
    stall_timeout_s: float = 60.0
    """Time until a worker is replaced that fetches data while others wait for it; ten times as
    long in the script's own code."""
    max_failures: int = 3
    """Consecutive losses without a committed step between, after which a job is not retried."""
    on_non_finite: OnNonFinite = "stop"
    """Reaction to a step whose loss or gradient is not finite."""
    allow_changes: tuple[Change, ...] = ()
    """What may differ from the run that is resumed."""
    output: Shown = "leader"
    """Ranks whose stdout and stderr are shown while training."""
    max_steps: int | None = None
    """Number of committed steps at which training ends; None: after all epochs."""
    price_per_hour: float | None = None
    objective: "Objective | None" = None
    """Objective for the count during training. None: the knee, beginning with MIN."""
    interconnect: str = "ethernet-25"
    """Link between nodes, for predictions of counts on more nodes than were measured."""
    workers_per_node: int | None = None
    """None: all workers fit on one node."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_one_of(self.batch, get_args(BatchMode), what="batch")
        check_one_of(self.lr_rule, get_args(LrRule), what="lr_rule")
        check_one_of(self.on_non_finite, get_args(OnNonFinite), what="on_non_finite")
        check_one_of(self.output, get_args(Shown), what="output")
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
        """Return the allowed count nearest to `count`."""
        return min(max(count, self.min_workers), self.max_workers)

    def check_count(self, count: int) -> None:
        """Raise `SpecError` for a count outside MIN:MAX."""
        if self.clamp(count) != count:
            low, high = self.min_workers, self.max_workers
            raise SpecError(
                f"{count} worker{'s' * (count != 1)} requested, the job has --workers {low}:{high}."
                f" Request a count from {low} to {high}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a plan: workers, price, batch mode."""

    min_workers: int = 1
    max_workers: int | None = None
    price_per_hour: float | None = None
    batch: BatchMode = "fixed"

    def __post_init__(self) -> None:
        for what, count in (("least", self.min_workers), ("most", self.max_workers)):
            if count is not None and not is_count(count):
                raise SpecError(
                    f"a plan was requested with {count} as the {what} workers: it must be a whole "
                    "number of at least 1. Give None as the most for no cap."
                )
        check_one_of(self.batch, get_args(BatchMode), what="batch")
        _check_positive("a price per hour", self.price_per_hour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Objective of a plan: a deadline, a budget, or neither (the knee). `budget` is money, or
    accelerator-hours without a price."""

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
    """Parse the limits of a plan from `--max-workers`, `--price` and `--batch`."""
    return Limits(
        max_workers=parse_count(max_workers, what="--max-workers")
        if max_workers is not None
        else None,
        price_per_hour=parse_money(price, what="--price") if price is not None else None,
        batch=parse_batch(batch),
    )


def parse_objective(deadline: str | None, budget: str | None) -> Objective:
    """Parse the objective of a plan from `--deadline` or `--budget`; `SpecError` for both."""
    if deadline is not None and budget is not None:
        raise SpecError("--deadline and --budget were both given: choose the one that binds.")
    return Objective(
        deadline_s=parse_duration(deadline, what="--deadline") if deadline is not None else None,
        budget=parse_money(budget, what="--budget") if budget is not None else None,
    )
