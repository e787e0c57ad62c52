"""A script's errors, told as its author wants them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from supple.core.spec import SpecError
from supple.train.start.script import (
    Start,
    check,
    find_module,
    memory_advice,
    run,
    shared_memory_advice,
    user_traceback,
)


def raised(act) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()
    return caught.value


def test_memory_that_ran_out_comes_with_half_the_micro_batch() -> None:
    error = raised(lambda: torch.zeros(10**9, 10**6))
    assert "micro_batch_size=32" in memory_advice(error, 64)
    assert "One sample does not fit" in memory_advice(error, 1)
    assert "The model alone" in memory_advice(error, 0)


def test_an_accelerators_error_is_known_by_its_name() -> None:
    assert "micro_batch_size=4" in memory_advice(torch.OutOfMemoryError("CUDA out of memory"), 8)
    assert "micro_batch_size=4" in memory_advice(MemoryError(), 8)


def test_another_error_gets_no_advice_about_memory() -> None:
    assert memory_advice(ValueError("shapes differ"), 64) == ""
    assert memory_advice(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 64) == ""


def test_a_traceback_has_the_scripts_frames_and_the_message() -> None:
    def in_the_script() -> None:
        raise KeyError("label")

    told = user_traceback(raised(in_the_script))
    assert "in in_the_script" in told
    assert told.endswith("KeyError: 'label'")


def test_a_traceback_ends_in_the_script_not_in_the_machinery_below_it() -> None:
    """A trace on fake tensors passes dozens of torch's own frames."""

    def in_the_script() -> None:
        with FakeTensorMode():
            torch.nn.Linear(4, 4)(torch.zeros(2, 3))

    error = raised(in_the_script)
    told = user_traceback(error)
    assert "in in_the_script" in told and "nn/modules/linear.py" in told
    for internal in ("_subclasses", "nn/modules/module.py", "torch/__init__.py"):
        assert internal not in told
        assert internal in user_traceback(error, whole=True)


def ended(tmp_path: Path, body: str, *arguments: str) -> str:
    script = tmp_path / "ends.py"
    script.write_text(
        f"import argparse\nimport sys\n{body}\ndef train(job):\n    job.append(sys.argv)\n"
    )
    with pytest.raises(SpecError) as caught:
        run(str(script), "train", [], Start(arguments=arguments))
    return str(caught.value)


def test_a_script_that_ends_the_program_is_told_where_and_what_to_do(tmp_path: Path) -> None:
    told = ended(tmp_path, "sys.exit('no data')")
    for words in ("ends.py, line 3, called sys.exit('no data')", "Return from the", "__main__"):
        assert words in told


def test_a_script_that_asks_for_arguments_is_told_which_and_what_to_do(tmp_path: Path) -> None:
    told = ended(
        tmp_path,
        "p = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()",
    )
    for words in (
        "line 5, reads a command line",
        "required: data)",
        "Give every argument a default",
    ):
        assert words in told


def test_a_script_that_refuses_its_arguments_is_told_which_and_where_they_are_given(
    tmp_path: Path,
) -> None:
    read = "p = argparse.ArgumentParser()\np.add_argument('--epochs', type=int)\np.parse_args()"
    told = ended(tmp_path, read, "--epochs", "3 4")
    for words in ("line 5, does not take the arguments --epochs '3 4'", "invalid int", "after --"):
        assert words in told


def test_a_script_sees_its_arguments_when_it_is_imported_and_when_it_is_called(
    tmp_path: Path,
) -> None:
    script = tmp_path / "sees.py"
    script.write_text(
        "import sys\nat_import = sys.argv[1:]\n"
        "def train(job):\n    job.append((at_import, sys.argv))\n"
    )
    seen: list[tuple[list[str], list[str]]] = []
    ours = list(sys.argv)
    given = ["--epochs", "3", "--", "a b"]
    run(str(script), "train", seen, Start(arguments=tuple(given)))
    assert (seen, sys.argv) == ([(given, [str(script), *given])], ours)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module that imports from it, relatively, and a folder with another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "theirs"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "sizes.py").write_text("SIZE = 8\n")
    (folder / "inner" / "loop.py").write_text(
        "from ..sizes import SIZE\ntimes = 0\n"
        "def train(job):\n    global times\n    times += 1\n"
        "    job.append((SIZE, times, __name__))\n"
    )
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[name]


def test_a_module_of_a_package_imports_relatively_and_is_run_anew_each_time(package: Path) -> None:
    script = find_module("theirs.inner.loop")
    assert script == package / "inner" / "loop.py"
    check(str(script), "train")
    seen: list[tuple[int, int, str]] = []
    for _ in range(2):
        run(str(script), "train", seen, Start(module="theirs.inner.loop"))
    assert seen == 2 * [(8, 1, "theirs.inner.loop")]


def test_a_module_is_found_without_importing_its_package(package: Path) -> None:
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    assert find_module("theirs") == package / "__init__.py"
    assert find_module("theirs.sizes") == package / "sizes.py"
    for absent in ("theirs.absent", "theirs.sizes.more", "theirs.inner", "absent_here", "sys"):
        assert find_module(absent) is None


def test_a_script_sees_an_empty_command_line_and_ours_comes_back(tmp_path: Path) -> None:
    script = tmp_path / "sees.py"
    script.write_text("import sys\ndef train(job):\n    job.append(list(sys.argv))\n")
    seen: list[list[str]] = []
    ours = list(sys.argv)
    run(str(script), "train", seen)
    assert (seen, sys.argv) == ([[str(script)]], ours)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("bom.py", b"\xef\xbb\xbfdef train(job):\n    job.append(1)\n"),
        ("latin.py", b"# -*- coding: latin-1 -*-\ndef train(job):\n    job.append(1)  # \xe9\n"),
        ("script.txt", b"def train(job):\n    job.append(1)\n"),
        ("\u00fcber uns.py", b"def train(job):\n    job.append(1)\n"),
    ],
)
def test_what_python_runs_is_a_script(tmp_path: Path, name: str, source: bytes) -> None:
    script = tmp_path / name
    script.write_bytes(source)
    check(str(script), "train")
    done: list[int] = []
    run(str(script), "train", done)
    assert done == [1]


def test_a_script_that_goes_to_another_folder_does_not_take_us_along(tmp_path: Path) -> None:
    script = tmp_path / "goes.py"
    script.write_text("import os\nos.chdir('/')\ndef train(job):\n    job.append(os.getcwd())\n")
    seen: list[str] = []
    here = Path.cwd()
    run(str(script), "train", seen)
    assert (seen, Path.cwd()) == (["/"], here)


@pytest.mark.parametrize(
    "told",
    [
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_no_room_for_the_batches_of_other_processes_is_a_message_with_what_to_do(told: str) -> None:
    advice = shared_memory_advice(RuntimeError(told))
    for word in ("/dev/shm", "bytes", "--shm-size", "micro_batch_size", "num_workers=0"):
        assert word in advice
    assert shared_memory_advice(OSError("No space left on device")) == ""
