"""The picture of a served model: what was measured, and what a promise and a rate need."""

import re
from pathlib import Path

import matplotlib
import pytest

from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.replica_plan import ReplicaRow, ReplicaTable, plan_batch, plan_replicas
from supple.core.service.spec import Slo
from supple.core.types import Infeasible
from supple.report.profile_picture import draw_profile

SLO = Slo(share=0.99, within_s=0.1)


def measured(*, item_s: float = 0.002) -> LatencyProfile:
    points = [
        LatencyPoint(batch_size=size, p50_s=0.01 + item_s * size, p99_s=0.012 + 1.2 * item_s * size)
        for size in (1, 2, 4, 8, 16)
    ]
    return LatencyProfile(points=tuple(points), startup_s=5.0)


def drawn(folder: Path, table: ReplicaTable | Infeasible, *lengths: int) -> str:
    """The text in the picture."""
    assert not isinstance(table, Infeasible)
    target = folder / "profile.svg"
    fits = [(length, measured(item_s=0.002 * length)) for length in lengths or (1,)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        rows = [(length, fit.points, fit) for length, fit in fits]
        draw_profile(rows, table, target, name="app.py:Model", slo=SLO)
    return "\n".join(re.findall(r">([^<>]*)</text>", target.read_text()))


@pytest.mark.slow
def test_the_answer_to_a_rate_is_in_the_picture(tmp_path: Path) -> None:
    table = plan_replicas(measured(), SLO, rate_per_s=2000.0, most=64)
    text = drawn(tmp_path, table)
    assert isinstance(table, ReplicaTable) and isinstance(row := table.rows[-2], ReplicaRow)
    assert f"app.py:Model: {row.num_replicas} replicas recommended" in text
    for words in ("replicas", "predicted latency", "promise p99=100ms", "recommended", "the queue"):
        assert words in text
    assert "at 2,000 requests/s" in text


@pytest.mark.slow
def test_without_a_rate_the_batch_to_take_is_in_the_picture(tmp_path: Path) -> None:
    text = drawn(tmp_path, plan_batch(measured(), SLO))
    assert "app.py:Model: batches of 4 recommended" in text
    assert "requests/s of one replica" in text and "recommended batch" in text


@pytest.mark.slow
def test_times_are_plain_numbers_and_every_length_has_its_curve(tmp_path: Path) -> None:
    text = drawn(tmp_path, plan_batch(measured(), None), 1, 64)
    assert "length 1\n" in text and "length 64" in text
    assert "100ms" in text and "10" not in text.splitlines()
    assert not re.search(r"10\^|mathdefault", text)
