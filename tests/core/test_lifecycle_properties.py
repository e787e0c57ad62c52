"""Any order of events, with kills, freezes, exceptions and wishes in every state.

The world itself (`supple.testing`) refuses two live generations, two computations of one step in
one job, a state thrown away while its holder lives, an action for a worker that is not there. Here
hypothesis chooses the order of everything, and afterwards a fair world without new faults must
come to rest: the wanted size training on, or an end that the faults justify.
"""

from itertools import groupby
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from supple.core.job.lifecycle import Phase
from supple.core.spec import TrainSpec
from supple.core.types import FailJob, KillWorker, LossCause, WorkerId
from supple.testing import ScriptedBackend, ScriptedJob, TrainedState
from tests.examples import examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

SOMEONE = st.integers(0, 63)
MOVE = st.sampled_from(["arrive", "work", "work", "work", "torn", "poll", "hear", "hear"])
MOVES = st.lists(st.tuples(MOVE, SOMEONE), min_size=1, max_size=40)
CAUSE = st.sampled_from(["died", "preempted", "frozen"])
ON_THE_WAY = [Phase.DRAINING, Phase.FORMING, Phase.FORMING, Phase.WAITING, Phase.SAVING]
NEVER_ENDS = 1_000_000


def lineage(state: TrainedState) -> list[TrainedState]:
    """A state and all it was made from, the oldest first."""
    found: list[TrainedState] = []
    at: TrainedState | None = state
    while at is not None:
        found.append(at)
        at = at.parent
    return found[::-1]


