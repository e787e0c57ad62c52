"""The ingress as it is configured, in front of a server that tells what reached it. No Ray runs."""

import contextlib
import json
import resource
import socket
import subprocess
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from supple.core.service.spec import ServeSpec, parse_slo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own
    from ray.serve._private import haproxy as rays
    from ray.serve._private.common import RequestProtocol
    from ray.serve.config import HTTPOptions, gRPCOptions

    from supple.cluster.services import haproxy, ingress

BINARY = ingress.haproxy()
pytestmark = pytest.mark.skipif(BINARY is None, reason="HAProxy comes with Ray Serve on Linux")

TOKEN = "a-token-of-the-test"
MOST_BYTES = 1_000_000
LIMIT_S = 30.0


class Tells(BaseHTTPRequestHandler):
    """Answers every request with its path, its headers and the length of its body."""

    protocol_version = "HTTP/1.1"
    slow_s = 0.0

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        self.rfile.read(length)
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        if self.path == "/slow":
            time.sleep(3 * Ingress.silence_s)
        told = {"path": self.path, "length": length, "headers": [*self.headers.items()]}
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


class Ingress:
    """HAProxy with the configuration that Ray writes for it and we change, its times shortened."""

    head_s = 1
    silence_s = 1

    def __init__(self, folder: Path, **spec: Any) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Tells)
        self.server.seen = self.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.port, self.grpc_port = ingress.free_port(), ingress.free_port()
        asked = ServeSpec(
            name="m", target="a.py:M", slo=parse_slo("p99=1s"), max_body_bytes=MOST_BYTES, **spec
        )
        self.config = config = self._written(folder)
        assert BINARY is not None
        self.script = ingress._private_haproxy(BINARY, asked, folder)
        subprocess.run([self.script, "-c", "-f", str(config)], check=True, capture_output=True)
        text = config.read_text()
        for line, shorter in (
            (f"timeout http-request {haproxy.HEAD_S}s", f"timeout http-request {self.head_s}s"),
            (f"wait-for-body time {haproxy.SILENCE_S}s", f"wait-for-body time {self.silence_s}s"),
            (f"timeout client {haproxy.SILENCE_S}s", f"timeout client {self.head_s}s"),
        ):
            assert line in text
            text = text.replace(line, shorter)
        config.write_text(text)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [self.script, "-db", "-f", str(self.config)], stderr=subprocess.DEVNULL
        )
        self.wait_until_up()

    def _written(self, folder: Path) -> Path:
        settings = rays.HAProxyConfig(
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "state"),
            maxconn=haproxy.max_connections(),
            nbthread=1,
            stats_port=ingress.free_port(),
            metrics_port=ingress.free_port(),
            timeout_client_s=haproxy.SILENCE_S,
            metrics_enabled=False,
            is_head=True,
            has_received_routes=True,
            http_options=HTTPOptions(host="127.0.0.1", port=self.port),
            grpc_options=gRPCOptions(
                port=self.grpc_port,
                grpc_servicer_functions=["supple.cluster.services.grpc_servers:add_servicer"],
            ),
        )
        backend = rays.BackendConfig(
            name="m",
            path_prefix="/",
            app_name="m",
            servers=[rays.ServerConfig("one", "127.0.0.1", self.server.server_port)],
            protocol=RequestProtocol.HTTP,
        )
        config = folder / "haproxy.cfg"
        rays.HAProxyApi(settings, {"m": backend}, str(config))._generate_config_file_internal()
        return config

    def wait_until_up(self) -> None:
        end_s = time.monotonic() + LIMIT_S
        request = b"GET /v2/health/live HTTP/1.1\r\nHost: m\r\n\r\n"
        # Who connects to a port nobody listens on may be given that very port, and meet himself.
        while not self.listens() or not self.answer(request).startswith(b"HTTP/1.1 200"):
            assert self.process.poll() is None and time.monotonic() < end_s
            time.sleep(0.05)

    def listens(self) -> bool:
        with contextlib.suppress(psutil.Error):
            connections = psutil.Process(self.process.pid).net_connections("tcp")
            return any(c.laddr.port == self.port and c.status == "LISTEN" for c in connections)
        return False

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=LIMIT_S, source_address=(source, 0)
        )

    def answer(self, request: bytes, source: str = "127.0.0.1") -> bytes:
        """All that comes back until the answer is whole or the connection ends."""
        with self.connect(source) as client:
            client.sendall(request)
            found = b""
            while part := client.recv(65536):
                found += part
                head, _, body = found.partition(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    name, _, value = line.partition(b":")
                    if name == b"content-length" and len(body) >= int(value):
                        return found
            return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingress]:
    made = Ingress(tmp_path_factory.mktemp("open"), token=TOKEN, host="0.0.0.0")
    yield made
    made.close()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingress]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(haproxy, "max_connections_per_client", lambda: 20)
        made = Ingress(tmp_path_factory.mktemp("narrow"), retry_safe=False)
    yield made
    made.close()


