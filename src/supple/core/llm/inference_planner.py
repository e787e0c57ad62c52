"""Plan the serving of a language model: accelerators per copy, concurrency, number of copies.

Every (accelerators, concurrency) of one copy is a row with its tokens per second and the 90th
percentile of the time between two tokens; the load determines the number of copies.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from supple.core.fitting.estimates import Z80
from supple.core.layouts.model import Device
from supple.core.llm.decoding import (
    USABLE,
    Decoder,
    DecodingRun,
    Workload,
    in_accelerators,
    weight_bytes,
    weights_fit,
)
from supple.core.llm.inference import ITL_REPEAT, InferenceModel, ServingPrediction
from supple.core.spec import MAX_WORKERS, is_count, is_positive
from supple.core.types import Estimate, Infeasible
from supple.core.words import in_digits

KEPT, LIKELY = 0.9, 0.5
"""Chance of keeping the promise that counts as kept (the upper end of an 80 % interval), and the
least that is recommended where no row has it."""
MANY = 3
"""Factor on the accelerators of the cheapest likely row: a row with more is not recommended unless
it counts as kept, and then the cheaper one is mentioned."""
RULE = (
    f"among the rows that keep --itl with a chance of at least {KEPT:.0%}, the one that serves "
    "--rate with the fewest accelerators, and of those the one with the shortest time between "
    "tokens; without --rate, the most tokens per accelerator. Where no row does: of the rows with "
    f"a chance of at least {LIKELY:.0%}, the best chance for at most {MANY} times the fewest "
    "accelerators"
)
CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_NARROW = 1.5
"""Ratio of an interval's ends up to which a row needs no measurement."""
_ALIKE = 1.02
"""Ratio of tokens per accelerator up to which rows count as equal; the lower latency decides."""
_HEADROOM = 0.8
"""Share of a copy's tokens that arrivals may use, since they are uneven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceJob:
    """The model to serve, its load, accelerators and promise. Times in seconds."""

    model: Decoder
    device: Device
    workload: Workload
    output_tokens: float
    """Mean length of an answer."""
    itl_s: float | None = None
    """Promised 90th percentile of the time between tokens."""
    rate_per_s: float | None = None
    """Mean rate of requests."""
    max_devices: int = 8
    """Most accelerators of a copy: those of a node."""
    max_accelerators: int = MAX_WORKERS
    """Most accelerators of all copies."""
    price_per_hour: float | None = None
    """Price of one accelerator."""

    def __post_init__(self) -> None:
        for what, value in (
            ("the time between tokens", self.itl_s),
            ("the rate", self.rate_per_s),
            ("the price", self.price_per_hour),
        ):
            if value is not None and not is_positive(value):
                raise ValueError(f"{what} is {value:g}: it must be positive and finite.")
        for what, count in (
            ("the number of accelerators of a node", self.max_devices),
            ("the cap of accelerators", self.max_accelerators),
        ):
            if not is_count(count):
                raise ValueError(f"{what} is {count:g}: it must be at least 1, and whole.")
        if not 1 <= self.output_tokens < math.inf:
            raise ValueError(
                f"an answer has {self.output_tokens:g} tokens: it must be at least 1 and finite."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRow:
    """Prediction for one configuration of a copy."""

    num_devices: int
    """Accelerators of one copy, tensor parallel."""
    concurrency: int
    """Concurrent requests of one copy."""
    tokens_per_s: Estimate
    """Tokens per second of one copy."""
    itl_p90_s: Estimate
    chance: float | None
    """Probability that `itl_s` is kept; None without a promise."""
    num_copies: int | None
    """Copies for the rate, at the low end of the tokens' interval; None without a rate."""
    cost_per_million: Estimate | None
    """Cost of a million tokens of a busy copy; None without a price."""

    @property
    def num_accelerators(self) -> int:
        return self.num_devices * (self.num_copies or 1)

    @property
    def tokens_per_device_s(self) -> float:
        return self.tokens_per_s.value / self.num_devices

    @property
    def is_measured(self) -> bool:
        """Whether the row was measured."""
        return self.itl_p90_s.source == "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceTable:
    """All rows, the index of the recommended one, and the reason in words."""

    rows: tuple[InferenceRow, ...]
    recommended: int
    reason: str
    mentioned: tuple[InferenceRow, ...]
    """Rows that the reason mentions."""

    @property
    def choice(self) -> InferenceRow:
        return self.rows[self.recommended]


