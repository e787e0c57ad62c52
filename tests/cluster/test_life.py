"""What the kernel tells of a process, whoever holds its connections and whatever its interpreter
does; and that nothing of a Ray that was killed stays."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from supple.cluster.afterwards import end_left_behind, left_behind
from supple.cluster.life import Life, NearSight, Onlooker, life_of, wait_for_end

READY = "print('ready', flush=True); "


@contextmanager
def python(code: str, **options: object) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that runs `code` after it has said that it is ready; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", READY + code],
        stdout=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def until(process: psutil.Process, wanted: Life) -> None:
    """A signal takes effect a moment after it was sent; pytest's time-out ends a wait in vain."""
    while life_of(process) is not wanted:
        pass


def test_a_process_whose_interpreter_is_held_by_a_c_call_runs() -> None:
    with python("import ctypes; ctypes.PyDLL(None).sleep(60)") as child:
        assert life_of(psutil.Process(child.pid)) is Life.RUNNING


def test_a_stopped_process_gives_no_sign_of_life_until_it_is_continued() -> None:
    with python("import time; time.sleep(60)") as child:
        process = psutil.Process(child.pid)
        child.send_signal(signal.SIGSTOP)
        until(process, Life.STOPPED)
        child.send_signal(signal.SIGCONT)
        until(process, Life.RUNNING)


def test_a_killed_process_is_gone_before_anybody_waits_for_it() -> None:
    with python("import time; time.sleep(60)") as child:
        process = psutil.Process(child.pid)
        child.kill()
        until(process, Life.GONE)
        assert child.returncode is None


def test_the_end_of_a_process_is_told_while_a_child_holds_its_pipe_open() -> None:
    code = "import os, time; os.fork(); time.sleep(60)"
    with python(code, start_new_session=True) as child:

        async def end() -> None:
            ended = asyncio.ensure_future(NearSight(child.pid).end())
            await asyncio.sleep(0)
            assert not ended.done()
            child.kill()
            await ended

        try:
            asyncio.run(end())
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def test_the_end_of_a_process_that_is_gone_already_is_told_at_once() -> None:
    with python("pass") as child:
        process = psutil.Process(child.pid)
        child.wait()
        asyncio.run(wait_for_end(process))


def test_an_onlooker_says_what_a_process_of_its_node_does_and_kills_it() -> None:
    onlooker = Onlooker()
    with python("import time; time.sleep(60)") as child:
        assert onlooker.look(child.pid) == "running"
        onlooker.kill(child.pid)
        child.wait()
        assert onlooker.look(child.pid) == "gone"


def test_what_a_ray_left_behind_is_ended_and_nothing_else() -> None:
    sleep = [sys.executable, "-c", READY + "import time; time.sleep(60)"]
    mine = subprocess.Popen(
        ["ray::Agent", *sleep[1:]],
        executable=sleep[0],
        env=os.environ | {"SUPPLE_RAY": "one"},
        stdout=subprocess.PIPE,
    )
    other = subprocess.Popen(
        ["ray::Agent", *sleep[1:]],
        executable=sleep[0],
        env=os.environ | {"SUPPLE_RAY": "another"},
        stdout=subprocess.PIPE,
    )
    try:
        for process in (mine, other):
            assert process.stdout is not None
            process.stdout.readline()
        assert left_behind("one") == [mine.pid]
        end_left_behind("one", grace_s=0.0)
        assert mine.wait() == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
