"""Step time on K workers of n nodes, the fullest of which holds g: the form that `throughput.py`
fits, and the priors of its parameters.

    compute   C = (a + b m) (1 + chi log2 g)                    per micro-batch of m samples
    inside    w = (1 + eta (g-1)) / W                           seconds a byte, a hop in a node
    across    v = (1 + tau log2 n) (1 + kappa log2(K/n)) (1 + pi, for two nodes) / (r W')
    network   N = 2 (K-n) alpha + 2 (n-1) alpha' + 2 (K-1)/K M (w^4 + v^4)^(1/4)
    step      T = (1 + sigma log2 K) [ (s-1) C + (C^p + N^p)^(1/p) + o + d m s ]

with s micro-batches a step and M gradient bytes; alpha and W inside a node, alpha' and W' across,
where r is the number of rings: the lesser of a node's network cards and its workers. v applies from
two nodes on, w where a node holds two workers. The network term is the textbook cost of a ring
all-reduce through all workers, at the speed of its slowest hop. Workers of a node share its
processors (chi), its memory or bus (eta, largest in containers without direct memory access between
accelerators) and its network card (kappa). The slowest of many links is slower (tau). With two
nodes every flow has the same peer (pi, from the catalogue: providers of virtual machines limit a
flow). The p-norm that overlaps communication with the backward pass is Pollux's (OSDI 2021,
equation 11). All parameters are positive and fitted as logarithms.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from supple.core.hardware import Interconnect

Vector = npt.NDArray[np.float64]

PARAMETERS = (
    *("fixed", "per_sample", "latency", "per_byte", "latency_across", "per_byte_across"),
    *("overlap", "straggle", "slowest", "card", "pair", "crowd", "host"),
)
"""Names of the parameter vector's entries, in order: a, b, alpha, 1/W, alpha', 1/W', p-1, sigma,
tau, kappa, pi, chi, eta."""
_INDEX = {name: index for index, name in enumerate(PARAMETERS)}
LOCAL_LINK, SHARED_HOST = _INDEX["per_byte"], _INDEX["host"]
_SHARPNESS = 4.0
"""Power of the norm of the two hop times, inside and across: close to their maximum."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One configuration, or many as columns."""

    workers: Any
    nodes: Any
    most_per_node: Any
    micro_batch: Any
    accumulation: Any
    cards: int
    """Network cards of a node."""

    @property
    def rails(self) -> Any:
        return np.clip(self.workers / self.nodes, 1.0, self.cards)


def compute_time(x: Any, shape: Shape) -> Any:
    """Seconds of one micro-batch's forward and backward."""
    crowd = 1.0 + x[_INDEX["crowd"]] * np.log2(shape.most_per_node)
    return (x[0] + x[1] * shape.micro_batch) * crowd


def step_time(x: Any, shape: Shape, gradient_bytes: float, fixed: Any) -> Any:
    """Seconds of a step for every shape; (sets, shapes) where `x` is (parameters, sets, 1).
    `fixed` is the step's other time in seconds: optimizer and data."""
    compute = compute_time(x, shape)
    network = all_reduce(x, shape, gradient_bytes)
    power = 1.0 + x[_INDEX["overlap"]]
    larger = np.maximum(compute, network)
    smaller = np.minimum(compute, network) / larger
    last = larger * (1.0 + smaller**power) ** (1.0 / power)
    straggle = 1.0 + x[_INDEX["straggle"]] * np.log2(shape.workers)
    return straggle * ((shape.accumulation - 1.0) * compute + last + fixed)


def all_reduce(x: Any, shape: Shape, message_bytes: Any) -> Any:
    """Seconds of a ring all-reduce through all workers, node by node, one ring per card."""
    workers, nodes = shape.workers, shape.nodes
    hops = (workers - nodes) * x[_INDEX["latency"]] + (nodes - 1.0) * x[_INDEX["latency_across"]]
    host = 1.0 + x[_INDEX["host"]] * (shape.most_per_node - 1.0)
    inside = x[LOCAL_LINK] * host * np.where(workers > nodes, 1.0, 1e-3)
    card = 1.0 + x[_INDEX["card"]] * np.log2(np.maximum(1.0, workers / nodes))
    pair: Any = np.where(nodes == 2.0, 1.0 + x[_INDEX["pair"]], 1.0)
    many = 1.0 + x[_INDEX["slowest"]] * np.log2(nodes)
    across = x[_INDEX["per_byte_across"]] * many * card * pair / shape.rails
    larger = np.maximum(inside, across)
    smaller = np.minimum(inside, across) / larger
    both = larger * (1.0 + smaller**_SHARPNESS) ** (1.0 / _SHARPNESS)
    slowest = cast("Vector", np.where(nodes > 1.0, both, inside))
    return 2.0 * hops + 2.0 * (workers - 1.0) / workers * message_bytes * slowest


def priors(
    compute: Vector, micro_batch: Vector, inside: Interconnect, link: Interconnect
) -> tuple[Vector, Vector]:
    """Prior centres (logarithms) and widths (standard deviations of the logarithm), each
    (parameters,), from the measured compute times and the catalogue's links."""
    typical = float(np.median(compute))
    per_sample = float(np.median(compute / micro_batch))
    centres_and_widths = {
        "fixed": (0.2 * typical, 2.0),
        "per_sample": (0.8 * per_sample, 1.0),
        "latency": (inside.latency_s, 1.0),
        "per_byte": (1.0 / inside.bandwidth_bytes_per_s, 0.7),
        "latency_across": (link.latency_s, 0.7),
        "per_byte_across": (1.0 / link.bandwidth_bytes_per_s, 1.0),
        # p - 1: between no overlap and a p-norm of 3.
        "overlap": (0.7, 0.7),
        # Per doubling of the workers, of the nodes, and of the workers a node.
        "straggle": (0.01, 0.5),
        "slowest": (0.08, 0.5),
        "card": (0.05, 1.0),
        "pair": (link.pair_slowdown, link.pair_doubt),
        # Per doubling of the workers of the fullest node; per additional worker there.
        "crowd": (0.02, 1.0),
        "host": (0.01, 1.0),
    }
    table = np.array([centres_and_widths[name] for name in PARAMETERS])
    return np.log(table[:, 0]), table[:, 1]
