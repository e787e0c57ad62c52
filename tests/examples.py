"""How many examples a property test tries: `make nightly` tries twenty times as many."""

from hypothesis import settings

USUAL = 100
NIGHTLY_TIMES = 20


def examples(number: int) -> int:
    """`number` in a usual run; in one with another profile as many times more as that has."""
    return max(1, number * settings().max_examples // USUAL)
