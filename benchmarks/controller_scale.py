"""What the controller computes for a job of 8, 64, 512 and 4,096 workers, eight of them on a node.

    python benchmarks/controller_scale.py [SIZE ...]

Each job starts, takes 100 steps of half a second with a heartbeat of every worker in each, loses a
node five times, grows by a half and shrinks again. Its workers answer at once and cost nothing:
what is measured is the lifecycle's CPU time, medians of it: of a machine that others use as well
it is twice what it is on an idle one, and a wall clock would say ten times as much. How its groups
would form is computed by `benchmarks/forming.py`.
"""

import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import forming
from benchmarks.machine import report
from supple.control.garbage import rare_collections
from supple.core.job import lifecycle
from supple.core.job.lifecycle import Phase
from supple.core.spec import TrainSpec
from supple.core.types import (
    AbortGeneration,
    Action,
    AnnounceGeneration,
    Doing,
    Event,
    FormGroup,
    GroupFormed,
    Heartbeat,
    JobId,
    NodeReported,
    StartWorker,
    TargetChanged,
    Ticked,
    WorkerEvent,
    WorkerId,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)

_SIZES = (8, 64, 512, 4096)
_NODE = 8
_STEPS = 100
_DEATHS = 5
_BEATS_PER_S = 2
_TICKS_PER_S = 4
_JOB = JobId("scale")
_DOING: tuple[Doing, ...] = ("backward", "waiting", "data", "update")
"""What a worker does changes from one heartbeat to the next: the dearest kind."""


