"""The HTTP surface of one replica: an ASGI application for the Open Inference Protocol v2.

An inference takes few steps: match the path, check the token, decode, batch, encode. All other
paths are routes of a Starlette application, `supple.serve.about.cold`. Responses without binary
tensors are JSON. An error is `{"error": "..."}` with an HTTP status.
"""

import contextlib
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from supple.core.service.queue import DEFAULT_PRIORITY, LAST_PRIORITY
from supple.serve.about.cold import ColdRoutes, Pages
from supple.serve.about.description import Description
from supple.serve.again import ANSWERED
from supple.serve.attempts import SERIAL, Attempts, parse_serial
from supple.serve.bodies import Bodies, Receive
from supple.serve.meters import Meters
from supple.serve.models.answers import Outputs
from supple.serve.models.faults import FaultLog, ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.codings import ACCEPTED, compress
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.parameters import STREAM_REQUEST, refuse_unsupported
from supple.serve.protocol.refusal import Refused, refuse
from supple.serve.protocol.rest import InferRequest, RequestLimits, decode_request, encode_response
from supple.serve.streams import CLIENT, Leaving, Streams

Scope = Mapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_HEAD_LENGTH: Final = b"inference-header-content-length"
_JSON: Final[tuple[bytes, bytes]] = (b"content-type", b"application/json")
_LONGEST_US: Final = 3_600_000_000  # largest `timeout` parameter: one hour in microseconds
_OWN_FAULT: Final = "the server failed on this request"
_OPEN: Final = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no token: health probes have none."""


class Answers(Protocol):
    """Interface of the executor that runs the model for concurrent requests."""

    @property
    def stuck(self) -> str | None:
        """The reason why this replica can answer no more requests; None if it can."""
        ...

    async def submit(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        *,
        priority: int = DEFAULT_PRIORITY,
        within_s: float | None = None,
        serial: int | None = None,
    ) -> Outputs:
        """Return the outputs for one validated request. Raises `ModelFault` or `Refused`."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SurfaceSettings:
    """Version, bearer tokens and request limits of a service. Without `tokens`, access is open."""

    version: str = "1"
    tokens: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages a browser lets call the service; `*`: all; empty: no CORS."""
    limits: RequestLimits = field(default_factory=RequestLimits)


@final
class Surface:
    """HTTP interface of one model, an ASGI application: `surface(scope, receive, send)`."""

    def __init__(
        self,
        model: ServedModel,
        answers: Answers,
        meters: Meters,
        settings: SurfaceSettings,
        *,
        all_pages: Pages | None = None,
        attempts: Attempts | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`all_pages` fetches a page from all replicas; None: there is only this one. `attempts`
        records the requests being computed. `now` is the clock for body timeouts."""
        self._model = model
        self._answers = answers
        self._meters = meters
        self.settings = settings
        self.description = Description(model, settings.version)
        self._faults = FaultLog(logging.getLogger("ray.serve"))
        self.streams = Streams()
        self._attempts = attempts
        self.bodies = Bodies(settings.limits.max_body_bytes, now)
        self._tokens = [f"Bearer {token}".encode() for token in settings.tokens]
        names = (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{settings.version}")
        self._infer_paths = frozenset(f"{name}/infer" for name in names)
        self._stream_paths = frozenset(f"{name}/generate_stream" for name in names)
        self._cold = ColdRoutes(
            model,
            self.description,
            meters,
            stuck=lambda: self.stuck,
            all_pages=all_pages,
            answer_error=lambda error: _error_response(self.refusal(error)),
        )
        self.statistics = self._cold.statistics
        self._cors = _with_cors(self._http, settings.cors_origins)

    def refusal(self, error: Exception) -> Refused:
        """Convert `error` to a `Refused` that is safe to send: a client error is returned as it is,
        any other error becomes a short text and the error number in the log."""
        if isinstance(error, Refused):
            return error
        message = error.for_client if isinstance(error, ModelFault) else _OWN_FAULT
        return Refused(f"{message} (error {self._faults.number(error)})", 500)

    def authorized(self, authorization: bytes) -> bool:
        """Whether the value of an Authorization header is a valid token of this service."""
        return not self._tokens or any(
            hmac.compare_digest(authorization, token) for token in self._tokens
        )

    async def infer(self, request: InferRequest, serial: int | None = None) -> Outputs:
        """Return the outputs of one request, computed in a batch with others. `serial` is its
        serial number if the ingress resends it when this process ends."""
        rows = self._model.check(request.inputs)
        for wanted in request.outputs:
            if self._model.outputs and wanted.name not in {s.name for s in self._model.outputs}:
                refuse(f"the model has no output {wanted.name[:80]!r}")
        return await self._answers.submit(
            request.inputs,
            rows,
            priority=_priority(request),
            within_s=_allowed_s(request),
            serial=serial,
        )

    @contextmanager
    def recorded(self, header: bytes | None) -> Iterator[int | None]:
        """Yield the serial number in `header`; the request counts as being computed in the block.
        Raises `Refused` (500) for a request that killed too many replicas."""
        serial = None if header is None else parse_serial(header)
        if serial is None or self._attempts is None:
            yield None
            return
        self._attempts.refuse_deadly(serial)
        self._attempts.begin(serial)
        try:
            yield serial
        finally:
            self._attempts.pause(serial)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": f"{scope['type']}.close"})  # refuses the connection
            return
        await (self._http if self._cors is None else self._cors)(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began_s = time.perf_counter()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        status = 500
        try:
            if not self.authorized(headers.get(b"authorization", b"")) and path not in _OPEN:
                raise Refused("the Authorization header has no known bearer token", 401)
            if scope["method"] == "POST" and path in self._infer_paths:
                status = await self._infer(headers, receive, send)
            elif scope["method"] == "POST" and path in self._stream_paths:
                status = await self._stream(headers, receive, send)
            else:
                await self._other(scope, receive, send)
                path = ""
        except Exception as error:
            refusal = self.refusal(error)
            status = refusal.status
            await _refusal(send, refusal)
        finally:
            if path in self._infer_paths:
                self._meters.answered(status, time.perf_counter() - began_s)

    async def _infer(self, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> int:
        self._meters.num_arrived += 1
        body = await self.bodies.read(headers, receive)
        with self.recorded(headers.get(SERIAL)) as serial:
            request = self._decoded(body, headers)
        outputs = await self.infer(request, serial)
        content, json_bytes = encode_response(
            request, outputs, model=self._model.name, version=self.settings.version
        )
        extra: list[tuple[bytes, bytes]] = [_JSON]
        if json_bytes is not None:
            extra = [
                (b"content-type", b"application/octet-stream"),
                (_HEAD_LENGTH, str(json_bytes).encode()),
            ]
        accept = headers.get(b"accept-encoding")
        if accept is not None:
            content, coding = await compress(content, accept)
            if coding is not None:
                extra += [(b"content-encoding", coding), (b"vary", b"accept-encoding")]
        await _send(send, 200, content, extra)
        return 200

    def parts(
        self, request: InferRequest, client: bytes | None, *, supported: tuple[str, ...]
    ) -> AsyncGenerator[Outputs, None]:
        """Return the parts of a streamed answer; close the generator if the client leaves. `client`
        is its address, None if it is unknown; `supported` are the parameters it may set."""
        if not self._model.streams:
            refuse(f"the model {self._model.name!r} has no stream(self, batch)", 501)
        refuse_unsupported(request.parameters, supported, "a stream")
        self._model.check(request.inputs)
        leaving = Leaving()
        return self.streams.parts(self._model.stream(request.inputs, leaving), client, leaving)

    async def _stream(self, headers: Mapping[bytes, bytes], receive: Receive, send: Send) -> int:
        body = await self.bodies.read(headers, receive)
        with self.recorded(headers.get(SERIAL)):
            request = self._decoded(body, headers)
            if request.binary_output or any(wanted.binary for wanted in request.outputs):
                refuse("events are text: leave binary data out, or use ModelStreamInfer of gRPC")
            parts = self.parts(request, headers.get(CLIENT), supported=STREAM_REQUEST)
            return await self._send_parts(request, parts, send)

    async def _send_parts(
        self, request: InferRequest, parts: AsyncGenerator[Outputs, None], send: Send
    ) -> int:
        started = False
        try:
            async with aclosing(parts):
                async for outputs in parts:
                    content, _ = encode_response(
                        request, outputs, model=self._model.name, version=self.settings.version
                    )
                    if not started:
                        await send(_start(200, [(b"content-type", b"text/event-stream")]))
                        started = True
                    event = b"data: " + content + b"\n\n"
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not started:
                raise
            content = json.dumps({"error": str(self.refusal(error))}).encode()
            event = b"data: " + content + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not started:
            await send(_start(200, [(b"content-type", b"text/event-stream")]))
        await send({"type": "http.response.body", "body": b""})
        return 200

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is no inference of the served model."""
        head = scope["method"] == "HEAD"

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], ANSWERED]
            elif head:
                message["body"] = b""
            await send(message)  # type: ignore[arg-type]

        path = scope["path"].rstrip("/") or "/"
        # Starlette answers an unexpected error with 500, and raises it again for its server's log.
        with contextlib.suppress(Exception):
            await self._cold.app({**scope, "path": path, "raw_path": None}, receive, marked)

    @property
    def streams_parts(self) -> bool:
        """Whether the model has `stream(batch)`."""
        return self._model.streams

    @property
    def stuck(self) -> str | None:
        """The reason why this replica must be replaced; None if it works."""
        return self._answers.stuck or self.streams.stuck

    def _decoded(self, body: bytes, headers: Mapping[bytes, bytes]) -> InferRequest:
        return decode_request(body, json_bytes=_head_length(headers), limits=self.settings.limits)


def _priority(request: InferRequest) -> int:
    """Return `parameters.priority`, with the meaning it has in other servers of the protocol: 1 is
    answered first; 0, or no parameter, is the default."""
    priority = request.parameters.get("priority", 0)
    if type(priority) is not int or not 0 <= priority <= LAST_PRIORITY:
        refuse(f"the parameter priority is a whole number from 0 to {LAST_PRIORITY}")
    return priority or DEFAULT_PRIORITY


def _allowed_s(request: InferRequest) -> float | None:
    """Return `parameters.timeout` in seconds (microseconds in the request); None: the service's
    SLO applies."""
    timeout_us = request.parameters.get("timeout", 0)
    if type(timeout_us) is not int or not 0 <= timeout_us <= _LONGEST_US:
        refuse(f"the parameter timeout is a whole number of microseconds up to {_LONGEST_US}")
    return timeout_us / 1e6 if timeout_us else None


def _head_length(headers: Mapping[bytes, bytes]) -> int | None:
    length = headers.get(_HEAD_LENGTH)
    if length is None:
        return None
    if not length.isdigit() or len(length) > 12:
        refuse("Inference-Header-Content-Length is not a whole number")
    return int(length)


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [*headers, ANSWERED]}


async def _send(
    send: Send, status: int, content: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    length = (b"content-length", str(len(content)).encode())
    await send(_start(status, [*headers, length]))
    await send({"type": "http.response.body", "body": content})


async def _refusal(send: Send, error: Refused) -> None:
    await _send(send, error.status, _error_body(error), [_JSON, *_error_headers(error)])


def _error_response(error: Refused) -> Response:
    response = Response(_error_body(error), error.status, media_type="application/json")
    response.raw_headers += _error_headers(error)
    return response


def _error_body(error: Refused) -> bytes:
    return json.dumps({"error": str(error)}).encode()


def _error_headers(error: Refused) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        # The standard header has whole seconds; clients use retry-after-ms by convention.
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(error.retry_after_s * 1e3)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.status == 415:
        headers.append((b"accept-encoding", ACCEPTED))
    return headers


def _with_cors(app: Any, origins: tuple[str, ...]) -> Any:
    """Wrap `app` to answer browsers that ask for a page of `origins`; None without origins."""
    if not origins:
        return None
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "OPTIONS", "POST"),
        allow_headers=("*",),
        expose_headers=(_HEAD_LENGTH.decode(), "retry-after", "retry-after-ms"),
    )


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
