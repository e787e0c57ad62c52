"""Plan the number of replicas for a latency promise and a request rate, and the batch size."""

import math
from dataclasses import dataclass
from typing import final

from supple.core.service.latency import LatencyProfile, best_batch, fewest_replicas, latency
from supple.core.service.spec import Slo, latency_text
from supple.core.types import Infeasible
from supple.core.words import in_digits

_POISSON = 1.0
"""Index of dispersion of the arrivals of independent callers (Poisson)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRow:
    """Prediction for `num_replicas` at the given rate."""

    num_replicas: int
    batch_size: int
    """Largest number of requests in one prediction."""
    utilisation: float
    """Rate over the capacity with full batches; from 1 on the queue grows without limit."""
    latency_s: float | None
    """Time within which the promised share is answered, in s; None where the queue grows."""
    attainment: float
    """Share of the requests that is answered within the promised time."""
    cost_per_hour: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """Measurement of one replica with batches of `batch_size`."""

    batch_size: int
    p50_s: float
    p99_s: float
    requests_per_s: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTable:
    """Rows by count or by batch size, the index of the recommended row, and the reason."""

    rows: tuple[ReplicaRow, ...] | tuple[BatchRow, ...]
    recommended: int
    reason: str


def plan_replicas(
    profile: LatencyProfile,
    slo: Slo,
    *,
    rate_per_s: float,
    most: int,
    price_per_hour: float | None = None,
) -> ReplicaTable | Infeasible:
    """Plan the fewest replicas, at most `most`, that keep the promise at `rate_per_s` requests a
    second from independent callers (Poisson), with rows for comparison."""
    if (impossible := _impossible(profile, slo)) is not None:
        return impossible
    size = best_batch(profile, within_s=slo.within_s, most=profile.largest_batch)
    needed = fewest_replicas(
        profile,
        rate_per_s=rate_per_s,
        dispersion=_POISSON,
        max_batch_size=size,
        within_s=slo.within_s,
        share=slo.share,
        most=most,
    )

    def row(count: int) -> ReplicaRow:
        found = latency(
            profile,
            rate_per_s=rate_per_s,
            dispersion=_POISSON,
            num_replicas=count,
            max_batch_size=size,
        )
        seconds = found.quantile(slo.share)
        return ReplicaRow(
            num_replicas=count,
            batch_size=size,
            utilisation=found.utilisation,
            latency_s=None if math.isinf(seconds) else seconds,
            attainment=found.attainment(slo.within_s),
            cost_per_hour=None if price_per_hour is None else count * price_per_hour,
        )

    if needed is None:
        return _too_few(row(most), slo, rate_per_s, most * profile.capacity_per_s(size))
    counts = {1 << power for power in range(needed.bit_length())} | {needed, needed + 1}
    ordered = sorted(count for count in counts if count <= most)
    rows = tuple(map(row, ordered))
    chosen = ordered.index(needed)
    return ReplicaTable(
        rows=rows,
        recommended=chosen,
        reason=f"{needed:,} replica{'s' * (needed != 1)} in batches of up to {size}: "
        f"{rows[chosen].attainment:.4%} of the requests within {latency_text(slo.within_s)}, the "
        f"fewest that keep {slo} at {in_digits(rate_per_s)} requests/s from independent callers. "
        "Bursts need more: `supple simulate serve` replays a trace.",
    )


def plan_batch(profile: LatencyProfile, slo: Slo | None) -> ReplicaTable | Infeasible:
    """Plan the batch size of one replica: the highest capacity that can keep the promise, or the
    highest of all without a promise."""
    if slo is not None and (impossible := _impossible(profile, slo)) is not None:
        return impossible
    rows = tuple(
        BatchRow(
            batch_size=point.batch_size,
            p50_s=point.p50_s,
            p99_s=point.p99_s,
            requests_per_s=point.batch_size / point.p50_s,
        )
        for point in profile.points
    )
    if slo is None:
        chosen = max(range(len(rows)), key=lambda index: rows[index].requests_per_s)
        why = "the most requests a second; --slo gives the time that one may take"
    else:
        size = best_batch(profile, within_s=slo.within_s, most=profile.largest_batch)
        chosen = next(i for i, row in enumerate(rows) if row.batch_size == size)
        why = f"the most requests a second that leave room to keep {slo}"
    row = rows[chosen]
    return ReplicaTable(
        rows=rows,
        recommended=chosen,
        reason=f"batches of {row.batch_size}: {in_digits(row.requests_per_s)} requests/s from one "
        f"replica, {why}. --rate gives the number of replicas.",
    )


def _impossible(profile: LatencyProfile, slo: Slo) -> Infeasible | None:
    """Why no number of replicas keeps the promise: one prediction alone takes longer."""
    alone_s = profile.tail_s(1)
    if alone_s <= slo.within_s:
        return None
    return Infeasible(
        asked=f"--slo {slo}",
        numbers=f"one prediction of one input takes {latency_text(alone_s)} (the fit times the "
        "worst measured p99 over p50)",
        rule="no number of replicas makes one prediction shorter",
        advice=f"Promise at least {latency_text(2 * alone_s)}, or make the model faster.",
    )


def _too_few(best: ReplicaRow, slo: Slo, rate_per_s: float, capacity_per_s: float) -> Infeasible:
    """Why `best`, the most replicas allowed, do not keep the promise."""
    count = best.num_replicas
    have = "1 replica answers" if count == 1 else f"{count:,} replicas answer"
    kept = f"{best.attainment:.4%} in time"
    if best.utilisation >= 1.0:
        kept = f"at most {in_digits(capacity_per_s)} requests/s"
    return Infeasible(
        asked=f"{slo} at {in_digits(rate_per_s)} requests/s",
        numbers=f"{have} {kept}, in batches of {best.batch_size}",
        rule=f"{slo.share:.6g} of the requests must be answered within "
        f"{latency_text(slo.within_s)}",
        advice="Allow more replicas (--max-workers) or more time (--slo), or make the model "
        "faster.",
    )
