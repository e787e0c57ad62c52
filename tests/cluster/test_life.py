"""What the kernel tells of a process, whoever holds its connections and whatever its interpreter
does; and that nothing of a Ray that was killed stays."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.exceptions import RayError

from supple.cluster.afterwards import end_left_behind, left_behind
from supple.cluster.life import (
    Life,
    LocalProcess,
    ProcessHandles,
    ProcessMonitor,
    RemoteProcess,
    life_of,
    wait_for_end,
)
from tests.hurried import run_hurried

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
            ended = asyncio.ensure_future(LocalProcess(child.pid).end())
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


def test_nothing_is_left_open_when_ends_have_been_waited_for() -> None:
    async def ends() -> None:
        before = psutil.Process().num_fds()
        for _ in range(2):  # the next descriptor has the number of the one before
            with python("import sys; sys.stdin.read()", stdin=subprocess.PIPE) as child:
                ended = asyncio.ensure_future(wait_for_end(psutil.Process(child.pid)))
                await asyncio.sleep(0)
                assert child.stdin is not None
                child.stdin.close()
                await ended
        assert psutil.Process().num_fds() == before

    asyncio.run(ends())


class OfAnother(psutil.Process):
    """A process that has ended, and whose number is that of another now: of this one."""

    def is_running(self) -> bool:
        return False


def test_a_number_that_is_anothers_since_is_a_process_that_has_gone() -> None:
    ended = OfAnother(os.getpid())
    assert life_of(ended) is Life.GONE
    asyncio.run(asyncio.wait_for(wait_for_end(ended), 60.0))
    monitor = ProcessMonitor()
    monitor._seen[ended.pid] = ended
    assert monitor.look(ended.pid) == "gone"


def test_a_kill_ends_a_process_and_is_no_error_where_it_has_ended() -> None:
    with python("import time; time.sleep(60)") as child:
        handle = LocalProcess(child.pid)
        handle.kill()
        assert child.wait() == -signal.SIGKILL
        handle.kill()


def test_a_monitor_kills_no_process_that_it_was_never_asked_to_look_at() -> None:
    with python("import sys; sys.stdin.read()", stdin=subprocess.PIPE) as child:
        ProcessMonitor().kill(child.pid)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait() == 0


def test_a_monitor_says_what_a_process_of_its_node_does_and_kills_it() -> None:
    monitor = ProcessMonitor()
    with python("import time; time.sleep(60)") as child:
        assert monitor.look(child.pid) == "running"
        monitor.kill(child.pid)
        child.wait()
        assert monitor.look(child.pid) == "gone"


class Call:
    """A method of an actor that is `remote`: the answer is there when it is waited for."""

    def __init__(self, method: Callable[[int], Any]) -> None:
        self.method = method

    def remote(self, pid: int) -> "asyncio.Future[Any]":
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(self.method(pid))
        return answer


class Actor:
    """A monitor as Ray hands it out, in this process."""

    def __init__(self) -> None:
        self.body = ProcessMonitor()
        self.look, self.kill = Call(self.body.look), Call(self.body.kill)


def test_a_process_elsewhere_is_seen_and_killed_by_the_monitor_there() -> None:
    with python("import time; time.sleep(60)") as child:

        async def go() -> None:
            handle = RemoteProcess(Actor(), child.pid)
            handle.kill()  # the very first look made the number known to be its own
            child.wait()
            assert await handle.life() is Life.GONE
            running = RemoteProcess(Actor(), os.getpid())
            assert await running.life() is Life.RUNNING
            end = asyncio.ensure_future(running.end())
            await asyncio.sleep(0)
            assert not end.done(), "only a look can tell"
            end.cancel()

        asyncio.run(go())


def test_a_node_that_does_not_answer_within_two_seconds_gives_no_proof_of_life() -> None:
    async def go() -> None:
        monitor = Actor()
        handle = RemoteProcess(monitor, os.getpid())
        loop = asyncio.get_running_loop()
        monitor.look.remote = lambda _pid: loop.create_future()  # type: ignore[method-assign]
        began_s = loop.time()
        assert await handle.life() is Life.STOPPED
        assert loop.time() - began_s == pytest.approx(2.0)

    run_hurried(go())


def test_a_node_that_cannot_be_asked_gives_no_proof_of_life_and_is_not_asked_to_kill() -> None:
    def cannot(_pid: int) -> Any:
        raise RayError("the actor is gone")

    async def go() -> None:
        monitor = Actor()
        handle = RemoteProcess(monitor, os.getpid())
        monitor.look.method = monitor.kill.method = cannot
        assert await handle.life() is Life.STOPPED
        handle.kill()

    asyncio.run(go())


SIGHTS = """
import asyncio, logging, os, subprocess, sys
import psutil, ray
from supple.cluster.life import RemoteProcess, Life, LocalProcess, ProcessHandles

