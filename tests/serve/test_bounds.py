"""Whatever is sent, the answer is right or a refusal, and costs no more than it should."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supple.serve.protocol import grpc as oip
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import RequestLimits, decode_request
from tests.examples import examples
from tests.serve.test_surface import Service

LIMITS = RequestLimits()
GENEROUS_S = 20.0


class Echo:
    """Answers with what it is sent; takes anything."""

    max_batch = 8
    allow_nan = True

    def predict(self, batch: Any) -> Any:
        return batch


class Asked:
    """A surface in a loop of its own, asked without a server between."""

    def __init__(self, **settings: Any) -> None:
        self.runner = asyncio.Runner()
        self.service = self.runner.run(self._made(settings))

    async def _made(self, settings: dict[str, Any]) -> Service:
        return Service(user=Echo(), **settings)

    def post(self, body: bytes, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = "/v2/models/m/infer"
        found = self.runner.run(self.service.client.post(url, content=body, headers=named))
        return found.status_code, found.content

    def close(self) -> None:
        self.service.executor.close()
        self.runner.close()


@pytest.fixture(scope="module")
def asked() -> Iterator[Asked]:
    made = Asked()
    yield made
    made.close()


words = st.sampled_from(["x", "FP32", "INT8", "BYTES", "BOOL", "UINT64", "BF16", "\ud7ff\0", "é"])
numbers = st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, True, None])
leaves = words | numbers | st.integers(-5, 300) | st.just("x" * 3000)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=10,
)
large = st.sampled_from([0, 2**22, 2**23])
lengths = st.sampled_from([0, 1, 2, 3, -1, 2**40, 2**63, True, 1.0]) | large


GOOD = st.sampled_from(
    [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]},
        {"name": "x", "shape": [2], "datatype": "UINT64", "data": [1, 2**64 - 1]},
        {"name": "x", "shape": [1, 1], "datatype": "BYTES", "data": [["text"]]},
        {"name": "x", "shape": [1], "datatype": "FP64", "parameters": {"binary_data_size": 8}},
        {"name": "x", "shape": [1, 0], "datatype": "BOOL", "data": []},
    ]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["y", "x" * 300, ""]),
    "shape": st.lists(lengths, min_size=1, max_size=5) | st.lists(large, min_size=4, max_size=9),
    "datatype": words,
    "data": st.lists(leaves | st.lists(leaves, max_size=3), max_size=6)
    | st.just(["a" * 9_000] + [""] * 600),
    "parameters": st.dictionaries(
        st.sampled_from(["binary_data_size", "a"]), numbers | anything, max_size=2
    ),
}
ASKED: dict[str, st.SearchStrategy[Any]] = {
    "id": words,
    "outputs": st.lists(
        st.fixed_dictionaries({"name": st.sampled_from(["output", "other"]) | anything}), max_size=3
    ),
    "parameters": st.dictionaries(
        st.sampled_from(["priority", "timeout", "binary_data_output"]),
        numbers | anything,
        max_size=3,
    ),
}


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """A right request with some fields changed for likely ones or for anything, or left out."""
    tensors = [dict(draw(GOOD)) for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
    document: dict[str, Any] = {"inputs": tensors}
    for owner, fields in [(document, ASKED), *((tensor, FIELDS) for tensor in tensors)]:
        for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
            owner[name] = draw(fields[name] | fields[name] | anything)
        if draw(st.integers(0, 9)) == 0:
            owner.pop(draw(st.sampled_from(sorted(owner))))
    return document


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A request of the protocol, right or nearly; at times with bytes changed, cut off or added."""
    head = json.dumps(draw(documents())).encode()
    body = head + draw(st.sampled_from([b"", b"\0" * 8, b"\xff" * 8]))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        change = draw(st.sampled_from([b"", b'"', b"[", b"}", b"1e999", b"\xff", b",", b"NaN"]))
        body = body[:at] + change + body[at + draw(st.integers(0, 3)) :]
    return body, draw(st.sampled_from([None, None, len(head), 0, len(body) + 1]))


@pytest.mark.slow
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
@given(sent=bodies())
def test_any_body_is_answered_or_refused_and_costs_little(
    asked: Asked, sent: tuple[bytes, int | None]
) -> None:
    body, json_bytes = sent
    told = {} if json_bytes is None else {"Inference_Header_Content_Length": str(json_bytes)}
    began_s = time.monotonic()
    tracemalloc.start()
    try:
        status, content = asked.post(body, **told)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 200 or 400 <= status < 500, content
    assert peak < 8 * 2**20 and time.monotonic() - began_s < GENEROUS_S
    package = str(Path(oip.__file__).parent)
    assert b"Traceback" not in content and package.encode() not in content


def tensor_of(data: bytes, shape: str, datatype: bytes = b"FP32") -> bytes:
    head = b'{"inputs":[{"name":"x","shape":' + shape.encode() + b',"datatype":"' + datatype
    return head + b'","data":' + data + b"}]}"


