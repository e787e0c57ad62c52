"""Slow is not dead, dead is not slow, and what everything runs on may die too: real processes."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.runs import TrainRun
from tests.cluster.test_training import LONG, Start, start

__all__ = ["start"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# At its 20th batch rank 0 holds the interpreter's lock for three time-outs; and every worker has a
# child that holds its connections open.
HELD = LONG.replace(
    "    for x, y",
    "    import ctypes, itertools, os, time\n"
    "    if os.fork() == 0:\n"
    "        time.sleep(3600)\n"
    "        os._exit(0)\n"
    "    batches = itertools.count()\n"
    "    for x, y",
).replace(
    "        loss =",
    "        if next(batches) == 20 and job.rank == 0:\n"
    "            ctypes.PyDLL(None).sleep(6)\n"
    "        loss =",
)


def offspring(run: TrainRun) -> list[psutil.Process]:
    return psutil.Process(run.process.pid).children(recursive=True)


def server(run: TrainRun, name: str) -> psutil.Process:
    return next(child for child in offspring(run) if child.name() == name)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """pytest's time-out ends a wait in vain."""
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        time.sleep(0.02)  # a process that ends says so to nobody here


def test_a_held_interpreter_is_waited_for_and_a_death_is_seen_behind_open_connections(
    start: Start,
) -> None:
    run = start(HELD, "--workers", "1:2", "--schedule", "0s:2", "--heartbeat-timeout", "2s")
    members = run.wait_running(2)
    run.wait("Progress", lambda record: record["step"] > 25)
    assert not run.of_type("KillWorker") and not run.of_type("WorkerLost")
    all_processes = offspring(run)
    os.kill(run.pid_of(members[1]), signal.SIGKILL)
    lost = run.wait("WorkerLost")
    assert (lost["worker_id"], lost["cause"]) == (members[1], "died")
    assert not run.of_type("KillWorker")
    run.wait_running(1)
    run.process.kill()
    wait_until_gone(all_processes)


@pytest.mark.parametrize(
    ("name", "words"), [("raylet", "Ray's raylet on this machine"), ("gcs_server", "Ray's GCS on")]
)
def test_a_job_whose_ray_dies_ends_saved_failed_and_says_why(
    start: Start, tmp_path: Path, name: str, words: str
) -> None:
    run = start(LONG, "--workers", "2")
    run.wait_running(2)
    run.wait("Progress")
    server(run, name).kill()
    lost = run.wait("ClusterLost")
    assert lost["reason"].startswith(words)
    saved = run.wait("CheckpointSaved")
    assert run.end() == 1
    assert f"supple: failed: {words}" in run.errors()
    assert f"--resume {saved['path']}" in run.errors()
    assert Path(saved["path"]).is_dir()
