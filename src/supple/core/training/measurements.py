"""Measurements of a job's steps and links, and their validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from supple.core.spec import SpecError, is_count
from supple.core.words import in_words

Configuration = tuple[int, int, int, int]
"""(workers, nodes, micro-batch, accumulation)."""
_PART = 2.0
"""Largest valid time of a part of a step over the step: a part may be the sum of two medians, each
at most the step's."""
_ABSURD = 10.0
"""Largest valid ratio of the step time on fewer workers to that on more, at equal micro-batch:
expected is about 1."""
_COMPARABLE = 4.0
"""Largest ratio of two micro-batches that are compared: the step of the larger is longer by at most
that ratio."""


class ContradictoryMeasurements(SpecError):
    """Times that cannot belong to one job: one is in another unit, or from a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """Median times of one configuration, in seconds; parts are sums over the micro-batches."""

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
    """Workers on the fullest node; None: spread evenly."""


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
    """Validate measurements. Raise `ValueError` for no measurement, counts that are no whole number
    of at least 1, and times that are not positive and finite; `ContradictoryMeasurements` for parts
    far longer than their step, and for fewer workers far slower than more of them."""
    if not steps:
        raise ValueError(
            "a step-time fit was requested with 0 measurements: it needs at least 1. Measure one "
            "configuration first."
        )
    if not _are_counts(gradient_bytes, workers_per_node):
        raise ValueError(
            f"a step-time fit was requested with gradient_bytes={gradient_bytes}, "
            f"workers_per_node={workers_per_node}: both must be whole numbers of at least 1. Give "
            "the bytes of all gradients, and the workers of one node."
        )
    for step in steps:
        times = (step.forward_s + step.backward_s, step.step_time_s)
        rest = (step.optimizer_s, step.data_s, step.sync_s)
        good = all(math.isfinite(t) and t > 0 for t in times) and _are_counts(*configuration(step))
        good = good and _is_spread(step)
        if not good or not all(math.isfinite(t) and t >= 0 for t in rest):
            raise ValueError(
                f"the measurement {step} cannot be fitted: counts must be whole and at least 1, "
                "nodes no more than workers, the fullest node between an even share and all that "
                "the others leave, and times positive and finite. Measure it again, or leave it "
                "out."
            )
        _check_parts(step)
    _check_counts(steps)
    for collective in collectives:
        good = math.isfinite(collective.time_s) and collective.time_s > 0
        good = good and _are_counts(collective.num_workers, collective.message_bytes)
        if not good or collective.num_workers < 2:
            raise ValueError(
                f"the measurement {collective} cannot be fitted: an all-reduce needs at least 2 "
                "workers and 1 byte, and its time must be positive and finite. Measure it again, "
                "or leave it out."
            )


def _check_parts(step: StepMeasurement) -> None:
    parts = {
        "forward and backward": step.forward_s + step.backward_s,
        "the optimizer": step.optimizer_s,
        "loading data": step.data_s,
        "exposed communication": step.sync_s,
    }
    for name, time_s in parts.items():
        if time_s > _PART * step.step_time_s:
            raise ContradictoryMeasurements(
                f"a step-time fit was requested with a step of {_described(step)}, of which {name} "
                f"took {time_s:.3g} s: no part of a step is longer than the step. Give all times "
                "in seconds and of the same steps, or measure it again."
            )


def _check_counts(steps: Sequence[StepMeasurement]) -> None:
    """Compare worker counts by their median step times (the lower of two), robust to a busy
    machine."""
    groups: dict[Configuration, list[StepMeasurement]] = {}
    for step in steps:
        groups.setdefault(configuration(step), []).append(step)
    typical = [
        sorted(group, key=lambda step: step.step_time_s)[(len(group) - 1) // 2]
        for group in groups.values()
    ]
    times = np.array([step.step_time_s for step in typical])
    workers, nodes, sizes, cuts = np.array(list(groups), dtype=float).T
    apart = sizes[:, None] / sizes
    alike = (cuts[:, None] == cuts) & (abs(np.log(apart)) <= math.log(_COMPARABLE) + 1e-9)
    # Fewer workers on more nodes may be slower.
    fewer = (workers[:, None] < workers) & (nodes[:, None] <= nodes)
    longer = times[:, None] / times
    absurd = fewer & alike & (longer > _ABSURD * np.maximum(1.0, apart))
    for few, many in np.argwhere(absurd).tolist():
        raise ContradictoryMeasurements(
            f"a step-time fit was requested with a step of {_described(typical[few])} and one of "
            f"{_described(typical[many])}: fewer workers do not take {longer[few, many]:,.0f} "
            "times as long for a step. Give all times in seconds, or measure both again on an idle "
            "machine."
        )


def _described(step: StepMeasurement) -> str:
    return (
        f"{step.step_time_s:.3g} s on {in_words(step.num_workers)} with a micro-batch of "
        f"{step.micro_batch_size}"
    )


def _are_counts(*numbers: float) -> bool:
    return all(map(is_count, numbers))


def _is_spread(step: StepMeasurement) -> bool:
    """Whether the fullest node's worker count is possible."""
    return (
        step.num_nodes <= step.num_workers
        and -(-step.num_workers // step.num_nodes)
        <= most_per_node(step)
        <= step.num_workers - step.num_nodes + 1
    )


def check_configuration(
    num_workers: int, num_nodes: int, micro_batch: int, accumulation: int
) -> None:
    """Raise `ValueError` for a configuration that cannot run."""
    counts = (num_workers, num_nodes, micro_batch, accumulation)
    if not _are_counts(*counts):
        raise ValueError(
            f"a step time was requested with num_workers={num_workers}, num_nodes={num_nodes}, "
            f"micro_batch_size={micro_batch}, num_accumulation_steps={accumulation}: all must be "
            "whole numbers of at least 1. Give a step that can run."
        )
    if num_nodes > num_workers:
        raise ValueError(
            f"a step time was requested with {num_workers} workers on {num_nodes} nodes: every "
            "node holds at least 1 worker. Give fewer nodes, or more workers."
        )


def most_per_node(step: StepMeasurement) -> int:
    """Workers on the fullest node."""
    even = -(-step.num_workers // step.num_nodes)
    return even if step.most_per_node is None else step.most_per_node


def configuration(step: StepMeasurement) -> Configuration:
    """Configuration of a measurement, without its spread over the nodes."""
    return (
        step.num_workers,
        step.num_nodes,
        step.micro_batch_size,
        step.num_accumulation_steps,
    )
