"""A test over a second is marked slow, or it fails, so that `make check` stays quick.

What counts is processor time, of this process and of the children it has waited for: other work on
a shared machine makes a test late without making it slow. Tests that take half a second are marked
as well, so that a machine half as fast finds nothing. See docs/decisions/0018-three-runs.md.
"""

import os
from dataclasses import dataclass, field

MOST_S = 1.0


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@dataclass(frozen=True)
class Beginning:
    """The processor time of this process when a test begins."""

    cpu_s: float = field(default_factory=_cpu_s)

    def why_too_long(self) -> str | None:
        """What to tell of an unmarked test that ends now, if it took over a second."""
        took_s = _cpu_s() - self.cpu_s
        if took_s <= MOST_S:
            return None
        return (
            f"an unmarked test took {took_s:.1f} s of processor time; the most is {MOST_S:g} s: "
            "make it quicker, or mark it with @pytest.mark.slow"
        )
