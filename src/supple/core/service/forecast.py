"""The load a service must be ready for: a quantile at the time when a new replica could be ready.

Everything is a capacity, in requests per second, that keeps the promise.
*Needed*: for every past second, the least constant capacity that would have served it in time.
Its quantile, weighted by arrivals, is exact if the future is like the memory, whatever the
distribution. *Projected*: level and trend at the horizon, with room for noise by the index of
dispersion. *Surprise*: by how much earlier projections fell short of what was needed when their
time came, as a quantile. A load that can be foreseen is followed; what came as a surprise lately is
kept in reserve. Only arrivals count, never the queue: what gathers during a cold start is no
demand.
"""

import math
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BIN_S = 1.0
"""Arrivals are counted in bins of so many seconds."""
LONGEST_BACKLOG = 600
"""Bins that one busy period is followed back."""
LEARNING_S = 300.0
"""History after which the surprises alone tell how wrong a projection can be."""
LEAST_PAST_S = 30.0
"""History that a projection needs."""
REFRESH_S = 4.0
"""After so long without a call, everything known of the memory is computed anew."""
LEVEL_Z = 1.2815515655446004
"""Before that the level is projected at its 90 % quantile."""
_STEADY = 1e-9
_SURE_BINS = 30
_GUESS = 0.9
"""Quantiles over the memory are looked for above this part of what they were before."""


def _none() -> Floats:
    return np.zeros(0)


def needed_rates(counts: Floats, slack_s: float) -> Floats:
    """For every bin the least constant capacity (requests/s) with which its last arrival waits at
    most `slack_s`: the maximum over windows w ending there of arrivals(w) / (w + slack).

    That is Reich's formula for the backlog of a fluid queue, backlog(t) = max over w of
    (arrivals(w) - capacity * w), solved for the capacity where backlog = capacity * slack.
    """
    total = totals(counts)
    needed = np.zeros(len(counts))
    for width in _widths(len(counts)):
        rates = (total[width:] - total[:-width]) / (width * BIN_S + slack_s)
        np.maximum(needed[width - 1 :], rates, out=needed[width - 1 :])
    return needed


def _widths(longest: int) -> list[int]:
    """1, 2, 3, ... growing by at most an eighth: windows between two of them are covered within
    that share."""
    widths, width = list[int](), 1
    while width <= min(longest, LONGEST_BACKLOG):
        widths.append(width)
        width = max(width + 1, math.floor(width * 1.125))
    return widths


def share_quantile(
    values: Floats, weights: Floats, share: float, *, guess: float = math.inf
) -> float:
    """The least of `values` such that those up to it hold `share` of all weight; 0 without any.
    A `guess` a little below the answer makes it faster to find, and changes nothing."""
    total = float(weights.sum())
    if total <= 0.0:
        return 0.0
    for chosen in (np.flatnonzero(values >= guess), np.arange(len(values))):
        if not len(chosen):
            continue
        order = chosen[np.argsort(values[chosen])]
        held = np.cumsum(weights[order])
        below = total - float(held[-1])
        if below < share * total:
            index = int(np.searchsorted(held, share * total - below))
            return float(values[order[min(index, len(order) - 1)]])
    raise AssertionError("all values hold all weight")


def totals(counts: Floats) -> Floats:
    """Running sum of the counts, from zero."""
    total = np.zeros(len(counts) + 1)
    np.cumsum(counts, out=total[1:])
    return total


def dispersion(total: Floats, width: int) -> float:
    """Index of dispersion of arrivals in `width` bins, from their `totals`, about a drifting mean:
    half the mean squared difference of neighbours over their mean (Allan factor); at least 1,
    Poisson, and drawn to it with the weight of two neighbours."""
    if len(total) <= 2 * width or total[-1] <= 0.0:
        return 1.0
    sums = total[width:] - total[:-width]
    steps = sums[width:] - sums[:-width]
    independent = (len(total) - 1) / width
    mean = float(total[-1]) / independent
    measured = float(steps @ steps) / len(steps) / (2.0 * mean)
    return max(1.0, (measured * independent + 2.0) / (independent + 2.0))


