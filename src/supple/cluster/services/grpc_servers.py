"""Changes to the gRPC servers of Ray Serve for which it has no settings: their methods, address,
port, message size and shutdown, and the retry of requests whose replica dies.

The retry is the counterpart of `supple.serve.again`: if no replica can be reached, the ingress
passes requests to Ray's proxy, which waits for one; if that replica dies too, the proxy retries.
"""

import asyncio
import functools
import inspect
import math
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import grpc
from ray.serve._private import proxy as ray_proxy

from supple.serve.attempts import SERIAL
from supple.serve.protocol.grpc import METHODS, SERVICE, STREAM

_PAUSE_S: Final = 0.25
_QUIET_S: Final = 1.0
"""After this time without a call, no client uses the stopping replica any more."""
_SHARED: Final = "grpc.so_reuseport"
_OWN_ERRORS: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
"""Status codes of the proxy if a replica died or none exists. To the proxy, a refusal by one of
Supple's replicas is a successful call."""


def add_servicer(_servicer: Any, server: Any) -> None:
    """Register the protocol's gRPC methods without decoding: replicas decode the messages."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(None) for name in METHODS}  # type: ignore[arg-type]
    handlers[STREAM] = grpc.stream_stream_rpc_method_handler(None)  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def retry_in_proxy(patience_s: float) -> None:
    """Patch Ray's gRPC proxy to retry for `patience_s` seconds while no replica has answered, and
    to report the error without Ray's message, which names processes and addresses."""
    plain: Any = ray_proxy.gRPCProxy.proxy_request
    if not getattr(plain, "retries", False):
        ray_proxy.gRPCProxy.proxy_request = retrying(plain, patience_s)


def retrying(plain: Any, patience_s: float, *, pause_s: float = _PAUSE_S) -> Any:
    """Wrap `plain`, a method that yields messages and then a status, for `retry_in_proxy`. A
    request without a serial number is sent once, because its replica deaths cannot be counted."""

    async def proxy_request(self: Any, proxy_request: Any) -> AsyncIterator[Any]:
        if proxy_request.stream or proxy_request.has_input_stream:  # what was read cannot be resent
            async for message in plain(self, proxy_request):
                yield message
            return
        numbered = SERIAL.decode() in dict(proxy_request.context.invocation_metadata() or ())
        end_s = time.monotonic() + (patience_s if numbered else 0.0)
        while True:
            messages = [message async for message in plain(self, proxy_request)]
            status = messages[-1]
            failed = status.is_error and status.code in _OWN_ERRORS
            if not failed or time.monotonic() >= end_s:
                break
            await asyncio.sleep(pause_s)
        if failed:
            messages[-1] = replace(
                status,
                code=grpc.StatusCode.UNAVAILABLE,
                message="no replica could answer; try again later",
            )
        for message in messages:
            yield message

    proxy_request.retries = True  # type: ignore[attr-defined]
    return proxy_request


def stop_when_quiet(quiet_s: float = _QUIET_S) -> None:
    """Patch Ray's gRPC servers of replicas to stop only after `quiet_s` seconds without a call,
    within the grace period of Ray. A stopping server cancels new calls, and a replaced HAProxy
    process sends calls to a replica that has left until its clients have moved."""
    from ray.serve._private import grpc_util

    plain: Any = grpc_util.gRPCGenericServer
    if not getattr(plain, "stops_when_quiet", False):
        grpc_util.gRPCGenericServer = stopping_when_quiet(plain, quiet_s)  # type: ignore[misc]


def stopping_when_quiet(plain: Any, quiet_s: float) -> Any:
    """Subclass `plain`, the class of Ray's gRPC servers, for `stop_when_quiet`."""

    class Server(plain):
        stops_when_quiet = True

        def __init__(self, service_handler_factory: Any, **named: Any) -> None:
            self._called_s = -math.inf

            def with_call_times(service_method: str, **named: Any) -> Any:
                handler = service_handler_factory(service_method=service_method, **named)
                if f"/{SERVICE}/" not in service_method or not inspect.iscoroutinefunction(handler):
                    return handler  # HAProxy's health checks never end; a stream has all the grace

                @functools.wraps(handler)
                async def timed(*arguments: Any) -> Any:
                    self._called_s = time.monotonic()
                    return await handler(*arguments)

                return timed

            super().__init__(with_call_times, **named)

        async def stop(self, grace: float | None) -> None:
            now_s = time.monotonic()
            end_s = now_s + (grace or 0.0)
            while (quiet_at_s := self._called_s + quiet_s) > now_s and now_s < end_s:
                await asyncio.sleep(min(quiet_at_s, end_s) - now_s)
                now_s = time.monotonic()
            await super().stop(None if grace is None else max(0.0, end_s - now_s))

    return Server


def listen_alone() -> None:
    """Patch Ray's gRPC servers to refuse a port on which another process listens: Ray then takes
    the next. Replicas of two services on one machine would share a port otherwise, and the kernel
    would give a call of one service to either."""
    from ray.serve._private import grpc_util

    plain: Any = grpc_util.gRPCGenericServer
    if not getattr(plain, "listens_alone", False):
        grpc_util.gRPCGenericServer = listening_alone(plain)  # type: ignore[misc]


def listening_alone(plain: Any) -> Any:
    """Subclass `plain`, the class of Ray's gRPC servers, for `listen_alone`."""

    class Server(plain):
        listens_alone = True

        def __init__(self, *given: Any, extra_options: Any = None, **named: Any) -> None:
            # Ray gives "0" for 0, and gRPC ignores a text where it expects a number.
            options = [(k, int(v) if k == _SHARED else v) for k, v in extra_options or ()]
            super().__init__(*given, extra_options=options, **named)

    return Server


def limit_messages(most_bytes: int) -> None:
    """Limit the size of messages to Ray's gRPC servers. Ray's own setting would also limit answers
    and Ray's internal messages."""
    from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS as OPTIONS

    received = "grpc.max_receive_message_length"
    OPTIONS[:] = [(k, most_bytes if k == received else v) for k, v in OPTIONS]


def listen_on_loopback() -> None:
    """Patch Ray's gRPC servers of replicas to listen on loopback instead of every interface."""
    from ray.serve._private import default_impl

    listen = default_impl.add_grpc_address
    if getattr(listen, "on_loopback", False):
        return

    def on_loopback(server: Any, address: str) -> None:
        listen(server, address.replace("[::]:", "127.0.0.1:"))

    on_loopback.on_loopback = True  # type: ignore[attr-defined]
    default_impl.add_grpc_address = on_loopback
    replica: Any = sys.modules.get("ray.serve._private.replica")
    if replica is not None:  # its port for calls between replicas, which are not used here
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: add_port(
            server, address.replace("[::]:", "127.0.0.1:")
        )