LONG = b'"' + b"a" * 60_000 + b'"'
BOMBS = {
    "a long string among many": tensor_of(b"[" + LONG + b',""' * 49_999 + b"]", "[1, 50000]"),
    "the same nested": tensor_of(b"[[" + LONG + b"]" + b',[""]' * 29_999 + b"]", "[1, 30000]"),
    "strings for BYTES of another shape": tensor_of(
        b"[" + LONG + b',""' * 49_999 + b"]", "[1, 5]", b"BYTES"
    ),
    "lists without end": tensor_of(b"[" * 900 + b"]" * 900, "[1, 1]"),
    "lists beyond the parser": tensor_of(b"[" * 200_000, "[1, 1]"),
    "empty lists": tensor_of(b"[" + b"[]," * 50_000 + b"[]]", "[1, 1]"),
    "a number of a million digits": tensor_of(b"[" + b"9" * 1_000_000 + b"]", "[1, 1]", b"INT64"),
    "a large exponent": tensor_of(b"[1e999999]", "[1, 1]"),
    "a shape that overflows": tensor_of(b"[]", "[0, 8388608, 8388608, 8388608]"),
    "a shape of many": tensor_of(b"[]", "[8388608, 8388608, 8388608, 8388608]"),
    "a long name": b'{"inputs":[{"name":"' + b"n" * 1_000_000 + b'"}]}',
    "a deep datatype": tensor_of(b"[1]", "[1]", b"").replace(b'""', b"[" * 990 + b"]" * 990),
    "a deep size": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":'
    b'{"binary_data_size":' + b"[" * 990 + b"]" * 990 + b"}}]}",
    "many inputs": b'{"inputs":[' + b"{}," * 100_000 + b"{}]}",
    "many parameters": b'{"inputs":[{}],"parameters":{'
    + b",".join(b'"%d":1' % i for i in range(100_000))
    + b"}}",
    "an output asked for often": b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[1]}'
    b'],"outputs":[{"name":"output"},{"name":"output"}]}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_body_takes_no_more_than_its_size_many_times_over(asked: Asked, name: str) -> None:
    body = BOMBS[name]
    tracemalloc.start()
    try:
        status, content = asked.post(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert status == 400, content[:200]
    assert peak < 2**20 + 100 * len(body), f"{peak} bytes for {len(body)}"
    assert len(content) < 2000


@pytest.mark.parametrize(
    "wire",
    [
        b"\x2a\x00" * 1_000_000,  # inputs
        b"\x32\x00" * 1_000_000,  # outputs
        b"\x3a\x00" * 1_000_000,  # raw contents
        b"\x22\x00" * 1_000_000,  # parameters
        b"\x0b\x0c" + b"\x2a\x00" * 1_000_000,  # behind a group, a kind the protocol has not
        b"\xa2\x06\x00" * 1_000_000,  # a field that is not known
    ],
)
def test_a_grpc_message_of_a_million_fields_is_refused_before_it_is_unpacked(wire: bytes) -> None:
    with pytest.raises(Refused, match="the request has"):
        oip.parse("ModelInfer", wire, LIMITS)


def test_a_grpc_tensor_is_held_to_its_shape_before_an_array_is_made() -> None:
    asked = oip.MESSAGES["ModelInferRequest"]()
    tensor = asked.inputs.add(name="x", datatype="INT64", shape=[1] * 100_000)
    with pytest.raises(Refused, match="list of 1 to 16"):
        oip.decode_infer(asked, LIMITS)
    tensor.shape[:] = [0, 2**23, 2**23, 2**23]
    with pytest.raises(Refused, match="at most 8388608"):
        oip.decode_infer(asked, LIMITS)
    tensor.shape[:] = [2]
    tensor.datatype = "UINT64"
    tensor.contents.uint64_contents[:] = [1, 2**64 - 1]
    assert oip.decode_infer(asked, LIMITS).inputs["x"].tolist() == [1, 2**64 - 1]
    tensor.datatype = "INT8"
    tensor.contents.int_contents[:] = [1, 200]
    with pytest.raises(Refused, match="outside the range of INT8"):
        oip.decode_infer(asked, LIMITS)


@pytest.mark.parametrize(
    ("datatype", "data", "numbers"),
    [
        ("UINT64", [1, 2**64 - 1, True], [1, 2**64 - 1, 1]),
        ("INT64", [[1], [-(2**63)], [False]], [1, -(2**63), 0]),
        ("FP64", [2**64 - 1, 1.5, True], [float(2**64 - 1), 1.5, 1.0]),
        ("BOOL", [True, False, True], [True, False, True]),
    ],
)
def test_numbers_arrive_as_they_were_sent(
    datatype: str, data: list[Any], numbers: list[Any]
) -> None:
    body = tensor_of(json.dumps(data).encode(), "[3]", datatype.encode())
    array = decode_request(body, limits=LIMITS).inputs["x"]
    assert array.tolist() == numbers and array.flags.c_contiguous


def test_half_read_bodies_are_held_up_to_a_bound_and_given_back() -> None:
    async def go() -> None:
        limits = RequestLimits(max_body_bytes=1000)
        async with Service(limits=limits) as service:
            gate = asyncio.Event()

            async def half() -> Any:
                yield b" " * 900
                await gate.wait()
                yield b" " * 50

            url = "/v2/models/m/infer"
            post = service.client.post
            held = [asyncio.ensure_future(post(url, content=half())) for _ in range(17)]
            while service.surface.bodies.half_read_bytes < 17 * 900 and not held[-1].done():
                await asyncio.sleep(0)
            refused = await post(url, content=half())
            assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
            gate.set()
            assert {r.status_code for r in await asyncio.gather(*held)} == {400}
            assert service.surface.bodies.half_read_bytes == 0
            assert (await service.infer(1, 2)).status_code == 200

    asyncio.run(go())


def test_an_error_of_the_server_itself_shows_no_line_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        async with Service() as service:

            def broken(_: object) -> int:
                raise RuntimeError("a value of the request")

            monkeypatch.setattr(service.model, "check", broken)
            response = await service.infer(1, 2)
            assert response.status_code == 500
            assert response.json()["error"].startswith("the server failed on this request (error ")
            assert "a value" not in response.text + caplog.text and "RuntimeError" in caplog.text

    asyncio.run(go())


def test_no_more_than_a_line_a_second_of_faults_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def go() -> None:
        async with Service() as service:
            for _ in range(50):
                assert (await service.infer(-1, -1)).status_code == 500
            assert len(caplog.records) < 25

    asyncio.run(go())
