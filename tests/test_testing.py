"""The simulated world: whole runs in it, that they repeat, and that it refuses what must not be."""

import pytest

from supple.core.spec import TrainSpec
from supple.core.types import FormGroup, JobId, KillWorker, StartWorker, StopWorker, WorkerId
from supple.testing import (
    FakeClock,
    FaultScript,
    ProtocolViolation,
    ScriptedJob,
    SimulatedWorker,
    Stage,
    TrainedState,
    World,
)

SPEC = TrainSpec(name="job", script="train.py", min_workers=1, max_workers=4)
JOB = JobId("job")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_with_every_kind_of_fault_finishes(seed: int) -> None:
    faults = (
        FaultScript()
        .kill(rank=1, step=5)
        .resize(to=4, at=4.0)
        .freeze(rank=0, step=30)
        .preempt(worker="w3", at=12.0, notice_s=3.0)
        .batch(size=32, at=20.0)
        .throw(rank=1, step=70)
        .resize(to=1, at=30.0)
    )
    job = ScriptedJob(SPEC, faults=faults, seed=seed, num_steps=150, initial=2)
    job.run(lambda: job.outcome is not None)
    assert job.outcome is not None
    assert job.outcome.reason.startswith("training finished after 150 steps; step 150 is saved")
    kinds = {decision.kind for decision in job.decisions}
    assert {"start", "grow", "recover", "shrink", "batch", "finish"} <= kinds


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run() -> None:
    def history(seed: int) -> list[str]:
        faults = FaultScript().kill(rank=0, step=9).resize(to=3, at=5.0)
        job = ScriptedJob(SPEC, faults=faults, seed=seed, num_steps=40)
        job.run(lambda: job.outcome is not None)
        return job.backend.history

    assert history(1) == history(1)
    assert history(1) != history(2)
    assert StartWorker.__name__ in history(1)[1]


def test_a_clock_never_goes_back() -> None:
    clock = FakeClock(5.0)
    clock.advance(1.5)
    with pytest.raises(ValueError, match="time never goes back"):
        clock.advance(-1.0)
    assert clock.now() == 6.5


def test_a_run_without_an_end_is_refused_with_its_history() -> None:
    job = ScriptedJob(SPEC)
    with pytest.raises(ProtocolViolation, match="no end after 20 rounds") as refused:
        job.run(lambda: False, max_rounds=20)
    assert "GroupFormed(" in str(refused.value)


def forming(*states: TrainedState | None) -> World:
    """A generation of so many workers that hold these states, told to form."""
    world = World(JOB, 100, {})
    members = tuple(WorkerId(f"w{index}") for index in range(len(states)))
    command = FormGroup(
        job_id=JOB, generation=1, members=members, global_batch_size=None, restore=None
    )
    for worker_id, state in zip(members, states, strict=True):
        worker = SimulatedWorker(worker_id=worker_id, stage=Stage.WAITING, state=state)
        worker.inbox.append(command)
        world.workers[worker_id] = worker
    return world


def move(world: World, *, lucky: bool = True) -> None:
    for worker in world.workers.values():
        world.arrive(worker)
        world.work(worker, lucky=lucky)


def test_two_computations_of_one_step_are_refused_where_they_meet() -> None:
    world = forming(TrainedState(4), TrainedState(4))
    with pytest.raises(ProtocolViolation, match="step 4 was computed twice"):
        for _ in range(3):
            move(world)


def test_a_commit_in_an_old_generation_is_refused() -> None:
    world = forming(None, None)
    for _ in range(8):
        move(world)
    world.newest_formed = 2
    with pytest.raises(ProtocolViolation, match="in generation 1 after 2 had formed"):
        for _ in range(4):
            move(world)


def test_a_step_can_be_committed_on_one_member_and_torn_on_the_other() -> None:
    world = forming(None, None)
    first, second = world.workers.values()
    while first.doing != "step" or second.doing != "step" or first.step < 1 or second.step < 1:
        move(world)
    while first.step == second.step:
        world.work(first, lucky=True)
        world.work(second, lucky=True)
        if first.step == second.step:
            world.work(first, lucky=True)
    world.kill(first, "died", is_reported=True)
    world.work(second, lucky=False)
    assert second.stage is Stage.WAITING
    assert second.step == first.step - 1


def test_letting_the_only_holder_go_is_refused() -> None:
    job = ScriptedJob(SPEC, initial=1)
    job.run(lambda: job.state.step > 3)
    worker = job.backend.world.workers[WorkerId("w0")]
    worker.stage = Stage.WAITING
    with pytest.raises(ProtocolViolation, match="held the newest state"):
        job.do(StopWorker(job_id=JOB, generation=1, worker_id=WorkerId("w0"), reason=""))


def test_an_action_for_a_worker_that_was_lost_is_refused() -> None:
    job = ScriptedJob(SPEC, initial=1)
    with pytest.raises(ProtocolViolation, match="started twice"):
        job.do(StartWorker(job_id=JOB, generation=0, worker_id=WorkerId("w0")))
    job.backend.kill(WorkerId("w0"))
    job.backend.hear(WorkerId("w0"))
    with pytest.raises(ProtocolViolation, match="w0, which is not running"):
        job.do(StopWorker(job_id=JOB, generation=0, worker_id=WorkerId("w0"), reason=""))
    with pytest.raises(ProtocolViolation, match="w7 is killed and was never started"):
        job.do(KillWorker(job_id=JOB, generation=0, worker_id=WorkerId("w7"), reason=""))
