"""A parameter is supported, or refused by name; none is ignored."""

import json
from typing import Any

import numpy as np
import pytest

from supple.serve.protocol import grpc as oip
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import InferRequest, RequestLimits, decode_request

LIMITS = RequestLimits()


def over_rest(
    request: dict[str, Any] | None = None,
    tensor: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
) -> InferRequest:
    x = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0], "parameters": tensor}
    document: dict[str, Any] = {"inputs": [x], "parameters": request}
    if output is not None:
        document["outputs"] = [{"name": "y", "parameters": output}]
    return decode_request(json.dumps(document).encode(), limits=LIMITS)


def over_grpc(
    request: dict[str, Any] | None = None,
    tensor: dict[str, Any] | None = None,
    output: dict[str, Any] | None = None,
) -> InferRequest:
    message: Any = oip.MESSAGES["ModelInferRequest"]()
    x = message.inputs.add(name="x", datatype="FP32", shape=[1])
    x.contents.fp32_contents.append(1.0)
    for owner, parameters in (
        (message, request),
        (x, tensor),
        (message.outputs.add(name="y") if output else None, output),
    ):
        for name, value in (parameters or {}).items():
            kind = {bool: "bool", int: "int64", float: "double", str: "string"}[type(value)]
            setattr(owner.parameters[name], f"{kind}_param", value)
    return oip.decode_infer(message, LIMITS)


REFUSED = [
    ("request", {"sequence_id": 7}, "'sequence_id' of the request.*keep no state"),
    ("request", {"sequence_id": "a"}, "'sequence_id'"),
    ("request", {"sequence_start": True}, "'sequence_start'"),
    ("request", {"sequence_end": True}, "'sequence_end'"),
    ("request", {"temperature": 0.5}, "'temperature' of the request.*priority, timeout"),
    ("tensor", {"shared_memory_region": "r"}, "'shared_memory_region' of input 'x'.*binary data"),
    ("tensor", {"content_type": "np"}, "'content_type' of input 'x'"),
    ("output", {"classification": 3}, r"'classification' of output 'y'.*class_count"),
    ("output", {"shared_memory_byte_size": 8}, "'shared_memory_byte_size' of output 'y'"),
]


@pytest.mark.parametrize("decode", [over_rest, over_grpc])
@pytest.mark.parametrize(("owner", "parameters", "message"), REFUSED)
def test_a_parameter_that_is_not_supported_is_refused_by_name(
    decode: Any, owner: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message) as refusal:
        decode(**{owner: parameters})
    assert refusal.value.status == 400


@pytest.mark.parametrize("decode", [over_rest, over_grpc])
def test_an_extension_that_is_switched_off_is_no_reason_to_refuse(decode: Any) -> None:
    off = {"sequence_id": 0, "sequence_start": False, "sequence_end": False}
    request = decode(request=off | {"priority": 1, "timeout": 5}, output={"classification": 0})
    assert request.parameters["priority"] == 1 and request.parameters["timeout"] == 5


@pytest.mark.parametrize("value", [1, "true", None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(Refused, match="binary_data_output is true or false"):
        over_rest(request={"binary_data_output": value})
    with pytest.raises(Refused, match="binary_data is true or false"):
        over_rest(output={"binary_data": value})


@pytest.mark.parametrize("binary", [True, False])
def test_the_flags_of_the_binary_extension_are_read(binary: bool) -> None:
    assert over_rest(request={"binary_data_output": binary}).binary_output is binary
    assert over_rest(output={"binary_data": binary}).outputs[0].binary is binary


def test_the_public_client_sends_what_is_refused_under_these_names() -> None:
    http: Any = pytest.importorskip("tritonclient.http")
    x = http.InferInput("x", [1], "FP32")
    x.set_data_from_numpy(np.ones(1, np.float32))
    classes = http.InferRequestedOutput("y", class_count=3)
    client = http.InferenceServerClient
    for arguments, name in (
        ({"outputs": [classes]}, "classification"),
        ({"sequence_id": 7, "sequence_start": True}, "sequence_id"),
    ):
        body, json_bytes = client.generate_request_body([x], **arguments)
        with pytest.raises(Refused, match=name):
            decode_request(body, json_bytes=json_bytes, limits=LIMITS)
