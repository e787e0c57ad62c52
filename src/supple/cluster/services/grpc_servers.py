"""What is changed in the gRPC servers of Ray Serve, which it has no settings for: the methods they
know, where they listen, how large a message may be, when they stop, and requests whose replica
dies.

The counterpart of `supple.serve.again` for gRPC: where no replica can be reached, the ingress hands
requests to Ray's proxy, which waits for one; if that replica dies too, it is asked again.
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
from ray.serve._private import proxy as rays

from supple.serve.attempts import SERIAL
from supple.serve.protocol.grpc import METHODS, SERVICE

_PAUSE_S: Final = 0.25
_QUIET_S: Final = 1.0
"""Without a call for so long, nobody sends any more to a replica that leaves."""
_OWN_ERRORS: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
"""What the proxy says when a replica died or there is none. Replicas of ours never let a call fail:
their refusals are answers."""


def add_servicer(_servicer: Any, server: Any) -> None:
    """Register the protocol's gRPC methods; messages stay bytes, for the replica reads them."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(None) for name in METHODS}  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def ask_again(patience_s: float) -> None:
    """Let Ray's gRPC proxy ask again for `patience_s` seconds while its errors are its own, and
    tell of them without Ray's words, which name processes and addresses."""
    plain: Any = rays.gRPCProxy.proxy_request
    if not getattr(plain, "asks_again", False):
        rays.gRPCProxy.proxy_request = asking_again(plain, patience_s)


def asking_again(plain: Any, patience_s: float, *, pause_s: float = _PAUSE_S) -> Any:
    """`plain`, a method that yields messages and then a status, as `ask_again` wants it. A request
    without a serial number is asked once: nobody could tell that it is what kills the replicas."""

    async def proxy_request(self: Any, proxy_request: Any) -> AsyncIterator[Any]:
        if proxy_request.stream or proxy_request.has_input_stream:  # the protocol has none
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
                message="no replica could answer; ask again later",
            )
        for message in messages:
            yield message

    proxy_request.asks_again = True  # type: ignore[attr-defined]
    return proxy_request


def stop_when_quiet(quiet_s: float = _QUIET_S) -> None:
    """Let Ray's gRPC servers of replicas stop only after `quiet_s` seconds without a call, within
    the time Ray gives them. A server that stops cancels what arrives, and a process of HAProxy that
    was replaced sends calls to a replica that has left until its clients have moved."""
    from ray.serve._private import grpc_util

    plain: Any = grpc_util.gRPCGenericServer
    if not getattr(plain, "stops_when_quiet", False):
        grpc_util.gRPCGenericServer = stopping_when_quiet(plain, quiet_s)  # type: ignore[misc]


def stopping_when_quiet(plain: Any, quiet_s: float) -> Any:
    """A class like `plain`, Ray's gRPC server, that stops as `stop_when_quiet` says."""

    class Server(plain):
        stops_when_quiet = True

        def __init__(self, service_handler_factory: Any, **named: Any) -> None:
            self._called_s = -math.inf

            def noting_calls(service_method: str, **named: Any) -> Any:
                handler = service_handler_factory(service_method=service_method, **named)
                if f"/{SERVICE}/" not in service_method or not inspect.iscoroutinefunction(handler):
                    return handler  # HAProxy's health checks never end; the protocol has no streams

                @functools.wraps(handler)
                async def noted(*arguments: Any) -> Any:
                    self._called_s = time.monotonic()
                    return await handler(*arguments)

                return noted

            super().__init__(noting_calls, **named)

        async def stop(self, grace: float | None) -> None:
            now_s = time.monotonic()
            end_s = now_s + (grace or 0.0)
            while (quiet_at_s := self._called_s + quiet_s) > now_s and now_s < end_s:
                await asyncio.sleep(min(quiet_at_s, end_s) - now_s)
                now_s = time.monotonic()
            await super().stop(None if grace is None else max(0.0, end_s - now_s))

    return Server


def limit_messages(most_bytes: int) -> None:
    """Refuse messages to Ray's gRPC servers beyond so many bytes. Ray's one setting would limit
    answers and what Ray itself sends, too."""
    from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS as OPTIONS

    received = "grpc.max_receive_message_length"
    OPTIONS[:] = [(k, most_bytes if k == received else v) for k, v in OPTIONS]


def listen_on_loopback() -> None:
    """Ray's gRPC servers of replicas listen on every interface; here they do on loopback."""
    from ray.serve._private import default_impl

    listen = default_impl.add_grpc_address
    if getattr(listen, "on_loopback", False):
        return

    def on_loopback(server: Any, address: str) -> None:
        listen(server, address.replace("[::]:", "127.0.0.1:"))

    on_loopback.on_loopback = True  # type: ignore[attr-defined]
    default_impl.add_grpc_address = on_loopback
    replica: Any = sys.modules.get("ray.serve._private.replica")
    if replica is not None:  # and its port for other replicas, which ask it nothing here
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: add_port(
            server, address.replace("[::]:", "127.0.0.1:")
        )