def monitors():
    found = psutil.Process().children(recursive=True)
    return [p for p in found if "ray::ProcessMonitor" in " ".join(p.cmdline())]

ray.init(
    "local",
    num_cpus=0,
    include_dashboard=False,
    log_to_driver=False,
    logging_level=logging.ERROR,
)
here = ray.get_runtime_context().get_node_id()
children = [subprocess.Popen(["sleep", "120"]) for _ in range(3)]
try:
    assert isinstance(ProcessHandles(here).of(children[0].pid, here), LocalProcess)
    assert monitors() == []
    handles = ProcessHandles("another node")
    far = [handles.of(child.pid, here) for child in children]

    async def lives():
        return [await handle.life() for handle in far]

    while asyncio.run(lives()) != [Life.RUNNING] * 3:
        pass  # the monitor has yet to come up
    (crashed,) = monitors()
    crashed.kill()
    psutil.wait_procs([crashed], timeout=60)
    while asyncio.run(lives()) != [Life.RUNNING] * 3:
        pass  # another one takes its place
    (monitor,) = monitors()
    far[0].kill()
    children[0].wait()
    assert asyncio.run(lives()) == [Life.GONE, Life.RUNNING, Life.RUNNING]
    handles.close()
    psutil.wait_procs([monitor], timeout=60)
    assert not monitor.is_running()
    assert asyncio.run(lives()) == [Life.STOPPED] * 3
    far[1].kill()
    assert children[1].poll() is None
    far[:] = [handles.of(children[2].pid, here)]
    while asyncio.run(lives()) != [Life.RUNNING]:
        pass  # a new one has yet to come up
    handles.close()
    print("seen")
finally:
    for child in children:
        child.kill()
        child.wait()
    ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_has_one_monitor_that_ends_with_the_handles(tmp_path: Path) -> None:
    script = tmp_path / "handles.py"
    script.write_text(SIGHTS)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "seen" in done.stdout, done.stderr[-3000:]


def test_each_node_gets_a_monitor_of_its_own_that_can_be_nowhere_else() -> None:
    a, b = "a" * 56, "b" * 56
    placed: list[tuple[str, bool]] = []

    class Options:
        def options(self, scheduling_strategy: Any) -> Any:
            placed.append((scheduling_strategy.node_id, scheduling_strategy.soft))
            return self

        def remote(self) -> Actor:
            return Actor()

    async def go() -> None:
        handles = ProcessHandles("here", actor_class=Options())
        for node_id in (a, b, a, "here", b):
            handles.of(os.getpid(), node_id)

    asyncio.run(go())
    assert placed == [(a, False), (b, False)]


def test_what_a_ray_left_behind_is_ended_and_nothing_else(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", READY + "import time; time.sleep(60)"]
    one, another = tmp_path / "one", tmp_path / "another"
    one.mkdir()

    def begun(title: str, mark: str, log: Path) -> "subprocess.Popen[bytes]":
        with log.open("wb") as opened:
            return subprocess.Popen(
                [title, *sleep[1:]],
                executable=sleep[0],
                env=os.environ | {"SUPPLE_RAY": mark},
                stdout=subprocess.PIPE,
                stderr=opened,
            )

    marked = begun("ray::Agent", str(one), tmp_path / "log")
    # Its title has overwritten its environment; its log is open.
    logging = begun("ray::Agent", "", one / "log")
    others = (
        begun("ray::Agent", str(another), tmp_path / "log"),
        begun("python", str(one), one / "other"),  # as what a script starts
    )
    started = (marked, logging, *others)
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        assert sorted(left_behind(str(one))) == sorted([marked.pid, logging.pid])
        end_left_behind(str(one), grace_s=0.0)
        assert {marked.wait(), logging.wait()} == {-signal.SIGKILL}
        assert [other.poll() for other in others] == [None, None]
    finally:
        for process in started:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
