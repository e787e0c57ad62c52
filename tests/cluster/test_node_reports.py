"""What the workers of a node tell is gathered: heartbeats wait for each other, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable

from supple.cluster.node_reports import NodeReports
from supple.core.types import Event, Heartbeat, JobId, NodeReported, WorkerId, WorkerReady

JOB = JobId("job")
Test = Callable[[NodeReports, "asyncio.Queue[Event]"], Awaitable[None]]


def run(test: Test) -> None:
    async def body() -> None:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        reports = NodeReports(JOB, queue.put_nowait)
        await test(reports, queue)
        reports.close()

    asyncio.run(body())


def beat(name: str, step: int = 0) -> Heartbeat:
    return Heartbeat(job_id=JOB, generation=1, worker_id=WorkerId(name), step=step)


def ready(name: str) -> WorkerReady:
    return WorkerReady(job_id=JOB, generation=0, worker_id=WorkerId(name), node_id="n")


def report(node_id: str, *events: Event) -> NodeReported:
    return NodeReported(job_id=JOB, generation=0, node_id=node_id, events=events)


def test_heartbeats_of_a_node_come_in_one_event_and_those_of_another_in_another() -> None:
    async def test(reports: NodeReports, queue: "asyncio.Queue[Event]") -> None:
        for name in ("w0", "w1"):
            reports.add("n", beat(name))
        reports.add("m", beat("w2"))
        assert queue.empty()
        assert await queue.get() == report("n", beat("w0"), beat("w1"))
        assert await queue.get() == report("m", beat("w2"))
        assert queue.empty()

    run(test)


def test_anything_else_waits_for_nothing_and_takes_along_what_came_before() -> None:
    async def test(reports: NodeReports, queue: "asyncio.Queue[Event]") -> None:
        reports.add("n", beat("w0"))
        reports.add("n", ready("w1"))
        assert queue.get_nowait() == report("n", beat("w0"), ready("w1"))
        reports.add("n", beat("w1"))
        assert await queue.get() == report("n", beat("w1"))

    run(test)


def test_of_a_worker_that_was_killed_nothing_is_told_any_more() -> None:
    async def test(reports: NodeReports, queue: "asyncio.Queue[Event]") -> None:
        reports.add("n", beat("w0"))
        reports.add("m", beat("w1"))
        reports.forget(WorkerId("w0"))
        reports.add("n", beat("w2"))
        assert await queue.get() == report("n", beat("w2"))
        assert await queue.get() == report("m", beat("w1"))

    run(test)


def test_what_was_gathered_is_dropped_at_the_close() -> None:
    async def test(reports: NodeReports, queue: "asyncio.Queue[Event]") -> None:
        reports.add("n", beat("w0"))
        reports.close()
        reports.add("n", ready("w1"))
        assert queue.get_nowait() == report("n", ready("w1"))

    run(test)
