"""What it takes a generation of n workers to find and reach each other: today, and as designed in
`docs/decisions/0020-forming-at-4096.md`. Numbers alone: no worker runs.

Every queue is served in order: the controller's connections and bytes, each worker's own pairs.
What is assumed was measured on two cores (30 November 2026) or is said to be assumed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

PER_NODE = 8
MEETING_S = 1.2e-3
"""CPU time of a member's connection to the rendezvous, both sides, as measured with 64 of them."""
PAIR_S = 0.3e-3
"""CPU time to connect one pair of gloo's, as measured with 32 ranks (496 pairs in 0.16 s)."""
COMMAND_S = 0.2e-3
"""Of the controller, to send one actor a command: assumed."""
BYTES_PER_S = 1e9
"""Of the controller's link, and of proving (HMAC-SHA256) what is sent over it: assumed."""
TRIP_S = 100e-6
"""There and back between two nodes: assumed."""
_MOST_WRITTEN = 64 * 1024
"""What `supple.train.generation.rendezvous` lets one member write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forming:
    messages: int
    """Commands, what members write, answers, and one for each pair that is connected."""
    pairs: int
    """Connections between workers."""
    bytes: int
    """Over the controller's link."""
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "messages": float(self.messages),
            "pairs": float(self.pairs),
            "mb": self.bytes / 1e6,
            "s": self.seconds,
        }


def today(size: int) -> Forming:
    """Each member is told by the controller, writes an address for every other, gets what all
    wrote, and connects to all."""
    wrote = written_bytes(size)
    answer = size * wrote
    told_s = served(COMMAND_S for _ in range(size))
    met_s = served([MEETING_S + wrote / BYTES_PER_S] * size, arrivals=told_s)
    answered_s = served([answer / BYTES_PER_S] * size, arrivals=[met_s[-1]] * size)
    pairs = size * (size - 1) // 2
    return Forming(
        messages=3 * size + pairs,
        pairs=pairs,
        bytes=size * (wrote + answer),
        seconds=answered_s[-1] + (size - 1) * PAIR_S / 2 + TRIP_S,
    )


def designed(size: int) -> Forming:
    """A node's members meet on their node; nodes meet at the controller, which answers with the
    addresses of neighbours; pairs are connected when they are first used."""
    nodes = math.ceil(size / PER_NODE)
    wrote = PER_NODE * lazy_bytes()
    neighbours = [tree_neighbours(node, nodes) for node in range(nodes)]
    answers = [len(near) * lazy_bytes() for near in neighbours]
    told_s = served(COMMAND_S for _ in range(nodes))
    at_node_s = [told + PER_NODE * MEETING_S for told in told_s]
    met_s = served([MEETING_S + wrote / BYTES_PER_S] * nodes, arrivals=at_node_s)
    answered_s = served((answer / BYTES_PER_S for answer in answers), arrivals=[met_s[-1]] * nodes)
    between = sum(map(len, neighbours)) // 2
    within = nodes * (PER_NODE - 1)
    most = PER_NODE - 1 + max(map(len, neighbours))
    levels = math.ceil(math.log2(nodes)) if nodes > 1 else 0
    return Forming(
        messages=3 * nodes + 3 * size + between + within,
        pairs=between + within,
        bytes=nodes * wrote + sum(answers),
        seconds=answered_s[-1] + most * PAIR_S + 2 * levels * TRIP_S,
    )


def served(durations: Iterable[float], *, arrivals: Iterable[float] | None = None) -> list[float]:
    """When each of a queue is done: one at a time, in the order in which they come; all are there
    at 0, or from their `arrivals` on."""
    found: list[float] = []
    free_at = 0.0
    took = list(durations)
    for came, takes in zip(sorted(arrivals or [0.0] * len(took)), took, strict=True):
        free_at = max(free_at, came) + takes
        found.append(free_at)
    return found


def written_bytes(size: int) -> int:
    """What a member writes today: gloo's one value (154 bytes and 8 for each rank, as measured with
    2, 8 and 32), in hexadecimal, and who it is."""
    return 2 * (154 + 8 * size) + 90


def lazy_bytes() -> int:
    """The same of a device that connects its pairs when they are used: it names one port."""
    return 2 * 154 + 90


def largest_today() -> int:
    """The largest group whose members may write what gloo has them write."""
    return max(size for size in range(1, 8192) if written_bytes(size) <= _MOST_WRITTEN)


def tree_neighbours(node: int, nodes: int) -> frozenset[int]:
    """Nodes that one talks to: parent and children in two binary trees, the second one shifted by
    half, so that the leaves of one are not those of the other; as NCCL has them."""
    half = nodes // 2
    here: set[int] = set()
    for shift in (0, half):
        place = (node + shift) % nodes
        near = {(place - 1) // 2} if place else set[int]()
        near |= {child for child in (2 * place + 1, 2 * place + 2) if child < nodes}
        here |= {(other - shift) % nodes for other in near}
    return frozenset(here)


def metrics(sizes: Iterable[int]) -> dict[str, float]:
    """Of both, by size."""
    found: dict[str, float] = {"forming_largest_today": float(largest_today())}
    for size in sizes:
        for name, forming in (("today", today(size)), ("designed", designed(size))):
            found |= {
                f"forming_{what}_{name}_{size}": value for what, value in forming.metrics.items()
            }
    return found
