"""A stream ends with its reader, and runs no further than it is read."""

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from supple.serve.executor import Executor
from supple.serve.meters import Meters
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.refusal import Refused
from supple.serve.streams import Leaving, Streams, in_this_thread
from supple.serve.surface import Surface, SurfaceSettings

LIMIT_S = 30.0
BODY = json.dumps(
    {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [0]}]}
).encode()


class Endless:
    """Yields parts without end; says how many, and that it ended."""

    inputs = {"x": "int64[1]"}  # noqa: RUF012

    def __init__(self) -> None:
        self.num_parts = 0
        self.go = threading.Event()
        self.go.set()
        self.in_part = threading.Event()
        self.ended = threading.Event()

    def predict(self, batch: Any) -> Any:
        return batch

    def stream(self, batch: Any) -> Iterator[Any]:
        try:
            while True:
                self.part()
                yield batch
        finally:
            self.ended.set()

    def part(self) -> None:
        self.num_parts += 1
        self.in_part.set()
        assert self.go.wait(LIMIT_S)


class AsyncEndless(Endless):
    async def stream(self, batch: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        try:
            while True:
                await asyncio.sleep(0)
                self.part()
                yield batch
        finally:
            await asyncio.sleep(0)
            self.ended.set()


class Awaits(Endless):
    """Its asynchronous stream awaits something that does not come."""

    async def stream(self, batch: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        try:
            self.in_part.set()
            await asyncio.Event().wait()
            yield batch
        finally:
            self.ended.set()


class Broken(Endless):
    """Its stream raises after a part."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def stream(self, batch: Any) -> Iterator[Any]:
        yield batch
        raise self.error


def streamed(user: Endless, send: Any) -> "asyncio.Task[None]":
    """A request for a stream of `user` as the server runs it: it cancels this when its client has
    left."""
    model = ServedModel(user, name="m")
    executor = Executor(model, timeout_s=LIMIT_S)
    surface = Surface(model, executor, Meters(model="m", replica="r"), SurfaceSettings())
    path = "/v2/models/m/generate_stream"
    scope = {"type": "http", "method": "POST", "path": path, "headers": []}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY}

    return asyncio.ensure_future(surface(scope, receive, send))


async def happens(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, LIMIT_S)


@pytest.mark.parametrize("kind", [Endless, AsyncEndless])
def test_a_stream_whose_client_left_is_closed_after_the_part_in_work(kind: type[Endless]) -> None:
    async def go() -> None:
        user = kind()
        some = asyncio.Event()

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                some.set()

        task = streamed(user, send)
        await asyncio.wait_for(some.wait(), LIMIT_S)
        user.go.clear()
        user.in_part.clear()
        await happens(user.in_part)
        task.cancel()
        await asyncio.wait([task])
        assert not user.ended.is_set(), "a part that is in work is not cut"
        parts = user.num_parts
        user.go.set()
        await happens(user.ended)
        assert user.num_parts == parts

    asyncio.run(go())


@pytest.mark.parametrize("kind", [Endless, AsyncEndless])
def test_a_client_that_does_not_read_holds_its_stream_where_it_is(kind: type[Endless]) -> None:
    async def go() -> None:
        user = kind()
        full = asyncio.Event()

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                full.set()
                await asyncio.Event().wait()

        task = streamed(user, send)
        await asyncio.wait_for(full.wait(), LIMIT_S)
        for _ in range(100):
            await asyncio.sleep(0)
        assert user.num_parts == 1
        task.cancel()
        await happens(user.ended)
        assert user.num_parts == 1

    asyncio.run(go())


def test_what_a_stream_awaits_is_cancelled_when_its_client_has_left() -> None:
    async def go() -> None:
        user = Awaits()

        async def send(_: dict[str, Any]) -> None: ...

        task = streamed(user, send)
        await happens(user.in_part)
        task.cancel()
        await happens(user.ended)

    asyncio.run(go())


@pytest.mark.slow
def test_what_a_stream_raises_after_its_client_has_left_is_not_logged() -> None:
    go_on, logged = threading.Event(), []

    def raising() -> Iterator[Any]:
        assert go_on.wait(LIMIT_S)
        raise ValueError("SECRET of the caller")
        yield

    async def go() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: logged.append(context))
        streams = Streams()
        parts = streams.parts(raising())
        waiting = asyncio.ensure_future(anext(parts))
        while not streams.num_open:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        go_on.set()
        while streams.num_open:
            await asyncio.sleep(0.001)
        gc.collect()

    asyncio.run(go())
    gc.collect()
    assert logged == []


def test_a_stream_that_is_left_before_it_awaits_does_not_await_at_all() -> None:
    async def go() -> None:
        user = Awaits()
        leaving = Leaving()
        leaving.leave()
        parts = in_this_thread(user.stream(np.ones(1)), leaving)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.to_thread(next, parts)

    asyncio.run(go())


def test_a_part_that_takes_too_long_fails_its_stream_and_many_hanging_ones_the_replica() -> None:
    go_on = threading.Event()

    def hanging() -> Iterator[Any]:
        assert go_on.wait(LIMIT_S)
        yield {"x": np.ones(1)}

    async def go() -> None:
        streams = Streams(most=4, part_timeout_s=0.01)
        for _ in range(2):
            assert streams.stuck is None
            with pytest.raises(Refused, match=r"has not yielded its next part for 0\.01 s") as told:
                await anext(streams.parts(hanging()))
            assert told.value.status == 504
        assert streams.num_open == 2
        while streams.stuck is None:
            await asyncio.sleep(0.001)
        assert "2 abandoned streams" in streams.stuck
        go_on.set()
        while streams.num_open:
            await asyncio.sleep(0.001)
        assert streams.stuck is None

    asyncio.run(go())


def test_a_part_of_another_type_or_shape_than_declared_fails_the_stream() -> None:
    class Model:
        inputs = {"x": "int64[1]"}  # noqa: RUF012
        outputs = {"y": "float32[2]"}  # noqa: RUF012

        def __init__(self, part: Any) -> None:
            self.part = part

        def predict(self, batch: Any) -> Any:
            return np.ones((1, 2), np.float32)

        def stream(self, batch: Any) -> Iterator[Any]:
            yield {"y": self.part}

    def parts(part: Any) -> list[Any]:
        return list(ServedModel(Model(part), name="m").stream({"x": np.ones((1, 1), np.int64)}))

    assert len(parts(np.ones((3, 2), np.float32))) == 1, "any number of rows"
    for wrong in ("garbage", np.ones((1, 3), np.float32), np.ones((1, 2), np.int64)):
        with pytest.raises(ModelFault, match="the class declares FP32"):
            parts(wrong)


def test_more_streams_than_there_are_threads_for_are_refused_until_one_ends() -> None:
    async def go() -> None:
        streams = Streams(most=1)
        ends = iter([{"x": np.ones(1)}] * 2)
        first = streams.parts(part for part in ends)
        await anext(first)
        with pytest.raises(Refused, match="1 streams are open here") as refused:
            await anext(streams.parts(iter([])))
        assert refused.value.status == 503 and refused.value.retry_after_s is not None
        await first.aclose()
        while streams.num_open:
            await asyncio.sleep(0)
        assert len([part async for part in streams.parts(part for part in ends)]) == 1

    asyncio.run(go())


def test_one_client_leaves_streams_for_the_others() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield {"x": np.ones(1)}

    async def go() -> None:
        streams = Streams(most=4)
        held = [streams.parts(endless(), b"10.0.0.1") for _ in range(3)]
        for parts in held:
            await anext(parts)
        with pytest.raises(Refused, match="3 streams of this client are open here") as refused:
            await anext(streams.parts(endless(), b"10.0.0.1"))
        assert refused.value.status == 429
        other = streams.parts(endless(), b"10.0.0.2")
        await anext(other)
        await held[0].aclose()
        while streams.num_open > 3:
            await asyncio.sleep(0)
        again = streams.parts(endless(), b"10.0.0.1")
        await anext(again)
        for parts in (*held, other, again):
            await parts.aclose()
        while streams.num_open:
            await asyncio.sleep(0)

    asyncio.run(go())


def test_a_generator_whose_end_raises_is_closed_all_the_same() -> None:
    def raising() -> Iterator[Any]:
        try:
            yield {"x": np.ones(1)}
        finally:
            raise OSError("at the end")

    async def go() -> None:
        streams = Streams()
        parts = streams.parts(raising())
        await anext(parts)
        await parts.aclose()
        while streams.num_open:
            await asyncio.sleep(0)

    asyncio.run(go())


def test_a_replica_has_64_streams_and_48_of_one_client_and_says_when_to_come_again() -> None:
    async def go() -> None:
        streams = Streams()
        taken = []

        async def open_one(client: bytes | None) -> None:
            parts = streams.parts(Endless().stream(np.ones(1)), client)
            await anext(parts)
            taken.append(parts)

        for _ in range(48):
            await open_one(b"one")
        with pytest.raises(Refused, match="48 streams of this client") as of_one:
            await open_one(b"one")
        for _ in range(16):
            await open_one(None)
        with pytest.raises(Refused, match="64 streams are open") as of_all:
            await open_one(b"another")
        found = [(why.value.status, why.value.retry_after_s) for why in (of_one, of_all)]
        assert found == [(429, 1.0), (503, 1.0)]
        for parts in taken:
            await parts.aclose()
        while streams.num_open:
            await asyncio.sleep(0)

    asyncio.run(go())


@pytest.mark.parametrize("kind", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_a_stream_that_would_end_the_process_ends_itself_with_an_error(
    kind: type[BaseException],
) -> None:
    sent: list[bytes] = []

    async def go() -> None:
        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b""))

        await streamed(Broken(kind("the words")), send)

    asyncio.run(go())
    assert b"the model failed on this request" in sent[-2] and sent[-1] == b""
    assert b"the words" not in b"".join(sent)
