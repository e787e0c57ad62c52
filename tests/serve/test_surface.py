"""The HTTP surface, called as a server would call it, and the executor behind it."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from supple.serve.attempts import SERIAL, Attempts, parse_serial
from supple.serve.executor import Executor
from supple.serve.meters import Meters, merge
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import RequestLimits
from supple.serve.surface import Surface, SurfaceSettings
from supple.testing.faults import FakeClock


class Doubles:
    inputs = {"x": "float32[2]"}  # noqa: RUF012

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def predict(self, batch: Any) -> Any:
        self.entered.set()
        self.gate.wait()
        self.batches.append(len(batch))
        if (batch < 0).any():
            raise ValueError("negative")
        return batch * 2

    def stream(self, batch: Any) -> Any:
        yield batch
        raise OSError("lost")


def asked(*values: float, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": list(values)}
    return {"inputs": [tensor | changes]}


class Service:
    """A surface with a client of it, and all of its parts at hand."""

    def __init__(
        self,
        timeout_s: float = 30.0,
        max_waiting: int = 100,
        all_pages: Callable[[str], Awaitable[list[bytes]]] | None = None,
        user: Any = None,
        attempts: Attempts | None = None,
        clock: FakeClock | None = None,
        **settings: Any,
    ) -> None:
        self.user = user or Doubles()
        self.model = ServedModel(self.user, name="m")
        self.meters = Meters(model="m", replica="r")
        self.executor = Executor(
            self.model,
            timeout_s=timeout_s,
            max_waiting=max_waiting,
            on_batch=self.meters.batch,
            attempts=attempts,
        )
        self.surface = Surface(
            self.model,
            self.executor,
            self.meters,
            SurfaceSettings(**settings),
            all_pages=all_pages,
            attempts=attempts,
            now=time.monotonic if clock is None else clock.now,
        )
        transport = httpx.ASGITransport(app=self.surface)  # type: ignore[arg-type]
        self.client = httpx.AsyncClient(transport=transport, base_url="http://m")

    async def __aenter__(self) -> "Service":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.user.gate.set()
        self.executor.close()
        await self.client.aclose()

    async def infer(self, *values: float, **kwargs: Any) -> httpx.Response:
        return await self.client.post("/v2/models/m/infer", json=asked(*values), **kwargs)

    async def entered(self) -> None:
        await asyncio.to_thread(self.user.entered.wait)


def test_an_inference_is_answered() -> None:
    async def go() -> None:
        async with Service() as service:
            response = await service.infer(1, 2)
            assert response.status_code == 200
            assert response.json()["outputs"][0]["data"] == [2.0, 4.0]
            assert 'status="200"} 1' in (await service.client.get("/metrics")).text

    asyncio.run(go())


def test_requests_that_come_while_the_model_works_become_one_batch() -> None:
    async def go() -> None:
        async with Service() as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            others = [asyncio.ensure_future(service.infer(i, i)) for i in range(1, 6)]
            while service.executor.num_waiting < 5:
                await asyncio.sleep(0)
            service.user.gate.set()
            answers = [r.json()["outputs"][0]["data"] for r in await asyncio.gather(first, *others)]
            assert answers == [[2.0 * i, 2.0 * i] for i in range(6)]
            assert service.user.batches == [1, 5]

    asyncio.run(go())


def numbered() -> tuple[dict[str, str], int]:
    """The header of a request that the ingress may send again, and its number."""
    told = str(uuid.uuid4())
    number = parse_serial(told.encode())
    assert number is not None
    return {SERIAL.decode(): told}, number


def test_numbered_requests_that_wait_together_become_one_batch(tmp_path: Path) -> None:
    async def go() -> None:
        async with Service(attempts=Attempts(tmp_path / "attempts")) as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            others = [
                asyncio.ensure_future(service.infer(i, i, headers=numbered()[0])) for i in range(8)
            ]
            while service.executor.num_waiting < 8:
                await asyncio.sleep(0)
            service.user.gate.set()
            answers = await asyncio.gather(first, *others)
            assert {response.status_code for response in answers} == {200}
            assert service.user.batches == [1, 8]

    asyncio.run(go())


def test_a_request_over_which_two_replicas_died_is_not_computed(tmp_path: Path) -> None:
    table = tmp_path / "attempts"
    headers, number = numbered()
    for _ in range(2):
        Attempts(table).begin(number)

    async def go() -> None:
        async with Service(attempts=Attempts(table)) as service:
            response = await service.infer(1, 2, headers=headers)
            assert response.status_code == 500
            assert "2 replicas died while they computed this request" in response.json()["error"]
            assert service.user.batches == []

    asyncio.run(go())


def test_a_bad_request_in_a_batch_does_not_fail_its_neighbours() -> None:
    async def go() -> None:
        async with Service() as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            others = [asyncio.ensure_future(service.infer(i, i)) for i in (1, -1, 2)]
            while service.executor.num_waiting < 3:
                await asyncio.sleep(0)
            service.user.gate.set()
            statuses = [r.status_code for r in await asyncio.gather(first, *others)]
            assert statuses == [200, 200, 500, 200]
            told = (await others[1]).json()["error"]
            assert told.startswith("the model failed on this request (error ")

    asyncio.run(go())


def test_a_request_whose_client_left_is_not_computed() -> None:
    async def go() -> None:
        async with Service() as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            gone = asyncio.ensure_future(service.infer(1, 1))
            while service.executor.num_waiting < 1:
                await asyncio.sleep(0)
            gone.cancel()
            service.user.gate.set()
            await first
            assert (await service.infer(2, 2)).status_code == 200
            assert service.user.batches == [1, 1]

    asyncio.run(go())


def test_a_predict_that_hangs_is_answered_and_the_replica_says_so() -> None:
    async def go() -> None:
        async with Service(timeout_s=0.01) as service:
            service.user.gate.clear()
            hung = await service.infer(1, 1)
            assert hung.status_code == 504
            assert "predict() has not returned for 0.01 s on a batch of 1" in hung.json()["error"]
            assert (await service.client.get("/v2/health/ready")).status_code == 503
            assert (await service.client.get("/v2/health/live")).status_code == 200
            assert (await service.infer(1, 1)).headers["retry-after"] == "1"

    asyncio.run(go())


def test_more_waiting_requests_than_allowed_are_refused_at_once() -> None:
    async def go() -> None:
        async with Service(max_waiting=1) as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            second = asyncio.ensure_future(service.infer(0, 0))
            while service.executor.num_waiting < 1:
                await asyncio.sleep(0)
            refused = await service.infer(0, 0)
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            service.user.gate.set()
            await asyncio.gather(first, second)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 200),
        ("GET", "/v2/", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/models/m", 200),
        ("GET", "/v2/models/m/versions/1", 200),
        ("GET", "/v2/models/m/versions/1/ready", 200),
        ("GET", "/v2/models/m/versions/2/ready", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/nothing", 404),
        ("GET", "/openapi.json", 200),
        ("GET", "/docs", 200),
        ("POST", "/v2", 405),
        ("GET", "/v2/models/m/infer", 405),
    ],
)
def test_every_path_has_its_answer(method: str, path: str, status: int) -> None:
    async def go() -> None:
        async with Service() as service:
            response = await service.client.request(method, path)
            assert response.status_code == status, response.text

    asyncio.run(go())


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"priority": 10}, "from 0 to 9"),
        ({"priority": True}, "from 0 to 9"),
        ({"timeout": -1}, "microseconds"),
        ({"timeout": "1s"}, "microseconds"),
    ],
)
def test_priorities_and_timeouts_that_are_none_are_refused(
    parameters: dict[str, Any], words: str
) -> None:
    async def go() -> None:
        async with Service() as service:
            url = "/v2/models/m/infer"
            body = asked(1, 2) | {"parameters": parameters}
            response = await service.client.post(url, json=body)
            assert response.status_code == 400 and words in response.json()["error"]
            body["parameters"] = {"priority": 1, "timeout": 60_000_000}
            assert (await service.client.post(url, json=body)).status_code == 200

    asyncio.run(go())


def test_a_body_over_the_limit_is_refused() -> None:
    async def go() -> None:
        async with Service(limits=RequestLimits(max_body_bytes=50)) as service:
            assert (await service.infer(1, 2)).status_code == 413

            async def chunks() -> Any:
                for _ in range(10):
                    yield b" " * 10

            response = await service.client.post("/v2/models/m/infer", content=chunks())
            assert response.status_code == 413

    asyncio.run(go())


def test_another_model_or_version_than_the_one_that_is_served_is_named_and_refused() -> None:
    async def go() -> None:
        async with Service() as service:
            for version in ("", "1"):
                service.surface.description.check_name("m", version)
            for name, version, words in (
                ("other", "", "no model 'other'; 'm' version 1 is served here"),
                ("m", "2", "no model 'm' version '2'; 'm' version 1 is served here"),
            ):
                with pytest.raises(Refused, match=words) as refused:
                    service.surface.description.check_name(name, version)
                assert refused.value.status == 404
            for path, words in (
                ("/v2/models/other/versions/1", "no model 'other' version '1'"),
                ("/v2/models/m/versions/2", "no model 'm' version '2'"),
                ("/v2/models/m/versions", "no resource at"),
                ("/v2/models", "no resource at"),
            ):
                assert words in (await service.client.get(path)).json()["error"]

    asyncio.run(go())


def test_each_of_several_tokens_opens_the_service() -> None:
    async def go() -> None:
        async with Service(tokens=("one", "two")) as service:
            for token, status in (("one", 200), ("two", 200), ("three", 401)):
                headers = {"Authorization": f"Bearer {token}"}
                assert (await service.infer(1, 2, headers=headers)).status_code == status

    asyncio.run(go())


def test_a_binary_answer_tells_where_its_json_ends() -> None:
    async def go() -> None:
        async with Service() as service:
            wanted = asked(1, 2) | {"parameters": {"binary_data_output": True}}
            response = await service.client.post("/v2/models/m/infer", json=wanted)
            assert response.headers["content-type"] == "application/octet-stream"
            end = int(response.headers["inference-header-content-length"])
            json.loads(response.content[:end])
            assert np.frombuffer(response.content[end:], np.float32).tolist() == [2.0, 4.0]

    asyncio.run(go())


def test_only_inferences_are_counted() -> None:
    async def go() -> None:
        async with Service() as service:
            await service.infer(1, 2)
            await service.client.get("/v2")
            lines = (await service.client.get("/metrics")).text.splitlines()
            counts = [line for line in lines if line.startswith("supple_requests_total{")]
            assert [line.rpartition(" ")[2] for line in counts] == ["1.0"]

    asyncio.run(go())


@pytest.mark.parametrize(("spare", "status"), [(0, 200), (-1, 413)])
def test_a_body_of_the_largest_size_is_taken(spare: int, status: int) -> None:
    body = json.dumps(asked(1, 2)).encode()

    async def go() -> None:
        async with Service(limits=RequestLimits(max_body_bytes=len(body) + spare)) as service:
            response = await service.client.post("/v2/models/m/infer", content=body)
            assert response.status_code == status

    asyncio.run(go())


async def sent_in_parts(
    service: Service, parts: AsyncIterator[bytes | None]
) -> tuple[int, dict[bytes, bytes], Any]:
    """(status, headers, document) of the answer to an inference whose body comes in `parts`; with
    None its client leaves."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        part = await anext(parts)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part != b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path = "/v2/models/m/infer"
    await service.surface(
        {"type": "http", "method": "POST", "path": path, "headers": []}, receive, send
    )
    start, body = sent
    return start["status"], dict(start["headers"]), json.loads(body["body"])


