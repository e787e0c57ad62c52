"""Forecast the load of a service: a quantile at the time when a new replica could be ready.

All quantities are capacities, in requests per second, that keep the promise. *Needed*: for every
past second, the least constant capacity that would have served it in time. Its quantile, weighted
by arrivals, is exact if the future is like the memory, for any distribution. *Projected*: level and
trend at the horizon, plus noise by the index of dispersion. *Surprise*: the quantile of needed
minus projected in the past. So predictable load is followed, and recent surprises are kept in
reserve. Only arrivals count, never the queue: a backlog during a cold start is not demand.
"""

import math
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BIN_S = 1.0
"""Width of a bin of arrivals, in s."""
LONGEST_BACKLOG = 600
"""Longest window of a busy period, in bins."""
LEARNING_S = 300.0
"""History, in s, after which the error of a projection is estimated from surprises alone."""
LEAST_PAST_S = 30.0
"""Shortest history for a projection, in s."""
REFRESH_S = 4.0
"""Time without a call, in s, after which all habits are recomputed."""
LEVEL_Z = 1.2815515655446004
"""Until `LEARNING_S` the level is projected at its 90 % quantile."""
_STEADY = 1e-9
"""Tolerance of rounding."""
_SURE_BINS = 30
"""Longest window of the certain rate, in bins."""
_GUESS = 0.9
"""A quantile over the memory is first searched above this share of its last value."""


def _none() -> Floats:
    return np.zeros(0)


def needed_rates(counts: Floats, slack_s: float) -> Floats:
    """Return for every bin the least constant capacity (requests/s) with which its last arrival
    waits at most `slack_s`: the maximum over windows w ending there of arrivals(w) / (w + slack).

    This is Reich's formula for the backlog of a fluid queue, backlog(t) = max over w of
    (arrivals(w) - capacity * w), solved for the capacity where backlog = capacity * slack.
    """
    total = totals(counts)
    needed = np.zeros(len(counts))
    for width in _widths(len(counts)):
        rates = (total[width:] - total[:-width]) / (width * BIN_S + slack_s)
        np.maximum(needed[width - 1 :], rates, out=needed[width - 1 :])
    return needed


def _widths(longest: int) -> list[int]:
    """Window widths 1, 2, 3, ... growing by at most an eighth, which bounds the error of the
    maximum."""
    widths, width = list[int](), 1
    while width <= min(longest, LONGEST_BACKLOG):
        widths.append(width)
        width = max(width + 1, math.floor(width * 1.125))
    return widths


def share_quantile(
    values: Floats, weights: Floats, share: float, *, guess: float = math.inf
) -> float:
    """Weighted quantile: the least of `values` up to which they have `share` of all weight; 0
    without weight. A `guess` slightly below the result makes it faster and does not change it."""
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
    """Running sum of the counts from zero, (bins + 1,)."""
    total = np.zeros(len(counts) + 1)
    np.cumsum(counts, out=total[1:])
    return total


