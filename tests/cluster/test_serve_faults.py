"""Requests and kills that are meant to take a service down: each takes itself, at most."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.cluster.test_serving import NAME, Clients, Service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SOURCE = """
import os
import time
from pathlib import Path

PARTS = Path(__file__).with_name("parts")

class Model:
    inputs = {"x": "float32[2]"}
    outputs = {"y": "float32[2]"}

    def predict(self, batch):
        time.sleep(0.02)
        if (batch == 666).any():
            os._exit(3)
        if (batch == 777).any():
            time.sleep(1e6)
        return batch * 2

    def stream(self, batch):
        try:
            while True:
                time.sleep(0.02)
                yield batch
        finally:
            with PARTS.open("a") as ended:
                ended.write("ended;")
"""
DRIVER = """
import dataclasses, sys
from supple.cluster.services import ingress
from supple.cluster.services import service as serving
from supple.core.service.spec import ServeSpec, parse_slo

spec = ServeSpec(
    name=sys.argv[2], target=sys.argv[1] + ":Model", slo=parse_slo("p99=60s"),
    port=ingress.free_port(), grpc_port=ingress.free_port(),
    min_replicas=3, max_replicas=3, cpus_per_replica=0.1,
)
ingress.connect(spec)
try:
    serving.deploy(dataclasses.replace(serving.deployment_of(spec), predict_timeout_s=2.0))
    print(f"http://127.0.0.1:{spec.port}/  gRPC 127.0.0.1:{spec.grpc_port} ", flush=True)
    sys.stdin.read()
finally:
    serving.shut_down()
"""
"""A service whose `predict` may take two seconds."""


class Driven(Service):
    """A service with a time-out that no option has."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "app.py"
        self.file.write_text(SOURCE)
        self.log = folder / "serve.log"
        self.out = self.log.open("wb")
        self.headers = {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(self.file), NAME],
            stdin=subprocess.PIPE,
            stdout=self.out,
            stderr=subprocess.STDOUT,
        )

    def refused(self, value: float) -> tuple[int, str]:
        """(status, error) of the answer to a request with `value`."""
        with pytest.raises(urllib.error.HTTPError) as refusal:
            self.infer(value)
        with refusal.value as response:
            return response.code, json.load(response)["error"]

    def processes(self, title: str) -> list[int]:
        """Of the ingress, by what they are called."""
        parents: dict[int, int] = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # Ray adds the method that is called at the moment.
                if child.name() == title or " ".join(child.cmdline()).startswith(title):
                    parents[child.pid] = child.ppid()
        # A process that starts another is seen twice for a moment: before the other has its name.
        return [pid for pid, parent in parents.items() if parent not in parents]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    running = Driven(tmp_path_factory.mktemp("faults"))
    try:
        running.wait_until_served()
        yield running
    finally:
        assert running.process.stdin is not None
        running.process.stdin.close()
        running.close()


def whole(service: Driven) -> set[int]:
    """The replicas' processes, once all three answer."""
    service.wait_until(lambda: service.metrics_of(3))
    return set(service.replica_pids())


def test_a_request_that_kills_its_replica_fails_alone_and_is_not_tried_a_third_time(
    service: Driven,
) -> None:
    before = whole(service)
    with Clients(service, {2.0}) as clients:
        status, error = service.refused(666.0)
        assert status == 500 and "2 replicas died while they computed this request" in error
        clients.more()
        assert len(before & whole(service)) == 1, "two of three were replaced"


def test_over_grpc_too(service: Driven) -> None:
    grpc: Any = pytest.importorskip("tritonclient.grpc")
    before = whole(service)
    asked = grpc.InferInput("x", [1, 2], "FP32")
    asked.set_data_from_numpy(np.full((1, 2), 666.0, np.float32))
    with (
        Clients(service, {2.0}) as clients,
        grpc.InferenceServerClient(service.grpc_address) as client,
    ):
        # HAProxy may end the call itself when the connection to the replica breaks.
        with pytest.raises(grpc.InferenceServerException, match=r"2 replicas died|UNAVAILABLE"):
            client.infer(NAME, [asked])
        clients.more()
        assert len(before & whole(service)) >= 1


def test_a_request_that_hangs_is_told_so_and_the_others_are_answered(service: Driven) -> None:
    whole(service)
    with Clients(service, {2.0}) as clients:
        status, error = service.refused(777.0)
        assert status == 504 and "predict() has not returned for 2 s on a batch of 1" in error
        clients.more()
    whole(service)


def test_a_stream_whose_client_left_ends_in_the_model(service: Driven) -> None:
    ended = service.file.with_name("parts")
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}
    body = json.dumps({"inputs": [tensor]}).encode()
    host, port = service.address.split(":")
    for times in (1, 2):
        with socket.create_connection((host, int(port)), timeout=60) as client:
            head = f"POST /v2/models/{NAME}/generate_stream HTTP/1.1\r\nHost: x\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            got = b""
            while b"data:" not in got:
                got += client.recv(1000)
        service.wait_until(
            lambda times=times: ended.exists() and ended.read_text().count(";") >= times
        )


def test_a_haproxy_that_is_killed_is_started_again_by_its_manager(service: Driven) -> None:
    whole(service)
    (haproxy,) = service.wait_until(lambda: one(service.processes("haproxy")))
    (manager,) = service.processes("ray::HAProxyManager")
    os.kill(haproxy, signal.SIGKILL)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return service.infer() == 2
        return False

    service.wait_until(answers)
    assert service.processes("haproxy") != [haproxy]
    assert service.processes("ray::HAProxyManager") == [manager], "nobody waited for Ray"


def test_a_manager_that_is_killed_takes_nobody_along_and_the_next_one_knows_new_replicas(
    service: Driven,
) -> None:
    (manager,) = service.processes("ray::HAProxyManager")
    with Clients(service, {2.0}) as clients:
        os.kill(manager, signal.SIGKILL)
        service.wait_until(lambda: service.processes("ray::HAProxyManager") not in ([], [manager]))
        clients.more()
        for pid in service.replica_pids():
            os.kill(pid, signal.SIGKILL)
        clients.more()
    whole(service)


def test_haproxy_ends_with_ray_though_its_manager_ended_before(service: Driven) -> None:
    (manager,) = service.processes("ray::HAProxyManager")
    found = [psutil.Process(pid) for pid in service.processes("haproxy")]
    os.kill(manager, signal.SIGKILL)
    service.process.kill()
    service.process.wait()
    psutil.wait_procs([process for process in found if not is_gone(process)], timeout=60)
    assert all(map(is_gone, found))


def one(pids: list[int]) -> list[int] | None:
    return pids if len(pids) == 1 else None


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
