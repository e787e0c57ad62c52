"""The gRPC surface of one replica: the same checks, counts and answers as over HTTP.

A message is passed as the bytes that arrived, together with the context of the call.
"""

import time
from collections.abc import Mapping
from typing import Any, Final, final

import grpc

from supple.serve.attempts import SERIAL
from supple.serve.meters import Meters
from supple.serve.protocol import grpc as oip
from supple.serve.protocol.refusal import Refused
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
        live = method in ("ServerLive", "ServerReady")
        if not live and not surface.authorized(_metadata(context, b"authorization") or b""):
            raise Refused("the authorization metadata has no known bearer token", 401)
        parsed = oip.parse(method, wire, surface.settings.limits)
        make = oip.MESSAGES[f"{method}Response"]
        match method:
            case "ServerLive":
                return make(live=True)
            case "ServerReady":
                return make(ready=surface.stuck is None)
            case "ModelReady":
                surface.check_name(parsed.name, parsed.version)
                return make(ready=surface.stuck is None)
            case "ServerMetadata":
                return make(**surface.server_metadata())
            case "ModelMetadata":
                surface.check_name(parsed.name, parsed.version)
                return make(**surface.model_metadata())
            case _:
                surface.check_name(parsed.model_name, parsed.model_version)
                with surface.recorded(_metadata(context, SERIAL)) as serial:
                    request = oip.decode_infer(parsed, surface.settings.limits)
                outputs = await surface.infer(request, serial)
                return oip.encode_infer(
                    request, outputs, model=surface.name, version=surface.settings.version
                )


def _metadata(context: Any, name: bytes) -> bytes | None:
    for key, value in context.invocation_metadata():
        if key == name.decode():
            return value if isinstance(value, bytes) else value.encode()
    return None
