"""Files and streams that end (a full disk, a reader that left) and stop nobody who writes."""

import contextlib
import io
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supple.cli.output import LossyStream
from supple.train.start.logfile import LogFile

Lost = list[tuple[str, str]]


@contextmanager
def limited_to(num_bytes: int) -> Iterator[None]:
    """A file of this process may not grow beyond: the kernel writes what fits, then refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_is_full_keeps_whole_lines_and_is_told_of_once(tmp_path: Path) -> None:
    lost: Lost = []
    path = tmp_path / "logs" / "w0.log"
    file = LogFile(path, lambda *what: lost.append(what))
    with limited_to(1050):  # half of the eleventh line fits
        for number in range(30):
            print(f"{number:02d}" + "x" * 97, file=file, flush=True)
    written = path.read_text().splitlines(keepends=True)
    assert [line[:2] for line in written] == [f"{number:02d}" for number in range(10)]
    assert all(len(line) == 100 for line in written)
    assert lost == [(str(path), "File too large")]
    file.close()


@pytest.mark.parametrize("where", ["/dev/full", "a folder", "in a file"])
def test_a_file_that_cannot_be_written_at_all_is_told_of_once(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    paths = {
        "/dev/full": Path("/dev/full"),
        "a folder": tmp_path / "folder",
        "in a file": tmp_path / "file" / "w0.log",
    }
    lost: Lost = []
    file = LogFile(paths[where], lambda *what: lost.append(what))
    with contextlib.redirect_stdout(file):
        print("hello")
        print("again", flush=True)
    assert [path for path, _ in lost] == [str(paths[where])]


def test_text_that_is_no_valid_unicode_is_written_escaped(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "w0.log", lambda *_: None)
    print("a\udc80b", file=file)
    assert (tmp_path / "w0.log").read_text() == "a\\udc80b\n"


def test_threads_that_print_into_a_full_file_leave_other_files_alone(tmp_path: Path) -> None:
    """The number of a file that was given up must not become that of another one."""
    file = LogFile(Path("/dev/full"), lambda *_: None)
    other = tmp_path / "other"

    def write() -> None:
        for _ in range(500):
            file.write("x\n")

    threads = [threading.Thread(target=write) for _ in range(4)]
    with other.open("w"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert other.read_bytes() == b""


def test_a_stream_whose_reader_left_is_told_of_once_and_stops_nobody() -> None:
    reader, writer = os.pipe()
    lost: list[str] = []
    with os.fdopen(writer, "w") as stream:
        lossy = LossyStream(stream, lost.append)
        os.close(reader)
        for _ in range(3):
            print("hello", file=lossy, flush=True)
    assert lost == ["Broken pipe"]


def test_a_stream_shows_what_its_encoding_has_no_sign_for() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print("━ ü", file=LossyStream(stream, lambda _: None), flush=True)
    assert raw.getvalue() == b"\\u2501 \\xfc\n"


def test_a_stream_passes_on_what_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    print("hello", file=LossyStream(sys.stdout, lambda _: None), flush=True)
    assert capsys.readouterr().out == "hello\n"
