"""The protocol's bodies: what is right comes back as it was, what is wrong is refused, always."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from supple.serve.protocol import grpc as oip
from supple.serve.protocol import rest as protocol
from supple.serve.protocol.dtypes import BF16, DATATYPES, Array
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import (
    InferRequest,
    RequestLimits,
    decode_request,
    encode_response,
    to_bytes,
)
from tests.examples import examples

LIMITS = RequestLimits(max_body_bytes=100_000, max_elements=10_000)
NUMERIC = [d for d in DATATYPES if d.kind != "O"]


def of_dtype(dtype: np.dtype[Any]) -> st.SearchStrategy[Array]:
    """Arrays of finite numbers; NumPy itself has no bfloat16."""
    shapes = hnp.array_shapes(max_dims=4, max_side=5)
    if dtype.name == "bfloat16":
        finite = st.floats(-(2.0**90), 2.0**90, width=32)
        return hnp.arrays(np.float32, shapes, elements=finite).map(lambda a: a.astype(dtype))
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None
    return hnp.arrays(dtype, shapes, elements=elements)


arrays = st.sampled_from(NUMERIC).flatmap(of_dtype)
texts = hnp.arrays(object, hnp.array_shapes(max_dims=2), elements=st.binary(max_size=8))
named = st.dictionaries(st.text(min_size=1, max_size=8), arrays | texts, min_size=1, max_size=3)


def body_of(*inputs: dict[str, Any], **extra: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **extra}).encode()


def x(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]} | changes


def decoded(body: bytes, json_bytes: int | None = None) -> InferRequest:
    return decode_request(body, json_bytes=json_bytes, limits=LIMITS)


def same(left: Array, right: Array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())


@pytest.mark.slow
@given(named)
def test_what_is_sent_as_binary_comes_back_as_it_was(inputs: dict[str, Array]) -> None:
    tensors, raws = [], []
    for name, array in inputs.items():
        raws.append(to_bytes(array))
        tensors.append(
            {
                "name": name,
                "shape": list(array.shape),
                "datatype": DATATYPES[array.dtype],
                "parameters": {"binary_data_size": len(raws[-1])},
            }
        )
    head = body_of(*tensors)
    request = decoded(head + b"".join(raws), len(head))
    assert request.inputs.keys() == inputs.keys()
    assert all(same(request.inputs[name], array) for name, array in inputs.items())


@pytest.mark.slow
@given(named)
def test_an_answer_in_json_holds_the_numbers_that_were_computed(outputs: dict[str, Array]) -> None:
    outputs = {name: a for name, a in outputs.items() if a.dtype.kind != "O"}
    body, json_bytes = encode_response(InferRequest(inputs={}), outputs, model="m", version="1")
    assert json_bytes is None
    request = (
        decoded(json.dumps({"inputs": json.loads(body)["outputs"]}).encode()) if outputs else None
    )
    for name, array in outputs.items():
        assert request is not None and same(request.inputs[name], array)


@settings(max_examples=examples(80))
@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_any_bytes_are_a_request_or_refused(body: bytes, json_bytes: int | None) -> None:
    with pytest.raises(Refused):
        decoded(body, json_bytes)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("x") | anything,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | anything,
        "datatype": st.sampled_from([*DATATYPES.values(), "BF16"]) | anything,
        "data": st.lists(st.integers(-3, 300) | st.floats() | st.text(max_size=3), max_size=6)
        | anything,
        "parameters": st.dictionaries(st.just("binary_data_size"), st.integers(-1, 9) | anything)
        | anything,
    },
)


@pytest.mark.slow
@settings(max_examples=examples(80))
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "inputs": st.lists(tensors, max_size=3) | anything,
            "outputs": anything,
            "id": anything,
            "parameters": anything,
        },
    ),
    st.binary(max_size=16),
)
def test_any_json_is_a_request_or_refused(document: Any, tail: bytes) -> None:
    head = json.dumps(document).encode()
    for json_bytes in (None, len(head)):
        with contextlib.suppress(Refused):
            request = decoded(head + tail, json_bytes)
            assert all(isinstance(array, np.ndarray) for array in request.inputs.values())


@settings(max_examples=examples(80))
@given(st.sampled_from(oip.METHODS), st.binary(max_size=100))
def test_any_grpc_bytes_are_a_request_or_refused(method: str, wire: bytes) -> None:
    with contextlib.suppress(Refused):
        asked = oip.parse(method, wire, LIMITS)
        if method == "ModelInfer":
            request = oip.decode_infer(asked, LIMITS)
            assert all(isinstance(array, np.ndarray) for array in request.inputs.values())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[]", "not an object"),
        (b"[" * 100_000, "depth limit"),
        (body_of(), "at least one tensor"),
        (body_of(x(), x()), "given twice"),
        (body_of(x(shape=[2, 2])), "needs 4 elements, data has 2"),
        (body_of(x(shape=[-1, 2])), "whole numbers from 0"),
        (body_of(x(shape=[True, 2])), "whole numbers from 0"),
        (body_of(x(shape=[10_000, 10_000])), "at most 10000 are accepted"),
        (body_of(x(shape=[1] * 17)), "list of 1 to 16"),
        (body_of(x(datatype="FLOAT")), "none of BOOL, UINT8"),
        (body_of(x(data=["1", "2"])), "does not fit in FP32"),
        (body_of(x(data=[[1.0], [2.0, 3.0]])), "ragged"),
        (body_of(x(data=[1.0, 1e300])), "outside the range of FP32"),
        (body_of(x(datatype="UINT8", data=[1, 256])), "does not fit in UINT8"),
        (body_of(x(datatype="INT64", data=[1.5, 2.0])), "does not fit in INT64"),
        (body_of(x(datatype="BYTES", data=[1, 2])), "holds strings"),
        (body_of({"name": "x", "shape": [1], "datatype": "FP32"}), "neither"),
        (body_of(x(parameters={"binary_data_size": 8})), "send one"),
        (body_of(x(), id=3), '"id" is a string'),
        (body_of(x(), outputs=[{}]), 'no "name"'),
        (body_of(x(datatype="BF16", data=[1.0, 1e39])), "outside the range of BF16"),
        (body_of(x(datatype="FP16", data=[1.0, 70_000.0])), "outside the range of FP16"),
        (body_of(x(datatype="BYTES")).replace(b"1.0, 2.0", b'"a\xff", "b"'), "binary_data_size"),
        (body_of(x(datatype="BYTES", data=["\ud800", "b"])), "binary_data_size"),
        (b'{"inputs": [{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}', "NaN"),
    ],
)
def test_a_wrong_body_is_told_what_is_wrong(body: bytes, told: str) -> None:
    with pytest.raises(Refused) as refusal:
        decoded(body)
    assert told in str(refusal.value)


@pytest.mark.parametrize(
    ("size", "tail", "told"),
    [
        (8, b"1234567", "7 bytes are left"),
        (4, b"1234", "is 8 bytes, 4 came"),
        (8, b"123456789", "1 bytes follow the last tensor"),
        (-1, b"", "binary_data_size is -1"),
        (8.0, b"12345678", "binary_data_size is 8.0"),
    ],
)
def test_a_wrong_binary_tail_is_told_what_is_wrong(size: Any, tail: bytes, told: str) -> None:
    tensor = x(parameters={"binary_data_size": size})
    del tensor["data"]
    head = body_of(tensor)
    with pytest.raises(Refused) as refusal:
        decoded(head + tail, len(head))
    assert told in str(refusal.value)


def test_bfloat16_arrives_with_its_values() -> None:
    tensor = {
        "name": "x",
        "shape": [2],
        "datatype": "BF16",
        "parameters": {"binary_data_size": 4},
    }
    head = body_of(tensor)
    array = decoded(head + b"\x80\x3f\x00\xc0", len(head)).inputs["x"]
    assert array.dtype == BF16 and array.tolist() == [1.0, -2.0]


def test_outputs_come_as_they_were_asked_for() -> None:
    request = decoded(
        body_of(x(), id="7", outputs=[{"name": "b", "parameters": {"binary_data": True}}])
    )
    outputs = {"a": np.ones(1), "b": np.asarray([3], dtype=np.int16)}
    body, json_bytes = encode_response(request, outputs, model="m", version="1")
    assert json_bytes is not None and body[json_bytes:] == b"\x03\x00"
    answer = json.loads(body[:json_bytes])
    assert answer["id"] == "7" and [o["name"] for o in answer["outputs"]] == ["b"]
    with pytest.raises(Refused, match="the model has a"):
        encode_response(request, {"a": np.ones(1)}, model="m", version="1")


def test_an_infinite_output_is_refused_in_json_and_sent_as_binary() -> None:
    outputs = {"y": np.asarray([np.inf])}
    with pytest.raises(Refused, match="set binary_data"):
        encode_response(InferRequest(inputs={}), outputs, model="m", version="1")
    binary = InferRequest(inputs={}, binary_output=True)
    assert encode_response(binary, outputs, model="m", version="1")[1] is not None


def test_more_strings_than_the_limit_are_refused_before_one_of_them_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def split(*_: object) -> Any:
        pytest.fail("the strings were made")

    for name in ("_split_strings", "_objects", "_flat"):
        monkeypatch.setattr(protocol, name, split)
    monkeypatch.setattr(oip, "_from_contents", split)
    limits = RequestLimits(max_strings=5)
    raw = b"\1\0\0\0a" * 6
    plain = {"name": "x", "shape": [2, 3], "datatype": "BYTES"}
    head = body_of(plain | {"parameters": {"binary_data_size": len(raw)}})
    asked = oip.MESSAGES["ModelInferRequest"]()
    asked.inputs.add(name="x", datatype="BYTES", shape=[2, 3]).contents.bytes_contents[:] = [
        b"a"
    ] * 6
    asked_raw = oip.MESSAGES["ModelInferRequest"](raw_input_contents=[raw])
    asked_raw.inputs.add(name="x", datatype="BYTES", shape=[2, 3])
    for decode in (
        lambda: decode_request(body_of(plain | {"data": ["a"] * 6}), limits=limits),
        lambda: decode_request(head + raw, json_bytes=len(head), limits=limits),
        lambda: oip.decode_infer(asked, limits),
        lambda: oip.decode_infer(asked_raw, limits),
    ):
        with pytest.raises(Refused, match="6 elements of BYTES; at most 5 are accepted") as refused:
            decode()
        assert refused.value.status == 413


def test_more_strings_than_the_shape_says_are_refused_before_one_of_them_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "_objects", lambda *_: pytest.fail("the strings were made"))
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a"] * 1000}
    with pytest.raises(Refused, match="needs 2 elements, data has 1000"):
        decoded(body_of(tensor))


def test_as_many_strings_as_the_limit_are_taken() -> None:
    tensor = {"name": "x", "shape": [2, 3], "datatype": "BYTES", "data": ["a"] * 6}
    found = decode_request(body_of(tensor), limits=RequestLimits(max_strings=6))
    assert found.inputs["x"].tolist() == [[b"a"] * 3] * 2