@pytest.mark.parametrize(("late_s", "status"), [(100.0, 200), (100.25, 408)])
def test_a_body_that_is_not_whole_within_five_minutes_is_refused(
    late_s: float, status: int
) -> None:
    clock = FakeClock()

    async def parts() -> AsyncIterator[bytes]:
        whole = json.dumps(asked(1, 2)).encode()
        for part in (whole[:9], whole[9:20], whole[20:]):
            yield part
            clock.advance(100.0)
        clock.advance(late_s - 100.0)
        yield b""

    async def go() -> None:
        async with Service(clock=clock) as service:
            found, _, document = await sent_in_parts(service, parts())
            assert found == status
            if status == 408:
                assert document["error"] == "the body was not complete within 300 s"

    asyncio.run(go())


def test_bodies_that_are_half_read_hold_so_much_memory_together_and_no_more() -> None:
    whole = json.dumps(asked(1, 2)).encode().ljust(200)
    limits = RequestLimits(max_body_bytes=200)

    async def go() -> None:
        rest = asyncio.Event()
        first_parts: list[None] = []

        async def halted(body: bytes) -> AsyncIterator[bytes]:
            yield body
            first_parts.append(None)
            await rest.wait()
            yield b""

        async def leaves() -> AsyncIterator[bytes | None]:
            yield whole
            yield None

        async with Service(limits=limits) as service:
            with pytest.raises(asyncio.CancelledError):
                await sent_in_parts(service, leaves())
            tasks = [
                asyncio.ensure_future(sent_in_parts(service, halted(whole))) for _ in range(16)
            ]
            while len(first_parts) < len(tasks):
                await asyncio.sleep(0)
            refused, headers, document = await sent_in_parts(service, halted(b" "))
            assert refused == 503 and headers[b"retry-after"] == b"1"
            assert "too many large requests are being read" in document["error"]
            rest.set()
            answers = await asyncio.gather(*tasks)
            assert [status for status, _, _ in answers] == [200] * 16
            assert (await sent_in_parts(service, halted(whole)))[0] == 200

    asyncio.run(go())


