"""What the server adds to a trivial model: latency alone, and requests per second under load,
against Ray Serve alone (HAProxy mode and Python proxy), LitServe and a bare uvicorn handler.

    python benchmarks/serve_overhead.py [--rounds 3] [--seconds 4]

Every server answers the same JSON with the same JSON, one process for the model. The servers are
started one after another, round by round, so that a slow minute hits all of them; a figure is the
median over rounds. The client is one process of raw keep-alive connections and shares the cores.
The batched case is a model that takes 10 ms a call, for one row or for many, against Ray Serve
without batching and with its `@serve.batch` at its defaults.
"""

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import report

_BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1.0, 2.0, 3.0, 4.0]}]}
).encode()
_PATH = "/v2/models/bench/infer"
_CONNECTIONS = 64
_WORK_S = 0.01


def answer(document: Any) -> Any:
    """What every server but Supple's computes: the input as the output."""
    tensor = document["inputs"][0]
    return {"model_name": "bench", "outputs": [{**tensor, "name": "y"}]}


def supple_server(port: int, model: str) -> None:
    """This project, one replica."""
    from supple.cli.serving import run
    from supple.core.service.spec import ServeSpec, parse_slo

    target = f"{Path(__file__).resolve().parent / 'serve_model.py'}:{model}"
    run(
        ServeSpec(
            name="bench",
            target=target,
            slo=parse_slo("p99=60s"),
            port=port,
            min_replicas=1,
            max_replicas=1,
        )
    )


def ray_server(port: int, *, haproxy: bool, work_s: float = 0.0, batch: bool = False) -> None:
    """Ray Serve as its documentation shows it."""
    if haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0.5"
    import logging

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    class Plain:
        async def __call__(self, request: Any) -> Any:
            document = await request.json()
            if work_s:
                time.sleep(work_s)
            return answer(document)

    class Batches:
        @serve.batch
        async def many(self, documents: list[Any]) -> list[Any]:
            time.sleep(work_s)
            return [answer(document) for document in documents]

        async def __call__(self, request: Any) -> Any:
            return await self.many(await request.json())

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    deployment: Any = serve.deployment(Batches if batch else Plain)
    bound = deployment.options(
        max_ongoing_requests=1000,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    ).bind()
    serve.run(bound, route_prefix="/")
    try:
        signal.pause()
    finally:
        serve.shutdown()
        ray.shutdown()


def litserve_server(port: int) -> None:
    """LitServe with its defaults, one worker."""
    from benchmarks.peers import litserve_server as peer

    peer.run(port, _PATH)


def uvicorn_server(port: int) -> None:
    """The floor: an ASGI handler in one process."""
    import uvicorn

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        body = json.dumps(answer(json.loads(message["body"]))).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(handler, host="127.0.0.1", port=port, log_level="error", lifespan="off")


SERVERS: dict[str, Callable[[int], None]] = {
    "supple": lambda port: supple_server(port, "Trivial"),
    "ray_haproxy": lambda port: ray_server(port, haproxy=True),
    "ray_proxy": lambda port: ray_server(port, haproxy=False),
    "litserve": litserve_server,
    "uvicorn": uvicorn_server,
    "supple_batched": lambda port: supple_server(port, "Batched"),
    "ray_unbatched": lambda port: ray_server(port, haproxy=True, work_s=_WORK_S),
    "ray_batched": lambda port: ray_server(port, haproxy=True, work_s=_WORK_S, batch=True),
}


@contextlib.contextmanager
def serving(name: str) -> Iterator[int]:
    """The port of a server of this name, once it has answered."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--server", name, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"},
    )
    try:
        deadline = time.monotonic() + 120.0
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server {name} did not start: exit {process.poll()}")
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _request() -> bytes:
    head = f"POST {_PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(_BODY)}\r\n\r\n".encode() + _BODY


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5.0) as client:
            client.sendall(_request())
            return client.recv(65536).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


class Connection:
    """One keep-alive connection that knows when an answer is complete."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.got = b""
        self.sent_at = 0.0

    def ask(self) -> None:
        self.got = b""
        self.sent_at = time.perf_counter()
        self.socket.sendall(_request_bytes)

    def read(self) -> bool:
        """Take what came; is the answer whole? Raises if it is not a 200."""
        self.got += self.socket.recv(65536)
        head, blank, body = self.got.partition(b"\r\n\r\n")
        if not blank:
            if not self.got:
                raise EOFError
            return False
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {head[:60]!r} {body[:200]!r}")
        lowered = head.lower()
        start = lowered.find(b"content-length: ")
        if start < 0:
            return body.endswith(b"0\r\n\r\n")
        return len(body) >= int(lowered[start + 16 :].split(b"\r\n")[0])