def plan_inference(fit: InferenceModel, job: InferenceJob) -> InferenceTable | Infeasible:
    """Return a table with a recommended row (`RULE`): all of 1, 2, 4 … accelerators and
    concurrencies whose memory holds the weights and the cache of at least one request. Of
    concurrencies beyond the cache only the least, and measured ones, are rows: further requests
    only wait.

    A row keeps the promise if the upper end of its 80 % interval does. Raises `ValueError` for
    invalid numbers.
    """
    counts = [2**power for power in range(20) if 2**power <= job.max_devices]
    runs = [_run(job, count, concurrency) for count in counts for concurrency in CONCURRENCIES]
    if not weights_fit(runs[-1]):
        return _too_large(runs[-1])
    room = fit.cache_room(runs)
    fitting = [
        (run, run.concurrency < 2 * left / taken)
        for run, (left, taken) in zip(runs, room, strict=True)
        if left >= taken
    ]
    if not fitting:
        return _too_long(job, counts[-1], *room[-1])
    found = fit.predict_all([run for run, _ in fitting])
    every = [(_row(job, run, each), held) for (run, held), each in zip(fitting, found, strict=True)]
    rows = tuple(row for row, held in every if held or row.is_measured)
    allowed = [row for row in rows if _is_allowed(row, job)]
    kept = [row for row in allowed if job.itl_s is None or row.itl_p90_s.high <= job.itl_s]
    likely = [row for row in allowed if _chance_of(row) >= LIKELY]
    if not likely:
        return _out_of_reach(job, rows, allowed)
    cheapest = _cheapest(likely, job, _needed)
    if kept:
        best = _cheapest(kept, job, _needed)
    else:
        most = MANY * _needed(cheapest, job)
        best = max((row for row in likely if _needed(row, job) <= most), key=_chance_of)
    promise, other = _promise(best, cheapest, job, sure=bool(kept))
    return InferenceTable(
        rows=rows,
        recommended=rows.index(best),
        reason=_what(best, job) + promise,
        mentioned=(best,) if other is None else (best, other),
    )


def worth_measuring(job: InferenceJob, table: InferenceTable) -> InferenceRow | None:
    """Return the row whose measurement is most useful: the one that would be chosen if every
    prediction were exact. None where it was measured, or its interval is already narrow."""
    likely = [row for row in table.rows if _is_allowed(row, job)]
    likely = [row for row in likely if job.itl_s is None or row.itl_p90_s.value <= job.itl_s]
    row = _cheapest(likely, job, _likely_need) if likely else table.choice
    known = row.is_measured or row.itl_p90_s.high / row.itl_p90_s.low <= _NARROW
    return None if known else row


def measure_first(row: InferenceRow) -> str:
    """Return a sentence: the row to measure, and the resulting interval between tokens."""
    itl = row.itl_p90_s
    return (
        f"Measure one copy on {in_accelerators(row.num_devices)} with {row.concurrency} at a time "
        f"first, and give it with --measured: the time between tokens, now {_ms(itl.low)} to "
        f"{_ms(itl.high)} ms, would be known within a factor of {math.exp(Z80 * ITL_REPEAT):.2f}."
    )


def _run(job: InferenceJob, num_devices: int, concurrency: int) -> DecodingRun:
    return DecodingRun(
        model=job.model,
        device=job.device,
        num_devices=num_devices,
        concurrency=concurrency,
        workload=job.workload,
        output_tokens=job.output_tokens,
    )


