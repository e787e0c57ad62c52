"""How long the measurement of a count is evidence, in a running job.

A count is not given up for good: what was measured of it is dropped after a while, or when the
machine has changed, and then it is predicted again from the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from supple.core.training.measurements import Configuration, StepMeasurement, configuration

LEAST_S = 15.0
"""Shortest time that a count is measured before it may be given up, in s."""
_TRUSTED_TIMES = 20.0
"""A measurement is evidence for this many times as long as it lasted."""
_ANOTHER_MACHINE = 1.5
"""Ratio of the step time of one configuration now to that in an earlier generation from which the
machine has changed: what other counts took before is no evidence any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How long a configuration was measured, in s, and when last."""

    total_s: float
    last_at: float
    generation: int
    """The last generation that had it."""
    before_s: float | None = None
    """Its step time in the generations before that; None: it had none."""


def record(
    measured: Mapping[Configuration, StepMeasurement],
    seen: Mapping[Configuration, Seen],
    newest: StepMeasurement,
    *,
    generation: int,
    began_at: float,
    now: float,
) -> tuple[dict[Configuration, StepMeasurement], dict[Configuration, Seen]]:
    """Add the newest measurement, of `generation`, which began at `began_at`, and drop those of
    other counts that are no evidence any more."""
    key = configuration(newest)
    old = seen.get(key)
    if old is not None and old.generation == generation:
        total_s, before_s = old.total_s + now - old.last_at, old.before_s
    else:
        total_s = (0.0 if old is None else old.total_s) + now - began_at
        before_s = measured[key].step_time_s if key in measured else None
    is_another = (
        before_s is not None
        and now - began_at >= LEAST_S
        and not 1 / _ANOTHER_MACHINE < newest.step_time_s / before_s < _ANOTHER_MACHINE
    )
    stale = {
        other
        for other, their in seen.items()
        if other[0] != key[0]
        and (is_another or now - their.last_at > _TRUSTED_TIMES * max(their.total_s, LEAST_S))
    }
    kept = {other: step for other, step in measured.items() if other not in stale}
    own = Seen(
        total_s=total_s,
        last_at=now,
        generation=generation,
        before_s=None if is_another else before_s,
    )
    return {**kept, key: newest}, {**seen, key: own}