def request(
    *headers: str, path: str = "/v2", body: bytes = b"", token: str | None = TOKEN
) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: m", *headers]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


GOOD = request(body=b"x")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def told(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def test_clients_are_heard_where_it_was_asked_and_the_rest_on_loopback(
    served: Ingress, narrow: Ingress
) -> None:
    for made, host in ((served, "0.0.0.0"), (narrow, "127.0.0.1")):
        heard = {
            c.laddr.port: c.laddr.ip
            for c in psutil.Process(made.process.pid).net_connections("tcp")
            if c.status == "LISTEN"
        }
        assert heard.pop(made.port) == heard.pop(made.grpc_port) == host
        assert set(heard.values()) == {"127.0.0.1"} and len(heard) == 2


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN.upper(), f"{TOKEN}, x"])
def test_without_the_token_nothing_is_read_but_health(served: Ingress, token: str | None) -> None:
    before = len(served.server.seen)  # type: ignore[attr-defined]
    for path in ("/v2", "/metrics", "/docs", "/openapi.json", "/-/routes", "/v2/models/m/ready"):
        sent = request("Content-Length: 900000", path=path, token=token)  # and no byte of it
        answer = served.answer(sent)
        assert status(answer) == 401 and "bearer token" in told(answer)["error"]
    assert len(served.server.seen) == before  # type: ignore[attr-defined]
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert status(served.answer(request(path=path, token=token))) == 200
    assert status(served.answer(GOOD)) == 200


PREFLIGHT = (
    b"OPTIONS /v2 HTTP/1.1\r\nHost: m\r\nOrigin: http://a\r\n"
    b"Access-Control-Request-Method: POST\r\n\r\n"
)


@pytest.fixture(scope="module")
def called_by_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingress]:
    made = Ingress(tmp_path_factory.mktemp("cors"), token=TOKEN, cors_origins=("http://a",))
    yield made
    made.close()


def test_the_preflight_of_a_browser_needs_no_token_where_pages_may_call(
    called_by_pages: Ingress, served: Ingress
) -> None:
    assert status(called_by_pages.answer(PREFLIGHT)) == 501, "the server behind knows no OPTIONS"
    assert status(served.answer(PREFLIGHT)) == 401
    for less in (b"Origin: http://a\r\n", b"Access-Control-Request-Method: POST\r\n"):
        assert status(called_by_pages.answer(PREFLIGHT.replace(less, b""))) == 401
    post = PREFLIGHT.replace(b"OPTIONS", b"POST")
    assert status(called_by_pages.answer(post)) == 401


def test_a_page_may_read_why_the_ingress_refused_it(
    called_by_pages: Ingress, served: Ingress
) -> None:
    long = b"POST /v2 HTTP/1.1\r\nHost: m\r\nContent-Length: 9999999\r\n"
    token = f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
    for asked, refused in ((request(token=None), 401), (long + token, 413)):
        for where, told in ((called_by_pages, True), (served, False)):
            answer = where.answer(asked)
            assert status(answer) == refused
            assert (b"access-control-allow-origin: *" in answer.lower()) is told


