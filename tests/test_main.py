"""The `supple` command as a process: output that does not arrive, and Ctrl-C at any moment."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
FULL = Path("/dev/full")
PLAN = f"plan {ROOT}/examples/model.toml:train"


def supple(arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supple", *arguments.split()],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=100,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "status", "status --json", PLAN])
def test_an_answer_that_cannot_be_written_is_one_line_and_a_failure(arguments: str) -> None:
    with FULL.open("w") as full:
        done = supple(arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "supple: the answer could not be written to stdout: No space left"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--help", PLAN])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_ends_it_without_a_word(arguments: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = supple(arguments, stdout=writer, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_a_closed_stdout_is_nobody_to_tell() -> None:
    done = supple("status", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, "")


# --- Ctrl-C -------------------------------------------------------------------------------------

INTERRUPTED_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            {press}

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["typer", "supple.cli.app", "supple.cli.output"])
@pytest.mark.parametrize("in_exec", [False, True])
def test_ctrl_c_while_modules_load_is_one_line(tmp_path: Path, name: str, in_exec: bool) -> None:
    """An interrupted exec() of a text, as in every dataclass, is a case of its own for Python."""
    press = "os.kill(os.getpid(), signal.SIGINT)"
    program = INTERRUPTED_IMPORT.format(name=name, press=f"exec({press!r})" if in_exec else press)
    (tmp_path / "sitecustomize.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = supple("status", stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "supple: stopped by Ctrl-C.\n"


def marked(mark: str) -> list[psutil.Process]:
    """The processes that were started with this mark in their environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SUPPLE_TEST") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def has_agent(mark: str) -> bool:
    """By the title it gives itself. psutil remembers the name that a process had before."""
    with contextlib.suppress(psutil.Error):
        return any(psutil.Process(found.pid).name().startswith("ray::") for found in marked(mark))
    return False


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_ctrl_c_while_ray_starts_leaves_no_process_and_no_folder_behind() -> None:
    """Its raylet has started the agents, and Ray waits for the raylet."""
    with tempfile.TemporaryDirectory(prefix="main-", dir="/tmp") as folder:
        interrupt_while_ray_starts(folder)
        assert os.listdir(folder) == []


def interrupt_while_ray_starts(folder: str) -> None:
    mark = uuid.uuid4().hex
    script = str(ROOT / "examples" / "digits.py")
    running = subprocess.Popen(
        [sys.executable, "-m", "supple", "plan", script],
        env=os.environ | {"SUPPLE_TEST": mark, "TMPDIR": folder, "RAY_TMPDIR": folder},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not has_agent(mark):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
    os.killpg(running.pid, signal.SIGINT)
    out, told = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert told.endswith("supple: stopped by Ctrl-C.\n")
    _, left = psutil.wait_procs(marked(mark), timeout=20)
    assert not left
