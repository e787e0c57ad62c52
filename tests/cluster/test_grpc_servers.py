"""The errors of Ray's gRPC proxy are not answers. No Ray runs."""

import asyncio
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own
    from ray.serve._private.grpc_util import gRPCGenericServer
    from ray.serve._private.proxy_request_response import ResponseStatus

    from supple.cluster.services.grpc_servers import (
        add_servicer,
        listening_alone,
        retrying,
        stopping_when_quiet,
    )
    from supple.serve.protocol.grpc import SERVICE

OK = ResponseStatus(code=grpc.StatusCode.OK)
NUMBERED = (("x-supple-serial", "1"),)


def failed(code: grpc.StatusCode) -> ResponseStatus:
    return ResponseStatus(code=code, is_error=True, message="pid: 7 ip: 10.0.0.1")


DIED = failed(grpc.StatusCode.INTERNAL)
NONE_THERE = failed(grpc.StatusCode.UNAVAILABLE)


class Proxy:
    """Answers with the next of `outcomes`: what it yields before its status, and that."""

    def __init__(self, *outcomes: tuple[bytes | None, ResponseStatus]) -> None:
        self.outcomes = list(outcomes)
        self.num_sent = 0

    async def proxy_request(self, proxy_request: Any) -> AsyncIterator[Any]:
        self.num_sent += 1
        message, status = self.outcomes.pop(0)
        if message is not None:
            yield message
        yield status


def received(
    proxy: Proxy, *, metadata: Any = NUMBERED, patience_s: float = 60.0, stream: bool = False
) -> list[Any]:
    request = SimpleNamespace(
        context=SimpleNamespace(invocation_metadata=lambda: metadata),
        stream=stream,
        has_input_stream=False,
    )
    retry = retrying(Proxy.proxy_request, patience_s, pause_s=0.0)

    async def go() -> list[Any]:
        return [message async for message in retry(proxy, request)]

    return asyncio.run(go())


def test_a_request_whose_replica_died_is_sent_again_until_one_answers() -> None:
    proxy = Proxy((None, DIED), (None, NONE_THERE), (b"answer", OK), (b"another", OK))
    assert received(proxy) == [b"answer", OK]
    assert proxy.num_sent == 3


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ],
)
def test_a_client_that_left_or_is_refused_is_not_retried(code: grpc.StatusCode) -> None:
    proxy = Proxy((None, failed(code)), (b"answer", OK))
    (status,) = received(proxy)
    assert status.code is code and proxy.num_sent == 1


@pytest.mark.parametrize("how", [{"metadata": None}, {"patience_s": 0.0}])
def test_without_a_number_or_where_it_must_not_be_repeated_it_is_sent_once(
    how: dict[str, Any],
) -> None:
    proxy = Proxy((None, DIED), (b"answer", OK))
    (status,) = received(proxy, **how)
    assert proxy.num_sent == 1
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert status.message == "no replica could answer; try again later"


def test_a_stream_is_passed_on_as_it_comes() -> None:
    proxy = Proxy((b"part", DIED), (b"part", OK))
    assert received(proxy, stream=True) == [b"part", DIED]


QUIET_S = 1.5
"""Longer than a busy machine keeps one call waiting for its turn."""
NEVER_S = 1000.0


def stopped(
    scenario: Callable[[Any, Callable[[], Awaitable[bytes]]], Awaitable[None]],
    quiet_s: float = QUIET_S,
) -> None:
    """Run `scenario` on a server of Ray's that stops when quiet, and a call of it that takes a
    moment and is answered with `b"done"`."""

    def factory(*, service_method: str, streaming_type: Any) -> Any:
        async def answer(_request: bytes, _context: Any) -> bytes:
            await asyncio.sleep(0.05)
            return b"done"

        return answer

    async def go() -> None:
        server = stopping_when_quiet(gRPCGenericServer, quiet_s)(factory)
        port = server.add_insecure_port("127.0.0.1:0")
        add_servicer(None, server)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await scenario(server, channel.unary_unary(f"/{SERVICE}/ServerLive"))
        await server.stop(0.0)

    asyncio.run(go())


def test_calls_that_come_while_a_server_stops_are_answered() -> None:
    async def scenario(server: Any, call: Any) -> None:
        await call(b"")
        stopping = asyncio.create_task(server.stop(30.0))
        end_s = asyncio.get_running_loop().time() + 1.5 * QUIET_S
        while asyncio.get_running_loop().time() < end_s:
            assert await call(b"") == b"done"
        assert not stopping.done()
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE

    stopped(scenario)


def test_a_server_that_nobody_calls_stops_at_once() -> None:
    async def scenario(server: Any, call: Any) -> None:
        async with asyncio.timeout(60.0):
            await server.stop(NEVER_S)

    stopped(scenario, NEVER_S)


def test_a_server_that_is_called_for_ever_stops_within_its_grace() -> None:
    async def scenario(server: Any, call: Any) -> None:
        await call(b"")
        stopping = asyncio.create_task(server.stop(2 * QUIET_S))
        with pytest.raises(grpc.aio.AioRpcError):
            while True:
                await call(b"")
        await stopping

    stopped(scenario)


@pytest.mark.parametrize("inner", [gRPCGenericServer, stopping_when_quiet(gRPCGenericServer, 0.0)])
def test_a_port_of_another_service_is_refused_so_that_ray_takes_the_next(inner: Any) -> None:
    """With Ray's own options the kernel would give the calls of one service to either."""

    async def go() -> None:
        as_ray_does = {"extra_options": [("grpc.so_reuseport", "0")]}
        first, second = (listening_alone(inner)(lambda **_: None, **as_ray_does) for _ in range(2))
        port = first.add_insecure_port("127.0.0.1:0")
        with pytest.raises(RuntimeError, match="Failed to bind"):
            second.add_insecure_port(f"127.0.0.1:{port}")
        await first.stop(0.0)

    asyncio.run(go())