class AnyHistory(RuleBasedStateMachine):
    job: ScriptedJob
    backend: ScriptedBackend
    spec: TrainSpec

    @initialize(
        low=st.sampled_from([1, 1, 2, 3]),
        more=st.integers(0, 3),
        initial=st.integers(1, 6),
        num_nodes=st.integers(1, 3),
        max_failures=st.sampled_from([0, 3, 3, 8]),
        first_stop=st.sampled_from([0, 3, 3]),
        num_steps=st.sampled_from([50, NEVER_ENDS, NEVER_ENDS]),
        restore=st.sampled_from([None, "old"]),
        seed=st.integers(0, 7),
        is_running=st.sampled_from([True, True, True, False]),
    )
    def begin(
        self, *, low: int, more: int, is_running: bool, first_stop: int, **options: Any
    ) -> None:
        self.first_stop = first_stop
        self.spec = TrainSpec(
            name="job",
            script="train.py",
            min_workers=low,
            max_workers=low + more,
            max_failures=options.pop("max_failures"),
        )
        self.job = ScriptedJob(self.spec, checkpoints={"old": 2}, **options)
        self.backend = self.job.backend
        self.num_thrown = self.num_left = self.num_stuck = 0
        self.idle_s = 0.0
        self.highest_generation = 0
        if is_running:
            self.job.run(lambda: self.job.state.phase is Phase.RUNNING)

    def someone(self, number: int) -> WorkerId:
        return WorkerId(f"w{number % len(self.backend.world.workers)}")

    # -- everything that may happen, in any order ------------------------------------------------

    @rule(moves=MOVES)
    def unfair_moves(self, moves: list[tuple[str, int]]) -> None:
        for move, number in moves:
            worker_id = self.someone(number)
            if move == "torn":
                self.backend.work(worker_id, lucky=False)
            else:
                getattr(self.backend, move)(worker_id)

    @rule(moves=MOVES, number=SOMEONE, cause=CAUSE)
    def fault_in_the_middle(self, moves: list[tuple[str, int]], number: int, cause: str) -> None:
        self.unfair_moves(moves)
        self.strike(self.someone(number), cause)

    @rule(phase=st.sampled_from(ON_THE_WAY), num_workers=st.integers(1, 6), number=SOMEONE)
    def fault_in_phase(self, phase: Phase, num_workers: int, number: int) -> None:
        """A wish leads there; then someone dies, or the very one that everything waits for."""
        if phase is Phase.SAVING and self.job.state.generation > 4:
            self.stop()
        else:
            self.backend.resize(num_workers)
        for _ in range(60):
            for worker_id in list(self.backend.world.workers):
                for move in ("arrive", "work", "poll", "hear", "hear"):
                    getattr(self.backend, move)(worker_id)
                    state = self.job.state
                    if state.phase is phase or state.is_ending:
                        saver = state.saver if number % 2 else None
                        self.strike(saver or self.someone(number), "died")
                        return
            self.job.tick(0.05)

    def strike(self, worker_id: WorkerId, cause: str) -> None:
        if cause == "frozen":
            self.backend.freeze(worker_id)
        else:
            self.backend.kill(worker_id, cast(LossCause, cause))

    @rule(num_rounds=st.integers(1, 12))
    def fair_rounds(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            self.job.round()

    @rule(num_rounds=st.integers(13, 24))
    def fair_seconds(self, num_rounds: int) -> None:
        self.fair_rounds(num_rounds)

    @rule(seconds=st.sampled_from([0.25, 1.0, 1.9, 5.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.job.tick(seconds)
        self.idle_s += seconds  # nobody works meanwhile

    @rule(number=SOMEONE)
    def one_is_not_heard_for_a_while(self, number: int) -> None:
        for _ in range(18):
            for worker_id in list(self.backend.world.workers):
                if worker_id != self.someone(number):
                    for move in ("arrive", "work", "poll", "hear"):
                        getattr(self.backend, move)(worker_id)
            self.job.tick(0.25)

    @rule(number=SOMEONE)
    @precondition(lambda self: self.num_thrown < 2 and self.job.state.generation)
    def throw(self, number: int) -> None:
        self.num_thrown += 1
        self.backend.throw(self.someone(number))

    @rule(number=SOMEONE, everybody=st.booleans())
    @precondition(lambda self: self.num_left < 2 and self.job.state.generation > 1)
    def leave(self, number: int, everybody: bool) -> None:
        self.num_left += 1
        for worker_id in list(self.backend.world.workers) if everybody else [self.someone(number)]:
            self.backend.leave(worker_id)

    @rule(number=SOMEONE)
    @precondition(lambda self: self.num_stuck < 2 and self.job.state.generation)
    def stick(self, number: int) -> None:
        self.num_stuck += 1
        self.backend.stick(self.someone(number))

    @rule(num_workers=st.integers(0, 8))
    def resize(self, num_workers: int) -> None:
        self.backend.resize(num_workers)

    @rule(size=st.sampled_from([32, 64, 128]), is_disk_full=st.booleans(), number=SOMEONE)
    def change_batch_and_save(self, size: int, is_disk_full: bool, number: int) -> None:
        self.backend.world.disk_is_full = is_disk_full
        self.backend.change_batch(size)
        self.backend.world.save_behind(self.backend.world.workers[self.someone(number)])

    @rule(numbers=st.lists(SOMEONE, max_size=4))
    def notice(self, numbers: list[int]) -> None:
        self.backend.notice({self.someone(number) for number in numbers})

    @rule()
    @precondition(lambda self: self.job.state.generation > self.first_stop)
    def stop(self) -> None:
        self.backend.stop()

    # -- what holds after every move -------------------------------------------------------------

    @invariant()
    def the_state_is_sound(self) -> None:
        state = self.job.state
        assert state.generation >= self.highest_generation
        self.highest_generation = state.generation
        assert self.spec.min_workers <= state.desired <= self.spec.max_workers
        assert state.phase.is_over == (self.job.outcome is not None)
        if state.phase.is_over:
            assert not state.workers
        if state.phase is Phase.RUNNING and not state.is_ending:
            assert state.present == state.members
        if state.phase is Phase.STARTING:
            assert state.generation == 0
        where = [self.backend.world.workers[member].node_id for member in state.members]
        assert len(list(groupby(where))) == len(set(where)), "ranks leave a node and come back"

    # -- and in the end --------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "job"):
            return
        backend = self.backend
        self.job.run(self.is_at_rest, max_rounds=3000)
        self.the_state_is_sound()
        for worker in backend.world.workers.values():
            if worker.state is not None:
                steps = [state.step for state in lineage(worker.state)]
                assert steps == list(range(steps[0], steps[-1] + 1))
        if isinstance(self.job.outcome, FailJob):
            self.check_failure_is_justified(self.job.outcome)
        elif self.job.outcome is not None and not self.job.outcome.stopped:
            finished = [
                w for w in backend.world.workers.values() if w.step == backend.world.num_steps
            ]
            assert finished or self.num_left, "the job finished, and nobody took its last step"

    def is_at_rest(self) -> bool:
        """As many as wanted train on, or as many as a back-off allows, or all is over."""
        state, now = self.job.state, self.backend.clock.now()
        if state.phase.is_over:
            return True
        if state.phase is not Phase.RUNNING or state.is_ending:
            return False
        backing_off = now < state.retry_at and self.spec.min_workers <= len(state.members)
        whole = len(state.members) == state.desired and state.batch_wanted == state.batch_in_force
        return (whole or backing_off) and state.step > state.struck_step

    def check_failure_is_justified(self, failed: FailJob) -> None:
        lost = [a for a in self.backend.actions if isinstance(a, KillWorker)]
        events = [line for line in self.backend.history if " WorkerLost(" in line]
        why = self.num_thrown or self.num_left or self.num_stuck
        stalled = self.idle_s >= self.spec.stall_timeout_s and "--stall-timeout" in failed.reason
        assert why or stalled or len(lost) + len(events) > self.spec.max_failures
        if "left the loop" in failed.reason:
            assert self.num_left or self.num_thrown, "who raises leaves its loop first"
        if "raised" in failed.reason or "before the first step" in failed.reason:
            assert self.num_thrown
            assert "bad sample" in failed.detail


TestAnyHistory: Any = pytest.mark.timeout(400)(AnyHistory.TestCase)
TestAnyHistory.settings = settings(
    max_examples=examples(60), stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
