"""One job's lifecycle, event by event: exact actions, the phase, and the reason in words."""

import pytest

from supple.core.job import advisor
from supple.core.job.lifecycle import Phase
from supple.core.spec import TrainSpec
from supple.core.types import Heartbeat, StopWorker, WorkerFinished, WorkerId
from tests.core.job_driver import TRACEBACK, Driver, running

# --- start ------------------------------------------------------------------------------------


def test_a_job_starts_its_workers_and_forms_when_all_are_ready() -> None:
    job = Driver(2, 4, restore="old")
    assert job.first_actions == [job.start("w0"), job.start("w1")]
    assert (job.kind, job.reason) == ("start", "starting 2 workers from old")
    assert job.ready("w1") == []
    assert job.ready("w0") == [job.form("w0 w1", restore="old")]
    assert job.phase is Phase.FORMING
    assert job.reason == "2 workers ready"
    job.formed("w0", 7)
    assert job.phase is Phase.FORMING
    assert job.formed("w1", 7) == []
    assert job.phase is Phase.RUNNING
    assert (job.state.generation, job.state.step) == (1, 7)


@pytest.mark.parametrize(
    ("schedule", "initial", "expected"),
    [((), None, 2), (((0.0, 3), (9.0, 4)), None, 3), (((9.0, 4),), None, 2), ((), 9, 4)],
)
def test_a_job_starts_with_its_schedule_or_min_or_what_is_asked_for(
    schedule: tuple[tuple[float, int], ...], initial: int | None, expected: int
) -> None:
    spec = TrainSpec(name="job", script="", min_workers=2, max_workers=4, schedule=schedule)
    advised = advisor.start(spec, 0.0)[1] if initial is None else initial
    assert len(Driver(2, 4, initial=advised).first_actions) == expected


def test_the_first_generation_waits_ten_seconds_for_the_last_worker() -> None:
    job = Driver(1, 3, initial=3)
    job.ready("w0")
    job.ready("w2")
    assert job.tick(9.75, hearing="w0 w2") == []
    assert job.tick(0.25, hearing="w0 w2") == [job.form("w0 w2")]
    job.formed("w0 w2", 0)
    assert job.ready("w1") == [job.announce("w0 w2")]


def test_fewer_than_min_ready_workers_wait_however_long_it_takes() -> None:
    job = Driver(2, 3)
    job.ready("w0")
    assert job.tick(60.0, hearing="w0 w1") == []
    assert job.phase is Phase.STARTING


# --- grow and shrink --------------------------------------------------------------------------


def test_a_grow_starts_workers_trains_on_and_announces_when_they_are_ready() -> None:
    job = running(2)
    assert job.target(4) == [job.start("w2"), job.start("w3")]
    assert (job.kind, job.reason) == ("grow", "asked for")
    assert job.ready("w3") == []
    assert job.ready("w2") == [job.announce("w0 w1")]
    assert job.phase is Phase.DRAINING
    assert job.stopped("w1", 12) == []
    assert job.stopped("w0", 12) == [job.form("w0 w1 w2 w3")]
    assert job.reason == "2 -> 4 workers: w2, w3 ready; asked for"
    assert job.formed("w0 w1 w2 w3", 12) == []
    assert (job.phase, job.state.step) == (Phase.RUNNING, 12)


def test_a_ready_worker_waits_two_seconds_for_another_that_is_starting() -> None:
    job = running(1)
    job.target(3)
    job.ready("w1")
    assert job.tick(1.75, hearing="w0 w1 w2") == []
    assert job.tick(0.25, hearing="w0 w1 w2") == [job.announce("w0")]
    assert job.stopped("w0", 11) == [job.form("w0 w1")]


def test_a_shrink_drops_the_newest_and_keeps_them_until_the_rest_is_running() -> None:
    job = running(3)
    assert job.target(1) == [job.announce("w0 w1 w2")]
    assert job.stopped("w0 w1 w2", 11) == [job.form("w0")]
    assert (job.kind, job.reason) == ("shrink", "3 -> 1 worker: asked for")
    assert job.formed("w0", 11) == [
        job.let_go("w2", "no longer wanted"),
        job.let_go("w1", "no longer wanted"),
    ]


