"""Two jobs of one name, or in one folder: the second is refused before it moves or starts anything.

Real processes, which a lock is about; Ray is left out.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supple.control.lock import FILE, only_job, only_service
from supple.control.socket import socket_path
from supple.core.spec import SpecError
from supple.train.checkpoint.store import CheckpointStore
from tests.train.crashes import SIGNATURE, state_of

RUN = """
import sys
from supple.cli import training as train_run
from supple.cluster import launch
from supple.control.controller import Outcome
from supple.core.spec import SpecError, TrainSpec

def train(spec, **_):
    print("trains", flush=True)
    sys.stdin.readline()
    return Outcome(status="finished", reason="told to")

launch.train = train
_, script, name, run_dir = sys.argv
sys.stdin.readline()
try:
    spec = TrainSpec(name=name, script=script, run_dir=run_dir, ledger=True)
    train_run.run(spec, resume=None, as_json=True, verbose=False)
except SpecError as error:
    print("refused:", error, flush=True)
"""

CONTEND = """
import os, sys
from pathlib import Path
from supple.control.lock import only_job
from supple.core.spec import SpecError

name, folder = sys.argv[1], Path(sys.argv[2])
held = 0
while held < 20:
    try:
        with only_job(name, folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(folder / "inside")
            held += 1
    except SpecError:
        continue
"""

Started = subprocess.Popen[str]


@pytest.fixture
def name() -> str:
    return f"test-lock-{os.getpid()}"


@pytest.fixture
def started() -> Iterator[list[Started]]:
    processes: list[Started] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(program: str, *arguments: str | Path) -> Started:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tell(process: Started) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def next_record(process: Started) -> str:
    """The next line that is no record of the event log."""
    assert process.stdout is not None
    return next(line for line in process.stdout if not line.startswith("{"))


@pytest.mark.slow
def test_of_two_jobs_begun_at_once_one_trains_and_one_is_refused_and_moves_nothing(
    tmp_path: Path, name: str, started: list[Started]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("def train(job):\n    pass\n")
    store = CheckpointStore(tmp_path / name / "checkpoints")
    store.save(10, state_of(10), {"signature": SIGNATURE})
    started += [start(RUN, script, name, tmp_path) for _ in range(2)]
    for process in started:
        tell(process)
    told = [next_record(process) for process in started]
    (winner,) = (index for index, line in enumerate(told) if line == "trains\n")
    refusal = told[1 - winner]
    assert refusal.startswith(f"refused: a job named {name!r} is already running on this machine")
    assert f"process {started[winner].pid} on " in refusal and "since 20" in refusal
    assert "--name" in refusal
    tell(started[winner])
    started[winner].communicate(timeout=60)
    assert [path.name for path in tmp_path.glob("*/checkpoints*")] == ["checkpoints-1"]


def test_the_same_name_in_another_folder_is_refused(tmp_path: Path, name: str) -> None:
    for folder in ("runs", "others"):
        (tmp_path / folder).mkdir()
    with (
        only_job(name, tmp_path / "runs"),
        pytest.raises(SpecError, match=f"a job named '{name}' is already running"),
        only_job(name, tmp_path / "others"),
    ):
        pass


def test_the_same_folder_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    with (
        only_job(name, tmp_path),
        pytest.raises(SpecError, match=f"already running in the folder {tmp_path}") as refused,
        only_job(f"{name}-2", tmp_path),
    ):
        pass
    assert f"process {os.getpid()}" in str(refused.value) and "--run-dir" in str(refused.value)


def test_a_service_that_starts_has_its_name_and_its_ports_before_it_listens(name: str) -> None:
    ports = {"--port": 18_100, "--grpc-port": 18_101}
    with only_service(name, ports):
        with (
            pytest.raises(SpecError, match=f"a job named '{name}' is already running"),
            only_service(name, {}),
        ):
            pass
        with (
            pytest.raises(SpecError, match=r"--grpc-port 18101 cannot be used.*process") as refused,
            only_service(f"{name}-2", {"--port": 0, "--grpc-port": 18_101}),
        ):
            pass
        assert f"process {os.getpid()}" in str(refused.value) and "or 0" in str(refused.value)
        with only_service(f"{name}-2", {"--port": 0, "--grpc-port": 0}):
            pass
    with only_service(f"{name}-2", ports):
        pass


@pytest.mark.slow
def test_a_killed_holder_leaves_no_lock(tmp_path: Path, name: str, started: list[Started]) -> None:
    script = tmp_path / "train.py"
    script.write_text("def train(job):\n    pass\n")
    started.append(start(RUN, script, name, tmp_path))
    tell(started[0])
    assert next_record(started[0]) == "trains\n"
    folder = tmp_path / name
    with pytest.raises(SpecError), only_job(name, folder):
        pass
    started[0].send_signal(signal.SIGKILL)
    started[0].wait()
    with only_job(name, folder) as warning:
        assert warning == ""


@pytest.mark.slow
def test_a_lock_is_never_held_twice_while_others_end(
    tmp_path: Path, name: str, started: list[Started]
) -> None:
    """Its file is removed at the end: nobody may hold the lock of a file that is gone."""
    started += [start(CONTEND, name, tmp_path) for _ in range(3)]
    for process in started:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors


def test_the_end_leaves_no_file_behind(tmp_path: Path, name: str) -> None:
    with only_job(name, tmp_path):
        assert (tmp_path / FILE).exists()
    assert not list(tmp_path.iterdir())
    assert not socket_path(name).with_suffix(".lock").exists()


def test_a_folder_that_takes_no_file_is_a_refusal(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SpecError, match="cannot be made"),
        only_job(name, tmp_path / "file"),
    ):
        pass
