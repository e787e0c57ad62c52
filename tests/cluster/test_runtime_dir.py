"""What another user made, linked, or could exchange is never used, and sockets are found again."""

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supple.control import runtime_dir
from supple.control import socket as control
from supple.core.spec import SpecError

US = os.geteuid()
OTHER = US + 1


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files in which anyone may write, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        path = Path(name).resolve()
        path.chmod(0o1777)
        monkeypatch.setattr(runtime_dir, "temporary", lambda: [path])
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        yield path


def no_folder(path: Path, where: Path) -> None:
    path.write_text("#!/bin/sh\n")


def link(path: Path, where: Path) -> None:
    (where / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(where / "elsewhere")


def link_to_nothing(path: Path, where: Path) -> None:
    path.symlink_to(where / "nothing")


def open_to_the_group(path: Path, where: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def open_to_read(path: Path, where: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def not_ours(path: Path, where: Path) -> None:
    path.mkdir(mode=0o700)
    give_away(path)


def give_away(path: Path) -> None:
    if US == 0:
        os.chown(path, 65534, 65534)
    else:
        path.chmod(0o755)  # whose it is only root can change; others can enter it


PLANTED = [no_folder, link, link_to_nothing, open_to_the_group, open_to_read, not_ours]


def test_the_folder_is_made_private_and_found_again(shared: Path) -> None:
    made = runtime_dir.folder()
    assert made == shared / f"supple-{US}"
    assert made.stat().st_mode & 0o777 == 0o700
    assert runtime_dir.folder() == made
    assert runtime_dir.folders() == [made]


@pytest.mark.parametrize("plant", PLANTED)
def test_what_somebody_planted_is_not_used_and_another_folder_is_found_by_all(
    shared: Path, plant: object
) -> None:
    planted = shared / f"supple-{US}"
    plant(planted, shared)  # type: ignore[operator]
    assert runtime_dir.folders() == []
    used = runtime_dir.folder()
    assert used != planted
    assert runtime_dir.is_private(used, US)
    assert runtime_dir.folder() == used
    assert planted not in runtime_dir.folders()


def test_a_folder_of_another_user_is_not_ours_however_closed_it_is(shared: Path) -> None:
    path = shared / f"supple-{OTHER}"
    path.mkdir(mode=0o700)
    assert runtime_dir.folders(OTHER) == []
    with pytest.raises(SpecError, match=f"belongs to user {US}, and this is user {OTHER}"):
        runtime_dir.refuse_foreign(path, OTHER)


def test_a_place_where_others_rename_folders_is_not_used(shared: Path) -> None:
    shared.chmod(0o777)  # without the sticky bit
    with pytest.raises(SpecError, match=r"others may rename what is in .* Set XDG_RUNTIME_DIR"):
        runtime_dir.folder()
    shared.chmod(0o1777)
    inner = shared / "mine"
    inner.mkdir(mode=0o700)
    shared.chmod(0o777)
    assert not runtime_dir.is_private(inner, US)


def test_a_place_of_another_user_is_not_used(shared: Path) -> None:
    base = shared / "base"
    base.mkdir(mode=0o755)
    if US == 0:
        os.chown(base, 65534, 65534)
    owner, us = (65534, US) if US == 0 else (US, OTHER)
    with pytest.raises(SpecError, match=f"{base} belongs to user {owner}"):
        runtime_dir.refuse_replaceable(base, us)


def test_a_place_is_not_used_where_a_folder_far_above_it_may_be_renamed(shared: Path) -> None:
    inner = shared / "a" / "b" / "c"
    inner.mkdir(parents=True, mode=0o755)
    runtime_dir.refuse_replaceable(inner, US)
    (shared / "a").chmod(0o777)
    with pytest.raises(SpecError, match=f"others may rename what is in {shared / 'a'}$"):
        runtime_dir.refuse_replaceable(inner, US)


def test_a_folder_that_others_may_enter_by_now_is_not_opened(shared: Path) -> None:
    path = runtime_dir.folder()
    path.chmod(0o755)
    with pytest.raises(SpecError, match="others may enter it"), runtime_dir.opened(path):
        pass


def test_xdg_runtime_dir_is_used_where_it_is_ours(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = runtime_dir.folder()
    xdg = tmp_path / "run"
    xdg.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(xdg))
    (xdg / "supple").mkdir(mode=0o700)
    assert runtime_dir.folder() == xdg / "supple"
    assert runtime_dir.folders() == [xdg / "supple", theirs]


@pytest.mark.parametrize("plant", PLANTED)
def test_an_xdg_runtime_dir_that_is_not_ours_is_not_used(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: object
) -> None:
    plant(tmp_path / "run", tmp_path)  # type: ignore[operator]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert runtime_dir.folder() == shared / f"supple-{US}"


def test_a_folder_that_was_exchanged_for_a_link_is_not_opened(shared: Path) -> None:
    path = runtime_dir.folder()
    path.rmdir()
    path.symlink_to(shared)
    with pytest.raises(OSError, match="supple"), runtime_dir.opened(path):
        pass


def test_a_socket_has_room_however_long_the_path_of_the_folder_is(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    path = control.socket_path("j" * 64)
    assert len(str(path)) > 200
    with socket.socket(socket.AF_UNIX) as listening:
        with runtime_dir.opened(path.parent) as folder:
            listening.bind(str(folder / path.name))
        listening.listen()
        assert control.running_jobs() == ["j" * 64]


def test_a_socket_of_another_user_is_not_talked_to(shared: Path) -> None:
    """Somebody has made the folder where this user's jobs are looked for, and listens in it."""
    path = shared / f"supple-{US}"
    path.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path / "digits.sock"))
        listening.listen()
        listening.setblocking(False)
        assert control.running_jobs() == ["digits"]
        listening.accept()[0].close()
        give_away(path)
        assert control.running_jobs() == []
        control.refuse_second("digits")
        with pytest.raises(SpecError, match="no running job 'digits'"):
            control.send_request("digits", {"ask": "status"})
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_who_answers_as_another_user_is_hung_up_on(shared: Path) -> None:
    path = control.socket_path("digits")
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as asking:
        listening.bind(str(path))
        listening.listen()
        asking.connect(str(path))
        connection, _ = listening.accept()
        with connection:
            control.refuse_stranger(connection, US)
            if US != 0:  # root may speak to everybody's jobs
                with pytest.raises(PermissionError, match=f"user {US} is at the other end"):
                    control.refuse_stranger(connection, OTHER)
    if US == 0:
        left, right = _pair_with_nobody(path.parent)
        with left, right, pytest.raises(PermissionError, match="user 65534 is at the other end"):
            control.refuse_stranger(left, US)


def _pair_with_nobody(folder: Path) -> tuple[socket.socket, socket.socket]:
    """A connection whose other end was made by the user nobody."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "open.sock"))
        (folder / "open.sock").chmod(0o666)
        folder.chmod(0o755)
        listening.listen()
        asking = socket.socket(socket.AF_UNIX)
        os.seteuid(65534)
        try:
            asking.connect(str(folder / "open.sock"))
        finally:
            os.seteuid(0)
        return listening.accept()[0], asking


@pytest.mark.skipif(US != 0, reason="another user's process is made by root")
def test_a_job_does_not_hear_another_user_and_another_users_is_not_asked(shared: Path) -> None:
    heard: list[object] = []

    async def run() -> None:
        serving = control.ControlServer("digits", lambda asked: {"heard": heard.append(asked)})
        await serving.start()
        path = control.socket_path("digits")
        path.parent.chmod(0o755)
        path.chmod(0o666)
        with socket.socket(socket.AF_UNIX) as asking:
            os.seteuid(65534)
            try:
                asking.connect(str(path))
            finally:
                os.seteuid(0)
            asking.setblocking(False)
            loop = asyncio.get_running_loop()
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # unread
                await loop.sock_sendall(asking, b'{"ask": "x"}\n')
                assert await loop.sock_recv(asking, 100) == b""
        await serving.stop()

    asyncio.run(run())
    assert heard == []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(control.socket_path("theirs")))
        os.seteuid(65534)
        try:
            listening.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(SpecError, match="no running job 'theirs'"):
            control.send_request("theirs", {"ask": "x"})
        listening.setblocking(False)
        connection, _ = listening.accept()
        with connection:
            assert connection.recv(100) == b""


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".hidden", "", "x" * 65, "a\n", "ä"])
def test_a_name_that_leads_elsewhere_is_refused(shared: Path, name: str) -> None:
    with pytest.raises(SpecError, match="not usable as a folder"):
        control.send_request(name, {"ask": "status"})
    with pytest.raises(SpecError, match="not usable as a folder"):
        control.socket_path(name)
