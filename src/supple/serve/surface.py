"""The HTTP surface of one replica: an ASGI application for the Open Inference Protocol v2.

An inference takes few steps: match the path, check the token, decode, batch, encode. All other
paths are entries of a table. Responses without binary tensors are JSON. An error is
`{"error": "..."}` with an HTTP status.
"""

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final

from supple.core.service.queue import DEFAULT_PRIORITY, LAST_PRIORITY
from supple.serve.again import ANSWERED
from supple.serve.attempts import SERIAL, Attempts, parse_serial
from supple.serve.meters import Meters, merge
from supple.serve.models.answers import Outputs
from supple.serve.models.faults import FaultLog, ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.models.tensor_spec import TensorSpec
from supple.serve.pages import openapi, page
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.parameters import STREAM_REQUEST, refuse_unsupported
from supple.serve.protocol.refusal import Refused, refuse
from supple.serve.protocol.rest import InferRequest, RequestLimits, decode_request, encode_response
from supple.serve.streams import CLIENT, Leaving, Streams

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

EXTENSIONS: Final = ("binary_tensor_data", "generate_stream")
_HEAD_LENGTH: Final = b"inference-header-content-length"
_PROMETHEUS: Final = b"text/plain; version=0.0.4"
_JSON: Final[tuple[bytes, bytes]] = (b"content-type", b"application/json")
_LONGEST_US: Final = 3_600_000_000  # largest `timeout` parameter: one hour in microseconds
_BODY_S: Final = 300.0
"""Seconds to receive a body that is larger than the ingress buffer."""
_MOST_HALF_READ: Final = 16
"""Memory for incomplete bodies, in multiples of `max_body_bytes`."""
_OWN_FAULT: Final = "the server failed on this request"
OWN_METRICS: Final = "/metrics/replica"
"""Path of the metrics of this replica; `/metrics` has those of all replicas."""
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
        all_metrics: Callable[[], Awaitable[Sequence[bytes]]] | None = None,
        attempts: Attempts | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`all_metrics` fetches the metrics pages of all replicas; None: there is only this one.
        `attempts` records the requests being computed. `now` is the clock for body timeouts."""
        self._now = now
        self._model = model
        self._all_metrics = all_metrics
        self._answers = answers
        self._meters = meters
        self.settings = settings
        self._half_read_bytes = 0
        self._faults = FaultLog(logging.getLogger("ray.serve"))
        self.streams = Streams()
        self._attempts = attempts
        self._tokens = [f"Bearer {token}".encode() for token in settings.tokens]
        names = (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{settings.version}")
        self._infer_paths = frozenset(f"{name}/infer" for name in names)
        self._stream_paths = frozenset(f"{name}/generate_stream" for name in names)
        self._gets: dict[str, Callable[[], tuple[int, bytes, bytes]]] = {
            "/v2/health/live": lambda: _json({"live": True}),
            "/v2/health/ready": self._ready,
            "/v2": lambda: _json(self.server_metadata()),
            OWN_METRICS: lambda: (200, meters.text(), _PROMETHEUS),
            "/openapi.json": lambda: _json(openapi(model, settings.version)),
            "/docs": lambda: (200, page(model, settings.version), b"text/html; charset=utf-8"),
            **{name: lambda: _json(self.model_metadata()) for name in names},
            **{f"{name}/ready": self._ready for name in names},
        }

    def server_metadata(self) -> dict[str, Any]:
        """The response to `GET v2`."""
        return {"name": "supple", "version": self.settings.version, "extensions": [*EXTENSIONS]}

    def model_metadata(self) -> dict[str, Any]:
        """The response to `GET v2/models/NAME`; lists are empty for undeclared tensors."""
        return {
            "name": self._model.name,
            "versions": [self.settings.version],
            "platform": "supple",
            "inputs": [_described(spec) for spec in self._model.inputs],
            "outputs": [_described(spec) for spec in self._model.outputs],
        }

    def check_name(self, name: str, version: str = "") -> None:
        """Raise `Refused` (404) unless the served model has this name and version."""
        if name != self._model.name or version not in ("", self.settings.version):
            requested = f"{name[:80]!r}" + (f" version {version[:80]!r}" if version else "")
            refuse(
                f"no model {requested}; {self._model.name!r} version {self.settings.version} is "
                "served here",
                404,
            )

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
        began_s = time.perf_counter()
        path: str = scope["path"]
        headers = dict(scope["headers"])
        status = 500
        try:
            if not self.authorized(headers.get(b"authorization", b"")) and path not in _OPEN:
                raise Refused("the Authorization header has no known bearer token", 401)
            if path in self._infer_paths:
                status = await self._infer(scope, headers, receive, send)
            elif path in self._stream_paths:
                status = await self._stream(scope, headers, receive, send)
            elif path == "/metrics":
                status = await self._metrics(scope["method"], send)
            else:
                status = await self._get(scope["method"], path, send)
        except Exception as error:
            refusal = self.refusal(error)
            status = refusal.status
            await _refusal(send, refusal)
        finally:
            if path in self._infer_paths:
                self._meters.answered(status, time.perf_counter() - began_s)

    async def _infer(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> int:
        self._meters.num_arrived += 1
        body = await self._body(scope, headers, receive)
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
        await _send(send, 200, content, extra)
        return 200

    async def _stream(
        self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> int:
        if not self._model.streams:
            refuse(f"the model {self._model.name!r} has no stream(self, batch)", 501)
        body = await self._body(scope, headers, receive)
        with self.recorded(headers.get(SERIAL)):
            request = self._decoded(body, headers)
            refuse_unsupported(request.parameters, STREAM_REQUEST, "a stream")
            if request.binary_output or any(wanted.binary for wanted in request.outputs):
                refuse("events are text: leave binary data out, or use ModelStreamInfer of gRPC")
            self._model.check(request.inputs)
            return await self._send_parts(request, headers.get(CLIENT), send)

    async def _send_parts(self, request: InferRequest, client: bytes | None, send: Send) -> int:
        leaving = Leaving()
        parts = self.streams.parts(self._model.stream(request.inputs, leaving), client, leaving)
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

    async def _get(self, method: str, path: str, send: Send) -> int:
        found = self._gets.get(path.rstrip("/") if path != "/" else path)
        if found is None:
            parts = path.split("/")
            if path.startswith("/v2/models/") and len(parts) > 3:
                versioned = len(parts) > 5 and parts[4] == "versions"
                self.check_name(parts[3], parts[5] if versioned else "")
            refuse(f"no resource at {path[:200]}; GET /docs lists all of them", 404)
        if method not in ("GET", "HEAD"):
            refuse(f"{path} is read with GET, not {method}", 405)
        status, content, kind = found()
        await _send(send, status, content, [(b"content-type", kind)])
        return status

    async def _metrics(self, method: str, send: Send) -> int:
        if method not in ("GET", "HEAD"):
            refuse(f"/metrics is read with GET, not {method}", 405)
        pages = () if self._all_metrics is None else await self._all_metrics()
        content = merge(pages or [self._meters.text()])
        await _send(send, 200, content, [(b"content-type", _PROMETHEUS)])
        return 200

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def stuck(self) -> str | None:
        """The reason why this replica must be replaced; None if it works."""
        return self._answers.stuck or self.streams.stuck

    def _ready(self) -> tuple[int, bytes, bytes]:
        if self.stuck is not None:
            return _json({"error": self.stuck}, 503)
        return _json({"ready": True, "name": self._model.name})

    def _decoded(self, body: bytes, headers: Mapping[bytes, bytes]) -> InferRequest:
        return decode_request(body, json_bytes=_head_length(headers), limits=self.settings.limits)

    async def _body(self, scope: Scope, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        if scope["method"] != "POST":
            refuse(f"{scope['path']} takes POST, not {scope['method']}", 405)
        if headers.get(b"content-encoding", b"identity") != b"identity":
            refuse("compressed bodies are not accepted; send it uncompressed", 415)
        most = self.settings.limits.max_body_bytes
        limit = f"and at most {most} are accepted (--max-body)"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            refuse(f"the body has {int(length)} bytes, {limit}", 413)
        message = await receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            if len(body) > most:
                refuse(f"the body has {len(body)} bytes, {limit}", 413)
            return body
        chunks: list[bytes] = []
        size = 0
        end_s = self._now() + _BODY_S
        try:
            while message["type"] == "http.request":
                chunk = message.get("body", b"")
                size += len(chunk)
                self._half_read_bytes += len(chunk)
                if size > most:
                    refuse(f"the body has more than {size - len(chunk)} bytes, {limit}", 413)
                if self._half_read_bytes > _MOST_HALF_READ * most:
                    raise Refused("too many large requests are being read; try again", 503, 1.0)
                if self._now() > end_s:
                    refuse(f"the body was not complete within {_BODY_S:g} s", 408)
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
                message = await receive()
            raise asyncio.CancelledError  # the client left
        finally:
            self._half_read_bytes -= size


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


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _head_length(headers: Mapping[bytes, bytes]) -> int | None:
    length = headers.get(_HEAD_LENGTH)
    if length is None:
        return None
    if not length.isdigit() or len(length) > 12:
        refuse("Inference-Header-Content-Length is not a whole number")
    return int(length)


def _json(document: Any, status: int = 200) -> tuple[int, bytes, bytes]:
    return status, json.dumps(document).encode(), b"application/json"


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [*headers, ANSWERED]}


async def _send(
    send: Send, status: int, content: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    length = (b"content-length", str(len(content)).encode())
    await send(_start(status, [*headers, length]))
    await send({"type": "http.response.body", "body": content})


async def _refusal(send: Send, error: Refused) -> None:
    headers: list[tuple[bytes, bytes]] = [_JSON]
    if error.retry_after_s is not None:
        # The standard header has whole seconds; clients use retry-after-ms by convention.
        headers.append((b"retry-after", str(math.ceil(error.retry_after_s)).encode()))
        headers.append((b"retry-after-ms", str(math.ceil(error.retry_after_s * 1e3)).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await _send(send, error.status, json.dumps({"error": str(error)}).encode(), headers)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
