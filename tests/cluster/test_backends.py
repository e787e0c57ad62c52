"""What holds of every `Backend`: of the scripted one, and of Ray's."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import psutil
import pytest
import ray
from ray._private.state import actors

from supple.cluster.life import Life, life_of
from supple.cluster.ray import RayBackend, connect
from supple.cluster.starting import stop_ray
from supple.control.backend import Backend
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    CheckpointSaved,
    Decision,
    Event,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    KillWorker,
    NodeReported,
    SaveCheckpoint,
    StartWorker,
    StopWorker,
    WorkerId,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from supple.testing import ScriptedBackend

JOB = JobId("contract")
W0, W1 = WorkerId("w0"), WorkerId("w1")
LIMIT_S = 120.0
SCRIPT = """
import time
import torch

def train(job):
    model = job.model(lambda: torch.nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=0.01)
    data = torch.utils.data.TensorDataset(torch.ones(64, 1))
    for (x,) in job.batches(data, batch_size=4, epochs=1_000_000):
        time.sleep(0.01)
        job.step(model(x).square().mean())
"""
Kind = TypeVar("Kind", bound=Event)


class Place(Protocol):
    """Where the workers of one backend are, beside what the backend says of them."""

    backend: Backend

    def die(self, worker_id: WorkerId) -> None:
        """Its process ends, and nobody asked for it."""
        ...

    def living(self) -> int:
        """Workers whose process is there, or may come yet."""
        ...


@final
class ScriptedPlace:
    def __init__(self, spec: TrainSpec) -> None:
        self._scripted = ScriptedBackend(spec)
        self.backend: Backend = self._scripted

    def die(self, worker_id: WorkerId) -> None:
        self._scripted.kill(worker_id)

    def living(self) -> int:
        return len(self._scripted.world.awake)


@final
class RayPlace:
    def __init__(self, spec: TrainSpec) -> None:
        self._before = set(actors())
        self.backend: Backend = RayBackend(
            spec,
            run_path=spec.run_dir,
            rehearsal_size=1,
            on_progress=lambda _: None,
            on_output=lambda _: None,
        )

    def die(self, worker_id: WorkerId) -> None:
        os.kill(self.backend.pids[worker_id], signal.SIGKILL)

    def living(self) -> int:
        ours = [actor for name, actor in actors().items() if name not in self._before]
        return sum(actor["State"] != "DEAD" or _runs(actor["Pid"]) for actor in ours)


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return pid > 0 and life_of(psutil.Process(pid)) is not Life.GONE
    return False


@final
class Company:
    """The workers of one backend, told what to do and listened to as by a controller."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.backend = place.backend
        self.heard: list[Event] = []
        self.started: set[WorkerId] = set()
        self._more = asyncio.Event()

    async def listen(self) -> None:
        async for event in self.backend.events():
            self.heard += event.events if isinstance(event, NodeReported) else (event,)
            self._more.set()

    async def do(self, action: type[Action], *, generation: int = 0, **values: Any) -> None:
        """Its outcome is no answer of `execute`."""
        if action is StartWorker:
            self.started.add(values["worker_id"])
        told = await self.backend.execute(action(job_id=JOB, generation=generation, **values))
        assert told is None

    async def hear(
        self, kind: type[Kind], worker_id: WorkerId | None = None, *, since: int = 0, **values: Any
    ) -> Kind:
        """The first such event since so many were heard; waits for it."""
        if worker_id is not None:
            values["worker_id"] = worker_id
        while True:
            self._more.clear()
            for event in self.heard[since:]:
                if isinstance(event, kind) and values.items() <= _fields(event).items():
                    return event
            await self._more.wait()

    async def beats(self, worker_id: WorkerId, count: int = 3) -> None:
        """Wait for so many more signs of life: whatever was on its way before has come then."""
        for _ in range(count):
            await self.hear(Heartbeat, worker_id, since=len(self.heard))

    async def trains(self, worker_id: WorkerId, generation: int, step: int) -> None:
        """Wait until it has committed `step` in `generation`."""
        while True:
            since = len(self.heard)
            beat = await self.hear(Heartbeat, worker_id, since=since, generation=generation)
            if beat.step >= step:
                return

    async def start(self, *worker_ids: WorkerId) -> None:
        """Start them, and wait until they stand by."""
        for worker_id in worker_ids:
            await self.do(StartWorker, worker_id=worker_id)
        for worker_id in worker_ids:
            await self.hear(WorkerReady, worker_id)

    async def form(
        self, generation: int, *members: WorkerId, restore: str | None = None
    ) -> list[int]:
        """The step at which each of them begins `generation`."""
        shared: dict[str, Any] = {"global_batch_size": None, "restore": restore}
        await self.do(FormGroup, generation=generation, members=members, **shared)
        formed = [await self.hear(GroupFormed, w, generation=generation) for w in members]
        return [event.step for event in formed]

    async def stopped(self, generation: int, *members: WorkerId) -> list[WorkerStopped]:
        return [await self.hear(WorkerStopped, w, generation=generation) for w in members]

    async def gone(self, *, left: int) -> None:
        """Wait until only so many workers live."""
        while self.place.living() > left:
            await asyncio.sleep(0.02)  # a process that ends says so to nobody here

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.heard if isinstance(event, kind)]

    def about(self, worker_id: WorkerId, *, since: int = 0) -> list[Event]:
        return [e for e in self.heard[since:] if _fields(e).get("worker_id") == worker_id]