def test_a_token_is_asked_for_everywhere_but_health() -> None:
    async def go() -> None:
        async with Service(tokens=("secret",)) as service:
            assert (await service.infer(1, 2)).status_code == 401
            wrong = {"Authorization": "Bearer other"}
            assert (await service.infer(1, 2, headers=wrong)).status_code == 401
            assert (await service.client.get("/metrics")).status_code == 401
            assert (await service.client.get("/v2/health/ready")).status_code == 200
            right = {"Authorization": "Bearer secret"}
            assert (await service.infer(1, 2, headers=right)).status_code == 200

    asyncio.run(go())


def test_a_stream_that_breaks_ends_with_its_error() -> None:
    async def go() -> None:
        async with Service() as service:
            url = "/v2/models/m/generate_stream"
            text = (await service.client.post(url, json=asked(1, 2))).text
            events = [json.loads(line[6:]) for line in text.splitlines() if line]
            assert events[0]["outputs"][0]["data"] == [1.0, 2.0]
            assert events[1]["error"].startswith("the model failed on this request (error ")

    asyncio.run(go())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": {"priority": 1}}, "'priority' of a stream is not supported"),
        ({"parameters": {"timeout": 1}}, "'timeout' of a stream is not supported"),
        ({"parameters": {"binary_data_output": True}}, "events are text"),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, "events are text"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_it_begins(
    changes: dict[str, Any], words: str
) -> None:
    async def go() -> None:
        async with Service() as service:
            url = "/v2/models/m/generate_stream"
            response = await service.client.post(url, json=asked(1, 2) | changes)
            assert response.status_code == 400 and words in response.json()["error"]

    asyncio.run(go())