def test_grpc_without_the_token_is_refused_before_its_message(served: Ingress) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        for method in (
            "/inference.GRPCInferenceService/ModelInfer",
            "/inference.GRPCInferenceService/ServerMetadata",
            "/ray.serve.RayServeAPIService/ListApplications",
        ):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(method)(b"\0" * 50_000_000, timeout=LIMIT_S)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_body_beyond_the_limit_is_refused_by_what_it_says_of_itself(served: Ingress) -> None:
    answer = served.answer(request(f"Content-Length: {MOST_BYTES + 1}", "Expect: 100-continue"))
    assert status(answer) == 413 and f"at most {MOST_BYTES} bytes" in told(answer)["error"]
    assert status(served.answer(request(body=b" " * MOST_BYTES))) == 200


def test_who_waits_for_leave_to_send_gets_it(served: Ingress) -> None:
    with served.connect() as client:
        client.sendall(request("Content-Length: 3", "Expect: 100-continue"))
        assert status(client.recv(1000)) == 100
        client.sendall(b"abc")
        assert status(client.recv(1000)) == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"POST /v2 HTTP/1.1\r\nHost: m\r\nX",
        request("Content-Length: 10"),
        request("Content-Length: 10") + b"abc",
        request("Content-Length: 900000") + b"x" * 600_000,
        request("Transfer-Encoding: chunked") + b"5\r\nab",
    ],
)
def test_what_is_half_sent_is_given_up(served: Ingress, sent: bytes) -> None:
    answer = served.answer(sent)
    assert not answer or status(answer) in (400, 408)


def test_an_answer_may_take_longer_than_a_client_may_be_silent(served: Ingress) -> None:
    assert status(served.answer(request(path="/slow"))) == 200


@pytest.mark.slow
def test_thousands_that_do_not_finish_their_heads_stop_nobody(served: Ingress) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    num = min(4300, haproxy.max_connections_per_client() - 100)
    held: list[socket.socket] = []
    try:
        while len(held) < num:
            held.append(served.connect())
            held[-1].sendall(b"GET /v2 HTTP/1.1\r\nX")
        assert status(served.answer(GOOD)) == 200
        assert status(served.answer(GOOD, "127.0.0.2")) == 200
    finally:
        for client in held:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_address_cannot_take_the_connections_of_others(narrow: Ingress) -> None:
    refused = 0
    with contextlib.ExitStack() as clients:
        for _ in range(60):
            try:
                client = clients.enter_context(narrow.connect("127.0.0.2"))
                client.settimeout(0.02)
                client.sendall(b"GET /v2 HTTP/1.1\r\nX")
                refused += client.recv(1) == b""
            except TimeoutError:
                pass  # it is held
            except OSError:
                refused += 1
        assert refused >= 20
        assert status(narrow.answer(GOOD)) == 200


def test_a_request_in_a_request_reaches_nobody_as_a_second_one(served: Ingress) -> None:
    inner = b"GET /smuggled HTTP/1.1\r\nHost: m\r\nAuthorization: Bearer " + TOKEN.encode()
    inner += b"\r\n\r\n"
    for sent in (
        # Both lengths: by one the body ends before the inner request, by the other behind it.
        request(f"Content-Length: {5 + len(inner)}", "Transfer-Encoding: chunked", token="wrong!")
        + b"0\r\n\r\n"
        + inner,
        request("Content-Length: 3", f"Content-Length: {3 + len(inner)}") + b"abc" + inner,
        request("Transfer-Encoding: xchunked", body=inner),
        request("Transfer-Encoding: chunked", "Transfer-Encoding: identity") + b"0\r\n\r\n" + inner,
        request("X: a\r\n Content-Length: 0", body=inner),
        request(f"Content-Length : {len(inner)}") + inner,
        request("Content-Length: +3") + b"abc" + inner,
        request(body=inner).replace(b"POST /v2 HTTP/1.1", b"POST /v2 HTTP/1.1\nGET /smuggled"),
    ):
        answer = served.answer(sent)
        assert not answer or status(answer) in (200, 400, 401, 408, 422, 501), answer
    assert status(served.answer(GOOD)) == 200
    assert not any("smuggled" in path for path in served.seen)


