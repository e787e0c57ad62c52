"""A script's files are after a measurement as they were before it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from supple.train.probes.kept_files import kept_files, restore


@pytest.fixture
def keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files, in which the test changes them; then they are put back."""
    folder, copies = tmp_path / "work", tmp_path / "copies"
    folder.mkdir()
    copies.mkdir()
    monkeypatch.chdir(folder)
    (folder / "best.pt").write_bytes(b"best")
    (folder / "log.txt").write_text("one\n")
    os.utime("best.pt", (1e9, 1e9))
    with kept_files(str(copies)):
        yield folder
    restore(str(copies))
    assert (folder / "best.pt").read_bytes() == b"best"
    assert (folder / "log.txt").read_text() == "one\n"
    assert sorted(os.listdir(folder)) == ["best.pt", "log.txt"]


def test_a_model_saved_over_another(keeping: Path) -> None:
    torch.save({"w": torch.ones(2)}, "best.pt")
    torch.save({"w": torch.ones(2)}, keeping / "new.pt")
    assert float(torch.load("best.pt")["w"].sum()) == 2.0, "the script reads what it wrote"


def test_lines_added_and_a_file_written_by_pathlib(keeping: Path) -> None:
    with open("log.txt", "a") as log:
        log.write("two\n")
    Path("results.json").write_text("{}")
    assert Path("log.txt").read_text() == "one\ntwo\n"


def test_a_file_replaced_by_its_new_version_and_one_removed(keeping: Path) -> None:
    Path("next").write_bytes(b"next")
    os.replace("next", "best.pt")
    Path("log.txt").unlink()
    assert Path("best.pt").read_bytes() == b"next" and not os.path.exists("log.txt")


def test_the_first_copy_counts_when_several_workers_write(keeping: Path, tmp_path: Path) -> None:
    Path("best.pt").write_bytes(b"of one worker")
    with kept_files(str(tmp_path / "copies")):
        Path("best.pt").write_bytes(b"of another")


def test_devices_descriptors_and_reading_are_left_alone(keeping: Path, tmp_path: Path) -> None:
    with open(os.devnull, "w") as null, open("log.txt") as log:
        null.write(log.read())
    with open(os.dup(1), "w"):
        pass
    assert list((tmp_path / "copies").iterdir()) == []


def test_the_time_of_a_file_is_kept_too(tmp_path: Path) -> None:
    file, copies = tmp_path / "a", tmp_path / "copies"
    copies.mkdir()
    file.write_text("a")
    os.utime(file, (1e9, 1e9))
    with kept_files(str(copies)):
        file.write_text("b")
    restore(str(copies))
    assert file.stat().st_mtime == 1e9 and open.__module__ in ("io", "_io")
