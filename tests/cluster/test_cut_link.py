"""A cut link: nothing arrives and nobody is told. The job finds it and goes on without the other
side."""

import os
from pathlib import Path

import pytest

from supple.control.socket import send_request
from supple.core.job.ledger import prove
from tests.cluster.namespaces import ray_node, two_hosts, why_not
from tests.cluster.runs import TrainRun
from tests.cluster.test_training import LONG

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_worker_behind_a_cut_link_is_found_by_its_silence_and_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("a token of this test alone, thirty-two characters and more")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9/")
    script = tmp_path / "script.py"
    script.write_text(LONG)
    with two_hosts() as hosts:
        address = f"{hosts.near_address}:6399"
        head = ("--head", "--port=6399", "--num-cpus=1", "--include-dashboard=false")
        near = (*head, f"--node-ip-address={hosts.near_address}")
        far = (f"--address={address}", f"--node-ip-address={hosts.far_address}", "--num-cpus=1")
        with (
            ray_node(hosts, hosts.near, tmp_path, *near),
            ray_node(hosts, hosts.far, tmp_path, *far),
        ):
            run = TrainRun(
                script,
                tmp_path,
                *("--address", address, "--workers", "1:2", "--schedule", "0s:2", "--ledger"),
                name=f"cut-{os.getpid()}",
                prefix=hosts.inside(hosts.near),
            )
            try:
                members = run.wait_running(2)
                run.wait("Progress", lambda record: record["num_workers"] == 2)
                hosts.cut()
                silent = run.wait("KillWorker")
                assert silent["worker_id"] in members
                assert "no heartbeat for" in silent["reason"]
                (survivor,) = run.wait_running(1)
                assert survivor != silent["worker_id"]
                run.wait("Progress", lambda record: record["num_workers"] == 1)
                send_request(run.name, {"ask": "stop"})
                assert run.end() == 0
                report = prove(run.ledger(), expected=range(1500))
                assert report.samples_seen > 0
                assert report.is_exact, str(report)
            finally:
                run.close()