def test_headers_ray_acts_on_are_not_passed_on(served: Ingress) -> None:
    acted_on = (
        *("X-Request-Timeout-Seconds: 0.001", "X-Request-Disconnect-Disabled: ?1"),
        *("X-Session-Id: a", "X-Request-Id: \xff"),
        *("serve_multiplexed_model_id: a", "serve-multiplexed-model-id: a"),
    )
    names = {name.lower() for name, _ in told(served.answer(request(*acted_on)))["headers"]}
    assert names.isdisjoint({line.split(":")[0].lower() for line in acted_on})
    assert "authorization" in names
    kept = dict(told(served.answer(request("X-Request-Id: abc-1")))["headers"])
    assert kept["x-request-id"] == "abc-1"


def test_a_killed_haproxy_starts_again_on_the_configuration_it_had(tmp_path: Path) -> None:
    made = Ingress(tmp_path, token=TOKEN)
    try:
        before = made.config.read_text()
        made.process.kill()
        made.process.wait()
        made.start()
        assert made.config.read_text() == before
        assert status(made.answer(GOOD)) == 200
        assert status(made.answer(request(token=None))) == 401
    finally:
        made.close()


def test_nobody_else_speaks_to_the_administrators_socket(served: Ingress) -> None:
    assert (served.config.parent / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_a_serial_number_is_the_ingress_own_and_of_what_may_be_sent_again_alone(
    served: Ingress, narrow: Ingress
) -> None:
    def serials(made: Ingress) -> list[str]:
        sent = request("X-Supple-Serial: mine", "x-supple-serial: mine too", body=b"x")
        headers = told(made.answer(sent))["headers"]
        return [value for name, value in headers if name.lower() == "x-supple-serial"]

    (first,), (second,) = serials(served), serials(served)
    assert str(uuid.UUID(first)) == first and first != second
    assert serials(narrow) == []


def test_a_clients_address_is_what_the_ingress_sees_whatever_the_client_says(
    served: Ingress,
) -> None:
    sent = request("X-Supple-Client: 10.0.0.9", "x-supple-client: 10.0.0.8", body=b"x")
    headers = told(served.answer(sent))["headers"]
    assert [v for name, v in headers if name.lower() == "x-supple-client"] == ["127.0.0.1"]


def grpc_answer(made: Ingress, *encodings: bytes) -> bytes:
    """What comes back for a message with these `grpc-encoding` headers, of which a client of the
    library sends one at most."""

    def frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
        head = len(data).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
        return head + data

    named = [
        *((b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"m")),
        (b":path", b"/inference.GRPCInferenceService/ModelInfer"),
        *((b"content-type", b"application/grpc"), (b"te", b"trailers")),
        *((b"grpc-encoding", encoding) for encoding in encodings),
    ]
    headers = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in named
    )
    sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
    sent += frame(1, 4, 1, headers) + frame(0, 1, 1, b"\1\0\0\0\1x")
    with socket.create_connection(("127.0.0.1", made.grpc_port), timeout=LIMIT_S) as client:
        client.sendall(sent)
        found = b""
        while b"grpc-message" not in found and (part := client.recv(65536)):
            found += part
    return found


@pytest.mark.parametrize(
    ("encodings", "is_refused"),
    [
        ((), False),
        ((b"identity",), False),
        ((b"gzip",), True),
        ((b"",), True),
        ((b"identity", b"gzip"), True),
        ((b"gzip", b"identity"), True),
        ((b"identity, gzip",), True),
    ],
)
def test_a_grpc_message_that_may_be_compressed_is_refused(
    narrow: Ingress, encodings: tuple[bytes, ...], is_refused: bool
) -> None:
    answer = grpc_answer(narrow, *encodings)
    assert b"grpc-message" in answer
    assert (b"compressed messages are not accepted" in answer) is is_refused


def test_a_free_port_is_taken_by_nobody_and_none_that_the_kernel_assigns_by_default() -> None:
    ports = [ingress.free_port() for _ in range(20)]
    assert len(set(ports)) == 20 and min(ports) >= 20_000 and max(ports) < 32_768
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ingress.free_port()))
        again = {ingress.free_port() for _ in range(ingress._PORTS)}
        assert taken.getsockname()[1] not in again and len(again) > 1000
