"""Whoever recovers from a loss has the cores to itself until its next step. No Ray runs."""

import asyncio
from typing import Any

import pytest

from supple.cluster.node_reports import NodeReports
from supple.cluster.ray import RayBackend, _Worker
from supple.cluster.worker import Report
from supple.core.spec import TrainSpec
from supple.core.types import AbortGeneration, JobId, WorkerId
from tests.hurried import run_hurried

NEW, OLD = WorkerId("w2"), WorkerId("w0")


class Actor:
    """Stands for what Ray made; only its being made counts."""

    def __init__(self, made_at: list[float]) -> None:
        made_at.append(asyncio.get_running_loop().time())
        self.run = self

    def remote(self) -> None: ...


def backend(made_at: list[float]) -> Any:
    made: Any = object.__new__(RayBackend)
    made._spec = TrainSpec(name="job", script="train.py", min_workers=2, max_workers=3)
    made._workers = {}
    made._generation = 2
    made._calm = asyncio.Event()
    made._calm.set()
    made._actor = lambda _: Actor(made_at)

    async def follow(*_: object) -> None: ...

    made._follow = follow
    return made


async def abort(made: Any, num_members: int) -> None:
    members = tuple(WorkerId(f"w{index}") for index in range(num_members))
    await made.execute(AbortGeneration(job_id=JobId("job"), generation=2, members=members))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_replacement_starts_once_a_survivor_has_made_a_step() -> None:
    async def go() -> None:
        made_at: list[float] = []
        made = backend(made_at)
        await abort(made, 2)
        made._start(NEW)
        await settled()
        assert made_at == []
        made._calm.set()
        await settled()
        assert len(made_at) == 1

    asyncio.run(go())


def test_a_replacement_is_not_kept_for_long_by_survivors_whose_steps_are() -> None:
    async def go() -> None:
        made_at: list[float] = []
        made = backend(made_at)
        began = asyncio.get_running_loop().time()
        await abort(made, 2)
        made._start(NEW)
        await asyncio.gather(*made._workers[NEW].tasks)
        assert made_at == [pytest.approx(began + 2.0)]

    run_hurried(go())


def test_a_replacement_that_the_others_wait_for_starts_at_once() -> None:
    async def go() -> None:
        made_at: list[float] = []
        made = backend(made_at)
        await abort(made, 1)
        made._start(NEW)
        await settled()
        assert len(made_at) == 1

    asyncio.run(go())


def test_a_replacement_that_is_let_go_meanwhile_never_starts() -> None:
    async def go() -> None:
        made_at: list[float] = []
        made = backend(made_at)
        await abort(made, 2)
        made._start(NEW)
        made._workers[NEW].leaving = True
        made._calm.set()
        await settled()
        assert made_at == []

    asyncio.run(go())


@pytest.mark.parametrize(
    ("generation", "step", "is_calm"),
    [(2, 11, True), (2, 10, False), (1, 11, False)],
)
def test_it_is_a_step_of_the_newest_generation_that_calms(
    generation: int, step: int, is_calm: bool
) -> None:
    async def go() -> None:
        made = backend([])
        await abort(made, 2)
        made._follow = RayBackend._follow.__get__(made)
        made._queue = asyncio.Queue()
        made._job_id = JobId("job")
        made._reports = NodeReports(made._job_id, lambda _: None)
        worker = _Worker(generation=generation, step=10)

        class ProcessHandle:
            async def end(self) -> None:
                await asyncio.Event().wait()

        worker.handle = ProcessHandle()  # type: ignore[assignment]
        reports = [
            Report(
                events=(),
                progress=None,
                output=(),
                generation=generation,
                step=step,
                doing="script",
                since_s=0.0,
            )
        ]

        async def greet(*_: object) -> bool:
            return True

        async def answer(*_: object) -> Report:
            if not reports:
                raise ConnectionError("the test is over")
            return reports.pop()

        made._greet, made._answer = greet, answer
        with pytest.raises(ConnectionError):
            await made._follow(OLD, worker)
        assert made._calm.is_set() == is_calm

    asyncio.run(go())