def effective_bandwidth(mean: float, dispersion: float, slack_s: float, miss: float) -> float:
    """Capacity (requests/s) at which arrivals of this mean and dispersion wait longer than
    `slack_s` with probability `miss`: c (c - mean) = dispersion mean ln(1/miss) / (2 slack), the
    diffusion approximation exp(-2 (c - mean) c slack / (dispersion mean)) solved for c."""
    if mean <= 0.0:
        return 0.0
    excess = dispersion * mean * math.log(1.0 / miss) / (2.0 * slack_s)
    return 0.5 * mean + math.sqrt(0.25 * mean * mean + excess)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What the memory tells of a load; it changes slowly. Capacities in requests per second."""

    at_s: float
    turn: int
    """Which of them is renewed next."""
    remembered_per_s: float
    """Capacity that would have kept the promise over the memory."""
    surprise_per_s: float
    """The quantile of needed minus projected; inf where the past is too short to say."""
    dispersion: float
    """Index of dispersion of counts at the horizon's time scale."""
    burst_dispersion: float
    """The same from bin to bin."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Arrivals of the last while, per bin, what each bin needed, and what had been projected."""

    begun_s: float
    """When the bin that is not yet full began."""
    slack_s: float
    """Seconds a request may wait."""
    pending: float = 0.0
    """Arrivals in it."""
    counts: Floats = field(default_factory=_none)
    needed: Floats = field(default_factory=_none)
    projected: Floats = field(default_factory=_none)
    """What was projected at the end of each bin; inf where its past was too short for one."""
    habits: Habits | None = None

    @property
    def seen_s(self) -> float:
        return len(self.counts) * BIN_S

    def rate_over(self, seconds: float) -> float:
        """Requests per second over the last so many seconds, or what there is of them."""
        last = self.counts[-max(1, round(seconds / BIN_S)) :]
        return float(last.sum()) / (len(last) * BIN_S) if len(last) else 0.0

    def sure_rate(self) -> float:
        """Requests per second that go on now, as far as is sure: the largest, over windows of up
        to half a minute, of the count less two of its Poisson deviations over the window."""
        last = self.counts[: -_SURE_BINS - 1 : -1]
        if not len(last):
            return 0.0
        number = np.cumsum(last)
        return float(((number - 2.0 * np.sqrt(number)) / _WINDOWS[: len(last)]).max(initial=0.0))

    def advance(self, now: float, num_new: int, memory_s: float) -> "Demand":
        """With `num_new` more arrivals, spread evenly since the last call, until `now`; only the
        last `memory_s` are kept."""
        elapsed = now - self.begun_s
        pending = self.pending + num_new
        full = math.floor(elapsed / BIN_S + _STEADY)
        if full <= 0:
            return replace(self, pending=pending)
        keep = max(1, round(memory_s / BIN_S))
        per_bin = pending * min(1.0, BIN_S / elapsed)
        fresh = min(full, keep)
        counts = _extended(self.counts, per_bin, fresh, keep)
        return Demand(
            begun_s=self.begun_s + full * BIN_S,
            slack_s=self.slack_s,
            pending=max(0.0, pending - per_bin * full),
            counts=counts,
            needed=_extended(self.needed, _needed_last(counts, self.slack_s), fresh, keep),
            projected=_extended(self.projected, math.inf, fresh, keep),
            habits=self.habits,
        )

    def with_slack(self, slack_s: float) -> "Demand":
        """The same arrivals, asked for another slack."""
        if abs(slack_s - self.slack_s) <= 0.01 * max(slack_s, self.slack_s):
            return self
        needed = needed_rates(self.counts, slack_s)
        return replace(self, slack_s=slack_s, needed=needed, habits=None)

    def habits_at(self, now: float, *, horizon_s: float, miss: float) -> Habits:
        """The habits, up to date: all of them after a pause, else one of three in turn in every
        bin, and at once what was exceeded. They change slowly, and each costs a pass."""
        known = self.habits
        if known is None or now - known.at_s >= REFRESH_S:
            turns, turn = {0, 1, 2}, 0
        elif now - known.at_s >= BIN_S - _STEADY:
            turns, turn = {known.turn}, (known.turn + 1) % 3
        else:
            return known
        if known is None or 0 in turns or self.exceeds(known.remembered_per_s):
            guess = math.inf if known is None else _GUESS * known.remembered_per_s
            remembered = share_quantile(self.needed, self.counts, 1.0 - miss, guess=guess)
        else:
            remembered = known.remembered_per_s
        if known is None or 1 in turns:
            guess = math.inf if known is None else known.surprise_per_s - 0.1 * remembered
            surprise = self._surprise(horizon_s, miss, guess)
        else:
            surprise = known.surprise_per_s
        if known is None or 2 in turns:
            total = totals(self.counts)
            width = max(1, round(min(max(horizon_s, 5.0), max(self.seen_s / 4.0, 1.0)) / BIN_S))
            slow, fast = dispersion(total, width), dispersion(total, 1)
        else:
            slow, fast = known.dispersion, known.burst_dispersion
        return Habits(
            at_s=now,
            turn=turn,
            remembered_per_s=remembered,
            surprise_per_s=surprise,
            dispersion=slow,
            burst_dispersion=fast,
        )

    def exceeds(self, per_s: float) -> bool:
        """Did the last bin need more?"""
        return len(self.needed) > 0 and bool(self.needed[-1] > per_s)

    def _surprise(self, horizon_s: float, miss: float, guess: float) -> float:
        lag = max(1, round(horizon_s / BIN_S))
        least = max(LEAST_PAST_S, 2.0 * horizon_s) / BIN_S
        if len(self.needed) - lag < least + LEAST_PAST_S / BIN_S:
            return math.inf
        short = self.needed[lag:] - self.projected[:-lag]
        return share_quantile(short, self.counts[lag:], 1.0 - miss, guess=guess)

    def knowing(self, habits: Habits, projected_per_s: float) -> "Demand":
        """Remembers its habits, and what was projected at the end of the last bin."""
        projected = self.projected
        if self.seen_s >= LEAST_PAST_S and projected[-1] == math.inf:
            projected = projected.copy()
            projected[-1] = projected_per_s
        return Demand(
            begun_s=self.begun_s,
            slack_s=self.slack_s,
            pending=self.pending,
            counts=self.counts,
            needed=self.needed,
            projected=projected,
            habits=habits,
        )


