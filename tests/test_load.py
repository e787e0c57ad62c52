"""`supple load`: open-loop against a real server, and what it makes of the outcomes."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from supple.cli.app import app
from supple.control.socket import ControlServer
from supple.core.service.spec import Slo
from supple.load import generator as load
from supple.load.replicas import ReplicaSeconds, service_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def served(handler: Handler) -> Iterator[str]:
    """The URL of a server of `handler` in a thread of its own."""
    ready, stop = threading.Event(), asyncio.Event()
    found: dict[str, Any] = {}

    async def go() -> None:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        found["port"] = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        found["loop"] = asyncio.get_running_loop()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(go(),))
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        found["loop"].call_soon_threadsafe(stop.set)
        thread.join()


def supple(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["load", *arguments])


async def fine(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


def ended(*outcomes: tuple[float, float, float, int]) -> load.Outcomes:
    """(due, sent, end, status) of each request."""
    found = load.Outcomes(np.array([due for due, *_ in outcomes]))
    for index, (_, sent_s, end_s, status) in enumerate(outcomes):
        found.record(index, sent_s, end_s, status)
    return found


def test_latency_counts_from_when_the_request_was_due_not_from_when_it_was_sent() -> None:
    found = load.report(ended((1.0, 3.0, 3.5, 200)), Slo(share=0.99, within_s=1.0))
    assert found.latency["max_s"] == pytest.approx(2.5)
    assert found.lag["max_s"] == pytest.approx(2.0)
    assert found.slo_attainment == 0.0


def test_refusals_errors_and_timeouts_are_misses() -> None:
    outcomes = ended(
        (0.0, 0.0, 0.1, 200),
        (1.0, 1.0, 1.1, 429),
        (2.0, 2.0, 2.1, 500),
        (3.0, 3.0, 3.1, load.TIMED_OUT),
        (4.0, 4.0, 4.1, load.BROKEN),
        (5.0, 5.0, 5.9, 200),
    )
    found = load.report(outcomes, Slo(share=0.99, within_s=0.5))
    assert found.slo_attainment == pytest.approx(1 / 6)
    assert (found.num_answered, found.num_refused, found.num_errors) == (2, 1, 2)
    assert found.num_timeouts == 1 and found.statuses["timed out"] == 1
    assert found.slo_goodput_per_s == pytest.approx(1 / 5)


def test_what_was_not_known_at_the_interrupt_counts_nowhere() -> None:
    outcomes = load.Outcomes(np.array([0.0, 1.0, 2.0]))
    outcomes.record(0, 0.0, 0.1, 200)
    found = load.report(outcomes, Slo(share=0.5, within_s=1.0))
    assert (found.num_requests, found.num_unknown, found.slo_attainment) == (1, 2, 1.0)
    assert any("unknown    2" in line for line in load.lines(found))


def test_a_run_without_an_answer_has_a_report() -> None:
    found = load.report(load.Outcomes(np.array([0.0])), None)
    assert found.latency["p99_s"] is None and found.num_requests == 0
    assert load.lines(found)


def test_poisson_arrivals_repeat_with_their_seed() -> None:
    first, again, other = (
        load.poisson(rate_per_s=200, duration_s=10, seed=seed) for seed in (1, 1, 2)
    )
    assert first.tolist() == again.tolist() != other.tolist()
    assert (np.diff(first) >= 0).all() and first[0] >= 0 and first[-1] <= 10
    assert len(first) == pytest.approx(2000, abs=200)
    assert np.diff(first).std() / np.diff(first).mean() == pytest.approx(1.0, abs=0.1)


def test_a_trace_is_replayed_from_its_first_arrival_at_a_speed(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,tokens\n12,3\n10,1\n20,2\n")
    assert load.replay(path, speed=2.0).tolist() == [0.0, 1.0, 5.0]
    assert load.replay(path, speed=2.0, duration_s=1.0).tolist() == [0.0, 1.0]


def test_requests_are_sent_though_earlier_ones_are_not_answered() -> None:
    together = 8
    arrived, all_here = 0, asyncio.Event()

    async def handler(_request: web.Request) -> web.Response:
        nonlocal arrived
        arrived += 1
        if arrived == together:
            all_here.set()
        await all_here.wait()
        return web.Response()

    with served(handler) as url:
        target = load.Target(url=url)
        outcomes = asyncio.run(load.run(target, np.linspace(0.0, 0.05, together), timeout_s=60.0))
    assert load.report(outcomes, None).num_answered == together


def test_a_request_that_is_not_answered_is_given_up() -> None:
    async def handler(_request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with served(handler) as url:
        outcomes = asyncio.run(load.run(load.Target(url=url), np.zeros(2), timeout_s=0.05))
    assert outcomes.status.tolist() == [load.TIMED_OUT] * 2


def test_an_interrupt_ends_the_run_with_what_is_known() -> None:
    async def go(url: str) -> load.Outcomes:
        stop = asyncio.Event()
        due_s = np.array([0.0, 3600.0])

        def on_second(_elapsed_s: float, outcomes: load.Outcomes) -> None:
            if outcomes.num_ended:
                stop.set()

        target = load.Target(url=url)
        return await load.run(target, due_s, timeout_s=60.0, stop=stop, on_second=on_second)

    with served(fine) as url:
        outcomes = asyncio.run(go(url))
    assert outcomes.status.tolist() == [200, 0]


@pytest.mark.slow
def test_the_command_asks_a_model_for_what_it_takes_and_reports(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = []

    async def handler(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer sesame-sesame":
            return web.Response(status=401)
        if request.method == "GET":
            tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
            return web.json_response({"inputs": [tensor]})
        assert request.path == "/v2/models/m/infer"
        bodies.append(await request.json())
        return web.Response(status=429 if len(bodies) % 2 else 200)

    with served(handler) as url:
        result = supple(
            *(f"{url}/v2/models/m", "--rate", "100", "--duration", "0.2s", "--slo", "p99=20s"),
            *("--token", "sesame-sesame", "--json", "--plot", str(tmp_path / "load.png")),
        )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}
    assert bodies[0] == {"inputs": [tensor]}
    assert found["num_requests"] == len(bodies) > 5
    assert found["slo_attainment"] == pytest.approx((len(bodies) // 2) / len(bodies))
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_any_url_can_be_loaded_and_the_report_is_for_people() -> None:
    with served(fine) as url:
        result = supple(url, "--rate", "50", "--duration", "0.2s")
    assert result.exit_code == 0, result.output
    for words in ("requests ", "answered ", "latency ", "p99.9", "of the generator"):
        assert words in result.stdout


def test_a_service_that_is_not_there_is_an_outcome_and_a_failure() -> None:
    with served(fine) as url:
        pass
    result = supple(url, "--rate", "50", "--duration", "0.2s")
    assert result.exit_code == 1 and "nothing was answered" in result.stderr
    assert "broken" in result.stdout


@pytest.mark.parametrize(
    ("url", "service"),
    [
        ("http://127.0.0.1:8000/v2/models/digits", "digits"),
        ("http://localhost/v2/models/digits/infer", "digits"),
        ("http://elsewhere:8000/v2/models/digits", None),
        ("http://127.0.0.1:8000/", None),
    ],
)
def test_the_service_behind_a_url_of_this_machine_is_known_by_name(
    url: str, service: str | None
) -> None:
    assert service_of(url) == service


def test_replicas_are_counted_over_the_time_they_are_held() -> None:
    name = f"load-{os.getpid()}"
    asked = threading.Semaphore(0)

    def status(_request: Mapping[str, Any]) -> dict[str, Any]:
        asked.release()
        return {"phase": "serving", "members": ["replica 1", "replica 2"]}

    async def go() -> tuple[float | None, float]:
        control = ControlServer(name, status)
        await control.start()
        began_s = time.monotonic()
        held = ReplicaSeconds(name, every_s=0.001)

        def watch() -> None:
            with held:
                for _ in range(3):
                    asked.acquire()

        await asyncio.to_thread(watch)
        took_s = time.monotonic() - began_s
        await control.stop()
        return held.total, took_s

    total, took_s = asyncio.run(go())
    assert total is not None and 0.0 < total <= 2 * took_s
    found = load.report(ended((0.0, 0.0, 0.1, 200)), None, replica_s=total)
    assert load.lines(found)[-1] == f"replicas   {total:.1f} replica-seconds"


def test_a_service_that_does_not_tell_has_no_count() -> None:
    for service in (None, f"load-nobody-{os.getpid()}"):
        with ReplicaSeconds(service) as held:
            pass
        assert held.total is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("http://h",), "either --rate"),
        (("http://h", "--rate", "1", "--trace", "t.csv"), "either --rate"),
        (("http://h", "--rate", "0"), "--rate is 0"),
        (("http://h", "--rate", "1e9"), "at most 5e+07"),
        (("h:80", "--rate", "1"), "is no URL"),
        (("http://h", "--rate", "1", "--slo", "fast"), "not a promise"),
        (("http://h", "--rate", "1", "--body", "nowhere"), "--body nowhere"),
        (("http://h", "--trace", "nowhere.csv"), "cannot be read"),
        (("http://127.0.0.1:9/v2/models/m", "--rate", "1"), "returns no inputs of the model"),
    ],
)
def test_nonsense_is_refused_before_anything_is_sent(
    arguments: tuple[str, ...], words: str
) -> None:
    result = supple(*arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output
