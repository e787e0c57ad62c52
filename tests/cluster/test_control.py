"""The line between a job and another terminal: a real socket, and what people do to it."""

import asyncio
import contextlib
import gc
import json
import socket
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from supple.control import socket as control
from supple.control.socket import (
    ControlServer,
    refuse_second,
    running_jobs,
    send_request,
    socket_path,
)
from supple.core.spec import SpecError


def handler(request: Mapping[str, Any]) -> dict[str, Any]:
    if request.get("ask") == "refuse":
        raise SpecError("9 workers requested, the job has --workers 1:4.")
    return {"heard": dict(request)}


@asynccontextmanager
async def server(name: str):
    listening = ControlServer(name, handler)
    await listening.start()
    try:
        yield listening
    finally:
        await listening.stop()


@pytest.fixture
def name(tmp_path: Any) -> str:
    return f"control-{tmp_path.name}"[:60]


async def say(name: str, raw: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(socket_path(name)))
    writer.write(raw)
    await writer.drain()
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


def test_a_request_is_answered_and_a_refusal_is_the_askers_error(name: str) -> None:
    async def run() -> None:
        async with server(name):
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }
            assert name in await asyncio.to_thread(running_jobs)
            with pytest.raises(SpecError, match="9 workers requested"):
                await asyncio.to_thread(send_request, name, {"ask": "refuse"})

    asyncio.run(run())


@pytest.mark.parametrize("raw", [b"not json\n", b"[1, 2]\n", b"3\n", b'"resize"\n', b"\xff\xfe\n"])
def test_nonsense_is_answered_with_an_error_and_the_next_request_is_served(
    name: str, raw: bytes
) -> None:
    async def run() -> None:
        async with server(name):
            assert "error" in json.loads(await say(name, raw))
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }

    asyncio.run(run())


def test_someone_who_hangs_up_without_a_word_disturbs_nobody(name: str) -> None:
    async def run() -> None:
        async with server(name):
            for sent in (b"", b'{"ask": '):
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(socket_path(name)))
                    client.sendall(sent)
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }

    asyncio.run(run())


def test_a_second_job_of_the_name_is_refused_and_the_first_keeps_its_socket(name: str) -> None:
    async def run() -> None:
        async with server(name):
            with pytest.raises(SpecError, match="already running on this machine"):
                await asyncio.to_thread(refuse_second, name)
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }

    asyncio.run(run())


def test_a_socket_left_behind_by_a_killed_job_is_in_nobodys_way(name: str) -> None:
    path = socket_path(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert path.exists()
    with pytest.raises(SpecError, match="no running job"):
        send_request(name, {"ask": "x"})

    async def run() -> None:
        async with server(name):
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }

    asyncio.run(run())
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_turns", range(6))
def test_who_connects_while_the_job_stops_leaks_nothing(name: str, num_turns: int) -> None:
    async def run() -> None:
        async with server(name):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_path(name)))
            for _ in range(num_turns):
                await asyncio.sleep(0)

    asyncio.run(run())
    gc.collect()  # what is not closed warns here, and pytest makes that an error


def test_who_stays_connected_and_says_nothing_does_not_keep_the_job_from_ending(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_LAST_REQUEST_S", 0.05)

    async def run() -> None:
        async with server(name):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(socket_path(name)))
            # Who is answered after it says that it was let in.
            assert await asyncio.to_thread(send_request, name, {"ask": "x"}) == {
                "heard": {"ask": "x"}
            }
        with client:  # it stayed until the server had stopped, which closed its side
            client.settimeout(30.0)
            assert client.recv(1) == b""

    asyncio.run(asyncio.wait_for(run(), 30.0))


def test_only_the_owner_may_speak_to_a_job(name: str) -> None:
    async def run() -> None:
        async with server(name):
            assert socket_path(name).stat().st_mode & 0o077 == 0
            assert socket_path(name).parent.stat().st_mode & 0o077 == 0

    asyncio.run(run())


@pytest.fixture
def all_are_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("a stranger is at the other end")

    monkeypatch.setattr(control, "refuse_stranger", refuse)


@pytest.mark.usefixtures("all_are_strangers")
def test_a_stranger_who_listens_where_a_job_would_be_is_told_nothing(name: str) -> None:
    path = socket_path(name)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        try:
            listening.listen()
            with pytest.raises(SpecError, match="no running job"):
                send_request(name, {"ask": "x"})
            listening.setblocking(False)
            connection, _ = listening.accept()
            with connection:
                assert connection.recv(100) == b""
        finally:
            path.unlink()


@pytest.mark.usefixtures("all_are_strangers")
def test_a_stranger_who_asks_a_job_is_hung_up_on_unheard(name: str) -> None:
    heard: list[Mapping[str, Any]] = []

    async def run() -> None:
        serving = ControlServer(name, lambda request: {"heard": heard.append(request)})
        await serving.start()
        try:
            with contextlib.suppress(ConnectionResetError):  # it may not even read the request
                assert await say(name, b'{"ask": "x"}\n') == b""
        finally:
            await serving.stop()

    asyncio.run(run())
    assert heard == []
