"""The proxy's own errors are not answers."""

import asyncio
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from supple.serve.again import ANSWERED, App, Receive, RetryMiddleware, Send
from supple.serve.attempts import SERIAL
from tests.hurried import run_hurried


class Proxy:
    """Answers with the next of `statuses`; those from a replica carry its mark."""

    def __init__(self, *statuses: int, marked: bool = False) -> None:
        self.statuses = list(statuses)
        self.headers = [ANSWERED] if marked else []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        status = self.statuses.pop(0)
        start = {"type": "http.response.start", "status": status, "headers": self.headers}
        await send(start)
        await send({"type": "http.response.body", "body": str(status).encode()})


@pytest.mark.parametrize(
    ("proxy", "status", "tries"),
    [
        (Proxy(200), 200, 1),
        (Proxy(500, 503, 502, 504, 200), 200, 5),
        (Proxy(500, 200, marked=True), 500, 1),
        (Proxy(404, 200), 404, 1),
    ],
)
def test_an_error_of_the_proxys_own_is_asked_again(proxy: Proxy, status: int, tries: int) -> None:
    response = posted(proxy, b"body")
    assert response.status_code == status and response.text == str(status)
    assert proxy.bodies == [b"body"] * tries


class Silent(Proxy):
    """Raises, or gives no answer at all, where the status is 0 or -1."""

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        if self.statuses[0] <= 0:
            await receive()
            if self.statuses.pop(0) == 0:
                raise ConnectionError("the replica died")
            return
        await super().__call__(scope, receive, send)


def test_a_proxy_that_raises_or_says_nothing_is_asked_again() -> None:
    proxy = Silent(0, -1, 0, 200)
    response = posted(proxy, b"body")
    assert response.status_code == 200 and proxy.bodies == [b"body"]


@pytest.mark.parametrize("headers", [{}, {SERIAL.decode(): "7e57ab1e-0000-4000-8000-000000000001"}])
def test_all_times_of_asking_carry_the_serial_number_of_the_first(headers: dict[str, str]) -> None:
    seen: list[list[bytes]] = []

    async def proxy(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        seen.append([value for name, value in scope["headers"] if name == SERIAL])
        status = 500 if len(seen) < 3 else 200
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    assert posted(proxy, b"body", headers=headers).status_code == 200
    (serial,) = seen[0]
    assert seen == [[serial]] * 3
    assert not headers or serial.decode() in headers.values()


def test_the_proxys_own_error_is_told_when_patience_ends() -> None:
    proxy = Proxy(503, 200)
    assert posted(proxy, b"body", patience_s=0.0).status_code == 503
    assert proxy.bodies == [b"body"]


def test_a_body_too_large_to_hold_is_asked_once_and_passed_on_whole() -> None:
    proxy = Proxy(503, 200)
    assert posted(proxy, b"x" * 5_000).status_code == 503
    assert proxy.bodies == [b"x" * 5_000]


def asked(app: App, *messages: dict[str, Any], **settings: Any) -> tuple[list[Any], float]:
    """What the client gets that sends `messages`, and how long it took by the loop's clock."""
    sent: list[Any] = []
    coming = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(coming)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def go() -> float:
        began_s = asyncio.get_running_loop().time()
        again = RetryMiddleware(app, **{"patience_s": 60.0, "most_held_bytes": 2_000} | settings)
        await again({"type": "http", "headers": []}, receive, send)
        return asyncio.get_running_loop().time() - began_s

    took_s = run_hurried(go())
    return sent, took_s


LAST = {"type": "http.request", "body": b"x"}
LEFT = {"type": "http.disconnect"}


def test_a_quarter_of_a_second_is_between_two_times_of_asking() -> None:
    proxy = Proxy(503, 503, 200)
    sent, took_s = asked(proxy, LAST)
    assert sent[0]["status"] == 200 and proxy.bodies == [b"x"] * 3
    assert took_s == pytest.approx(0.5)


def test_a_client_that_has_left_is_not_asked_for_again() -> None:
    num_asked = 0

    async def proxy(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        nonlocal num_asked
        num_asked += 1
        while (await receive())["type"] != "http.disconnect":
            pass

    assert asked(proxy, LAST, LEFT) == ([], 0.0)
    assert num_asked == 1


def test_a_proxy_that_says_nothing_is_not_asked_again_when_patience_has_ended() -> None:
    proxy = Silent(-1, 200)
    assert asked(proxy, LAST, patience_s=0.0) == ([], 0.0)
    assert proxy.statuses == [200]


def test_what_the_proxy_raises_is_raised_when_patience_has_ended() -> None:
    proxy = Silent(0, 200)
    with pytest.raises(ConnectionError, match="the replica died"):
        asked(proxy, LAST, patience_s=0.0)
    assert proxy.statuses == [200]


def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    num_asked = 0

    async def proxy(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        nonlocal num_asked
        num_asked += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionError("the replica died")

    with pytest.raises(ConnectionError):
        asked(proxy, LAST)
    assert num_asked == 1


def test_what_is_no_request_is_handed_on_as_it_is() -> None:
    handed: list[Any] = []

    async def app(*arguments: Any) -> None:
        handed.append(arguments)

    async def nothing(*_: Any) -> Any: ...

    scope = {"type": "lifespan"}
    again = RetryMiddleware(app, patience_s=60.0, most_held_bytes=2_000)
    asyncio.run(again(scope, nothing, nothing))
    assert handed == [(scope, nothing, nothing)]


def posted(
    proxy: App, body: bytes, patience_s: float = 60.0, headers: dict[str, str] | None = None
) -> httpx.Response:
    async def chunks() -> Any:
        for start in range(0, len(body), 1_000):
            yield body[start : start + 1_000]

    async def go() -> httpx.Response:
        app: Any = RetryMiddleware(proxy, patience_s=patience_s, most_held_bytes=2_000, pause_s=0.0)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
            return await client.post("http://m/", content=chunks(), headers=headers)

    return asyncio.run(go())
