"""A whole run on a machine with other users: who reaches it, what it touches, what it leaves."""

import ipaddress
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from supple.control.socket import running_jobs, send_request
from tests.cluster.runs import TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SCRIPT = """
import time
import torch

def train(job):
    data = torch.utils.data.TensorDataset(torch.rand(1000, 4))
    model = job.model(lambda: torch.nn.Linear(4, 1))
    job.optimizer(torch.optim.SGD, lr=0.01)
    for (x,) in job.batches(data, batch_size=8, epochs=100_000):
        time.sleep(0.01)
        job.step(model(x).square().mean())
"""


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for temporary files that others may write to; the run's, and this test's."""
    with tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp") as name:
        path = Path(name).resolve()
        path.chmod(0o1777)
        monkeypatch.setenv("TMPDIR", str(path))
        monkeypatch.setattr(tempfile, "tempdir", str(path))
        for variable in ("RAY_TMPDIR", "XDG_RUNTIME_DIR"):
            monkeypatch.delenv(variable, raising=False)
        yield path


def plant(shared: Path) -> Path:
    """What another user would make there before: the folder, and the script that was executed."""
    planted = shared / f"supple-{os.geteuid()}"
    planted.mkdir()
    (planted / "haproxy").write_text(f"#!/bin/sh\ntouch {shared}/executed\n")
    (planted / "haproxy").chmod(0o755)
    planted.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(planted, 65534, 65534)
    return planted


def listeners(root: int) -> list[tuple[str, str, int]]:
    """Process name, address and port of all that listen below process `root`."""
    found: list[tuple[str, str, int]] = []
    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
        try:
            found += [
                (process.name(), connection.laddr.ip, connection.laddr.port)
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
        except psutil.NoSuchProcess:
            continue
    return found


def programs(root: int) -> set[str]:
    """File names on the command lines below process `root`."""
    children = psutil.Process(root).children(recursive=True)
    return {Path(word).name for child in children for word in child.cmdline()}


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)  # which Python 3.11 does not look at itself
    return (mapped or parsed).is_loopback


def test_a_run_is_reached_from_this_machine_by_this_user_and_leaves_nothing(
    shared: Path, tmp_path: Path
) -> None:
    planted = plant(shared)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = TrainRun(script, tmp_path, "--workers", "2", name=f"private-{os.getpid()}")
    try:
        run.wait_running(2)
        heard = listeners(run.process.pid)
        assert {name for name, _, _ in heard} >= {"gcs_server", "raylet"}
        assert [one for one in heard if not is_loopback(one[1])] == []
        assert not programs(run.process.pid) & {"monitor.py", "log_monitor.py", "dashboard.py"}

        gcs = next(port for name, _, port in heard if name == "gcs_server")
        with grpc.insecure_channel(f"127.0.0.1:{gcs}") as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=30)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

        assert run.name in running_jobs()
        assert len(send_request(run.name, {"ask": "status"})["members"]) == 2
        for folder in shared.iterdir():
            if folder != planted:
                assert folder.stat().st_mode & 0o077 == 0
        run.process.send_signal(signal.SIGTERM)
        assert run.end() == 0, run.errors()
    finally:
        run.close()
    assert list(shared.iterdir()) == [planted]
    assert sorted(planted.iterdir()) == [planted / "haproxy"]