def _extended(values: Floats, value: float, times: int, keep: int) -> Floats:
    """`values` and then `value` so many times; the last `keep` of all."""
    longer = np.empty(min(len(values) + times, keep))
    longer[-times:] = value
    kept = len(longer) - times
    longer[:kept] = values[len(values) - kept :]
    return longer


_WINDOWS = np.arange(1.0, LONGEST_BACKLOG + 1.0) * BIN_S


def _needed_last(counts: Floats, slack_s: float) -> float:
    """`needed_rates(...)[-1]`, over every window."""
    backwards = np.cumsum(counts[: -LONGEST_BACKLOG - 1 : -1])
    return float((backwards / (_WINDOWS[: len(backwards)] + slack_s)).max())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Requests per second at the horizon."""

    horizon_s: float
    recent_s: float
    """Over which the level is the mean."""
    level_per_s: float
    expected_per_s: float
    """Level and trend at the horizon."""
    projected_per_s: float
    """Capacity for that and its noise."""
    habits: Habits

    @property
    def needed_per_s(self) -> float:
        """Capacity for the projection and its usual surprise, but for no more than was needed
        lately, and no less than projected."""
        surprised = self.projected_per_s + self.habits.surprise_per_s
        return max(self.projected_per_s, min(self.habits.remembered_per_s, surprised))


def forecast(
    demand: Demand, *, now: float, horizon_s: float, miss: float
) -> tuple[Forecast, Demand]:
    """The load at `now + horizon_s`, where a share `miss` of the requests may wait longer than the
    demand's slack; and the demand, which remembers what was projected."""
    habits = demand.habits_at(now, horizon_s=horizon_s, miss=miss)
    recent_s = min(max(horizon_s, 30.0), 300.0)
    level = demand.rate_over(recent_s)
    slope = _slope(demand.counts[-round(2.0 * recent_s / BIN_S) :], habits.dispersion)
    ahead_s = horizon_s + 0.5 * min(recent_s, demand.seen_s)
    expected = min(max(level + slope * ahead_s, 0.5 * level), 2.0 * level)
    unsure = max(0.0, 1.0 - demand.seen_s / LEARNING_S)
    noise = math.sqrt(habits.dispersion * expected / max(min(horizon_s, demand.seen_s), 1.0))
    projected = effective_bandwidth(
        expected + unsure * LEVEL_Z * noise, habits.burst_dispersion, demand.slack_s + BIN_S, miss
    )
    found = Forecast(
        horizon_s=horizon_s,
        recent_s=recent_s,
        level_per_s=level,
        expected_per_s=expected,
        projected_per_s=projected,
        habits=habits,
    )
    return found, demand.knowing(habits, projected)


def _slope(counts: Floats, dispersion: float) -> float:
    """Requests/s gained per second, by least squares, shrunk by how sure it is: t^2 / (1 + t^2)."""
    number = len(counts)
    mean = float(counts.sum()) / max(number, 1)
    if number * BIN_S < LEAST_PAST_S or mean <= 0.0:
        return 0.0
    at = (np.arange(number) - 0.5 * (number - 1)) * BIN_S
    spread = float(number * (number * number - 1)) / 12.0 * BIN_S**2
    slope = float(at @ counts) / spread / BIN_S
    squared_t = slope * slope * spread / (dispersion * mean)
    return slope * squared_t / (1.0 + squared_t)