def _fields(event: Event) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in fields(event)}


Body = Callable[[Company], Coroutine[Any, Any, None]]
Play = Callable[[Body], None]


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Callable[[TrainSpec], Place]]:
    def place(spec: TrainSpec) -> Place:
        if not ray.is_initialized():
            connect(spec)
        return RayPlace(spec)

    yield place
    stop_ray()


@pytest.fixture(
    params=["scripted", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(240)])]
)
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Plays a test with a company of its own; afterwards nothing of it may be left."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    spec = TrainSpec(name=JOB, script=str(script), max_workers=2, run_dir=str(tmp_path))
    place: Callable[[TrainSpec], Place] = ScriptedPlace
    if request.param == "ray":
        place = request.getfixturevalue("on_ray")

    async def whole(body: Body) -> None:
        company = Company(place(spec))
        listening = asyncio.ensure_future(company.listen())
        playing = asyncio.ensure_future(asyncio.wait_for(body(company), LIMIT_S))
        try:
            await asyncio.wait([listening, playing], return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()  # raises what ended it
            await playing
        finally:
            listening.cancel()
            playing.cancel()
            await company.backend.close()
        await company.gone(left=0)
        assert not company.backend.pids
        assert all(event.job_id == JOB for event in company.heard)
        about = {
            values["worker_id"] for values in map(_fields, company.heard) if "worker_id" in values
        }
        assert about <= company.started

    return lambda body: asyncio.run(whole(body))


def test_a_started_worker_stands_by_and_gives_signs_of_life(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.do(Decision, kind="keep", num_workers=1, reason="no backend's affair")
        await company.do(StartWorker, worker_id=W0)
        ready = await company.hear(WorkerReady)
        assert (ready.worker_id, ready.generation) == (W0, 0)
        await company.beats(W0)
        assert company.of(WorkerReady) == [ready]
        assert set(company.backend.pids) <= {W0}

    play(body)


def test_members_form_a_group_stop_together_and_some_go_on_from_there(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        assert await company.form(1, W0, W1) == [0, 0]
        await company.trains(W1, 1, step=2)
        await company.do(AnnounceGeneration, generation=2, members=(W0, W1))
        first, second = await company.stopped(1, W0, W1)
        assert first.step == second.step >= 2
        assert (first.error, second.error) == ("", "")
        assert await company.form(2, W1) == [first.step]
        await company.trains(W1, 2, step=first.step + 1)

    play(body)


def test_a_generation_that_is_aborted_is_left_by_all_and_the_next_has_the_newest_state(
    play: Play,
) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        await company.form(1, W0, W1)
        await company.trains(W0, 1, step=1)
        await company.do(AbortGeneration, generation=1, members=(W0, W1))
        stopped = await company.stopped(1, W0, W1)
        assert all(event.error for event in stopped)
        newest = max(event.step for event in stopped)
        assert await company.form(2, W0, W1) == [newest, newest]

    play(body)


def test_what_a_stopped_worker_saves_another_begins_with(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        await company.form(1, W0)
        await company.trains(W0, 1, step=1)
        await company.do(AnnounceGeneration, generation=2, members=(W0,))
        (stopped,) = await company.stopped(1, W0)
        await company.do(SaveCheckpoint, generation=1, worker_id=W0)
        saved = await company.hear(CheckpointSaved)
        assert saved.step == stopped.step
        assert await company.form(2, W1, restore=saved.path) == [saved.step]

    play(body)


def test_a_killed_worker_is_heard_no_more_and_not_told_to_be_lost(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        await company.do(KillWorker, worker_id=W1, reason="fenced")
        assert W1 not in company.backend.pids
        await company.gone(left=1)
        await company.do(KillWorker, worker_id=W1, reason="to be sure")
        await company.beats(W0, 1)
        since = len(company.heard)
        await company.beats(W0)
        assert company.about(W1, since=since) == []
        assert company.of(WorkerLost) == []

    play(body)


def test_a_worker_that_is_let_go_ends_and_is_not_told_to_be_lost(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        await company.do(StopWorker, worker_id=W1, reason="no longer wanted")
        await company.gone(left=1)
        await company.beats(W0)
        assert W1 not in company.backend.pids
        assert company.of(WorkerLost) == []

    play(body)


def test_a_worker_whose_process_dies_is_told_to_be_lost_once(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0, W1)
        company.place.die(W1)
        lost = await company.hear(WorkerLost)
        assert (lost.worker_id, lost.cause) == (W1, "died")
        assert W1 not in company.backend.pids
        await company.do(StopWorker, worker_id=W1, reason="before it was known")
        await company.do(KillWorker, worker_id=W1, reason="to be sure")
        await company.beats(W0)
        assert company.about(W1)[-1] is lost
        assert company.of(WorkerLost) == [lost]

    play(body)


def test_close_ends_those_too_who_are_starting_and_may_be_called_again(play: Play) -> None:
    async def body(company: Company) -> None:
        await company.start(W0)
        await company.do(StartWorker, worker_id=W1)
        await company.backend.close()
        await company.gone(left=0)
        assert not company.backend.pids
        await company.backend.close()
        assert not company.of(WorkerLost)

    play(body)
