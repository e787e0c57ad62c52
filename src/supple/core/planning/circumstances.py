"""What a plan of a measured script rests on: a busy machine, assumed nodes and links."""

from itertools import groupby

from supple.core.planning.measured import ScriptMeasurements
from supple.core.training.measurements import configuration
from supple.core.words import in_words

_USED_CORES = 0.5
"""Cores in use by other processes below which a machine counts as idle."""
_DIFFER = 1.5
"""Ratio of the two measurements of one configuration from which they disagree."""


def busy(found: ScriptMeasurements) -> str:
    """Say in one line that the machine was busy while the script was measured; empty if not."""
    most = most_measured(found)
    reasons: list[str] = []
    if found.used_cores > _USED_CORES and found.num_cores - found.used_cores < most:
        reasons.append(
            f"other processes used {found.used_cores:.1f} of its {found.num_cores} cores"
        )
    apart = repeats_apart(found)
    if apart > _DIFFER:
        reasons.append(f"two measurements of the same differ by a factor of {apart:.1f}")
    if not reasons:
        return ""
    return (
        f"Busy machine: {', and '.join(reasons)}. Nothing beyond the {in_words(most)} measured is "
        "recommended: plan again when it is idle."
    )


def repeats_apart(found: ScriptMeasurements) -> float:
    """Largest ratio of two measured step times of one configuration."""
    ordered = sorted(found.steps, key=configuration)
    groups = [[step.step_time_s for step in group] for _, group in groupby(ordered, configuration)]
    return max(max(times) / min(times) for times in groups)


def most_measured(found: ScriptMeasurements) -> int:
    """The largest measured number of workers."""
    return max(step.num_workers for step in found.steps)


def assumed(
    *, workers_per_node: int | None, interconnect: str | None, cores: int, link: str, most: int
) -> str:
    """Name the nodes and links that were not given, where the table (up to `most` workers) depends
    on them; empty where it does not."""
    if most <= (workers_per_node or cores):
        return ""
    parts: list[str] = []
    if workers_per_node is None:
        parts.append(
            f"nodes of {in_words(cores)}, as many as this machine has cores (--workers-per-node)"
        )
    if interconnect is None:
        parts.append(f"{link} between nodes (--interconnect)")
    return f"Assumed: {', '.join(parts)}." if parts else ""