def _row(job: InferenceJob, run: DecodingRun, found: ServingPrediction) -> InferenceRow:
    tokens = found.tokens_per_s
    copies = None
    if job.rate_per_s is not None:
        copies = _num_copies(job, job.rate_per_s, tokens.low)
    cost = None
    if job.price_per_hour is not None:
        per_token = job.price_per_hour * run.num_devices / 3600.0 * 1e6
        cost = Estimate(
            value=per_token / tokens.value,
            low=per_token / tokens.high,
            high=per_token / tokens.low,
            source=tokens.source,
        )
    return InferenceRow(
        num_devices=run.num_devices,
        concurrency=run.concurrency,
        tokens_per_s=tokens,
        itl_p90_s=found.itl_p90_s,
        chance=None if job.itl_s is None else _chance(found.itl_p90_s, job.itl_s),
        num_copies=copies,
        cost_per_million=cost,
    )


def _num_copies(job: InferenceJob, rate_per_s: float, tokens_per_s: float) -> int:
    """Number of copies for the rate, at `tokens_per_s` of one copy; at least 1."""
    return max(1, math.ceil(rate_per_s * job.output_tokens / (_HEADROOM * tokens_per_s) - 1e-9))


def _chance(estimate: Estimate, within_s: float) -> float:
    """Probability that the true value is at most `within_s`; its logarithm is normal."""
    half = math.log(estimate.high / estimate.value)
    away = math.log(within_s / estimate.value)
    if half <= 0.0:
        return float(away >= 0.0)
    return 0.5 * math.erfc(-away / half * Z80 / math.sqrt(2.0))


def _is_allowed(row: InferenceRow, job: InferenceJob) -> bool:
    return row.num_accelerators <= job.max_accelerators


def _cheapest(
    rows: Sequence[InferenceRow],
    job: InferenceJob,
    need: Callable[[InferenceRow, InferenceJob], float],
) -> InferenceRow:
    """Row with the least need, and of equals the shortest time between tokens. Without a rate needs
    are not whole numbers, and nearly equal ones count as equal."""
    most = min(need(row, job) for row in rows) * (_ALIKE if job.rate_per_s is None else 1.0)
    return min((row for row in rows if need(row, job) <= most), key=lambda row: row.itl_p90_s.value)


def _likely_need(row: InferenceRow, job: InferenceJob) -> float:
    """`_needed` if every prediction were exact."""
    if job.rate_per_s is None:
        return _needed(row, job)
    return _num_copies(job, job.rate_per_s, row.tokens_per_s.value) * row.num_devices


def _needed(row: InferenceRow, job: InferenceJob) -> float:
    """Accelerators for the rate; without a rate, for one token a second."""
    return 1.0 / row.tokens_per_device_s if job.rate_per_s is None else row.num_accelerators


def _where(row: InferenceRow) -> str:
    """Describe the accelerators and the concurrency of a copy."""
    at_once = "one request" if row.concurrency == 1 else f"{row.concurrency} requests"
    return f"on {in_accelerators(row.num_devices)}, {at_once} at a time"


def _what(row: InferenceRow, job: InferenceJob) -> str:
    if row.num_copies is None:
        what = f"copies {_where(row)}"
    elif row.num_copies == 1:
        what = f"one copy {_where(row)}"
    else:
        what = (
            f"{row.num_copies:,} copies {_where(row)} each, "
            f"{in_accelerators(row.num_accelerators)} in all"
        )
    itl = row.itl_p90_s
    return (
        f"{what}: {in_digits(row.tokens_per_s.value)} tokens/s a copy, nine of ten tokens within "
        f"{_ms(itl.value)} ms ({_ms(itl.low)} to {_ms(itl.high)}"
        f"{', as measured' * row.is_measured})."
    )


def _ms(seconds: float) -> str:
    return in_digits(seconds * 1e3)