def test_the_openapi_document_shows_a_request_that_is_taken() -> None:
    async def go() -> None:
        async with Service() as service:
            document = (await service.client.get("/openapi.json")).json()
            post = document["paths"]["/v2/models/m/infer"]["post"]
            body = post["requestBody"]["content"]["application/json"]["example"]
            response = await service.client.post("/v2/models/m/infer", json=body)
            assert response.status_code == 200
            for path, operations in document["paths"].items():
                if "get" in operations:
                    assert (await service.client.get(path)).status_code == 200, path

    asyncio.run(go())


def test_an_executor_raises_what_it_cannot_answer() -> None:
    async def go() -> None:
        async with Service() as service:
            with pytest.raises(ModelFault):
                await service.executor.submit({"x": np.full((1, 2), -1, np.float32)}, 1)
            service.executor.stuck = "hung"
            with pytest.raises(Refused, match="hung"):
                await service.executor.submit({"x": np.ones((1, 2), np.float32)}, 1)

    asyncio.run(go())


def test_the_metrics_of_all_replicas_are_told_by_whichever_is_asked() -> None:
    other = Meters(model="m", replica="other")
    other.answered(200, 0.004)

    async def go() -> None:
        async def pages(path: str) -> list[bytes]:
            return [(await service.client.get(path)).content, other.text()]

        async with Service(all_pages=pages) as service:
            assert (await service.infer(1, 2)).status_code == 200
            lines = (await service.client.get("/metrics")).text.splitlines()
            told = [line for line in lines if line.startswith("supple_requests_total{")]
            assert len(told) == 2 and all(line.endswith("} 1.0") for line in told)
            assert (await service.client.post("/metrics", json={})).status_code == 405

    asyncio.run(go())


def test_pages_of_several_replicas_merge_with_each_metric_in_one_place() -> None:
    pages = []
    for replica in ("a", "b"):
        meters = Meters(model="m", replica=replica)
        meters.answered(200, 0.004)
        meters.batch(3, 0.002)
        pages.append(meters.text())
    lines = merge(pages)[0].decode().splitlines()
    assert lines.count("# TYPE supple_requests_total counter") == 1
    counters = [i for i, line in enumerate(lines) if line.startswith("supple_requests_total{")]
    assert counters[1] - counters[0] == 1
    assert 'supple_batch_rows_bucket{le="4.0",model="m",replica="b"} 1.0' in lines
    assert 'supple_batch_rows_bucket{le="2.0",model="m",replica="b"} 0.0' in lines
