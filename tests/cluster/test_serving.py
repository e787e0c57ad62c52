"""`supple serve` for real: its processes, its clients, real kills, updates under load."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from supple.control.socket import send_request
from supple.core.spec import SpecError
from supple.train.checkpoint.store import CheckpointStore
from supple.train.state.train_state import TrainState

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NAME = f"serving-test-{os.getpid()}"
URL = f"/v2/models/{NAME}/infer"
TOKEN = "a-token-of-the-test"
SOURCE = """
import pathlib
import time

class Model:
    inputs = {"x": "float32[2]"}
    outputs = {"y": "float32[2]"}

    def load(self, weights=None):
        if weights is not None and "bad" in weights:
            raise OSError("no such weights")
        self.factor = FACTOR if weights is None else 5

    def predict(self, batch):
        time.sleep(0.02)
        if (batch == 7).any():
            pathlib.Path(WORKING).touch()
            time.sleep(4)
        return batch * self.factor

    def stream(self, batch):
        for step in range(3):
            yield {"y": batch * step}
"""
_LIMIT_S = 120.0


class Service:
    """A running `supple serve` and what its clients need."""

    def __init__(
        self, folder: Path, *options: str, token: str | None = TOKEN, source: str = SOURCE
    ) -> None:
        self.file = folder / "app.py"
        self.working = folder / "working"
        """There once the model computes a request of sevens, for four seconds."""
        self.source = source
        self.write(2)
        self.log = folder / "serve.log"
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        environment = os.environ | ({} if token is None else {"SUPPLE_TOKEN": token})
        self.out: IO[bytes] = self.log.open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "supple", "serve", f"{self.file}:Model"),
                *("--name", NAME, "--port", "0", "--grpc-port", "0"),
                *("--cpus-per-replica", "0.1", "--slo", "p99=60s", *options),
            ],
            stderr=self.out,
            env=environment,
        )

    def write(self, factor: int) -> None:
        source = self.source.replace("FACTOR", str(factor))
        self.file.write_text(source.replace("WORKING", repr(str(self.working))))

    def said(self) -> str:
        return self.log.read_text()

    def wait_until(self, found: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + _LIMIT_S
        while not (value := found()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return value

    def wait_until_served(self) -> None:
        self.wait_until(lambda: "  gRPC" in self.said() and self.said().endswith("\n"))
        self.address = self.said().partition("http://")[2].partition("/")[0]
        self.grpc_address = self.said().partition("gRPC")[2].split()[0]

    def wait_until_updated(self) -> None:
        def ended() -> bool:
            said = send_request(NAME, {"ask": "status"})["update"]
            assert not said.startswith("failed"), said
            return said == "done"

        self.wait_until(ended)

    def infer(self, value: float = 1.0, padding: int = 0) -> float:
        tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [value, value]}
        body = json.dumps({"inputs": [tensor]}).encode() + b" " * padding
        return self.post(body)["outputs"][0]["data"][0] / value

    def post(self, document: Any, path: str = URL) -> Any:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        request = urllib.request.Request(
            f"http://{self.address}{path}", data=body, headers=self.headers
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def metrics_of(self, num_replicas: int) -> str:
        """The page, once so many replicas are on it; till then nothing."""
        request = urllib.request.Request(f"http://{self.address}/metrics", headers=self.headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            told = response.read().decode()
        return told if len(set(re.findall('replica="([^"]+)"', told))) == num_replicas else ""

    def replica_pids(self) -> list[int]:
        found: list[int] = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{NAME}" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            self.out.close()


class Clients:
    """Threads that ask without a pause while a block runs; at its end every answer is looked at."""

    def __init__(self, service: Service, allowed: set[float], num: int = 6) -> None:
        self.service = service
        self.allowed = allowed
        self.answers: list[Any] = []
        self.done = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num)]

    def _ask(self, index: int) -> None:
        padding = 60_000 if index == 0 else 0
        while not self.done.is_set():
            try:
                self.answers.append(self.service.infer(padding=padding))
            except (OSError, ValueError, KeyError) as error:
                self.answers.append(error)

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        self.service.wait_until(lambda: len(self.answers) > 20)
        return self

    def more(self, count: int = 50) -> None:
        """Wait until so many more requests were answered."""
        until = len(self.answers) + count
        self.service.wait_until(lambda: len(self.answers) >= until)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()
        lost = [answer for answer in self.answers if answer not in self.allowed]
        assert not lost, f"{len(lost)} of {len(self.answers)} lost: {lost[:3]}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("serve"), "--replicas", "1")
    try:
        running.wait_until_served()
        yield running
    finally:
        running.close()


def test_a_public_client_of_the_protocol_is_answered_over_rest(service: Service) -> None:
    http: Any = pytest.importorskip("tritonclient.http")
    with http.InferenceServerClient(service.address) as client:
        headers = service.headers
        assert client.is_server_live(headers=headers)
        assert client.is_server_ready(headers=headers)
        assert client.is_model_ready(NAME, headers=headers)
        assert client.is_model_ready(NAME, "1", headers=headers)
        assert client.get_server_metadata(headers=headers)["name"] == "supple"
        metadata = client.get_model_metadata(NAME, headers=headers)
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        x = np.arange(6, dtype=np.float32).reshape(3, 2)
        for binary in (True, False):
            asked = http.InferInput("x", x.shape, "FP32")
            asked.set_data_from_numpy(x, binary_data=binary)
            wanted = [http.InferRequestedOutput("y", binary_data=binary)]
            # The client writes into the headers it is handed.
            sent = dict(headers)
            answer = client.infer(NAME, [asked], outputs=wanted, request_id="7", headers=sent)
            assert (answer.as_numpy("y") == x * 2).all()
            assert answer.get_response()["id"] == "7"


def test_a_public_client_of_the_protocol_is_answered_over_grpc(service: Service) -> None:
    grpc: Any = pytest.importorskip("tritonclient.grpc")
    headers = {"authorization": service.headers["Authorization"]}
    with grpc.InferenceServerClient(service.grpc_address) as client:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready(NAME, headers=headers)
        assert client.get_server_metadata(headers=headers).name == "supple"
        assert list(client.get_model_metadata(NAME, headers=headers).inputs[0].shape) == [-1, 2]
        x = np.ones((2, 2), np.float32)
        asked = grpc.InferInput("x", x.shape, "FP32")
        asked.set_data_from_numpy(x)
        answer = client.infer(NAME, [asked], request_id="8", headers=headers)
        assert (answer.as_numpy("y") == 2).all() and answer.get_response().id == "8"
        wrong = grpc.InferInput("z", x.shape, "FP32")
        wrong.set_data_from_numpy(x)
        for inputs, model, sent, told in (
            ([wrong], NAME, headers, "the model takes x; the request has z"),
            ([asked], "other", headers, "no model 'other'"),
            ([asked], NAME, {}, "bearer token"),
        ):
            with pytest.raises(grpc.InferenceServerException, match=told):
                client.infer(model, inputs, headers=sent)


def test_a_public_client_compresses_and_reads_configuration_and_statistics(
    service: Service,
) -> None:
    http: Any = pytest.importorskip("tritonclient.http")
    x = np.zeros((32, 2), np.float32)
    with http.InferenceServerClient(service.address) as client:
        headers = service.headers
        config = client.get_model_config(NAME, headers=headers)
        assert config["max_batch_size"] == 64 and config["input"][0]["dims"] == [2]
        (listed,) = client.get_model_repository_index(headers=headers)
        assert listed["name"] == NAME and listed["state"] == "READY"
        before = client.get_inference_statistics(NAME, headers=headers)["model_stats"][0]
        asked = http.InferInput("x", x.shape, "FP32")
        for coding in ("gzip", "deflate"):
            for binary in (True, False):
                asked.set_data_from_numpy(x, binary_data=binary)
                answer = client.infer(
                    NAME,
                    [asked],
                    outputs=[http.InferRequestedOutput("y", binary_data=binary)],
                    headers=dict(headers),
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                assert (answer.as_numpy("y") == x).all()
        after = client.get_inference_statistics(headers=headers)["model_stats"][0]
        assert after["inference_count"] - before["inference_count"] == 4 * 32
        assert after["inference_stats"]["queue"]["count"] >= 4


def test_a_public_client_streams_over_grpc(service: Service) -> None:
    grpc: Any = pytest.importorskip("tritonclient.grpc")
    headers = {"authorization": service.headers["Authorization"]}
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    x = np.ones((1, 2), np.float32)
    asked = grpc.InferInput("x", x.shape, "FP32")
    asked.set_data_from_numpy(x)
    with grpc.InferenceServerClient(service.grpc_address) as client:
        config = client.get_model_config(NAME, headers=headers).config
        assert config.name == NAME and config.model_transaction_policy.decoupled
        assert client.get_inference_statistics(NAME, headers=headers).model_stats[0].name == NAME
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        for number in ("1", "2"):
            client.async_stream_infer(
                NAME, [asked], request_id=number, enable_empty_final_response=True
            )
        for number in ("1", "2"):
            for step in range(3):
                result, error = answers.get(timeout=_LIMIT_S)
                assert error is None and result.get_response().id == number
                assert (result.as_numpy("y") == step).all()
            assert not answers.get(timeout=_LIMIT_S)[0].get_response().outputs
        client.async_stream_infer("other", [asked])
        _, error = answers.get(timeout=_LIMIT_S)
        assert "no model 'other'" in str(error)
        client.stop_stream()


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_head_and_options_are_answered_through_the_ingress(service: Service, method: str) -> None:
    request = urllib.request.Request(
        f"http://{service.address}/v2/models/{NAME}", method=method, headers=service.headers
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.read() == b""
        if method == "HEAD":
            assert response.status == 200 and int(response.headers["content-length"]) > 50
        else:
            assert response.status == 204 and response.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("body", [b"", b"{", b"\x00" * 1000, b'{"inputs": 3}', b"[" * 5000])
def test_a_bad_body_is_refused_and_the_replica_goes_on(service: Service, body: bytes) -> None:
    pids = service.replica_pids()
    with pytest.raises(urllib.error.HTTPError) as refusal:
        service.post(body)
    with refusal.value as response:
        assert response.code == 400 and json.load(response)["error"]
    assert service.infer() == 2
    assert service.replica_pids() == pids


def test_nothing_listens_beyond_loopback(service: Service) -> None:
    processes = [psutil.Process(service.process.pid)]
    processes += processes[0].children(recursive=True)
    ports = {int(service.address.split(":")[1]), int(service.grpc_address.split(":")[1])}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                if connection.status == "LISTEN" and (
                    process.name() == "haproxy" or 30_000 <= connection.laddr.port < 30_100
                ):
                    assert connection.laddr.ip in ("127.0.0.1", "::ffff:127.0.0.1")
                    ports.discard(connection.laddr.port)
    assert not ports


def test_a_replica_that_is_killed_loses_nothing_though_it_was_the_only_one(
    service: Service,
) -> None:
    with Clients(service, {2.0}) as clients:
        (pid,) = service.replica_pids()
        os.kill(pid, signal.SIGKILL)
        service.wait_until(lambda: service.replica_pids() not in ([], [pid]))
        clients.more()


def test_an_update_under_load_loses_nothing_and_comes_into_force(service: Service) -> None:
    with Clients(service, {2.0, 3.0}) as clients:
        service.write(3)
        send_request(NAME, {"ask": "update", "weights": None})
        service.wait_until_updated()
        clients.more()
    assert service.infer() == 3


def test_weights_are_swapped_under_load_and_bad_ones_leave_the_old(service: Service) -> None:
    pids = service.replica_pids()
    with Clients(service, {3.0, 5.0}) as clients:
        send_request(NAME, {"ask": "update", "weights": "good"})
        with pytest.raises(SpecError, match="is being updated"):
            send_request(NAME, {"ask": "update", "weights": "other"})
        service.wait_until_updated()
        clients.more()
    assert service.infer() == 5
    assert service.replica_pids() == pids


def test_ctrl_c_answers_the_requests_in_flight(service: Service) -> None:
    expected = service.infer()
    answers: list[float] = []

    def ask_once(value: float) -> None:
        answers.append(service.infer(value))

    threads = [threading.Thread(target=ask_once, args=(value,)) for value in (7.0, *[1.0] * 20)]
    threads[0].start()
    service.wait_until(service.working.exists)
    for thread in threads[1:]:
        thread.start()
    waiting = re.compile(r"supple_requests_waiting{[^}]*} 20\.0\n")
    service.wait_until(lambda: waiting.search(service.metrics_of(1)))
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    for thread in threads:
        thread.join()
    assert answers == [expected] * 21
    assert "stops; requests in flight are answered" in service.said()


@pytest.mark.parametrize(
    ("source", "options", "code", "told"),
    [
        (
            SOURCE.replace("FACTOR", "1 / 0"),
            [],
            1,
            "ZeroDivisionError: division by zero",
        ),
        (
            SOURCE.replace("FACTOR", "1").replace("0.02", "0.05"),
            ["--slo", "p99=10ms"],
            2,
            "one prediction of one input takes",
        ),
        (
            SOURCE.replace("FACTOR", "1"),
            ["--gpus-per-replica", "1000"],
            2,
            "no capacity: 1 replica",
        ),
    ],
)
def test_what_cannot_be_served_says_why_with_its_numbers(
    tmp_path: Path, source: str, options: list[str], code: int, told: str
) -> None:
    running = Service(tmp_path, *options)
    running.file.write_text(source)
    try:
        assert running.process.wait(_LIMIT_S) == code, running.said()
        assert told in running.said()
        assert "Traceback (most recent call last)" not in running.said().partition("supple:")[0]
    finally:
        running.close()


TRAINED = """
import time
import torch
import supple

