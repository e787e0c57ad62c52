"""A service that others may reach: where it listens, and what a stranger can cost it."""

import contextlib
import http.client
import json
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import grpc
import psutil
import pytest

from supple.serve.protocol import grpc as oip
from tests.cluster.test_serving import NAME, TOKEN, URL, Service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SOURCE = """
class Model:
    inputs = {"x": "float32[2]"}
    outputs = {"y": "float32[2]"}
    factor = FACTOR

    def predict(self, batch):
        if (batch < 0).any():
            raise ValueError(f"what was sent is {batch}")
        return batch * self.factor
"""
LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")
MOST_BYTES = 2**20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    options = ("--replicas", "1", "--host", "0.0.0.0", "--max-body", "1")
    running = Service(tmp_path_factory.mktemp("open"), *options, source=SOURCE)
    try:
        running.wait_until_served()
        yield running
    finally:
        running.close()


def processes(service: Service) -> list[psutil.Process]:
    root = psutil.Process(service.process.pid)
    return [root, *root.children(recursive=True)]


def memory_of_replica(service: Service) -> int:
    (pid,) = service.replica_pids()
    return int(psutil.Process(pid).memory_info().rss)


def test_the_ingress_alone_is_open_and_only_on_the_two_ports_that_were_asked_for(
    service: Service,
) -> None:
    asked = {int(address.rpartition(":")[2]) for address in (service.address, service.grpc_address)}
    end_s = time.monotonic() + 60.0
    # HAProxy is replaced by another at every change of the replicas: look again.
    while open_ports(service) != asked:
        assert time.monotonic() < end_s


def open_ports(service: Service) -> set[int]:
    """Ports on which HAProxy hears others than this machine; nobody else hears more than it may."""
    seen: set[int] = set()
    for process in processes(service):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            heard = [c for c in process.net_connections("tcp") if c.status == "LISTEN"]
            beyond = [c.laddr for c in heard if c.laddr.ip not in LOOPBACK]
            if process.name() == "haproxy":
                assert {address.ip for address in beyond} <= {"0.0.0.0"}
                seen |= {address.port for address in beyond}
            else:
                assert not beyond, (name, beyond)
    return seen


def grpc_call(service: Service, method: str, wire: bytes, token: str | None, **options: Any) -> Any:
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(
        service.grpc_address, options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            return call(wire, metadata=metadata, timeout=60, **options)
        except grpc.RpcError as error:
            return error


def test_a_message_beyond_the_limit_is_not_received_over_grpc(service: Service) -> None:
    assert grpc_call(service, "ServerLive", b"", None) == b"\x08\x01"
    before = memory_of_replica(service)
    large = b"\0" * (256 * MOST_BYTES)
    for token, code in (
        (None, grpc.StatusCode.UNAUTHENTICATED),
        ("wrong-token", grpc.StatusCode.UNAUTHENTICATED),
        (TOKEN, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        refused = grpc_call(service, "ModelInfer", large, token)
        assert refused.code() is code, refused.details()
    assert f"vs. {MOST_BYTES}" in refused.details()
    # Zeros that pack well: what a message holds is not known before it is unpacked.
    packed = grpc_call(service, "ModelInfer", large, TOKEN, compression=grpc.Compression.Gzip)
    assert packed.code() is grpc.StatusCode.UNIMPLEMENTED
    assert memory_of_replica(service) - before < 64 * MOST_BYTES
    assert service.infer() == 2


def test_a_body_beyond_the_limit_is_not_received_over_http(service: Service) -> None:
    before = memory_of_replica(service)

    host, _, port = service.address.partition(":")
    for chunked in (False, True):
        client = http.client.HTTPConnection(host, int(port), timeout=60)
        body = (b" " * MOST_BYTES for _ in range(64)) if chunked else b" " * (MOST_BYTES + 1)
        with contextlib.closing(client):
            try:
                client.request("POST", URL, body, service.headers, encode_chunked=chunked)
                answer = client.getresponse()
            except (BrokenPipeError, ConnectionResetError):
                continue  # it was cut off while it was sent
            assert answer.status == 413 and "--max-body" in json.load(answer)["error"]
    assert memory_of_replica(service) - before < 32 * MOST_BYTES
    assert service.infer() == 2


def test_a_fault_of_the_model_shows_strangers_neither_path_nor_line_nor_value(
    service: Service,
) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [-13.25, 1]}
    with pytest.raises(urllib.error.HTTPError) as failed:
        service.post({"inputs": [tensor]}, URL)
    with failed.value as response:
        text = response.read().decode()
        assert response.code == 500 and "the model failed on this request" in text
    asked = oip.MESSAGES["ModelInferRequest"](model_name=NAME)
    asked.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents[:] = [
        -13.25,
        1,
    ]
    text += grpc_call(service, "ModelInfer", asked.SerializeToString(), TOKEN).details()
    text += service.metrics_of(1)
    for word in ("13.25", "app.py", "Traceback", "ValueError", "line "):
        assert word not in text
