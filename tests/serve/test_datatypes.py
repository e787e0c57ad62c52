"""bfloat16, half and bytes from the request to the model and back, over REST and gRPC."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
import torch

from supple.core.spec import SpecError
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.models.tensor_spec import parse_tensor
from supple.serve.protocol import grpc as oip
from supple.serve.protocol.dtypes import BF16, Array
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import (
    InferRequest,
    RequestLimits,
    decode_request,
    encode_response,
)

X = np.asarray([[1.5, -2.0], [3.0, 0.0]], np.float32)
ANY = InferRequest(inputs={})


class Halves:
    """Returns its input as bfloat16 and as half."""

    inputs = {"x": "float32[2]"}  # noqa: RUF012
    outputs = {"bf16": "bfloat16[2]", "half": "float16[2]"}  # noqa: RUF012

    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"bf16": batch.to(torch.bfloat16), "half": batch.half()}


def answered(user: Any, **inputs: Array) -> dict[str, Array]:
    model = ServedModel(user, name="m")
    model.check(inputs)
    return model.predict(inputs)


def test_bfloat16_and_half_are_numbers_in_json() -> None:
    body, _ = encode_response(ANY, answered(Halves(), x=X), model="m", version="1")
    found = {o["name"]: (o["datatype"], o["data"]) for o in json.loads(body)["outputs"]}
    assert found == {"bf16": ("BF16", [1.5, -2, 3, 0]), "half": ("FP16", [1.5, -2, 3, 0])}


def test_bfloat16_and_half_are_two_bytes_each_as_binary_and_over_grpc() -> None:
    outputs = answered(Halves(), x=X)
    request = InferRequest(inputs={}, binary_output=True)
    body, json_bytes = encode_response(request, outputs, model="m", version="1")
    sizes = [o["parameters"]["binary_data_size"] for o in json.loads(body[:json_bytes])["outputs"]]
    assert sizes == [8, 8]
    message = oip.encode_infer(ANY, outputs, model="m", version="1")
    assert [o.datatype for o in message.outputs] == ["BF16", "FP16"]
    raw = b"".join(message.raw_output_contents)
    assert raw == body[json_bytes:]
    assert (np.frombuffer(raw[:8], BF16) == X.ravel()).all()
    assert (np.frombuffer(raw[8:], "<f2") == X.ravel()).all()


def test_bfloat16_may_be_returned_row_by_row() -> None:
    class Rows:
        def predict(self, batch: torch.Tensor) -> list[torch.Tensor]:
            return [row.sum().to(torch.bfloat16) for row in batch]

    found = answered(Rows(), x=X)["output"]
    assert found.dtype == BF16 and found.tolist() == [-0.5, 3.0]


def test_a_bfloat16_that_is_nan_is_a_fault_and_cannot_be_json() -> None:
    class Nan:
        def predict(self, batch: torch.Tensor) -> torch.Tensor:
            return (batch * float("nan")).to(torch.bfloat16)

    with pytest.raises(ModelFault, match="4 of 4 values that are NaN"):
        answered(Nan(), x=X)
    with pytest.raises(Refused, match="set binary_data"):
        encode_response(ANY, {"y": np.asarray([np.nan], BF16)}, model="m", version="1")


class Keeps:
    """Remembers the batch of its last call."""

    def __init__(self, declared: str | None = None) -> None:
        if declared is not None:
            self.inputs = {"x": declared}

    def predict(self, batch: torch.Tensor) -> Any:
        self.batch = batch
        return np.zeros(len(batch), np.float32)


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [("bfloat16[2]", torch.bfloat16), ("float32[2]", torch.float32), (None, torch.float32)],
)
def test_a_bfloat16_input_arrives_as_declared_and_else_as_float32(
    declared: str | None, dtype: torch.dtype
) -> None:
    user = Keeps(declared)
    answered(user, x=X.astype(BF16))
    assert user.batch.dtype == dtype and user.batch.float().tolist() == X.tolist()


def test_other_numbers_are_refused_for_a_bfloat16_input() -> None:
    with pytest.raises(Refused, match=r"is FP32\[2, 2\]; the model takes BF16\[n, 2\]"):
        answered(Keeps("bfloat16[2]"), x=X)
    with pytest.raises(Refused, match=r"is BF16\[2, 2\]; the model takes FP64\[n, 2\]"):
        answered(Keeps("float64[2]"), x=X.astype(BF16))


def test_a_bfloat16_output_that_is_declared_as_another_type_is_a_fault() -> None:
    class Wrong:
        outputs = {"y": "float32[2]"}  # noqa: RUF012

        def predict(self, batch: torch.Tensor) -> torch.Tensor:
            return batch.to(torch.bfloat16)

    with pytest.raises(ModelFault, match=r"is bfloat16\[2, 2\]; the class declares FP32\[n, 2\]"):
        answered(Wrong(), x=X)


def test_bfloat16_is_declared_like_any_type_and_float8_names_what_there_is() -> None:
    assert parse_tensor("bfloat16[3]", what="x") == (BF16, (3,))
    with pytest.raises(SpecError, match="float16, bfloat16, float32"):
        parse_tensor("float8[3]", what="x")


def test_bytes_that_are_not_utf8_are_refused_in_json_with_the_way_to_get_them() -> None:
    class Echo:
        def predict(self, batch: Any) -> Any:
            return batch

    raw = b"\x02\0\0\0a\xff"
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "s",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(raw)},
                }
            ]
        }
    ).encode()
    request = decode_request(head + raw, json_bytes=len(head), limits=RequestLimits())
    outputs = answered(Echo(), **request.inputs)
    with pytest.raises(Refused, match=r"bytes that are not UTF-8.*set binary_data") as refusal:
        encode_response(request, outputs, model="m", version="1")
    assert refusal.value.status == 406
    binary = InferRequest(inputs={}, binary_output=True)
    body, json_bytes = encode_response(binary, outputs, model="m", version="1")
    assert body[json_bytes:] == raw


@pytest.mark.parametrize("annotation", [None, torch.Tensor, "Tensor", "dict[str, torch.Tensor]"])
def test_a_predict_without_an_annotation_or_with_a_tensor_gets_tensors(annotation: Any) -> None:
    class Reads:
        def predict(self, batch):  # type: ignore[no-untyped-def]
            assert type(batch) is torch.Tensor
            return batch.mean(dim=1, keepdim=True)

        def stream(self, batch):  # type: ignore[no-untyped-def]
            yield batch.unsqueeze(1)

    if annotation is not None:
        Reads.predict.__annotations__["batch"] = annotation
    assert answered(Reads(), x=X)["output"].tolist() == [[-0.25], [1.5]]
    (part,) = ServedModel(Reads(), name="m").stream({"x": X})
    assert part["output"].shape == (2, 1, 2)


@pytest.mark.parametrize("annotation", [np.ndarray, "np.ndarray", Any, "dict[str, np.ndarray]"])
def test_a_predict_with_another_annotation_gets_arrays(annotation: Any) -> None:
    class Reads:
        def predict(self, batch: Any) -> Any:
            assert type(batch) is np.ndarray
            return batch

        def stream(self, batch: Any) -> Any:
            yield self.predict(batch)

    Reads.predict.__annotations__["batch"] = annotation
    Reads.stream.__annotations__["batch"] = annotation
    assert answered(Reads(), x=X)["output"].tolist() == X.tolist()
    assert len(list(ServedModel(Reads(), name="m").stream({"x": X}))) == 1


def test_strings_stay_arrays_beside_tensors() -> None:
    class Both:
        inputs = {"s": "bytes[]", "x": "float32[2]"}  # noqa: RUF012

        def predict(self, batch):  # type: ignore[no-untyped-def]
            assert batch["s"].tolist() == [b"a", b"b"]
            return batch["x"] * 2

    strings = np.asarray([b"a", b"b"], dtype=object)
    assert answered(Both(), s=strings, x=X)["output"].tolist() == (X * 2).tolist()


def test_requests_of_bfloat16_and_float32_share_no_batch() -> None:
    from supple.serve.executor import Executor

    class Doubles:
        inputs = {"x": "float32[2]"}  # noqa: RUF012

        def predict(self, batch: torch.Tensor) -> torch.Tensor:
            return batch * 2

    async def go() -> None:
        executor = Executor(ServedModel(Doubles(), name="m"), timeout_s=30.0)
        both = (executor.submit({"x": x}, 2) for x in (X, X.astype(BF16), X))
        assert [a["output"].tolist() for a in await asyncio.gather(*both)] == [(X * 2).tolist()] * 3
        executor.close()

    asyncio.run(go())