class Model:
    inputs = {"x": "float32[2]"}
    outputs = {"y": "float32[2]"}

    def load(self, weights):
        self.net = torch.nn.Linear(2, 2, bias=False)
        supple.load_weights(self.net, weights)

    @torch.inference_mode()
    def predict(self, batch: torch.Tensor):
        time.sleep(0.02)
        return self.net(batch)
"""


def publish(run: Path, factor: float) -> None:
    """A checkpoint as a training job saves it, whose layer multiplies by `factor`."""
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight).data.mul_(factor)
    state = TrainState(layer, torch.optim.SGD(layer.parameters()), {})
    CheckpointStore(run / "checkpoints").save(
        int(factor), state.payload({"step": int(factor)}), {"signature": state.signature()}
    )


def test_the_weights_of_a_training_run_are_served_and_followed_without_a_loss(
    tmp_path: Path,
) -> None:
    publish(run := tmp_path / "run", 2)
    options = ("--replicas", "2", "--weights", str(run), "--follow")
    running = Service(tmp_path, *options, source=TRAINED)
    try:
        running.wait_until_served()
        with Clients(running, {2.0, 3.0, 7.0}) as clients:
            pids = running.replica_pids()
            publish(run, 3)
            running.wait_until(lambda: clients.answers[-1] == 3)
            publish(run, 7)
            running.wait_until(lambda: clients.answers[-1] == 7)
        assert sorted(running.replica_pids()) == sorted(pids)
        # A replica that swaps its weights is out of the routing, and of the page, for a moment.
        told = running.wait_until(lambda: running.metrics_of(2))
        counts = re.findall(r"^supple_requests_total{.*} (\d+)\.0$", told, re.MULTILINE)
        assert sum(map(int, counts)) >= len(clients.answers), "one page has them all"
    finally:
        running.close()
