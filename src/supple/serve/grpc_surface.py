"""The gRPC surface of one replica: the same checks, counts and answers as over HTTP.

A message is passed as the bytes that arrived, together with the context of the call. In a stream
(ModelStreamInfer) requests are computed while earlier ones wait for their answers, which leave in
the order of the requests. A model with `stream(batch)` answers each with several messages.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final, final

import grpc

from supple.serve.attempts import SERIAL
from supple.serve.meters import Meters
from supple.serve.protocol import grpc as oip
from supple.serve.protocol.parameters import EMPTY_FINAL, GRPC_REQUEST, flag
from supple.serve.protocol.refusal import Refused
from supple.serve.streams import CLIENT
from supple.serve.surface import Surface

_STATUS: Final[Mapping[int, grpc.StatusCode]] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MOST_AHEAD: Final = 32
"""Requests of one stream that are computed or wait while an earlier one is answered."""
_FINAL: Final = "triton_final_response"
"""Parameter of each message of a stream: whether it is the last one to its request."""


@final
class GrpcSurface:
    """gRPC interface of one model, on top of its HTTP interface `surface`."""

    def __init__(self, surface: Surface, meters: Meters) -> None:
        self._surface = surface
        self._meters = meters

    async def call(self, method: str, wire: bytes, context: Any) -> bytes:
        """Return the response to the message `wire` of `method`. If the request is refused, the
        response is empty, and `context` gets the status and the reason."""
        began_s = time.perf_counter()
        status = 500
        self._meters.num_arrived += method == "ModelInfer"
        try:
            answer = await self._answer(method, wire, context)
            status = 200
            return answer.SerializeToString()
        except Exception as error:
            refusal = self._surface.refusal(error)
            status = refusal.status
            context.set_code(_STATUS.get(status, grpc.StatusCode.INTERNAL))
            context.set_details(str(refusal)[:2000])
            return b""
        finally:
            if method == "ModelInfer":
                self._meters.answered(status, time.perf_counter() - began_s)

    async def _answer(self, method: str, wire: bytes, context: Any) -> Any:
        surface = self._surface
        if method not in ("ServerLive", "ServerReady"):
            self._authorize(context)
        parsed = oip.parse(method, wire, surface.settings.limits)
        make = oip.MESSAGES[f"{method}Response"]
        about = surface.description
        named = method in ("ModelReady", "ModelMetadata", "ModelConfig")
        if named or (method == "ModelStatistics" and parsed.name):  # without a name: all models
            about.check_name(parsed.name, parsed.version)
        match method:
            case "ServerLive":
                return make(live=True)
            case "ServerReady" | "ModelReady":
                return make(ready=surface.stuck is None)
            case "ServerMetadata":
                return make(**about.server_metadata())
            case "ModelMetadata":
                return make(**about.model_metadata())
            case "ModelConfig":
                return make(config=about.model_config())
            case "ModelStatistics":
                return make(model_stats=[await surface.statistics()])
            case "RepositoryIndex":
                return make(models=about.repository_index(reason=surface.stuck))
            case _:
                about.check_name(parsed.model_name, parsed.model_version)
                with surface.recorded(_metadata(context, SERIAL)) as serial:
                    request = oip.decode_infer(parsed, surface.settings.limits)
                outputs = await surface.infer(request, serial)
                return self._encoded(request, outputs)

    def _authorize(self, context: Any) -> None:
        if not self._surface.authorized(_metadata(context, b"authorization") or b""):
            raise Refused("the authorization metadata has no known bearer token", 401)

    def _encoded(self, request: Any, outputs: Any) -> Any:
        about = self._surface.description
        return oip.encode_infer(request, outputs, model=about.name, version=about.version)

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Yield the answers to `requests` in their order, as ModelStreamInferResponse messages. A
        request that is refused gets a message with the reason, and the stream goes on."""
        try:
            self._authorize(context)
        except Refused as refusal:
            context.set_code(_STATUS[refusal.status])
            context.set_details(str(refusal))
            return
        client = _metadata(context, CLIENT)
        ahead: asyncio.Queue[AsyncIterator[Any] | None] = asyncio.Queue(_MOST_AHEAD)
        computing: set[asyncio.Task[Any]] = set()
        reading = asyncio.ensure_future(self._read(requests, ahead, computing, client))
        try:
            while (answers := await ahead.get()) is not None:
                async for answer in answers:
                    yield answer.SerializeToString()
        finally:
            for task in (reading, *computing):
                task.cancel()

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        ahead: "asyncio.Queue[AsyncIterator[Any] | None]",
        computing: set[asyncio.Task[Any]],
        client: bytes | None,
    ) -> None:
        """Put the answers to each request into `ahead`, and None at the end. Tasks that compute an
        answer are in `computing`."""
        with contextlib.suppress(Exception):  # of the connection: the client has left
            async for wire in requests:
                if self._surface.streams_parts:
                    await ahead.put(self._parts(wire, client))
                    continue
                task = asyncio.ensure_future(self._single(wire))
                computing.add(task)
                task.add_done_callback(computing.discard)
                await ahead.put(_one(task))
        await ahead.put(None)

    async def _single(self, wire: bytes) -> Any:
        """Return the message that answers one request of a model without `stream(batch)`."""
        began_s = time.perf_counter()
        status, request_id = 500, ""
        self._meters.num_arrived += 1
        try:
            parsed = oip.parse("ModelInfer", wire, self._surface.settings.limits)
            request_id = parsed.id[:1024]
            request = self._decoded(parsed)
            answer = self._encoded(request, await self._surface.infer(request))
            status = 200
            return _streamed(answer, final=True)
        except Exception as error:
            refusal = self._surface.refusal(error)
            status = refusal.status
            return _failed(refusal, request_id)
        finally:
            self._meters.answered(status, time.perf_counter() - began_s)

    async def _parts(self, wire: bytes, client: bytes | None) -> AsyncIterator[Any]:
        """Yield the messages that answer one request of a model with `stream(batch)`."""
        request_id = ""
        try:
            parsed = oip.parse("ModelInfer", wire, self._surface.settings.limits)
            request_id = parsed.id[:1024]
            request = self._decoded(parsed)
            with_end = flag(request.parameters, EMPTY_FINAL)
            parts = self._surface.parts(request, client, supported=(EMPTY_FINAL,))
            async with aclosing(parts):
                async for outputs in parts:
                    yield _streamed(self._encoded(request, outputs), final=False)
            if with_end:
                about = self._surface.description
                end = oip.MESSAGES["ModelInferResponse"]
                yield _streamed(
                    end(model_name=about.name, model_version=about.version, id=request_id),
                    final=True,
                )
        except Exception as error:
            yield _failed(self._surface.refusal(error), request_id)

    def _decoded(self, parsed: Any) -> Any:
        self._surface.description.check_name(parsed.model_name, parsed.model_version)
        return oip.decode_infer(
            parsed, self._surface.settings.limits, supported=(*GRPC_REQUEST, EMPTY_FINAL)
        )


async def _one(task: "asyncio.Task[Any]") -> AsyncIterator[Any]:
    yield await task


def _streamed(answer: Any, *, final: bool) -> Any:
    answer.parameters[_FINAL].bool_param = final
    return oip.MESSAGES["ModelStreamInferResponse"](infer_response=answer)


def _failed(refusal: Refused, request_id: str) -> Any:
    answer = oip.MESSAGES["ModelInferResponse"](id=request_id)
    answer.parameters[_FINAL].bool_param = True
    return oip.MESSAGES["ModelStreamInferResponse"](
        error_message=str(refusal)[:2000], infer_response=answer
    )


def _metadata(context: Any, name: bytes) -> bytes | None:
    for key, value in context.invocation_metadata():
        if key == name.decode():
            return value if isinstance(value, bytes) else value.encode()
    return None
