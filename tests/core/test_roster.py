"""What is known of a job's workers: counted as it changes, and at one cost for any number."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.job.lifecycle import Phase
from supple.core.job.roster import Roster, WorkerView, changed
from supple.core.types import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    GroupFormed,
    Heartbeat,
    NodeReported,
    SaveCheckpoint,
    WorkerEvent,
    WorkerId,
    WorkerLost,
    WorkerReady,
    WorkerStatus,
    WorkerStopped,
)
from tests.core.job_driver import JOB, Driver, ids, running

MEMBER, STANDBY = WorkerStatus.MEMBER, WorkerStatus.STANDBY
CHANGES = st.sampled_from(
    [
        {"status": status} | fields
        for status in WorkerStatus
        for fields in (
            {},
            {"leaving": True},
            {"finished": True},
            {"left_at": 3.0},
            {"left_at": None},
            {"reported": True, "heard_at": 2.0},
        )
    ]
)
WHO = st.integers(0, 5)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("see"), WHO, CHANGES),
        st.tuples(st.sampled_from(["remove", "stop", "form", "ready"]), WHO, st.none()),
        st.tuples(st.just("begin"), st.sets(WHO, max_size=6), st.none()),
    ),
    max_size=30,
)


def worker(number: int) -> WorkerId:
    return WorkerId(f"w{number}")


def view(status: WorkerStatus = WorkerStatus.STARTING, **fields: Any) -> WorkerView:
    return WorkerView(status=status, heard_at=1.0, answered_at=1.0, **fields)


def roster(*statuses: WorkerStatus) -> Roster:
    made = Roster()
    for number, status in enumerate(statuses):
        made.add(worker(number), view(status, ready_at=float(number)))
    return made


def move(roster: Roster, kind: str, who: Any, changes: Any, at: float) -> None:
    if kind == "begin":
        members = [w for w, view in roster.items() if view.status is MEMBER]
        roster.begin([w for w in map(worker, who) if w in roster and roster[w].can_join], members)
        return
    worker_id = worker(who)
    if worker_id not in roster:
        roster.add(worker_id, view())
    elif kind == "see":
        roster.update(worker_id, changes)
    elif kind == "remove":
        roster.remove(worker_id)
    elif kind == "ready" and roster[worker_id].status is STANDBY:
        return
    elif kind == "ready":
        roster.update(worker_id, {"status": STANDBY, "ready_at": at})
    elif roster[worker_id].status is MEMBER and kind == "stop":
        roster.stop(worker_id)
    elif roster[worker_id].status is MEMBER:
        roster.form(worker_id)


@given(MOVES)
def test_what_is_counted_is_what_a_search_finds_after_any_changes(moves: list[Any]) -> None:
    now = roster(MEMBER, STANDBY)
    for at, one in enumerate(moves):
        move(now, *one, at=float(at + 2))
        views = dict(now.items())
        can = {w: v.can_join and v.status in (MEMBER, STANDBY) for w, v in views.items()}
        present = [w for w, v in views.items() if v.status is MEMBER]
        newcomers = [
            v for w, v in views.items() if can[w] and v.status is STANDBY and not v.leaving
        ]
        assert now.num("present") == len(present)
        assert now.num("able") == sum(can.values())
        assert now.num("joinable") == sum(can[w] and not v.leaving for w, v in views.items())
        assert now.num("newcomer") == len(newcomers)
        assert now.num("left") == sum(v.left_at is not None for v in views.values())
        assert now.num("reported") == sum(v.reported for v in views.values())
        assert set(now.stopped) | set(now.formed) | set(now.gone_on) <= set(present)
        assert now.num_training == sum(map(now.is_training, views))
        assert now.num_training == sum(can[w] and w not in now.stopped for w in present)
        assert now.num_busy == sum(w not in now.stopped for w in present)
        assert now.all_formed == all(w in now.formed for w in present)
        assert now.first_ready_at == min((v.ready_at for v in newcomers), default=float("inf"))


def test_a_copy_changes_alone() -> None:
    before = roster(MEMBER, MEMBER, STANDBY)
    after = before.copy()
    after.update(worker(0), {"step": 7})
    after.stop(worker(1))
    after.remove(worker(2))
    after.begin([worker(0)], [worker(0), worker(1)])
    assert before[worker(0)].step == -1
    assert (before.num("present"), before.num_busy, len(before)) == (2, 2, 3)
    assert (after.num("present"), after.num_busy, len(after)) == (1, 1, 2)


def test_a_generation_begins_with_nobody_stopped_and_nobody_formed() -> None:
    now = roster(MEMBER, MEMBER, STANDBY)
    for number in (0, 1):
        now.form(worker(number))
        now.stop(worker(number))
    now.begin([worker(1), worker(2)], [worker(0), worker(1)])
    assert [now[worker(number)].status for number in range(3)] == [STANDBY, MEMBER, MEMBER]
    assert (now.num_training, now.num_busy, now.all_formed) == (2, 2, False)


@pytest.mark.parametrize("change", [{"status": WorkerStatus.RAISED}, None])
def test_of_who_is_a_member_no_more_nothing_of_its_generation_is_left(change: Any) -> None:
    now = roster(MEMBER, MEMBER)
    now.form(worker(0))
    now.stop(worker(0))
    if change is None:
        now.remove(worker(0))
    else:
        now.update(worker(0), change)
    assert (now.num_training, now.num_busy, now.all_formed) == (1, 1, False)
    now.form(worker(1))
    assert now.all_formed


@pytest.mark.slow
def test_the_oldest_comes_first_whatever_the_process_hashes() -> None:
    """Python hashes text differently in every process, and the map underneath goes by hashes."""
    source = "from tests.core.test_roster import roster, MEMBER\nprint(*roster(*[MEMBER] * 40))\n"
    expected = " ".join(f"w{number}" for number in range(40))
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", source],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.strip() == expected


def test_a_field_that_does_not_exist_is_refused() -> None:
    before = view()
    with pytest.raises(TypeError, match="WorkerView has no field stoped"):
        changed(before, {"stoped": True})
    assert changed(before, {"step": 3}) == view(step=3)


# --- what an event costs ------------------------------------------------------------------------


def calls(of: Callable[[], object]) -> int:
    """Calls of Python's and of C's that it makes."""
    count = 0

    def one(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(one)
    try:
        of()
    finally:
        sys.setprofile(None)
    return count


def beat(name: str = "w1") -> Heartbeat:
    return Heartbeat(
        job_id=JOB, generation=1, worker_id=WorkerId(name), step=11, doing="backward", since_s=0.1
    )


def stopped() -> WorkerStopped:
    return WorkerStopped(job_id=JOB, generation=1, worker_id=WorkerId("w1"), step=10, error="cut")


def cost(size: int, event: Event, *, others_stop: bool = False, starting: bool = False) -> int:
    """Calls for `event`, in a job of so many members."""
    job = running(size, low=1, high=2 * size)
    job.tick(0.25)
    if starting:
        job.target(2 * size)
    if others_stop:
        job.lost("w0")
        job.stopped("w2", 10)
    job.send(Heartbeat, worker_id=WorkerId("w1"), step=10)  # caches are filled
    return calls(lambda: job.send_one(event))


ONE_OF_MANY = [
    pytest.param(beat(), {}, id="heartbeat"),
    pytest.param(stopped(), {"others_stop": True}, id="stop"),
    pytest.param(beat(), {"others_stop": True}, id="heartbeat while others stop"),
    pytest.param(beat(), {"starting": True}, id="heartbeat while others start"),
]


@pytest.mark.parametrize(("event", "how"), ONE_OF_MANY)
def test_an_event_costs_as_many_calls_among_128_workers_as_among_8(
    event: WorkerEvent, how: dict[str, bool]
) -> None:
    assert cost(128, event, **how) <= cost(8, event, **how) + 2


def test_the_last_of_newcomers_costs_as_much_as_the_first() -> None:
    job = Driver(low=1, high=200, initial=100)
    found = [
        calls(
            lambda name=f"w{number}": job.send_one(
                WorkerReady(job_id=JOB, generation=0, worker_id=WorkerId(name), node_id="n")
            )
        )
        for number in range(99)
    ]
    assert max(found[5:]) <= min(found[5:]) + 4


# --- what the workers of a node tell together ---------------------------------------------------


def report(*events: Event) -> NodeReported:
    return NodeReported(job_id=JOB, generation=0, node_id="n", events=events)


def test_heartbeats_of_a_node_are_the_same_in_one_event_as_in_many() -> None:
    together, alone = running(3), running(3)
    told = [beat("w0"), beat("w2")]
    together.send_one(report(*told))
    for one in told:
        alone.send_one(one)
    assert together.state == alone.state
    assert together.state.step == 11


def test_a_node_that_dies_is_lost_in_one_event_and_who_is_left_forms_at_once() -> None:
    job = running(4)
    died = [WorkerLost(job_id=JOB, generation=0, worker_id=w, cause="died") for w in ids("w2 w3")]
    assert job.abort("w0 w1") in job.send_one(report(*died))
    stops = [
        WorkerStopped(job_id=JOB, generation=1, worker_id=w, step=10, error="cut")
        for w in ids("w0 w1")
    ]
    assert job.form("w0 w1") not in job.send_one(report(stops[0]))
    assert job.send_one(report(stops[1])) == [job.form("w0 w1")]


def test_what_a_forgotten_worker_tells_in_a_report_is_passed_over() -> None:
    job = running(2)
    strange = GroupFormed(job_id=JOB, generation=1, worker_id=WorkerId("w9"), step=3)
    before = job.state
    assert job.send_one(report(strange, beat("w1"))) == []
    assert job.state.workers[WorkerId("w1")].step == 11
    assert before.workers[WorkerId("w1")].step == 10, "the state before is as it was"


def test_a_report_of_another_job_changes_nothing() -> None:
    job = running(2)
    before = job.state
    other = changed_job(report(beat("w1")))
    assert job.send_one(other) == [] and job.state is before


def changed_job(event: NodeReported) -> NodeReported:
    return NodeReported(
        job_id=type(JOB)("other"), generation=0, node_id=event.node_id, events=event.events
    )


def test_nothing_that_follows_the_end_in_a_report_is_looked_at() -> None:
    job = running(2)
    job.stop()
    job.stopped("w0 w1", 11)
    saved = CheckpointSaved(job_id=JOB, generation=1, step=11, path="step-11")
    again = CheckpointSaved(job_id=JOB, generation=1, step=12, path="step-12")
    job.send_one(report(saved, again))
    assert job.phase is Phase.FINISHED
    assert job.state.restore == "step-11"


def test_a_save_is_not_asked_of_who_is_lost_in_the_same_report() -> None:
    job = running(2)
    job.stop()
    job.stopped("w0 w1", 11)
    assert job.phase is Phase.SAVING
    saver = job.state.saver
    other = WorkerId("w1" if saver == "w0" else "w0")
    failed = CheckpointFailed(job_id=JOB, generation=1, step=11, error="disk gone")
    lost = WorkerLost(job_id=JOB, generation=1, worker_id=other, cause="died")
    actions = job.send_one(report(failed, lost))
    assert not [action for action in actions if isinstance(action, SaveCheckpoint)]
    assert job.phase is Phase.FINISHED
