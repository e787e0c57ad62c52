"""How a job ends: what is held is saved first, once, and the last words say so, or why not."""

import pytest

from supple.core.job.endings import SAVE_LIMIT_S
from supple.core.job.lifecycle import Phase
from supple.core.types import FailJob, FinishJob, KillWorker
from tests.core.job_driver import TRACEBACK, Driver, running

# --- a script that raises ---------------------------------------------------------------------


def test_a_worker_whose_script_raised_on_all_saves_before_the_job_fails() -> None:
    job = running(1)
    assert job.raised("w0", 12) == [job.save("w0")]
    reason = "the script raised on every worker after step 12; step 12 is saved in step-12"
    assert job.saved(12, "step-12") == [
        job.let_go("w0", reason),
        job.fail(reason, TRACEBACK),
    ]


def test_a_worker_whose_script_raised_is_kept_until_the_others_run() -> None:
    job = running(2)
    assert job.raised("w0", 10) == [job.abort("w1"), job.start("w2")]
    assert job.stopped("w1", 10, "aborted") == [job.form("w1")]
    assert job.formed("w1", 10) == [job.let_go("w0", "raised in the script")]


def test_survivors_redo_the_step_that_only_a_raised_worker_had_committed() -> None:
    job = running(2)
    job.raised("w0", 11)
    assert job.stopped("w1", 10, "aborted") == [job.form("w1")]
    job.formed("w1", 10)
    assert job.state.step == 10


def test_a_raised_worker_saves_what_it_holds_before_others_begin_from_a_checkpoint() -> None:
    job = running(2, restore="old")
    job.raised("w0", 11)
    assert job.lost("w1") == [job.start("w3")]
    assert job.phase is Phase.WAITING
    assert job.ready("w2") == [job.save("w0")]
    assert job.saved(11, "step-11") == [job.form("w2", restore="step-11")]


def test_others_begin_from_the_older_checkpoint_if_a_raised_worker_cannot_save() -> None:
    job = running(2, restore="old")
    job.raised("w0", 11)
    job.lost("w1")
    job.ready("w2")
    assert job.save_failed(11, "an object cannot be saved.") == [job.form("w2", restore="old")]


def test_a_worker_that_holds_nothing_whole_is_let_go_at_once() -> None:
    job = running(2)
    assert job.raised("w0", -1)[0] == job.let_go("w0", "raised in the script")


# --- whatever ends it -------------------------------------------------------------------------


def test_a_survivor_is_saved_when_min_is_no_longer_met() -> None:
    job = running(2, low=2, max_failures=0, step=30)
    job.lost("w1")
    assert job.stopped("w0", 30, "aborted") == [job.save("w0")]
    ended = job.saved(30, "step-30")[-1]
    assert isinstance(ended, FailJob)
    assert ended.saved
    assert ended.reason.endswith("1 worker left, MIN is 2; step 30 is saved in step-30")


def test_a_step_that_is_durable_already_is_not_saved_again() -> None:
    job = running(2)
    job.stop()
    job.stopped("w0", 11)
    job.saved(11, "step-11")
    ended = job.stopped("w1", 11)[-1]
    assert ended == job.finish(
        "Ctrl-C: stopped at step 11; step 11 is saved in step-11", stopped=True
    )


def test_one_step_beyond_the_newest_checkpoint_is_saved() -> None:
    job = running(2)
    job.saved(10, "step-10")
    job.stop()
    assert job.stopped("w0 w1", 11) == [job.save("w0")]


def test_a_holder_whose_save_fails_gives_way_to_the_next() -> None:
    job = running(2)
    job.stop()
    assert job.stopped("w0 w1", 11) == [job.save("w0")]
    assert job.save_failed(11, "its disk is broken.") == [job.save("w1")]
    assert job.saved(11, "step-11")[-1] == job.finish(
        "Ctrl-C: stopped at step 11; step 11 is saved in step-11", stopped=True
    )


def test_a_full_disk_is_said_once() -> None:
    job = running(2)
    job.stop()
    job.stopped("w0 w1", 11)
    ended = job.save_failed(11, "the disk is full.", is_disk_full=True)[-1]
    assert isinstance(ended, FinishJob)
    assert not ended.saved
    assert "step 11 is NOT saved: the disk is full. There is no checkpoint." in ended.reason


def test_a_saver_that_never_answers_does_not_hang_the_end() -> None:
    job = running(2)
    job.stop()
    job.stopped("w0 w1", 11)
    assert job.tick(SAVE_LIMIT_S - 2.0, hearing="w0 w1", every=2.0) == []
    actions = job.tick(2.0, hearing="w0 w1")
    assert isinstance(actions[0], KillWorker)
    assert actions[1:] == [job.save("w1")]


