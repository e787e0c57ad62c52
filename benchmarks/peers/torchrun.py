"""torchrun elastic beside us: one agent per worker, gloo, its settings tuned in its favour.

Its state is saved once to a file in memory, well before the change; saving costs it nothing here.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks import recovery_models, workload

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).resolve().parent / "torchrun_script.py"
_LIMIT_S = 90.0
_REPEATS = 3
Row = tuple[float, int, int, int]


def pause_grow_2_to_3() -> float:
    """Median seconds from the last step of two workers to the first of three, less one step."""
    return statistics.median(_grow() for _ in range(_REPEATS))


def pause_shrink_3_to_2() -> float:
    """The same for one of three agents leaving on SIGTERM."""
    return statistics.median(_shrink() for _ in range(_REPEATS))


def recovery_kill_one_of_three(model: str) -> float:
    """Median seconds from `kill -9` of one of three workers to the next step: its agent restarts
    all of them. They train `recovery_models.MODELS[model]`."""
    return statistics.median(_recovery(model) for _ in range(_REPEATS))


def _grow() -> float:
    with _agents(2, 3) as (folder, agents, add):
        _wait(folder, lambda rows: _steps_of(rows, 2) >= 20)
        agents.append(add())
        _wait(folder, lambda rows: _steps_of(rows, 3) >= 5)
        return _pause(folder, 2, 3)


def _shrink() -> float:
    with _agents(3, 3) as (folder, agents, _):
        _wait(folder, lambda rows: _steps_of(rows, 3) >= 20)
        agents[-1].send_signal(signal.SIGTERM)
        _wait(folder, lambda rows: _steps_of(rows, 2) >= 5)
        return _pause(folder, 3, 2)


def _recovery(model: str) -> float:
    with _agents(3, 3, {recovery_models.MODEL_ENV: model}) as (folder, agents, _):
        _wait(folder, lambda rows: _steps_of(rows, 3) >= 20)
        victims = [
            child
            for child in psutil.Process(agents[1].pid).children()
            if any("torchrun_script" in part for part in child.cmdline())
        ]
        before = set(folder.glob("*.txt"))
        killed = time.time()
        victims[0].kill()
        _wait(folder, lambda _: bool(_first_steps(folder, before)))
        return min(_first_steps(folder, before)) - killed


def _first_steps(folder: Path, before: set[Path]) -> list[float]:
    """When each process that was not there before made its first step."""
    files = [file.read_text().split() for file in set(folder.glob("*.txt")) - before]
    return [float(words[0]) for words in files if words]


@contextmanager
def _agents(
    count: int, most: int, env: dict[str, str] | None = None
) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def add() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "torch.distributed.run", f"--nnodes=2:{most}"),
                    *("--nproc-per-node=1", "--max-restarts=20", "--monitor-interval=0.1"),
                    *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"),
                    "--rdzv-id=bench",
                    "--rdzv-conf=last_call_timeout=1,join_timeout=60",
                    str(SCRIPT),
                ],
                env=os.environ
                | {
                    workload.STEPS_ENV: name,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    **(env or {}),
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        agents = [add()]
        time.sleep(0.5)
        agents += [add() for _ in range(count - 1)]
        try:
            yield folder, agents, add
        finally:
            for agent in agents:
                _end(agent)


def _end(agent: subprocess.Popen[bytes]) -> None:
    children = []
    if agent.poll() is None:
        children = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
    agent.wait()
    for child in children:
        if child.is_running():
            child.kill()


def _wait(folder: Path, done: Callable[[list[Row]], bool]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        if done(workload.committed_steps(folder)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"torchrun did not get there in {_LIMIT_S:g} s")


def _steps_of(rows: list[Row], size: int) -> int:
    return sum(1 for row in rows if row[1] == 0 and row[2] == size)


def _pause(folder: Path, before: int, after: int) -> float:
    rows = [row for row in workload.committed_steps(folder) if row[1] == 0]
    first = next(
        i for i, row in enumerate(rows) if row[2] == after and i and rows[i - 1][2] != after
    )
    later = [b[0] - a[0] for a, b in zip(rows[first:], rows[first + 1 :], strict=False)]
    return rows[first][0] - rows[first - 1][0] - statistics.median(later)


if __name__ == "__main__":
    print({"grow": _grow(), "shrink": _shrink(), "recovery": _recovery("large")})
