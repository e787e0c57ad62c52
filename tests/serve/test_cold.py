"""Paths that no inference takes: methods, CORS, configuration, statistics, metrics."""

import asyncio
import json
from typing import Any

import pytest

from supple.serve.meters import Meters, merge, merge_statistics
from supple.serve.models.model import ServedModel
from tests.serve.test_surface import Doubles, Service

INFER = "/v2/models/m/infer"
ORIGIN = "https://app.example.com"


def answered(method: str, path: str, headers: Any = None, **settings: Any) -> Any:
    async def go() -> Any:
        async with Service(**settings) as service:
            return await service.client.request(method, path, headers=headers)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v2", "GET, HEAD, OPTIONS"),
        ("/metrics", "GET, HEAD, OPTIONS"),
        ("/v2/models/m/config", "GET, HEAD, OPTIONS"),
        ("/v2/repository/index", "OPTIONS, POST"),
        (INFER, "OPTIONS, POST"),
        ("/v2/models/m/versions/1/generate_stream", "OPTIONS, POST"),
    ],
)
def test_options_and_a_wrong_method_name_the_methods_of_a_path(path: str, allow: str) -> None:
    options = answered("OPTIONS", path)
    assert options.status_code == 204 and options.headers["allow"] == allow
    wrong = answered("DELETE", path)
    assert wrong.status_code == 405 and wrong.headers["allow"] == allow
    assert "not DELETE" in wrong.json()["error"]
    assert options.headers["x-supple"] == wrong.headers["x-supple"] == "1"


@pytest.mark.parametrize("path", ["/v2", "/v2/health/ready", "/metrics", "/docs", "/v2/models/m"])
def test_head_has_the_headers_of_get_and_no_body(path: str) -> None:
    get, head = answered("GET", path), answered("HEAD", path)
    assert head.status_code == 200 and head.content == b"" and get.content
    assert dict(head.headers) == dict(get.headers)


def test_an_unknown_path_is_a_404_for_every_method() -> None:
    for method in ("GET", "HEAD", "OPTIONS", "POST"):
        assert answered(method, "/nothing").status_code == 404


@pytest.mark.parametrize("path", ["infer", "generate_stream", "config", "stats", "ready"])
def test_another_model_is_named_in_the_refusal_of_each_of_its_paths(path: str) -> None:
    method = "POST" if path in ("infer", "generate_stream") else "GET"
    for base in ("/v2/models/other", "/v2/models/m/versions/2"):
        response = answered(method, f"{base}/{path}")
        assert response.status_code == 404 and "is served here" in response.json()["error"]


def test_without_cors_no_header_speaks_to_a_browser() -> None:
    response = answered("GET", "/v2", {"Origin": ORIGIN})
    assert "access-control-allow-origin" not in response.headers
    preflight = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in answered("OPTIONS", INFER, preflight).headers


@pytest.mark.parametrize(
    ("allowed", "granted"), [((ORIGIN,), ORIGIN), (("*",), "*"), (("https://other",), None)]
)
def test_with_cors_the_pages_of_an_origin_may_call(
    allowed: tuple[str, ...], granted: str | None
) -> None:
    async def go() -> None:
        async with Service(cors_origins=allowed, tokens=("secret",)) as service:
            preflight = {
                "Origin": ORIGIN,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            }
            options = await service.client.options(INFER, headers=preflight)
            assert options.headers.get("access-control-allow-origin") == granted
            assert options.status_code == (400 if granted is None else 200)
            if granted is not None:
                assert "authorization" in options.headers["access-control-allow-headers"]
            for headers, status in (({"Authorization": "Bearer secret"}, 200), ({}, 401)):
                called = await service.infer(1, 2, headers={"Origin": ORIGIN, **headers})
                assert called.status_code == status
                assert called.headers.get("access-control-allow-origin") == granted

    asyncio.run(go())


def test_a_token_is_needed_for_options_that_are_no_preflight() -> None:
    for origins in ((), ("*",)):
        response = answered("OPTIONS", INFER, tokens=("secret",), cors_origins=origins)
        assert response.status_code == 401


def test_the_configuration_states_tensors_batch_and_priorities() -> None:
    found = answered("GET", "/v2/models/m/config").json()
    assert found["name"] == "m" and found["max_batch_size"] == 64
    assert found["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [2], "format": "FORMAT_NONE"}
    ]
    assert found["output"] == []
    assert found["dynamic_batching"]["priority_levels"] == 9
    assert found["model_transaction_policy"] == {"decoupled": True}
    assert answered("GET", "/v2/models/m/versions/1/config").json() == found


def test_strings_and_bfloat16_have_the_names_of_the_configuration() -> None:
    class Named(Doubles):
        inputs = {"s": "bytes[]"}  # noqa: RUF012
        outputs = {"y": "bfloat16[3, -1]"}  # noqa: RUF012

    found = answered("GET", "/v2/models/m/config", user=Named()).json()
    assert found["input"][0]["data_type"] == "TYPE_STRING" and found["input"][0]["dims"] == []
    assert found["output"] == [{"name": "y", "data_type": "TYPE_BF16", "dims": [3, -1]}]


