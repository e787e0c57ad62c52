"""Calls over gRPC are checked, counted and answered as requests over HTTP are. Nothing listens."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from supple.serve.executor import Executor
from supple.serve.grpc_surface import GrpcSurface
from supple.serve.meters import Meters
from supple.serve.models.model import ServedModel
from supple.serve.protocol import grpc as oip
from supple.serve.surface import Surface, SurfaceSettings

TOKEN = (("authorization", "Bearer known"),)


class Doubles:
    inputs = {"x": "float32[2]"}  # noqa: RUF012
    outputs = {"y": "float32[2]"}  # noqa: RUF012

    def predict(self, batch: Any) -> Any:
        if (batch < 0).any():
            raise ValueError("SECRET of the author")
        return batch * 2


class Context:
    """What a call is told of, as gRPC's own context keeps it."""

    def __init__(self, metadata: Any) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> Any:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def called(method: str, message: Any, metadata: Any = TOKEN) -> tuple[Any, Context, Meters]:
    """The answer (None: refused), the context, and what was counted."""

    async def go() -> tuple[Any, Context, Meters]:
        model = ServedModel(Doubles(), name="m")
        executor = Executor(model, timeout_s=30.0)
        meters = Meters(model="m", replica="r")
        surface = Surface(model, executor, meters, SurfaceSettings(tokens=("known",)))
        context = Context(metadata)
        wire = await GrpcSurface(surface, meters).call(method, message.SerializeToString(), context)
        executor.close()
        made = None if context.code else oip.MESSAGES[f"{method}Response"].FromString(wire)
        return made, context, meters

    return asyncio.run(go())


def infer(*numbers: float, name: str = "m") -> Any:
    asked: Any = oip.MESSAGES["ModelInferRequest"](model_name=name)
    tensor = asked.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend(numbers)
    return asked


def test_an_inference_is_answered_and_counted() -> None:
    answer, _, meters = called("ModelInfer", infer(1.0, 2.0))
    assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [2.0, 4.0]
    assert meters.num_arrived == 1
    assert 'status="200"} 1.0\n' in meters.text().decode()


@pytest.mark.parametrize(
    ("message", "metadata", "code", "told"),
    [
        (infer(1.0, 2.0), (), grpc.StatusCode.UNAUTHENTICATED, "no known bearer token"),
        (infer(1.0, 2.0, name="other"), TOKEN, grpc.StatusCode.NOT_FOUND, "no model 'other'"),
        (infer(1.0), TOKEN, grpc.StatusCode.INVALID_ARGUMENT, "needs 2 elements"),
        (infer(-1.0, 2.0), TOKEN, grpc.StatusCode.INTERNAL, "the model failed on this request"),
    ],
)
def test_what_is_refused_says_why_and_never_what_the_author_said(
    message: Any, metadata: Any, code: grpc.StatusCode, told: str
) -> None:
    answer, context, meters = called("ModelInfer", message, metadata)
    assert answer is None and context.code is code
    assert 'status="200"' not in meters.text().decode()
    assert told in context.details and "SECRET" not in context.details


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady"])
def test_health_needs_no_token(method: str) -> None:
    answer, _, meters = called(method, oip.MESSAGES[f"{method}Request"](), metadata=())
    assert answer.live if method == "ServerLive" else answer.ready
    assert meters.num_arrived == 0


def test_what_the_model_takes_is_told_to_who_has_the_token() -> None:
    asked = oip.MESSAGES["ModelMetadataRequest"](name="m")  # type: ignore[call-arg]
    answer, _, _ = called("ModelMetadata", asked)
    assert [(t.name, t.datatype, [*t.shape]) for t in answer.inputs] == [("x", "FP32", [-1, 2])]
    _, context, _ = called("ModelMetadata", asked, metadata=())
    assert context.code is grpc.StatusCode.UNAUTHENTICATED
