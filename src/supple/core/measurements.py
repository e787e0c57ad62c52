"""What was measured of a job's steps and links, and the refusal of what cannot be fitted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

Configuration = tuple[int, int, int, int]
"""(workers, nodes, micro-batch, accumulation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """One configuration: medians in seconds. Parts are sums over the step's micro-batches."""

    num_workers: int
    num_nodes: int
    micro_batch_size: int
    num_accumulation_steps: int
    forward_s: float
    backward_s: float
    optimizer_s: float
    data_s: float
    sync_s: float
    step_time_s: float
    most_per_node: int | None = None
    """Workers on the fullest node; as if spread evenly where it is not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveMeasurement:
    """One all-reduce, measured inside a node."""

    num_workers: int
    message_bytes: int
    time_s: float


def check_measurements(
    steps: Sequence[StepMeasurement],
    collectives: Sequence[CollectiveMeasurement],
    gradient_bytes: int,
    workers_per_node: int,
) -> None:
    """Raise `ValueError` for no measurement, counts below 1, and times that are not positive and
    finite."""
    if not steps:
        raise ValueError(
            "a step-time fit was asked for with 0 measurements: it needs at least 1. Measure one "
            "configuration first."
        )
    if gradient_bytes <= 0 or workers_per_node <= 0:
        raise ValueError(
            f"gradient_bytes={gradient_bytes}, workers_per_node={workers_per_node}: both must be "
            "positive."
        )
    for step in steps:
        times = (step.forward_s + step.backward_s, step.step_time_s)
        counts = (*configuration(step), step.num_workers // max(1, step.num_nodes))
        even = -(-step.num_workers // max(1, step.num_nodes))
        fullest = even if step.most_per_node is None else step.most_per_node
        rest = (step.optimizer_s, step.data_s, step.sync_s)
        good = all(math.isfinite(t) and t > 0 for t in times) and min(counts) >= 1
        good = good and even <= fullest <= step.num_workers - step.num_nodes + 1
        if not good or not all(math.isfinite(t) and t >= 0 for t in rest):
            raise ValueError(
                f"the measurement {step} cannot be fitted: counts must be at least 1, nodes no "
                "more than workers, the fullest node between an even share and all that the others "
                "leave, and times positive and finite. Measure it again, or leave it out."
            )
    for collective in collectives:
        good = math.isfinite(collective.time_s) and collective.time_s > 0
        if not good or collective.num_workers < 2 or collective.message_bytes < 1:
            raise ValueError(
                f"the measurement {collective} cannot be fitted: an all-reduce needs at least 2 "
                "workers and 1 byte, and its time must be positive and finite. Measure it again, "
                "or leave it out."
            )


def check_asked(num_workers: int, num_nodes: int, micro_batch: int, accumulation: int) -> None:
    """Raise `ValueError` for a configuration that cannot run, and so has no step time."""
    counts = (num_workers, num_nodes, micro_batch, accumulation)
    if not all(isinstance(count, Integral) and count >= 1 for count in counts):
        raise ValueError(
            f"a step time was asked for with num_workers={num_workers}, num_nodes={num_nodes}, "
            f"micro_batch_size={micro_batch}, num_accumulation_steps={accumulation}: all must be "
            "whole numbers of at least 1. Ask for a step that can run."
        )
    if num_nodes > num_workers:
        raise ValueError(
            f"a step time was asked for with {num_workers} workers on {num_nodes} nodes: every "
            "node holds at least 1 worker. Ask for fewer nodes, or for more workers."
        )


def most_per_node(step: StepMeasurement) -> int:
    """Workers on the fullest node."""
    even = -(-step.num_workers // step.num_nodes)
    return even if step.most_per_node is None else step.most_per_node


def configuration(step: StepMeasurement) -> Configuration:
    """What was measured: how they lie on the nodes is left out."""
    return (
        step.num_workers,
        step.num_nodes,
        step.micro_batch_size,
        step.num_accumulation_steps,
    )
