"""What a step costs: every term of the form does what the first lines of `step_form` say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.training.step_form import PARAMETERS, Shape, all_reduce, compute_time, step_time

MEGABYTE = 1e6
PLAIN = {
    "fixed": 0.01,
    "per_sample": 0.001,
    "per_byte": 1e-10,
    "per_byte_across": 1e-9,
}
"""Seconds; 10 GB/s inside a node, 1 GB/s across; no latency and no slowing."""


def parameters(**fields: float) -> np.ndarray:
    return np.array([(PLAIN | fields).get(name, 0.0) for name in PARAMETERS])


def shape(
    workers: int, nodes: int = 1, *, micro: int = 10, accumulation: int = 1, cards: int = 1
) -> Shape:
    most = -(-workers // nodes)
    return Shape(*map(float, (workers, nodes, most, micro, accumulation)), cards)


def across(workers: int, nodes: int, cards: int = 1, **fields: float) -> float:
    """Seconds to reduce a megabyte, over the share of it that a ring carries."""
    found = all_reduce(parameters(**fields), shape(workers, nodes, cards=cards), MEGABYTE)
    return float(found) / (2.0 * (workers - 1) / workers * MEGABYTE)


def test_a_ring_moves_its_share_at_the_speed_of_its_slowest_hop() -> None:
    assert across(4, 1) == pytest.approx(1e-10)
    assert across(8, 4) == pytest.approx(1e-9, rel=1e-3)


def test_every_hop_costs_its_latency_inside_and_across() -> None:
    x = parameters(latency=1e-4, latency_across=1e-3)
    found = all_reduce(x, shape(8, 2), message_bytes=0.0)
    assert float(found) == pytest.approx(2 * 6 * 1e-4 + 2 * 1 * 1e-3)


@pytest.mark.parametrize(("workers", "times"), [(4, 1.0), (8, 1.5), (16, 2.0)])
def test_workers_of_a_node_share_its_network_card(workers: int, times: float) -> None:
    """Half as slow again for every doubling of a node's workers, nothing for one worker a node."""
    found = across(workers, 4, card=0.5)
    assert found == pytest.approx(times * across(workers, 4), rel=1e-3)


@pytest.mark.parametrize(("nodes", "times"), [(2, 1.5), (4, 2.0), (8, 2.5)])
def test_the_slowest_of_many_links_is_slower(nodes: int, times: float) -> None:
    found = across(nodes, nodes, slowest=0.5)
    assert found == pytest.approx(times * 1e-9, rel=1e-3)


@pytest.mark.parametrize(("nodes", "times"), [(2, 1.5), (3, 1.0), (4, 1.0)])
def test_two_nodes_alone_have_one_flow(nodes: int, times: float) -> None:
    assert across(nodes, nodes, pair=0.5) == pytest.approx(times * 1e-9, rel=1e-3)


@pytest.mark.parametrize(("workers", "nodes", "rings"), [(8, 4, 2), (16, 2, 4), (4, 4, 1)])
def test_as_many_rings_as_cards_and_workers_of_a_node(workers: int, nodes: int, rings: int) -> None:
    found = across(workers, nodes, cards=4, per_byte=1e-14)
    assert found == pytest.approx(1e-9 / rings, rel=1e-3)


def test_neighbours_slow_each_others_compute_and_bus() -> None:
    crowd = parameters(crowd=0.2)
    assert compute_time(crowd, shape(4)) == pytest.approx(1.4 * compute_time(crowd, shape(1)))
    assert across(4, 1, host=0.5) == pytest.approx(2.5 * across(4, 1))


@given(st.floats(0.0, 10.0), st.integers(2, 64), st.integers(1, 8))
def test_a_step_lies_between_full_overlap_and_none(
    overlap: float, workers: int, accumulation: int
) -> None:
    x = parameters(overlap=overlap)
    asked = shape(workers, accumulation=accumulation)
    compute, network = (float(f) for f in (compute_time(x, asked), all_reduce(x, asked, 1e8)))
    found = float(step_time(x, asked, 1e8, fixed=0.003)) - 0.003 - (accumulation - 1) * compute
    assert max(compute, network) * 0.999999 <= found <= (compute + network) * 1.000001


@pytest.mark.parametrize(("overlap", "norm"), [(0.0, 1), (1.0, 2), (2.0, 3)])
def test_communication_hides_behind_the_backward_pass_by_a_p_norm(
    overlap: float, norm: int
) -> None:
    x, asked = parameters(overlap=overlap), shape(4)
    parts = [float(compute_time(x, asked)), float(all_reduce(x, asked, 1e8))]
    expected = sum(part**norm for part in parts) ** (1 / norm)
    assert float(step_time(x, asked, 1e8, fixed=0.0)) == pytest.approx(expected)


def test_stragglers_hold_up_all_of_a_step() -> None:
    late, asked = parameters(straggle=0.1), shape(8)
    plain = float(step_time(parameters(), asked, 1e8, fixed=0.003))
    assert float(step_time(late, asked, 1e8, fixed=0.003)) == pytest.approx(1.3 * plain)
    alone = float(step_time(late, shape(1), 1e8, fixed=0.003))
    assert alone == pytest.approx(0.01 + 0.001 * 10 + 0.003)