class Job:
    """A lifecycle whose workers answer at once; `spent_s` is what it has computed so far."""

    def __init__(self, size: int) -> None:
        spec = TrainSpec(
            name=_JOB, script="train.py", min_workers=1, max_workers=2 * size, max_failures=100
        )
        self.now, self.spent_s, self.step = 100.0, 0.0, 0
        self._answers: list[WorkerEvent] = []
        began = time.thread_time()
        self.state, actions = lifecycle.start(spec, _JOB, self.now, restore=None, initial=size)
        self.spent_s += time.thread_time() - began
        self._answer(actions)

    def tell(self, events: Sequence[Event]) -> None:
        state, now, every = self.state, self.now, list[Action]()
        began = time.thread_time()  # which takes as long as many an event
        for event in events:
            state, actions = lifecycle.step(state, event, now)
            every += actions
        self.spent_s += time.thread_time() - began
        self.state = state
        self._answer(every)

    def settle(self) -> None:
        """Until nobody has anything to answer any more."""
        while self._answers:
            self.answer()

    def answer(self) -> None:
        """Who was asked something answers."""
        answers, self._answers = self._answers, []
        self.report(answers)

    def report(self, events: Iterable[WorkerEvent]) -> None:
        """What workers tell at one time, in one event of each node, as backends do."""
        of_node: dict[str, list[WorkerEvent]] = {}
        for event in events:
            of_node.setdefault(_node(event.worker_id), []).append(event)
        self.tell(
            [
                NodeReported(job_id=_JOB, generation=0, node_id=node_id, events=tuple(told))
                for node_id, told in of_node.items()
            ]
        )

    def tick(self) -> None:
        self.now += 1 / _TICKS_PER_S
        self.tell([Ticked(job_id=_JOB, generation=0)])

    def beats(self) -> list[Heartbeat]:
        """One of every worker, a step further than the last."""
        self.step += 1
        return [
            Heartbeat(
                job_id=_JOB,
                generation=self.state.generation,
                worker_id=worker_id,
                step=self.step,
                doing=_DOING[self.step % len(_DOING)],
                since_s=0.05,
            )
            for worker_id in self.state.members
        ]

    def second(self) -> None:
        """A second of training."""
        for index in range(_TICKS_PER_S):
            if index % (_TICKS_PER_S // _BEATS_PER_S) == 0:
                self.report(self.beats())
            self.tick()

    def lose(self, worker_ids: Iterable[WorkerId]) -> None:
        """These have died."""
        self.report(
            WorkerLost(job_id=_JOB, generation=0, worker_id=worker_id, cause="died")
            for worker_id in worker_ids
        )

    def resize(self, num_workers: int) -> None:
        self.tell(
            [TargetChanged(job_id=_JOB, generation=0, num_workers=num_workers, reason="asked for")]
        )

    def _answer(self, actions: Iterable[Action]) -> None:
        generation = self.state.generation
        for action in actions:
            match action:
                case StartWorker():
                    self._say(WorkerReady, action.worker_id, 0, node_id=_node(action.worker_id))
                case FormGroup():
                    for worker_id in action.members:
                        self._say(GroupFormed, worker_id, generation, step=self.step)
                case AnnounceGeneration() | AbortGeneration():
                    error = "Connection closed by peer" * isinstance(action, AbortGeneration)
                    for worker_id in action.members:
                        self._say(WorkerStopped, worker_id, generation, step=self.step, error=error)
                case _:
                    pass

    def _say(
        self, kind: type[WorkerEvent], worker_id: WorkerId, generation: int, **said: object
    ) -> None:
        fields = {"job_id": _JOB, "generation": generation, "worker_id": worker_id, **said}
        self._answers.append(kind(**fields))  # type: ignore[arg-type]


def _node(worker_id: WorkerId) -> str:
    return f"n{int(worker_id[1:]) // _NODE}"


def measured(size: int) -> dict[str, float]:
    """The costs of a job of so many workers."""
    job = Job(size)
    job.settle()
    _check(job, size)
    found = {"start_s": job.spent_s}
    found |= _steps(job)
    if size > _NODE:
        found |= _deaths(job)
    for name, goal in (("grow_s", size + size // 2), ("shrink_s", size)):
        before_s = job.spent_s
        job.resize(goal)
        job.settle()
        _check(job, goal)
        found[name] = job.spent_s - before_s
    return found


def _steps(job: Job) -> dict[str, float]:
    beat_s, second_s, tick_s = [], [], []
    for _ in range(_STEPS // 2 // _BEATS_PER_S):
        before_s = job.spent_s
        job.second()
        second_s.append(job.spent_s - before_s)
    for _ in range(_STEPS // 2):
        beats, before_s = job.beats(), job.spent_s
        job.tell(beats)
        beat_s.append((job.spent_s - before_s) / len(beats))
        before_s = job.spent_s
        job.tick()
        tick_s.append(job.spent_s - before_s)
    return {
        "heartbeat_us": 1e6 * statistics.median(beat_s),
        "tick_ms": 1e3 * statistics.median(tick_s),
        "second_of_heartbeats_s": statistics.median(second_s),
    }


def _deaths(job: Job) -> dict[str, float]:
    """From the death of a node to the decision who forms the next group; then all come back."""
    decided_s, back_s = [], []
    for _ in range(_DEATHS):
        before_s, size = job.spent_s, len(job.state.members)
        job.lose(job.state.members[size // 2 : size // 2 + _NODE])
        generation = job.state.generation
        while job.state.generation == generation:
            job.answer()
        decided_s.append(job.spent_s - before_s)
        job.settle()
        _check(job, size)
        back_s.append(job.spent_s - before_s)
        job.second()
    return {
        "recover_decision_ms": 1e3 * statistics.median(decided_s),
        "recover_whole_s": statistics.median(back_s),
    }


def _check(job: Job, size: int) -> None:
    phase, members = job.state.phase, len(job.state.members)
    if (phase, members) != (Phase.RUNNING, size):
        raise AssertionError(f"{size} workers should train; {phase}, {members} members")


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or list(_SIZES)
    metrics: dict[str, float] = {}
    beats_us = []
    for size in sizes:
        with rare_collections():  # as a controller has them
            found = measured(size)
        beats_us.append(found["heartbeat_us"])
        metrics |= {f"{name}_{size}": value for name, value in found.items()}
    metrics["growth_exponent"] = float(np.polyfit(np.log(sizes), np.log(beats_us), 1)[0])
    metrics |= forming.metrics(sizes)
    report("controller_scale", metrics)


if __name__ == "__main__":
    main()
