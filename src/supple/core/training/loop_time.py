"""Time that a script's loop spends outside of its steps: evaluation, logging, saving.

A turn of the loop is a step and what surrounds it. What happens in every turn is averaged. What
happens now and then, such as an evaluation every 100 steps, is found by its length, and its rate by
the distance between its first and its last occurrence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from supple.core.types import Estimate
from supple.core.words import in_digits

_RARE_TURNS, _RARE_S = 3.0, 0.01
"""A turn is rare if its time outside of the step is longer than usual by `_RARE_TURNS` usual turns,
and by `_RARE_S` seconds."""
_LATE_TURNS, _LATE_S = 10.0, 0.05
"""The same for a step that is longer than usual: an evaluation before the forward pass. Larger, as
a busy machine makes steps longer too."""
_AT_THE_START = 1
"""Index of the last turn that is the first one of a habit: `step % 100 == 0` is met at 0."""
_WORTH_SAYING, _DOMINATES = 0.01, 0.3
"""Shares of the time outside of steps from which a plan shows it, and names it beside the
recommendation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of the loop, in seconds."""

    loop_s: float
    """Outside of the step."""
    late_s: float = 0.0
    """How much longer than usual the step was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopTime:
    """Time outside of the steps, in seconds; an evaluation is an occurrence, for example."""

    every_s: float
    """Mean of the usual turns."""
    rare_s: float = 0.0
    """Typical length of an occurrence."""
    rate: float = 0.0
    """Occurrences per step, with the ends of an 80 % interval."""
    lowest_rate: float = 0.0
    highest_rate: float = 0.0
    num_rare: int = 0
    num_turns: int = 0

    @property
    def per_step(self) -> Estimate:
        """Mean seconds per step."""
        value, low, high = (
            self.every_s + rate * self.rare_s
            for rate in (self.rate, self.lowest_rate, self.highest_rate)
        )
        return Estimate(value=value, low=low, high=high, source="measured")

    @property
    def seen_once(self) -> bool:
        """Whether the only occurrence was at the start: how often it comes again is unknown."""
        return self.num_rare == 1 and self.lowest_rate == 0.0


NO_LOOP_TIME = LoopTime(every_s=0.0)


def loop_time(turns: Sequence[Turn], step_s: float) -> LoopTime:
    """Return the time outside of the steps of consecutive turns, with the usual step time."""
    if not turns:
        return NO_LOOP_TIME
    usual = median(turn.loop_s for turn in turns)
    turn_s, extras = usual + step_s, list[float]()
    for turn in turns:
        extra = turn.loop_s - usual
        rare = extra if extra > max(_RARE_TURNS * turn_s, _RARE_S) else 0.0
        late = turn.late_s if turn.late_s > max(_LATE_TURNS * turn_s, _LATE_S) else 0.0
        extras.append(rare + late)
    at = [index for index, extra in enumerate(extras) if extra]
    plain = [turn.loop_s for turn, extra in zip(turns, extras, strict=True) if not extra]
    later = [extras[index] for index in at if index > _AT_THE_START]
    low, rate, high = _rates(at, len(turns))
    return LoopTime(
        every_s=fmean(plain or [usual]),
        rare_s=median(later or [extras[index] for index in at] or [0.0]),
        rate=rate,
        lowest_rate=low,
        highest_rate=high,
        num_rare=len(at),
        num_turns=len(turns),
    )


def _rates(at: Sequence[int], num_turns: int) -> tuple[float, float, float]:
    """Low end, value and high end of the occurrences per turn, seen at the indices `at`."""
    if not at:
        return 0.0, 0.0, 0.0
    if len(at) > 1:
        rate = (len(at) - 1) / (at[-1] - at[0])
        doubt = 1.0 + 1.0 / len(at)
        return rate / doubt, rate, min(1.0, rate * doubt)
    if at[0] <= _AT_THE_START:
        return 0.0, 0.5 / num_turns, 1.0 / num_turns
    return 1.0 / num_turns, 1.0 / (at[0] + 1), 1.0 / (at[0] + 1)


def loop_share(loop: LoopTime, step_s: float) -> float:
    """Share of the time that the loop spends outside of steps of `step_s`."""
    outside = loop.per_step.value
    return outside / (outside + step_s) if outside else 0.0


def dominates(share: float) -> bool:
    """Whether a share is large enough to be named beside the recommendation."""
    return share >= _DOMINATES


def in_loop_words(loop: LoopTime, step_s: float) -> str:
    """Describe the time outside of steps of `step_s`; empty if it is negligible and nothing rare
    was seen."""
    share = loop_share(loop, step_s)
    if share < _WORTH_SAYING and not loop.num_rare:
        return ""
    text = f"outside of the steps: {_ms(loop.per_step.value)} a step, {share:.0%} of the loop"
    if loop.seen_once:
        return (
            f"{text}. At the start it took {_ms(loop.rare_s)} more (an evaluation?): not again in "
            f"{loop.num_turns} turns, so how often it comes again is unknown"
        )
    if loop.num_rare:
        text += (
            f": {_ms(loop.every_s)} in every turn, and {_ms(loop.rare_s)} more in "
            f"{loop.num_rare} of {loop.num_turns} (evaluation, saving)"
        )
    return text


def _ms(seconds: float) -> str:
    return f"{in_digits(seconds * 1e3)} ms" if seconds < 1.0 else f"{in_digits(seconds)} s"