def test_a_grow_after_a_shrink_is_a_grow_and_makes_good_no_loss() -> None:
    job = running(3)
    job.target(2)
    job.stopped("w0 w1 w2", 11)
    job.formed("w0 w1", 11)
    assert job.target(3, "wanted back") == [job.start("w3")]
    assert job.ready("w3") == [job.announce("w0 w1")]
    assert job.stopped("w0 w1", 12) == [job.form("w0 w1 w3")]
    assert (job.kind, job.reason) == ("grow", "2 -> 3 workers: w3 ready; wanted back")


def test_what_was_lost_before_a_shrink_is_made_good_up_to_the_smaller_target() -> None:
    job = running(3)
    job.lost("w2")
    job.lost("w1")
    job.stopped("w0", 11)
    job.formed("w0", 11)
    job.target(2)
    job.ready("w3")
    assert job.stopped("w0", 12) == [job.form("w0 w3")]
    assert (job.kind, job.reason) == (
        "regrow",
        "1 -> 2 workers: w3 ready, in place of lost workers",
    )


def test_a_smaller_target_above_what_ever_trained_is_still_grown_to() -> None:
    job = running(1)
    job.target(4)
    job.target(2, "two will do")
    job.ready("w1")
    assert job.stopped("w0", 11) == [job.form("w0 w1")]
    assert (job.kind, job.reason) == ("grow", "1 -> 2 workers: w1 ready; two will do")


def test_ranks_go_node_by_node_so_that_a_ring_enters_each_once() -> None:
    job = Driver(1, 5, initial=3)
    job.ready("w0", "a")
    job.ready("w1", "b")
    assert job.ready("w2", "a") == [job.form("w0 w2 w1", nodes=(2, 1))]
    job.formed("w0 w2 w1", 0)
    job.target(5)
    job.ready("w3", "b")
    job.ready("w4", "a")
    assert job.stopped("w0 w2 w1", 10) == [job.form("w0 w2 w4 w1 w3", nodes=(3, 2))]


def test_a_shrink_empties_the_node_that_came_last() -> None:
    job = Driver(1, 3, initial=3)
    job.ready("w0", "a")
    job.ready("w1", "b")
    job.ready("w2", "a")
    job.formed("w0 w2 w1", 0)
    job.target(2)
    assert job.stopped("w0 w2 w1", 10) == [job.form("w0 w2")]


def test_a_dropped_worker_gives_the_state_when_its_successors_die_while_forming() -> None:
    job = running(2)
    job.target(1)
    job.stopped("w0 w1", 11)
    assert job.lost("w0") == [job.form("w1")]
    assert (job.kind, job.reason) == ("recover", "1 worker: w0 died")


def test_shrink_during_drain_returns_to_previous_generation() -> None:
    job = running(2)
    job.target(3)
    job.ready("w2")
    assert job.target(2, "changed my mind") == []
    assert job.phase is Phase.DRAINING
    assert job.stopped("w0 w1", 11) == [job.form("w0 w1")]
    assert job.kind == "keep"
    assert job.reason == "2 workers: changed my mind, so nothing changes after all"
    assert job.formed("w0 w1", 11) == [job.let_go("w2", "no longer wanted")]


def test_a_target_outside_min_and_max_is_clamped_and_says_so() -> None:
    job = running(2, low=2, high=3)
    assert job.target(9) == [job.start("w2")]
    assert job.reason == "asked for (9 is outside 2:3)"
    assert job.target(0) == [job.let_go("w2", "no longer wanted")]
    assert job.reason == "asked for (0 is outside 2:3)"
    assert job.target(1) == []
    assert job.kind == "keep"


def test_a_target_while_forming_is_acted_on_when_running() -> None:
    job = running(2)
    job.batch(32)
    job.stopped("w0 w1", 11)
    assert job.target(1) == []
    job.formed("w0", 11)
    assert job.formed("w1", 11) == [job.announce("w0 w1")]


def test_a_batch_change_keeps_the_members_and_later_generations_keep_the_batch() -> None:
    job = running(2)
    assert job.batch(128) == [job.announce("w0 w1")]
    assert job.stopped("w0 w1", 11) == [job.form("w0 w1", batch=128)]
    assert (job.kind, job.reason) == ("batch", "2 workers: global batch 128")
    job.formed("w0 w1", 11)
    job.target(1)
    assert job.stopped("w0 w1", 12) == [job.form("w0", batch=128)]


