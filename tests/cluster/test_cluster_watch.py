"""A head that does not answer is said, then given up; nodes that drain are told of once."""

import asyncio
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path

import pytest
from ray.exceptions import RaySystemError

from supple.cluster.cluster_watch import ClusterWatch, own_servers
from supple.core.types import ClusterLost, Event, JobId, Noticed, PreemptionNoticed, WorkerId
from supple.testing.faults import FakeClock

JOB = JobId("job")
LIMIT_S = 60.0
NODES = {WorkerId("w0"): "a", WorkerId("w1"): "b", WorkerId("w2"): "b"}
Answer = Mapping[str, int] | Exception

SILENT = ConnectionError("no answer")


class Head:
    """Answers with the next of what it is to say, each after some seconds; then never again."""

    def __init__(self, *answers: tuple[float, Answer]) -> None:
        self.clock = FakeClock(100.0)
        self.answers = list(answers)
        self.nodes: dict[WorkerId, str] = dict(NODES)
        self.events: list[Event] = []
        self.told_at: list[float] = []

    def put(self, event: Event) -> None:
        self.events.append(event)
        self.told_at.append(self.clock.now())

    def ask(self) -> Mapping[str, int]:
        after_s, answer = self.answers.pop(0) if self.answers else (1000.0, SILENT)
        self.clock.advance(after_s)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def watched(self) -> "Head":
        """Once it was given up."""
        watch = ClusterWatch(
            JOB,
            self.put,
            lambda: self.nodes,
            draining_nodes=self.ask,
            now=self.clock.now,
            wall=lambda: self.clock.now() + 1_000_000.0,
            every_s=0.0,
        )
        asyncio.run(asyncio.wait_for(watch.watch_head("head:6379"), LIMIT_S))
        assert watch.is_lost
        return self

    def texts(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Noticed)]

    def noticed(self) -> list[PreemptionNoticed]:
        return [event for event in self.events if isinstance(event, PreemptionNoticed)]


def test_a_head_that_does_not_answer_is_said_after_ten_seconds_once_and_lost_after_thirty() -> None:
    head = Head((10.0, SILENT), (0.25, SILENT), (19.75, SILENT), (0.25, SILENT)).watched()
    who = "the head of the Ray cluster at head:6379 has not answered for"
    assert head.events == [
        Noticed(
            job_id=JOB,
            generation=0,
            text=f"{who} 10 s: no worker can be started; the job goes on with those it has, and "
            "saves and ends when 30 s have passed",
        ),
        ClusterLost(job_id=JOB, generation=0, reason=f"{who} 30 s"),
    ]
    assert head.told_at == [110.25, 130.25], "not before so many seconds had passed"
    assert head.clock.now() == 130.25, "and asked no more"


def test_an_answer_makes_good_the_silence_before_it() -> None:
    away: list[tuple[float, Answer]] = [(20.0, SILENT), (5.0, {})]
    head = Head(*away, *away, (10.0, SILENT), (15.0, SILENT), (5.0, SILENT)).watched()
    assert len(head.texts()) == 3, "each silence is said anew"
    assert head.clock.now() == 180.0 + 1000.0, "the last began with the last answer"


@pytest.mark.parametrize(
    "error", [RaySystemError("gone"), ConnectionError("refused"), RuntimeError("not connected")]
)
def test_an_error_is_as_good_as_no_answer(error: Exception) -> None:
    head = Head((11.0, error), (20.0, error)).watched()
    assert [type(event) for event in head.events] == [Noticed, ClusterLost]


def test_a_question_that_is_open_is_not_asked_twice() -> None:
    seconds, asked, answer = count(), list[None](), threading.Event()

    def ask() -> Mapping[str, int]:
        asked.append(None)
        answer.wait(LIMIT_S)
        return {}

    events: list[Event] = []
    watch = ClusterWatch(
        JOB,
        events.append,
        lambda: NODES,
        draining_nodes=ask,
        now=lambda: next(seconds),
        every_s=0.0,
    )
    try:
        asyncio.run(asyncio.wait_for(watch.watch_head("head:6379"), LIMIT_S))
    finally:
        answer.set()
    assert [type(event) for event in events] == [Noticed, ClusterLost]
    assert len(asked) == 1


def drained(head: Head) -> list[tuple[tuple[WorkerId, ...], float]]:
    found = head.watched().noticed()
    assert {(event.job_id, event.generation) for event in found} == {(JOB, 0)}
    return [(event.worker_ids, event.deadline) for event in found]


def ms(wall_s: float) -> int:
    """When the head's clock, which is a million seconds ahead, says so."""
    return int((wall_s + 1_000_000.0) * 1000)


@pytest.mark.parametrize(
    ("deadline_ms", "deadline"),
    [(ms(120.5), 120.5), (ms(90.0), 101.0), (0, 131.0)],
    ids=["is told", "that has passed is now", "that is not told is in half a minute"],
)
def test_the_workers_of_a_node_that_drains_are_named_with_its_deadline(
    deadline_ms: int, deadline: float
) -> None:
    assert drained(Head((1.0, {"elsewhere": 0, "b": deadline_ms}))) == [
        ((WorkerId("w1"), WorkerId("w2")), deadline)
    ]


def test_a_worker_is_told_of_once_and_those_that_come_later_to_its_node_too() -> None:
    head = Head((1.0, {"a": 0}), (1.0, {"a": 0}), (1.0, {"a": 0, "b": 0}))
    ask: Callable[[], Mapping[str, int]] = head.ask

    def and_a_worker_comes() -> Mapping[str, int]:
        if len(head.answers) == 1:
            head.nodes[WorkerId("w3")] = "a"
        return ask()

    head.ask = and_a_worker_comes  # type: ignore[method-assign]
    assert [names for names, _ in drained(head)] == [
        (WorkerId("w0"),),
        (WorkerId("w3"),),
        (WorkerId("w1"), WorkerId("w2")),
    ]


@pytest.fixture
def ended() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Processes that are killed after the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("dies", "words"), [("raylet", "Ray's raylet"), ("gcs_server", "Ray's GCS")]
)
def test_the_end_of_one_of_its_own_servers_is_the_end_of_the_cluster(
    tmp_path: Path, ended: list["subprocess.Popen[bytes]"], dies: str, words: str
) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    names = ("raylet", "gcs_server", "another")
    ended += [subprocess.Popen([shutil.copy(sleep, tmp_path / name), "60"]) for name in names]
    while len(found := own_servers()) < 2:
        pass  # they have yet to become what they are called
    assert [process.name() for process in found] == ["raylet", "gcs_server"]
    events: list[Event] = []
    watch = ClusterWatch(JOB, events.append, lambda: NODES)

    async def go() -> None:
        watching = asyncio.ensure_future(watch.watch_own())
        await asyncio.sleep(0)
        next(process for process in found if process.name() == dies).kill()
        await asyncio.wait_for(watching, LIMIT_S)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        assert all(task.cancelling() for task in rest), "nobody waits for the other any more"

    asyncio.run(go())
    (lost,) = events
    assert isinstance(lost, ClusterLost) and lost.reason.startswith(words)
    assert watch.is_lost


def test_where_ray_was_there_before_its_servers_are_not_watched() -> None:
    assert own_servers() == []
    events: list[Event] = []
    asyncio.run(ClusterWatch(JOB, events.append, lambda: NODES).watch_own())
    assert events == []