def test_a_finished_run_whose_last_save_failed_says_that_it_is_not_saved() -> None:
    job = running(1, restore="old")
    job.save_failed(30, "the disk is full.")
    ended = job.finished("w0", 30)[-1]
    assert isinstance(ended, FinishJob)
    assert not ended.saved
    assert ended.reason == (
        "training finished after 30 steps; step 30 is NOT saved: the disk is full. "
        "The last good checkpoint is old."
    )


def test_a_resumed_run_that_made_no_step_needs_no_save() -> None:
    job = Driver(1, 1, restore="old")
    job.ready("w0")
    job.formed("w0", 8)
    job.stop()
    assert job.stopped("w0", 8)[-1] == job.finish(
        "Ctrl-C: stopped at step 8; step 8 is saved in old", stopped=True
    )


def test_a_stop_while_a_failed_job_saves_lets_it_save_and_a_second_ends_at_once() -> None:
    job = running(1)
    job.raised("w0", 12)
    assert job.stop() == []
    assert "the job is ending already" in job.reason
    job.now += 1.0
    ended = job.stop()[-1]
    assert isinstance(ended, FailJob)
    assert not ended.saved
    assert "the script raised on every worker" in ended.reason
    assert "step 12 is NOT saved" in ended.reason


# --- leaving the loop -------------------------------------------------------------------------


def test_a_script_that_leaves_its_loop_on_all_ranks_finishes() -> None:
    job = running(2)
    assert job.left("w1 w0", 12) == []
    job.saved(12, "step-12")
    assert job.finished("w1", 12) == []
    assert job.tick(60.0, hearing="w0 w1") == []  # it may evaluate for as long as it likes
    assert job.finished("w0", 12)[-1] == job.finish(
        "the script left its loop at step 12, before the end of the data; "
        "step 12 is saved in step-12"
    )