def load(port: int, *, connections: int, seconds: float) -> tuple[float, list[float]]:
    """(answers per second, seconds of each) with so many requests always in flight."""
    latencies: list[float] = []
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for _ in range(connections):
            connection = Connection(port)
            stack.callback(connection.socket.close)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.ask()
        began_s = time.perf_counter()
        end_s = began_s + seconds
        while (now_s := time.perf_counter()) < end_s:
            for key, _ in selector.select(1.0):
                try:
                    whole = key.data.read()
                except (EOFError, ConnectionResetError):
                    # Between two requests a server may close: every HTTP client asks anew.
                    replace(selector, stack, port, key)
                    continue
                if whole:
                    latencies.append(time.perf_counter() - key.data.sent_at)
                    key.data.ask()
    return len(latencies) / (now_s - began_s), latencies


def replace(
    selector: selectors.BaseSelector, stack: contextlib.ExitStack, port: int, key: Any
) -> None:
    """A fresh connection in place of a closed one, with the time its request was first sent."""
    selector.unregister(key.fileobj)
    fresh = Connection(port)
    stack.callback(fresh.socket.close)
    selector.register(fresh.socket, selectors.EVENT_READ, fresh)
    fresh.ask()
    fresh.sent_at = key.data.sent_at


def measure(name: str, seconds: float) -> dict[str, float]:
    """Latency with one request in flight, and the peak with many."""
    with serving(name) as port:
        load(port, connections=8, seconds=1.0)
        _, alone = load(port, connections=1, seconds=seconds)
        peak, _ = load(port, connections=_CONNECTIONS, seconds=seconds)
    ordered = sorted(alone)
    return {
        "p50_ms": 1e3 * statistics.median(alone),
        "p99_ms": 1e3 * ordered[int(0.99 * len(ordered))],
        "peak_per_s": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--server", choices=SERVERS)
    parser.add_argument("--port", type=int)
    asked = parser.parse_args()
    if asked.server is not None:
        # A shell that starts this in the background has it ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        SERVERS[asked.server](asked.port)
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in asked.only}
    for turn in range(asked.rounds):
        for name in asked.only:
            found = measure(name, asked.seconds)
            rounds[name].append(found)
            figures = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            print(f"  round {turn + 1} {name:16} {figures}", flush=True)
    metrics = {
        f"{name}_{key}": statistics.median(found[key] for found in each)
        for name, each in rounds.items()
        for key in each[0]
    }
    for ratio, mine, theirs in (
        ("p50_vs_ray_serve", "supple_p50_ms", "ray_haproxy_p50_ms"),
        ("p99_vs_ray_serve", "supple_p99_ms", "ray_haproxy_p99_ms"),
        ("peak_vs_ray_serve", "supple_peak_per_s", "ray_haproxy_peak_per_s"),
        ("p50_vs_ray_python_proxy", "supple_p50_ms", "ray_proxy_p50_ms"),
        ("peak_vs_ray_python_proxy", "supple_peak_per_s", "ray_proxy_peak_per_s"),
        ("peak_vs_litserve", "supple_peak_per_s", "litserve_peak_per_s"),
        ("batched_peak_vs_ray_serve", "supple_batched_peak_per_s", "ray_unbatched_peak_per_s"),
        ("batched_peak_vs_ray_batch", "supple_batched_peak_per_s", "ray_batched_peak_per_s"),
    ):
        if mine in metrics and theirs in metrics:
            metrics[ratio] = metrics[mine] / metrics[theirs]
    report("serve_overhead", metrics)


_request_bytes = _request()

if __name__ == "__main__":
    main()