# --- preemption notices -----------------------------------------------------------------------


def test_a_preemption_notice_shrinks_at_once_and_starts_a_replacement() -> None:
    job = running(3)
    assert job.notice("w0 w9") == [job.start("w3"), job.announce("w0 w1 w2")]
    assert job.decisions[-1].reason == "w0 will be taken by the platform in 30 s"
    assert job.stopped("w0 w1 w2", 11) == [job.form("w1 w2")]
    assert (job.kind, job.reason) == (
        "shrink",
        "3 -> 2 workers: w0 will be taken by the platform",
    )
    assert job.formed("w1 w2", 11) == [job.let_go("w0", "taken by the platform")]


def test_workers_about_to_be_taken_train_on_until_min_others_can() -> None:
    job = running(2, low=2)
    assert job.notice("w1") == [job.start("w2")]
    assert job.phase is Phase.RUNNING
    assert job.ready("w2") == [job.announce("w0 w1")]
    assert job.stopped("w0 w1", 11) == [job.form("w0 w2")]


def test_the_last_holder_hands_its_state_over_before_it_is_taken() -> None:
    job = running(1)
    assert job.notice("w0") == [job.start("w1")]
    assert job.ready("w1") == [job.announce("w0")]
    assert job.stopped("w0", 11) == [job.form("w0 w1")]
    job.formed("w0", 11)
    assert job.formed("w1", 11) == [job.announce("w0 w1")]
    assert job.stopped("w0 w1", 12) == [job.form("w1")]
    assert job.formed("w1", 12) == [job.let_go("w0", "taken by the platform")]


# --- the end ----------------------------------------------------------------------------------


def test_the_job_finishes_when_every_member_has() -> None:
    job = running(2)
    job.target(3)
    job.saved(30, "step-30")
    assert job.finished("w1", 30) == []
    assert job.ready("w2") == []
    reason = "training finished after 30 steps; step 30 is saved in step-30"
    assert job.finished("w0", 30) == [
        job.let_go("w0", reason),
        job.let_go("w1", reason),
        job.let_go("w2", reason),
        job.finish(reason),
    ]
    assert job.phase is Phase.FINISHED


def test_survivors_of_the_last_fence_re_form_among_themselves_below_min() -> None:
    job = running(3, low=3)
    job.finished("w0", 30)
    assert job.lost("w1") == [job.abort("w2")]
    assert job.stopped("w2", 30, "aborted") == [job.form("w2")]
    job.formed("w2", 30)
    assert job.phase is Phase.RUNNING
    job.saved(30, "step-30")
    assert job.finished("w2", 30)[-1] == job.finish(
        "training finished after 30 steps; step 30 is saved in step-30"
    )


def test_a_finished_worker_that_dies_disturbs_nobody() -> None:
    job = running(2)
    job.saved(30, "step-30")
    job.finished("w0", 30)
    assert job.lost("w0") == []
    assert job.finished("w1", 30)[-1] == job.finish(
        "training finished after 30 steps; step 30 is saved in step-30"
    )


def test_a_script_that_raises_after_training_fails_the_job() -> None:
    job = running(2)
    job.saved(30, "step-30")
    job.finished("w0", 30)
    actions = job.lost("w1", "raised", TRACEBACK)
    reason = (
        "training finished after 30 steps, but then the script raised in w1; "
        "step 30 is saved in step-30"
    )
    assert actions[-1] == job.fail(reason, TRACEBACK)


def test_a_stop_drains_saves_and_ends() -> None:
    job = running(2)
    assert job.stop() == [job.announce("w0 w1")]
    assert job.reason == "Ctrl-C: finishing the step in flight, then saving"
    assert job.stopped("w0 w1", 11) == [job.save("w0")]
    assert job.phase is Phase.SAVING
    assert job.saved(9, "an-older-one-told-late") == []
    actions = job.saved(11, "step-11")
    assert actions[-1] == job.finish(
        "Ctrl-C: stopped at step 11; step 11 is saved in step-11", stopped=True
    )
    assert len(actions) == 3


def test_a_stop_that_cannot_save_says_what_is_left() -> None:
    job = running(1, restore="old")
    job.stop()
    job.stopped("w0", 11)
    reason = (
        "Ctrl-C: stopped at step 11; step 11 is NOT saved: the disk is full. "
        "The last good checkpoint is old."
    )
    assert job.save_failed(11, "the disk is full.")[-1] == job.finish(
        reason, stopped=True, saved=False
    )


