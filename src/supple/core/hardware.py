"""Catalogue of network links, for predictions that one machine cannot measure. Its numbers are
priors: a prediction that depends on one is marked `assumed` and has a wide interval."""

from dataclasses import dataclass

from supple.core.spec import parse_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Interconnect:
    """Latency of one hop of a ring, and the bandwidth of a ring per worker."""

    name: str
    latency_s: float
    bandwidth_bytes_per_s: float
    source: str
    pair_slowdown: float = 0.05
    """Relative increase of the transfer time of a ring of two nodes, where all flows have the same
    peer. Where a provider limits a flow (AWS documents 5 Gbit/s, 10 inside a placement group), the
    two neighbours of a node in a larger ring get more bandwidth than one."""
    pair_doubt: float = 0.3
    """Standard deviation of the logarithm of `pair_slowdown`."""
    cards_per_node: int = 1
    """Network cards of a node, each of this bandwidth."""


_BASIS = "nominal rate, {} of it achieved by large ring all-reduces"
_TCP = (0.1, 0.7)
"""`pair_slowdown` and `pair_doubt` for TCP through own switches: on the public profiles of a
cluster of 2080Ti (Sia, SOSP 2023) two nodes are about as fast as three."""
_VIRTUAL = (0.6, 0.3)
"""The same between virtual machines: on those with T4 at AWS (Pollux, OSDI 2021) two nodes take 1.4
to 2.1 times the transfer time predicted from larger rings, for all six models."""
_FABRIC = (0.05, 0.3)
"""The same for a fabric with many paths to a peer."""


def _link(
    name: str,
    latency_us: float,
    gigabytes_per_s: float,
    source: str,
    pair: tuple[float, float] = _FABRIC,
    cards: int = 1,
) -> Interconnect:
    slowdown, doubt = pair
    return Interconnect(
        name=name,
        latency_s=latency_us * 1e-6,
        bandwidth_bytes_per_s=gigabytes_per_s * 1e9,
        source=source,
        pair_slowdown=slowdown,
        pair_doubt=doubt,
        cards_per_node=cards,
    )


INTERCONNECTS: dict[str, Interconnect] = {
    link.name: link
    for link in (
        _link("loopback", 100.0, 1.5, "gloo between processes of one machine, order of magnitude"),
        _link("pcie3", 15.0, 6.0, _BASIS.format("half of 12 GB/s")),
        _link("pcie4", 15.0, 12.0, _BASIS.format("half of 25 GB/s")),
        _link("nvlink-v100", 3.4, 115.0, _BASIS.format("three quarters of 150 GB/s")),
        _link("nvlink-a100", 3.4, 230.0, _BASIS.format("three quarters of 300 GB/s")),
        _link("nvlink-h100", 3.4, 360.0, _BASIS.format("four fifths of 450 GB/s")),
        _link("nvlink-b200", 3.4, 720.0, _BASIS.format("four fifths of 900 GB/s")),
        _link("infinity-mi300x", 5.0, 300.0, _BASIS.format("two thirds of 448 GB/s")),
        _link("ethernet-10", 50.0, 1.0, _BASIS.format("80 % of 10 Gbit/s"), _TCP),
        _link("ethernet-25", 30.0, 2.5, _BASIS.format("80 % of 25 Gbit/s"), _TCP),
        _link("ethernet-50", 30.0, 5.0, _BASIS.format("80 % of 50 Gbit/s"), _TCP),
        _link("ethernet-100", 25.0, 10.0, _BASIS.format("80 % of 100 Gbit/s"), _TCP),
        _link("cloud-10", 50.0, 1.0, _BASIS.format("80 % of 10 Gbit/s"), _VIRTUAL),
        _link("cloud-25", 30.0, 2.5, _BASIS.format("80 % of 25 Gbit/s"), _VIRTUAL),
        _link("cloud-50", 30.0, 5.0, _BASIS.format("80 % of 50 Gbit/s"), _VIRTUAL),
        _link("cloud-100", 25.0, 10.0, _BASIS.format("80 % of 100 Gbit/s"), _VIRTUAL),
        _link("efa-400", 25.0, 40.0, _BASIS.format("80 % of 400 Gbit/s")),
        _link("infiniband-200", 14.0, 22.0, _BASIS.format("88 % of 200 Gbit/s")),
        _link("infiniband-400", 14.0, 44.0, _BASIS.format("88 % of 400 Gbit/s")),
        _link("infiniband-200x8", 14.0, 22.0, _BASIS.format("88 % of 200 Gbit/s"), cards=8),
        _link("infiniband-400x8", 14.0, 44.0, _BASIS.format("88 % of 400 Gbit/s"), cards=8),
    )
}


DEFAULT_INTERCONNECT = "ethernet-25"
"""Default link between nodes."""


def lookup(name: str, *, what: str = "--interconnect") -> Interconnect:
    """Look up a link by name, ignoring case; `SpecError` with the valid names for any other."""
    return INTERCONNECTS[parse_name(name, INTERCONNECTS, what=what)]