def test_a_rank_that_leaves_alone_is_named_within_seconds_and_the_other_saves() -> None:
    job = running(2)
    job.left("w1", 12)
    job.finished("w1", 12)
    job.beat("w0", 12, doing="waiting")
    assert job.tick(4.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0")]
    assert job.stopped("w0", 12, "aborted") == [job.save("w0")]
    ended = job.saved(12, "step-12")[-1]
    assert isinstance(ended, FailJob)
    assert ended.reason.startswith(
        "rank 1 (w1) left the loop at step 12, rank 0 (w0) did not: all ranks must leave at the "
        "same step."
    )
    assert ended.reason.endswith("step 12 is saved in step-12")


def test_a_rank_that_is_still_in_the_scripts_code_may_yet_leave() -> None:
    job = running(2)
    job.left("w1", 12)
    job.beat("w0", 12, doing="script")
    assert job.tick(30.0, hearing="w0 w1") == []
    job.left("w0", 12)
    job.saved(12, "step-12")
    job.finished("w0", 12)
    assert isinstance(job.finished("w1", 12)[-1], FinishJob)


def test_a_stop_frees_a_rank_that_waits_for_one_that_left() -> None:
    job = running(2)
    job.left("w1", 12)
    job.beat("w0", 12, doing="waiting")
    assert job.stop() == [job.announce("w0 w1")]
    assert job.tick(9.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0 w1")]
    assert job.stopped("w0", 12, "aborted") == [job.save("w0")]
    assert isinstance(job.saved(12, "step-12")[-1], FinishJob)


def test_a_worker_that_joined_at_the_step_at_which_the_others_leave_is_let_go() -> None:
    job = running(1)
    job.target(2)
    job.ready("w1")
    job.stopped("w0", 12)
    job.formed("w0 w1", 12)
    assert job.left("w0", 12) == [job.abort("w0 w1")]
    assert job.stopped("w1", 12, "aborted") == []
    job.saved(12, "step-12")
    assert isinstance(job.finished("w0", 12)[-1], FinishJob)


def test_those_who_had_not_left_when_a_generation_broke_redo_their_step() -> None:
    job = running(3)
    job.left("w0", 12)
    assert job.lost("w1") == [job.abort("w0 w2")]
    assert job.stopped("w2", 11, "aborted") == [job.form("w2")]
    job.formed("w2", 11)
    job.finished("w0", 12, generation=1)
    job.left("w2", 12)
    job.saved(12, "step-12")
    assert isinstance(job.finished("w2", 12)[-1], FinishJob)


def test_a_rank_that_leaves_at_the_last_step_lets_the_others_end_without_it() -> None:
    job = running(2)
    job.left("w1", 12)
    assert job.beat("w0", 12, doing="fence") == [job.abort("w0 w1")]
    assert job.stopped("w0", 12, "aborted") == [job.form("w0")]


def test_an_exception_that_leaves_the_loop_is_no_leaving() -> None:
    job = running(2)
    job.left("w1", 10)
    assert job.raised("w1", 10) == [job.abort("w0"), job.start("w2")]
    assert job.stopped("w0", 10, "aborted") == [job.form("w0")]


def test_a_script_that_raises_after_it_left_fails_the_job_saved() -> None:
    job = running(2)
    job.left("w0 w1", 12)
    job.saved(12, "step-12")
    job.finished("w0", 12)
    ended = job.raised("w1", 12)[-1]
    assert isinstance(ended, FailJob)
    assert ended.saved
    assert "before the end of the data, but then the script raised in w1" in ended.reason


def test_nobody_joins_a_job_whose_members_leave() -> None:
    job = running(2)
    job.left("w0", 12)
    assert job.target(3) == []
    assert job.kind == "keep"


def test_a_stop_does_not_wait_for_a_rank_whose_save_after_its_loop_has_failed() -> None:
    job = running(2)
    job.left("w0", 12)
    job.stop()
    job.save_failed(12, "its disk is broken.")
    assert job.stopped("w1", 12) == []
    assert job.tick(9.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.save("w1")]


def test_a_stop_waits_for_a_rank_that_saves_after_its_loop_but_not_for_ever() -> None:
    job = running(1)
    job.left("w0", 12)
    job.stop()
    assert job.tick(SAVE_LIMIT_S - 2.0, hearing="w0", every=2.0) == []
    ended = job.tick(2.0, hearing="w0", every=2.0)[-1]
    assert isinstance(ended, FinishJob)
    assert not ended.saved
    assert "step 12 is NOT saved" in ended.reason


# --- a stop that somebody does not hear -------------------------------------------------------


@pytest.mark.parametrize("doing", ["data", "script", "backward"])
def test_a_stop_saves_from_a_healthy_rank_in_bounded_time(doing: str) -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing=doing)
    assert job.stop() == [job.announce("w0 w1")]
    assert job.tick(9.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0 w1")]
    assert job.stopped("w0", 10, "aborted") == []
    assert job.tick(2.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.save("w0")]
    assert isinstance(job.saved(10, "step-10")[-1], FinishJob)


def test_a_single_worker_that_only_waits_for_data_saves_beside_it() -> None:
    job = running(1)
    job.beat("w0", 10, doing="data")
    job.stop()
    job.tick(12.75, hearing="w0")
    assert job.tick(0.25, hearing="w0") == [job.save("w0")]
    ended = job.saved(10, "step-10")[-1]
    assert ended == job.finish(
        "Ctrl-C: stopped at step 10; step 10 is saved in step-10", stopped=True
    )


def test_a_single_worker_that_cannot_save_beside_its_data_is_asked_once() -> None:
    job = running(1)
    job.beat("w0", 10, doing="data")
    job.stop()
    job.tick(12.75, hearing="w0")
    assert job.tick(0.25, hearing="w0") == [job.save("w0")]
    ended = job.save_failed(10, "its disk is broken.")[-1]
    assert isinstance(ended, FinishJob)
    assert "step 10 is NOT saved: its disk is broken." in ended.reason


def test_of_two_that_wait_for_data_the_one_with_the_newer_state_saves_beside_it() -> None:
    job = running(2, heartbeat_timeout_s=1000.0)
    job.beat("w0", 10, doing="data")
    job.beat("w1", 11, doing="data")
    job.stop()
    assert job.tick(10.0) == [job.abort("w0 w1")]
    for _ in range(11):
        assert job.tick(0.25) == []
    assert job.tick(0.25) == [job.save("w1")]


def test_a_single_worker_that_hangs_in_the_scripts_code_is_waited_for_and_said() -> None:
    job = running(1, stall_timeout_s=5.0)
    job.beat("w0", 10, doing="script")
    job.stop()
    job.tick(13.0, hearing="w0")
    assert "its state cannot be saved from there" in job.reason
    ended = job.tick(37.0, hearing="w0")[-1]
    assert isinstance(ended, FinishJob)
    assert not ended.saved
    assert "step 10 is NOT saved: w0 did not stop." in ended.reason


def test_a_stop_while_a_generation_cannot_form_aborts_it() -> None:
    job = running(2)
    job.batch(32)
    job.stopped("w0 w1", 11)
    job.stop()
    assert job.tick(9.75, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0 w1")]


@pytest.mark.parametrize(("longest_s", "grace_s"), [(2.0, 10.0), (15.0, 45.0), (30.0, 60.0)])
def test_a_stop_waits_for_the_step_in_flight_as_long_as_three_parts_of_it_up_to_a_minute(
    longest_s: float, grace_s: float
) -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="backward")
    job.tick(longest_s, hearing="w0 w1")
    job.beat("w1", 10, doing="waiting")
    job.stop()
    assert job.tick(grace_s - 0.25, hearing="w0 w1") == []
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0 w1")]