def _promise(
    choice: InferenceRow, cheapest: InferenceRow, job: InferenceJob, *, sure: bool
) -> tuple[str, InferenceRow | None]:
    """Return sentences about the chance of keeping the promise, and the row that they recommend to
    measure because it may need far fewer accelerators; empty without a promise."""
    if job.itl_s is None:
        return "", None
    chance, promise = _chance_of(choice), f"{_ms(job.itl_s)} ms"
    if not sure:
        measure = ": measure it before you promise it, and give the figure with --measured"
        return (
            f" No row keeps {promise} with the {KEPT:.0%} that count as kept. This one does with "
            f"{chance:.0%}, the best chance for at most {MANY} times the fewest accelerators"
            f"{measure * (not choice.is_measured)}."
        ), None
    text = f" That keeps {promise} with a chance of {chance:.0%}; {KEPT:.0%} count as kept."
    saved = _needed(choice, job) / _needed(cheapest, job)
    if saved <= MANY:
        return text, None
    copies = f"copies {_where(cheapest)}"
    if cheapest.num_copies is None:
        who = f"{copies.capitalize()}, with {saved:.0f} times the tokens per accelerator,"
    else:
        who = in_accelerators(cheapest.num_accelerators)
        one = cheapest.num_copies == 1
        who += f" (one copy {_where(cheapest)})" if one else f" ({copies} each)"
    measure = ": measure that row first, and give the figure with --measured"
    return (
        f"{text} {who} would keep it with {_chance_of(cheapest):.0%}"
        f"{', as measured' if cheapest.is_measured else measure}."
    ), cheapest


def _chance_of(row: InferenceRow) -> float:
    """Probability of keeping the promise; 1 without one."""
    return 1.0 if row.chance is None else row.chance


def _too_large(run: DecodingRun) -> Infeasible:
    each, count = run.device.memory_bytes / 1e9, run.num_devices
    held = in_accelerators(count) + (" holds" if count == 1 else " hold")
    return Infeasible(
        asked=f"a model of {in_digits(weight_bytes(run.model) / 1e9)} GB of weights on "
        f"{run.device.name}",
        numbers=f"{held} {in_digits(count * each)} GB, of which engines use {USABLE:.0%}: "
        f"{in_digits(USABLE * count * each)} GB",
        rule="A copy's weights must fit the accelerators of one node with room for a cache",
        advice="Raise --workers-per-node, use fewer bits a weight, or larger accelerators.",
    )


def _too_long(job: InferenceJob, devices: int, left: float, taken: float) -> Infeasible:
    return Infeasible(
        asked=f"prompts of {job.workload.prompt_tokens:,.0f} and answers of "
        f"{job.output_tokens:,.0f} tokens on {job.device.name}",
        numbers=f"the cache of one request takes {taken / 1e9:,.1f} GB; {left / 1e9:,.1f} GB are "
        f"left on {in_accelerators(devices)} beside "
        f"{in_digits(weight_bytes(job.model) / 1e9)} GB of weights",
        rule="A copy must hold its weights and the cache of at least one request",
        advice="Raise --workers-per-node, shorten the prompt or the answer, use fewer bits a "
        "weight, or larger accelerators.",
    )


def _out_of_reach(
    job: InferenceJob, rows: Sequence[InferenceRow], allowed: Sequence[InferenceRow]
) -> Infeasible:
    if not allowed:
        most = in_accelerators(job.max_accelerators)
        least = min(rows, key=lambda row: row.num_accelerators)
        if job.rate_per_s is None:
            return Infeasible(
                asked=f"a copy on at most {most}",
                numbers=f"the smallest that holds the model is {_what(least, job).rstrip('.')}",
                rule="The weights and the cache of one request must fit the accelerators allowed",
                advice="Raise --max-workers, use fewer bits a weight, or larger accelerators.",
            )
        capped = job.max_accelerators < MAX_WORKERS
        return Infeasible(
            asked=f"{job.rate_per_s:,.10g} requests/s on at most {most}",
            numbers=f"the fewest are {_what(least, job).rstrip('.')}",
            rule="The low end of the tokens' interval must cover the load"
            + ("" if capped else f", and more than {MAX_WORKERS:,} are more than any pool known"),
            advice="Raise --max-workers or lower --rate."
            if capped
            else "Lower --rate, shorten the answer, or use faster accelerators.",
        )
    fastest = min(allowed, key=lambda row: row.itl_p90_s.value)
    assert job.itl_s is not None
    return Infeasible(
        asked=f"--itl {_ms(job.itl_s)} ms",
        numbers=f"the fastest is {_what(fastest, job).rstrip('.')}",
        rule="No row keeps the promise with a chance of at least one half",
        advice="Promise more time, or use faster accelerators, more of them, or fewer bits.",
    )