def dispersion(total: Floats, width: int) -> float:
    """Index of dispersion of arrivals in windows of `width` bins, from their `totals`: half the
    mean squared difference of neighbours over their mean (Allan factor), robust to a drifting mean.
    At least 1 (Poisson), and shrunk to it with the weight of two neighbours."""
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
    """Slowly changing statistics of the memory. Capacities in requests per second."""

    at_s: float
    turn: int
    """Index, 0 to 2, of the statistic that is updated next."""
    remembered_per_s: float
    """Capacity that would have kept the promise over the memory."""
    surprise_per_s: float
    """The quantile of needed minus projected; inf where the past is too short."""
    dispersion: float
    """Index of dispersion of counts at the horizon's time scale."""
    burst_dispersion: float
    """Index of dispersion from bin to bin."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Recent arrivals, needed and projected capacities, three arrays of shape (bins,)."""

    begun_s: float
    """Start of the current, incomplete bin."""
    slack_s: float
    """Longest wait of a request, in s."""
    pending: float = 0.0
    """Arrivals in the current bin."""
    counts: Floats = field(default_factory=_none)
    needed: Floats = field(default_factory=_none)
    projected: Floats = field(default_factory=_none)
    """Projection made at the end of each bin; inf where the past was too short."""
    habits: Habits | None = None

    @property
    def seen_s(self) -> float:
        return len(self.counts) * BIN_S

    def rate_over(self, seconds: float) -> float:
        """Requests per second over the last `seconds`, or over the shorter history."""
        last = self.counts[-max(1, round(seconds / BIN_S)) :]
        return float(last.sum()) / (len(last) * BIN_S) if len(last) else 0.0

    def sure_rate(self) -> float:
        """Lower bound of the current requests per second: the largest, over windows of up to half a
        minute, of the count minus two Poisson standard deviations over the window."""
        last = self.counts[: -_SURE_BINS - 1 : -1]
        if not len(last):
            return 0.0
        number = np.cumsum(last)
        return float(((number - 2.0 * np.sqrt(number)) / _WINDOWS[: len(last)]).max(initial=0.0))

    def advance(self, now: float, num_new: int, memory_s: float) -> "Demand":
        """Return the demand at `now` with `num_new` more arrivals, spread evenly since the last
        call, keeping the last `memory_s`."""
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
        """Return the demand for another slack."""
        if abs(slack_s - self.slack_s) <= 0.01 * max(slack_s, self.slack_s):
            return self
        needed = needed_rates(self.counts, slack_s)
        return replace(self, slack_s=slack_s, needed=needed, habits=None)

    def habits_at(self, now: float, *, horizon_s: float, miss: float) -> Habits:
        """Return the updated habits: all after a pause, else one of the three in turn per bin, and
        an exceeded one at once. They change slowly, and each costs a pass over the memory."""
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
        """Whether the last bin needed more than `per_s`."""
        return len(self.needed) > 0 and bool(self.needed[-1] > per_s)

    def _surprise(self, horizon_s: float, miss: float, guess: float) -> float:
        lag = max(1, round(horizon_s / BIN_S))
        least = max(LEAST_PAST_S, 2.0 * horizon_s) / BIN_S
        if len(self.needed) - lag < least + LEAST_PAST_S / BIN_S:
            return math.inf
        short = self.needed[lag:] - self.projected[:-lag]
        return share_quantile(short, self.counts[lag:], 1.0 - miss, guess=guess)

    def with_projection(self, habits: Habits, projected_per_s: float) -> "Demand":
        """Return the demand with these habits and the projection at the end of the last bin."""
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
    """Append `value` to `values` `times` times, and keep the last `keep` of all."""
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
    """Forecast of requests per second at the horizon."""

    horizon_s: float
    recent_s: float
    """Time over which the level is averaged."""
    level_per_s: float
    expected_per_s: float
    """Level and trend at the horizon."""
    projected_per_s: float
    """Capacity for the expected rate and its noise."""
    habits: Habits

    @property
    def needed_per_s(self) -> float:
        """Capacity for the projection plus the usual surprise, limited to the capacity needed in
        the memory, and at least the projection."""
        surprised = self.projected_per_s + self.habits.surprise_per_s
        return max(self.projected_per_s, min(self.habits.remembered_per_s, surprised))


def forecast(
    demand: Demand, *, now: float, horizon_s: float, miss: float
) -> tuple[Forecast, Demand]:
    """Forecast the load at `now + horizon_s`, where a share `miss` of the requests may wait longer
    than the demand's slack; also returns the demand with this projection."""
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
    return found, demand.with_projection(habits, projected)


def _slope(counts: Floats, dispersion: float) -> float:
    """Least-squares trend in requests/s per second, shrunk by t^2 / (1 + t^2)."""
    number = len(counts)
    mean = float(counts.sum()) / max(number, 1)
    if number * BIN_S < LEAST_PAST_S or mean <= 0.0:
        return 0.0
    at = (np.arange(number) - 0.5 * (number - 1)) * BIN_S
    spread = float(number * (number * number - 1)) / 12.0 * BIN_S**2
    slope = float(at @ counts) / spread / BIN_S
    squared_t = slope * slope * spread / (dispersion * mean)
    return slope * squared_t / (1.0 + squared_t)
