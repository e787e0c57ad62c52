"""The shell around one lifecycle, over a backend that answers at once and keeps no process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from supple.control.backend import Clock, MonotonicClock
from supple.control.controller import Controller, Outcome
from supple.control.socket import running_jobs, send_request
from supple.core.spec import SpecError, TrainSpec
from supple.core.types import (
    Action,
    AnnounceGeneration,
    CheckpointSaved,
    Decision,
    Event,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    NodeReported,
    Progress,
    SaveCheckpoint,
    StartWorker,
    StopWorker,
    TargetChanged,
    WorkerFinished,
    WorkerId,
    WorkerReady,
    WorkerStopped,
)
from supple.testing import FakeClock, FaultScript, ScriptedBackend
from tests.core.test_advisor import progress


class ObligingBackend:
    """Workers that come, form groups and stop the moment they are asked to."""

    def __init__(self, job_id: JobId, on_form: Callable[[int], None] = lambda _: None) -> None:
        """`on_form` is called with each generation, before its members say that they formed it."""
        self.job_id = job_id
        self.on_form = on_form
        self.queue: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.done: list[Action] = []
        self.members: tuple[WorkerId, ...] = ()
        self.generation = 0
        self.closed = False

    @property
    def pids(self) -> Mapping[WorkerId, int]:
        return {worker_id: 4000 + rank for rank, worker_id in enumerate(self.members)}

    def tell(self, kind: type[Event], **fields: Any) -> None:
        self.queue.put_nowait(kind(job_id=self.job_id, generation=self.generation, **fields))

    async def execute(self, action: Action) -> None:
        self.done.append(action)
        match action:
            case StartWorker():
                self.tell(WorkerReady, worker_id=action.worker_id)
            case AnnounceGeneration():
                for worker_id in self.members:
                    self.tell(WorkerStopped, worker_id=worker_id, step=1)
            case FormGroup():
                self.members, self.generation = action.members, action.generation
                self.on_form(self.generation)
                for worker_id in self.members:
                    self.tell(GroupFormed, worker_id=worker_id, step=1)
            case SaveCheckpoint():
                self.tell(CheckpointSaved, step=1, path="checkpoints/000001")
            case _:
                pass

    async def events(self) -> AsyncIterator[Event]:
        while True:
            event = await self.queue.get()
            if isinstance(event, Exception):
                raise event
            yield event

    async def close(self) -> None:
        self.closed = True


class Witness:
    """An observer that remembers, and can be waited on."""

    def __init__(self) -> None:
        self.seen: list[Event | Action | Progress | str] = []
        self._changed = asyncio.Event()

    def happened(self, event: Event) -> None:
        self._saw(event)

    decided = acted = happened

    def progressed(self, progress: Progress) -> None:
        self._saw(progress)

    def printed(self, line: str) -> None:
        self._saw(line)

    def _saw(self, thing: Any) -> None:
        self.seen.append(thing)
        self._changed.set()

    async def until(self, matches: Callable[[Any], bool]) -> Any:
        while not (found := [thing for thing in self.seen if matches(thing)]):
            self._changed.clear()
            await self._changed.wait()
        return found[-1]


Play = Callable[[Controller, ObligingBackend, Witness], Awaitable[None]]


def play(
    tmp_path: Path,
    act: Play,
    *,
    clock: Clock | None = None,
    on_form: Callable[[int], None] = lambda _: None,
    **changes: Any,
) -> tuple[Outcome, ObligingBackend, Witness, str]:
    """Run a controller with `act` beside it."""
    name = f"shell-{tmp_path.name}"[:60]
    fields: dict[str, Any] = {"script": "train.py", "min_workers": 1, "max_workers": 3}
    fields["arguments"] = ("--epochs", "3")
    spec = TrainSpec(name=name, **(fields | changes))

    async def both() -> tuple[Outcome, ObligingBackend, Witness, str]:
        backend, witness = ObligingBackend(JobId(name), on_form), Witness()
        controller = Controller(
            spec,
            backend,
            clock=clock or MonotonicClock(),
            observers=[witness],
        )
        acting = asyncio.ensure_future(act(controller, backend, witness))
        outcome = await controller.run()
        await acting
        assert backend.closed
        assert name not in running_jobs()
        return outcome, backend, witness, name

    return asyncio.run(asyncio.wait_for(both(), 60))


def formed(count: int) -> Callable[[Any], bool]:
    return lambda thing: isinstance(thing, FormGroup) and len(thing.members) == count


def test_a_job_ends_when_its_workers_have_finished(tmp_path: Path) -> None:
    async def finish(_: Controller, backend: ObligingBackend, witness: Witness) -> None:
        await witness.until(formed(1))
        backend.tell(WorkerFinished, worker_id=backend.members[0], step=7)

    outcome, backend, _, _ = play(tmp_path, finish)
    assert outcome.status == "finished"
    assert "7 steps" in outcome.reason
    assert isinstance(backend.done[-1], StopWorker)


def test_who_watches_is_told_of_each_event_of_a_report_but_of_no_heartbeat(tmp_path: Path) -> None:
    async def finish(_: Controller, backend: ObligingBackend, witness: Witness) -> None:
        await witness.until(formed(1))
        fields = {"job_id": backend.job_id, "generation": 1, "worker_id": backend.members[0]}
        told = (Heartbeat(step=7, **fields), WorkerFinished(step=7, **fields))
        backend.tell(NodeReported, node_id="n", events=told)

    outcome, _, witness, _ = play(tmp_path, finish)
    assert "7 steps" in outcome.reason
    assert [type(thing) for thing in witness.seen].count(WorkerFinished) == 1
    assert not any(isinstance(thing, NodeReported | Heartbeat) for thing in witness.seen)


def test_a_resize_from_another_terminal_is_carried_out_and_said(tmp_path: Path) -> None:
    async def resize(controller: Controller, backend: ObligingBackend, witness: Witness) -> None:
        name = str(backend.job_id)
        await witness.until(formed(1))
        answer = await asyncio.to_thread(send_request, name, {"ask": "resize", "num_workers": 3})
        assert answer == {"accepted": 3}
        await witness.until(formed(3))
        status = await asyncio.to_thread(send_request, name, {"ask": "status"})
        assert len(status["members"]) == len(status["pids"]) == 3
        assert (status["script"], status["arguments"]) == ("train.py", ["--epochs", "3"])
        await asyncio.to_thread(send_request, name, {"ask": "stop"})

    outcome, _, witness, _ = play(tmp_path, resize)
    assert outcome.status == "stopped"
    assert outcome.checkpoint == "checkpoints/000001"
    wishes = [thing for thing in witness.seen if isinstance(thing, TargetChanged)]
    assert [wish.reason for wish in wishes] == ["requested by `supple resize`"]
    assert any("supple resize" in thing.reason for thing in witness.seen if type(thing) is Decision)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"ask": "resize", "num_workers": 9}, "9 workers requested, the job has --workers 1:3"),
        ({"ask": "resize", "num_workers": "many"}, "the number of workers"),
        ({"ask": "preempt", "workers": ["w77"]}, "w77: no such worker. The job has w0"),
        ({"ask": "dance"}, "unknown request 'dance'"),
    ],
)
def test_a_request_that_cannot_be_met_changes_nothing(
    tmp_path: Path, request_: dict[str, Any], words: str
) -> None:
    async def refuse(controller: Controller, backend: ObligingBackend, witness: Witness) -> None:
        await witness.until(formed(1))
        with pytest.raises(SpecError, match=words):
            await asyncio.to_thread(send_request, str(backend.job_id), request_)
        controller.request_stop("test over")

    _, backend, _, _ = play(tmp_path, refuse)
    assert len([action for action in backend.done if isinstance(action, StartWorker)]) == 1


def test_a_schedule_is_followed_from_the_first_step_on(tmp_path: Path) -> None:
    async def watch(controller: Controller, _: ObligingBackend, witness: Witness) -> None:
        await witness.until(lambda thing: "from 0.1 s on" in getattr(thing, "reason", ""))
        controller.request_stop("test over")

    _, _, witness, _ = play(tmp_path, watch, schedule=((0.0, 1), (0.05, 2), (0.1, 1)))
    reasons = [thing.reason for thing in witness.seen if isinstance(thing, TargetChanged)]
    assert reasons == [
        "the schedule sets 2 workers from 0.05 s on",
        "the schedule sets 1 worker from 0.1 s on",
    ]


def test_a_backend_that_breaks_ends_the_run_with_its_error_instead_of_a_silent_wait(
    tmp_path: Path,
) -> None:
    async def break_it(_: Controller, backend: ObligingBackend, witness: Witness) -> None:
        await witness.until(formed(1))
        backend.queue.put_nowait(ConnectionError("the head of the cluster is gone"))

    with pytest.raises(ConnectionError, match="the head of the cluster is gone"):
        play(tmp_path, break_it)


@pytest.mark.parametrize(("pause_s", "wanted"), [(0.5, [2, 4]), (60.0, [2])])
def test_the_pause_of_a_resize_is_measured_and_the_next_resize_must_be_worth_it(
    tmp_path: Path, pause_s: float, wanted: list[int]
) -> None:
    """Half a minute is left of the job. The start took longer, and is no pause."""
    clock = FakeClock(100.0)
    forming_s = {1: 500.0, 2: pause_s}

    async def grow(controller: Controller, _: ObligingBackend, witness: Witness) -> None:
        for generation, count in ((1, 1), (2, 2)):
            await witness.until(
                lambda thing, now=generation: (
                    isinstance(thing, GroupFormed) and thing.generation == now
                )
            )
            clock.advance(10.0)
            known = {"generation": generation, "num_workers": count, "step_time_s": 0.2 / count}
            for step in (0, 20):
                controller.progressed(progress(step, samples_done=9_990_000, **known))
        controller.request_stop("test over")

    def form(generation: int) -> None:
        clock.advance(forming_s.get(generation, 1.0))

    changes = {"clock": clock, "on_form": form, "max_workers": 4}
    _, _, witness, _ = play(tmp_path, grow, **changes)
    assert [t.num_workers for t in witness.seen if isinstance(t, TargetChanged)] == wanted


def test_a_job_on_the_scripted_backend_outlives_a_kill_and_finishes(tmp_path: Path) -> None:
    spec = TrainSpec(
        name=f"shell-{tmp_path.name}"[:60],
        script="train.py",
        max_workers=2,
        schedule=((0.0, 2),),
    )
    witness = Witness()

    async def run() -> Outcome:
        backend = ScriptedBackend(spec, faults=FaultScript().kill(rank=1, step=5), num_steps=40)
        controller = Controller(spec, backend, clock=backend.clock, observers=[witness])
        return await controller.run()

    outcome = asyncio.run(asyncio.wait_for(run(), 60))
    assert (outcome.status, outcome.saved) == ("finished", True)
    assert outcome.reason.startswith("training finished after 40 steps")
    kinds = [thing.kind for thing in witness.seen if isinstance(thing, Decision)]
    assert kinds[:2] == ["start", "start"] and "recover" in kinds and kinds[-1] == "finish"
