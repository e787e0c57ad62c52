"""Several Ray nodes: a job spreads over them, outlives the loss of one, grows onto a new one."""

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import psutil
import pytest

from supple.control.socket import send_request
from supple.core.job.ledger import prove
from tests.cluster.nodes import Nodes
from tests.cluster.runs import TrainRun
from tests.cluster.test_training import LONG

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "0")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "5")
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with Nodes() as cluster:
        yield cluster


def test_a_job_over_two_nodes_outlives_one_and_grows_onto_another(
    nodes: Nodes, tmp_path: Path
) -> None:
    second = nodes.add(2)
    script = tmp_path / "script.py"
    script.write_text(LONG)
    run = TrainRun(
        script,
        tmp_path,
        *("--address", nodes.address, "--workers", "1:3", "--schedule", "0s:3", "--ledger"),
        name=f"nodes-{os.getpid()}",
    )
    try:
        members = run.wait_running(3)
        where = {record["worker_id"]: record["node_id"] for record in run.of_type("WorkerReady")}
        # Both workers of the full node, then the other, whatever the order of their start.
        assert len(list(groupby(members, key=where.__getitem__))) == 2
        nodes.kill(second)
        (survivor,) = run.wait_running(1)
        assert where[survivor] != second.node_id
        gone = [record for record in run.of_type("WorkerLost") if record["worker_id"] in members]
        # Whichever comes first: Ray's word, or the heartbeat that is missing.
        silent = {record["worker_id"] for record in run.of_type("KillWorker")}
        assert set(members) - {survivor} == silent | {record["worker_id"] for record in gone}
        assert all(re.match(r"its (node|process)\b", record["detail"]) for record in gone), gone
        nodes.add(2)
        assert survivor in run.wait_running(3)
        run.wait("Progress", lambda record: record["num_workers"] == 3)
        send_request(run.name, {"ask": "stop"})
        assert run.end() == 0
        report = prove(run.ledger(), expected=range(1500))
        assert report.samples_seen > 0
        assert report.is_exact, str(report)
    finally:
        run.close()


def test_a_node_that_the_platform_announces_to_take_is_left_before_it_goes(
    nodes: Nodes, tmp_path: Path
) -> None:
    second = nodes.add(1)
    script = tmp_path / "script.py"
    script.write_text(LONG)
    run = TrainRun(
        script,
        tmp_path,
        *("--address", nodes.address, "--workers", "1:2", "--schedule", "0s:2"),
        name=f"drain-{os.getpid()}",
    )
    try:
        run.wait_running(2)
        where = {record["worker_id"]: record["node_id"] for record in run.of_type("WorkerReady")}
        (there,) = (worker for worker, node in where.items() if node == second.node_id)
        nodes.drain(second, left_s=60)
        assert run.wait("PreemptionNoticed")["worker_ids"] == [there]
        told = run.wait("Decision", lambda record: record["decision_kind"] == "shrink")
        assert f"{there} will be taken by the platform in" in told["reason"]
        assert there not in run.wait_running(1)
        run.wait("Progress", lambda record: record["num_workers"] == 1)
        nodes.add(1)
        assert there not in run.wait_running(2)
        assert not run.of_type("WorkerLost")
    finally:
        run.close()


def test_a_worker_whose_raylet_died_is_given_up_and_ends_and_writes_no_more(
    nodes: Nodes, tmp_path: Path
) -> None:
    second = nodes.add(1)
    script = tmp_path / "script.py"
    script.write_text(LONG)
    run = TrainRun(
        script,
        tmp_path,
        *("--address", nodes.address, "--workers", "1:2", "--schedule", "0s:2"),
        *("--checkpoint-every", "0.2s", "--heartbeat-timeout", "10s"),
        name=f"orphan-{os.getpid()}",
    )
    try:
        run.wait_running(2)
        where = {record["worker_id"]: record["node_id"] for record in run.of_type("WorkerReady")}
        (there,) = (worker for worker, node in where.items() if node == second.node_id)
        orphan = psutil.Process(run.pid_of(there))
        nodes.kill_raylet(second)
        (survivor,) = run.wait_running(1)
        assert survivor != there
        run.wait("CheckpointSaved")
        while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.02)  # pytest's time-out ends a wait in vain
        before = {path.name for path in (run.folder / "checkpoints").iterdir()}
        saved = run.wait("CheckpointSaved", lambda record: Path(record["path"]).name not in before)
        manifest = json.loads((Path(saved["path"]) / "manifest.json").read_text())
        assert manifest["worker"] == survivor
    finally:
        run.close()