def test_the_index_lists_the_model_and_whether_it_is_ready() -> None:
    (found,) = answered("POST", "/v2/repository/index").json()
    assert found == {"name": "m", "version": "1", "state": "READY", "reason": ""}


class Measured(Service):
    """A service whose calls are counted as in a replica."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self.executor.on_computed = self.meters.computed


def test_statistics_count_requests_rows_calls_and_their_times() -> None:
    async def go() -> None:
        async with Measured() as service:
            service.user.gate.clear()
            first = asyncio.ensure_future(service.infer(0, 0))
            await service.entered()
            others = [asyncio.ensure_future(service.infer(i, i)) for i in (1, 2, 3)]
            while service.executor.num_waiting < 3:
                await asyncio.sleep(0)
            service.user.gate.set()
            await asyncio.gather(first, *others)
            assert (await service.infer(1)).status_code == 400
            for path in ("/v2/models/m/stats", "/v2/models/m/versions/1/stats", "/v2/models/stats"):
                (found,) = (await service.client.get(path)).json()["model_stats"]
                assert found["name"] == "m" and found["version"] == "1"
                assert found["inference_count"] == 4 and found["execution_count"] == 2
                assert found["last_inference"] > 1_700_000_000_000
                stats = found["inference_stats"]
                assert [stats[k]["count"] for k in ("success", "fail", "queue")] == [4, 1, 4]
                assert stats["success"]["ns"] >= stats["queue"]["ns"] > 0
                assert stats["compute_infer"]["count"] == 4 and stats["compute_infer"]["ns"] > 0
                sizes = {b["batch_size"]: b["compute_infer"] for b in found["batch_stats"]}
                assert [(size, batch["count"]) for size, batch in sizes.items()] == [(1, 1), (3, 1)]

    asyncio.run(go())


def test_calls_that_are_made_at_once_are_counted_too() -> None:
    async def go() -> None:
        async with Measured() as service:
            service.executor._inline_s = 1e9
            for _ in range(30):
                await service.infer(1, 2)
            stats = service.meters.statistics()
            assert stats["inference_stats"]["queue"]["count"] == stats["inference_count"] == 30

    asyncio.run(go())


def test_statistics_of_several_replicas_are_summed() -> None:
    def one(*rows: int) -> dict[str, Any]:
        meters = Meters(model="m", replica="r")
        for size in rows:
            meters.batch(size, 0.5)
            meters.computed(1, 0.25, 0.5)
            meters.answered(200, 1.0)
        return json.loads(json.dumps(meters.statistics()))

    found = merge_statistics([one(1, 2), one(2), one()], model="m", version="1")
    assert found["inference_count"] == 5 and found["execution_count"] == 3
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 3, "ns": 3_000_000_000}
    assert stats["queue"] == {"count": 3, "ns": 750_000_000}
    assert stats["compute_infer"] == {"count": 3, "ns": 1_500_000_000}
    assert [(b["batch_size"], b["compute_infer"]["ns"]) for b in found["batch_stats"]] == [
        (1, 500_000_000),
        (2, 1_000_000_000),
    ]


def test_statistics_are_those_of_all_replicas() -> None:
    async def go() -> None:
        async def pages(path: str) -> list[bytes]:
            assert path == "/statistics/replica"
            return [(await service.client.get(path)).content] * 3

        async with Measured(all_pages=pages) as service:
            await service.infer(1, 2)
            (found,) = (await service.client.get("/v2/models/stats")).json()["model_stats"]
            assert found["inference_stats"]["success"]["count"] == 3

    asyncio.run(go())


def test_a_scraper_that_asks_for_openmetrics_gets_it() -> None:
    plain = answered("GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    openmetrics = answered("GET", "/metrics", {"Accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_a_histogram_counts_each_value_up_to_its_bound() -> None:
    meters = Meters(model="m", replica="r")
    for rows in (1, 2, 2, 300):
        meters.batch(rows, 0.001)
    text, _ = merge([meters.text()])
    buckets = [line for line in text.decode().splitlines() if "supple_batch_rows_bucket" in line]
    assert [line.rpartition(" ")[2] for line in buckets] == ["1.0", *["3.0"] * 8, "4.0"]
    assert 'supple_batch_rows_sum{model="m",replica="r"} 305.0' in text.decode()
    assert "_created" not in text.decode()


def test_an_error_of_a_cold_path_is_a_500_that_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> Any:
        raise RuntimeError("a secret")

    monkeypatch.setattr(ServedModel, "streams", property(broken))
    response = answered("GET", "/v2/models/m/config")
    assert response.status_code == 500
    assert response.json()["error"].startswith("the server failed on this request (error ")
    assert "a secret" not in response.text + caplog.text and "RuntimeError" in caplog.text


def test_the_openapi_document_lists_what_triton_clients_read() -> None:
    paths = answered("GET", "/openapi.json").json()["paths"]
    assert {INFER, "/v2/models/m/config", "/v2/models/m/stats", "/v2/models/stats"} <= paths.keys()
