"""Only members of a job meet, on the address they were told, and nothing of it stays."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from supple.core.spec import SpecError
from supple.train.generation import rendezvous
from supple.train.generation.group import CollectiveFailed, form
from supple.train.generation.rendezvous import Address, Meeting, MeetingFailed, Rendezvous

_LIMIT_S = 30.0


def meet(address: Address, key: str, rank: int, size: int) -> list[bytes]:
    """What `rank` learns that all ranks wrote."""
    meeting = Meeting(address, key=key, rank=rank, size=size)
    meeting.set(f"0/{rank}", f"from {rank}".encode())
    return [meeting.get(f"0/{other}") for other in range(size)]


def all_meet(address: Address, key: str, size: int) -> list[list[bytes]]:
    with ThreadPoolExecutor(size) as pool:
        waiting = [pool.submit(meet, address, key, rank, size) for rank in range(size)]
        return [one.result(_LIMIT_S) for one in waiting]


def connected(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), timeout=_LIMIT_S)


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _LIMIT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def until_closed(connection: socket.socket) -> bytes:
    """Everything the other side says until it closes."""
    heard = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            heard += part
    return heard


def test_every_rank_learns_what_every_rank_wrote() -> None:
    expected = [b"from 0", b"from 1", b"from 2"]
    assert all_meet(Rendezvous("127.0.0.1").address, "a/1", 3) == [expected] * 3


def test_more_members_than_strangers_are_allowed_meet_all_the_same() -> None:
    expected = [f"from {rank}".encode() for rank in range(70)]
    assert all_meet(Rendezvous("127.0.0.1").address, "a/1", 70) == [expected] * 70


def test_who_has_left_before_it_came_does_not_wait_for_the_others() -> None:
    meeting = Rendezvous("127.0.0.1")
    alone = Meeting(meeting.address, key="a/1", rank=0, size=2)
    alone.set("0/0", b"from 0")
    alone.leave()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(alone.get, "0/1")
        try:
            with pytest.raises(MeetingFailed, match="left before all had come"):
                waiting.result(_LIMIT_S)
        finally:
            alone.leave()  # where it waits all the same


def test_the_rendezvous_listens_on_the_address_it_was_given_and_on_no_other() -> None:
    meeting = Rendezvous("127.0.0.1")
    port = meeting.address.port
    listening = [
        c.laddr.ip
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


def test_who_does_not_know_the_secret_learns_nothing_and_changes_nothing() -> None:
    meeting = Rendezvous("127.0.0.1")
    address = meeting.address
    stranger = address._replace(secret=b"guessed" * 5)
    with ThreadPoolExecutor(1) as pool:
        member = pool.submit(meet, address, "a/1", 0, 2)
        with pytest.raises(MeetingFailed, match="was closed"):
            meet(stranger, "a/1", 1, 2)
        assert not member.done()
        assert meet(address, "a/1", 1, 2) == [b"from 0", b"from 1"]
        assert member.result(_LIMIT_S) == [b"from 0", b"from 1"]


def test_what_was_overheard_cannot_be_said_again() -> None:
    """A relay that a member took for the rendezvous says the member's words again to the real
    one."""
    meeting = Rendezvous("127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as relay, ThreadPoolExecutor(1) as pool:
        fake = meeting.address._replace(port=relay.getsockname()[1])
        member = pool.submit(meet, fake, "a/1", 0, 2)
        with relay.accept()[0] as overhearing, connected(meeting.address) as real:
            overhearing.sendall(b"x" * 32)
            words = overhearing.recv(65536)
            real.sendall(words)
            assert len(until_closed(real)) == 32  # the nonce, and not a word more
            overhearing.sendall((4).to_bytes(4) + b"{}  " + b"y" * 32)
            with pytest.raises(MeetingFailed, match="does not have the job's secret"):
                member.result(_LIMIT_S)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + b"x" * 100,
        b"\x00" * 32 + b"\xff\xff\xff\xff" + b"z" * 1000,
        b"\x00" * 32 + b"\x00\x00\x00\x02" + b"{}" + b"\x00" * 32,
    ],
)
def test_nonsense_is_answered_with_nothing_and_the_members_meet(said: bytes) -> None:
    address = Rendezvous("127.0.0.1")
    with connected(address.address) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        assert len(until_closed(stranger)) <= 32
    assert all_meet(address.address, "a/1", 2) == [[b"from 0", b"from 1"]] * 2


def test_members_meet_while_hundreds_connect_and_say_nothing() -> None:
    meeting = Rendezvous("127.0.0.1")
    with contextlib.ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(connected(meeting.address))
        assert all_meet(meeting.address, "a/1", 2) == [[b"from 0", b"from 1"]] * 2


def test_with_too_many_who_say_nothing_the_oldest_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "_INTRODUCTION_S", 1000.0)
    meeting = Rendezvous("127.0.0.1")
    with contextlib.ExitStack() as all_of_them:
        silent = [all_of_them.enter_context(connected(meeting.address)) for _ in range(65)]
        assert len(until_closed(silent[0])) <= 32
        assert len(silent[64].recv(33)) == len(silent[1].recv(33)) == 32
        silent[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[1].recv(1)


def test_who_would_write_more_than_a_member_does_is_not_listened_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "_INTRODUCTION_S", 1000.0)
    meeting = Rendezvous("127.0.0.1")
    with connected(meeting.address) as stranger:
        stranger.sendall(b"\x00" * 32 + (64 * 1024 + 1).to_bytes(4))
        assert len(until_closed(stranger)) == 32


def test_what_members_wrote_is_forgotten_once_they_have_met_or_left() -> None:
    listening, secret = rendezvous._listen("127.0.0.1", 0), b"secret"
    address = Address("127.0.0.1", listening.getsockname()[1], secret)
    exchange = rendezvous._Exchange(listening, secret)
    thread = threading.Thread(target=exchange.run_until_closed)
    thread.start()
    try:
        assert all_meet(address, "a/1", 2) == [[b"from 0", b"from 1"]] * 2
        assert exchange._meetings == {}
        alone = Meeting(address, key="a/2", rank=0, size=2)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(alone.get, "0/1")
            until(lambda: "a/2" in exchange._meetings)
            alone.leave()
            with pytest.raises(MeetingFailed):
                waiting.result(_LIMIT_S)
        until(lambda: exchange._meetings == {})
    finally:
        exchange.close()
        thread.join()


def test_a_member_that_left_before_all_had_come_is_not_met() -> None:
    meeting = Rendezvous("127.0.0.1")
    aborted = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(
            form,
            meeting.address,
            key="a/1",
            rank=0,
            size=2,
            host="127.0.0.1",
            aborted=aborted.is_set,
        )
        aborted.set()
        with pytest.raises(CollectiveFailed, match="aborted"):
            early.result(_LIMIT_S)
        again = pool.submit(meet, meeting.address, "a/1", 0, 2)
        assert meet(meeting.address, "a/1", 1, 2) == [b"from 0", b"from 1"]
        assert again.result(_LIMIT_S) == [b"from 0", b"from 1"]


def test_a_rendezvous_nobody_refers_to_listens_no_more() -> None:
    meeting = Rendezvous("127.0.0.1")
    address = meeting.address
    del meeting
    end_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < end_s:
        try:
            connected(address).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            continue  # it was being closed
    raise AssertionError("it still listens")


def test_a_rendezvous_that_is_not_there_fails_the_group() -> None:
    address = Rendezvous("127.0.0.1").address._replace(port=1)
    with pytest.raises(CollectiveFailed, match=r"the rendezvous at 127\.0\.0\.1:1: "):
        form(address, key="a/1", rank=0, size=2, host="127.0.0.1", aborted=lambda: False)


def test_the_secret_is_in_no_message() -> None:
    address = Rendezvous("127.0.0.1").address
    assert str(address) == repr(address) == f"Address(127.0.0.1:{address.port})"


def test_a_port_in_use_is_refused_with_the_port_and_what_to_do() -> None:
    taken = Rendezvous("127.0.0.1")
    port = taken.address.port
    with pytest.raises(SpecError, match=f"127.0.0.1:{port}.*--rendezvous-port"):
        Rendezvous("127.0.0.1", port)