def test_another_worker_saves_when_the_saver_dies() -> None:
    job = running(3)
    job.stop()
    job.stopped("w0 w2", 11)
    assert job.stopped("w1", 12) == [job.save("w1")]
    assert job.lost("w1") == [job.save("w0")]
    assert job.lost("w2") == []
    reason = (
        "Ctrl-C: stopped at step 12; step 12 is NOT saved: no worker that held it is left. "
        "There is no checkpoint."
    )
    assert job.lost("w0") == [job.finish(reason, stopped=True, saved=False)]


def test_a_stop_before_the_first_step_saves_nothing() -> None:
    job = Driver(1, 1)
    reason = "Ctrl-C: stopped before the first step, nothing to save"
    assert job.stop() == [job.let_go("w0", reason), job.finish(reason, stopped=True)]


def test_a_stop_while_waiting_saves_what_a_survivor_holds() -> None:
    job = running(2, low=2)
    job.lost("w1")
    job.stopped("w0", 10, "aborted")
    assert job.stop() == [job.save("w0")]


def test_a_stop_while_forming_waits_until_it_can_be_asked() -> None:
    job = running(2)
    job.batch(32)
    job.stopped("w0 w1", 11)
    assert job.stop() == []
    job.formed("w0", 11)
    assert job.formed("w1", 11) == [job.announce("w0 w1")]


def test_a_second_stop_ends_at_once() -> None:
    job = running(2)
    job.stop()
    job.now += 1.0
    actions = job.stop()
    assert [type(action) for action in actions[:2]] == [StopWorker, StopWorker]
    assert job.phase is Phase.FINISHED
    assert job.reason == (
        "stopped at once, requested twice (Ctrl-C); step 10 is NOT saved: the second request was "
        "to end without a save. There is no checkpoint."
    )


def test_a_key_hit_twice_is_one_request_to_stop() -> None:
    job = running(2)
    job.stop()
    for _ in range(3):
        job.now += 0.3
        assert job.stop() == []
    assert job.phase is Phase.DRAINING
    job.now += 0.2
    job.stop()
    assert job.phase is Phase.FINISHED, "a second after the first it is another request"


def test_wishes_after_a_stop_change_nothing() -> None:
    job = running(2)
    job.stop()
    assert job.target(4) == []
    assert (job.kind, job.reason) == ("keep", "the job is ending; asked for")


# --- messages that come too late ----------------------------------------------------------------


def test_messages_of_another_generation_or_of_strangers_change_nothing() -> None:
    job = running(2)
    job.target(1)
    job.stopped("w0 w1", 11)
    before = job.state
    for generation in (1, 3):
        job.stopped("w0", 99, generation=generation)
        job.send(Heartbeat, worker_id=WorkerId("w0"), step=99, generation=generation)
        job.send(WorkerFinished, worker_id=WorkerId("w0"), step=99, generation=generation)
    job.lost("w7")
    job.ready("w0")
    assert job.state == before
    other = job.beat("w0", 99, job_id="another")
    assert (job.state, other) == (before, [])


def test_a_job_that_is_over_stays_so() -> None:
    job = running(1)
    job.finished("w0", 30)
    before = job.state
    for actions in (job.lost("w0"), job.target(4), job.stop(), job.tick(10.0), job.ready("w0")):
        assert actions == []
    assert job.state is before


def test_the_reason_of_a_change_is_that_of_the_count_wanted_now() -> None:
    """A grow was announced for the schedule's count; then the planner wanted fewer."""
    job = running(2)
    job.target(3, "the schedule sets 3 workers")
    job.ready("w2")
    job.target(1, "the others add too little")
    assert job.stopped("w0 w1", 11) == [job.form("w0")]
    assert (job.kind, job.reason) == ("shrink", "2 -> 1 worker: the others add too little")


def test_a_loss_on_the_way_to_a_change_stays_the_reason_of_what_comes_of_it() -> None:
    job = running(3)
    job.target(2, "the schedule sets 2 workers")
    job.lost("w1")
    job.target(1, "the others add too little")
    job.stopped("w0 w2", 11)
    assert job.kind == "recover" and "w1 died" in job.reason
