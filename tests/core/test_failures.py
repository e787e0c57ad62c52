"""What a loss leads to: who goes on, when a replacement is tried, when the job is given up."""

from supple.core.job.failures import in_short
from supple.core.job.lifecycle import Phase
from supple.core.types import KillWorker, WorkerId
from tests.core.job_driver import TRACEBACK, Driver, running


def test_survivors_go_on_at_once_and_a_replacement_joins_later() -> None:
    job = running(3)
    assert job.lost("w1", "died", "exit code -9") == [job.abort("w0 w2"), job.start("w3")]
    assert job.phase is Phase.DRAINING
    job.stopped("w0", 14, "aborted")
    assert job.stopped("w2", 15, "aborted") == [job.form("w0 w2")]
    assert (job.kind, job.reason) == ("recover", "3 -> 2 workers: w1 died: exit code -9")
    job.formed("w0 w2", 15)
    assert job.state.step == 15
    assert job.ready("w3") == [job.announce("w0 w2")]
    assert job.stopped("w0 w2", 16) == [job.form("w0 w2 w3")]
    assert job.kind == "regrow"
    assert job.reason == "2 -> 3 workers: w3 ready, in place of lost workers"


def test_a_failed_collective_aborts_the_others_even_if_nobody_is_lost() -> None:
    job = running(2)
    assert job.stopped("w1", 10, "connection reset") == [job.abort("w0")]
    assert job.stopped("w0", 11, "aborted") == [job.form("w0 w1")]
    assert job.reason == "2 workers: w1: connection reset"


def test_a_failed_collective_while_draining_aborts_the_rest() -> None:
    job = running(3)
    job.batch(32)
    assert job.stopped("w0", 10, "connection lost") == [job.abort("w1 w2")]


def test_a_loss_while_draining_aborts_the_rest() -> None:
    job = running(3)
    job.target(2)
    job.stopped("w0", 11)
    assert job.lost("w2") == [job.abort("w1")]
    assert job.stopped("w1", 10, "aborted") == [job.form("w0 w1")]
    assert job.kind == "recover"


def test_a_loss_while_forming_aborts_that_generation_and_forms_the_next() -> None:
    job = running(2)
    job.target(3)
    job.ready("w2")
    job.stopped("w0 w1", 11)
    assert job.lost("w0") == [job.abort("w1 w2"), job.start("w3")]
    job.stopped("w2", -1, "aborted")
    assert job.stopped("w1", 11, "aborted") == [job.form("w1 w2")]
    assert job.state.generation == 3


def test_a_fresh_start_says_which_state_is_gone_and_what_it_begins_from() -> None:
    begun = "the state of step 11 is lost with its last holder: starting from"
    for saved, from_what in ((False, "the initial weights"), (True, "the checkpoint p of step 8")):
        job = running(1)
        if saved:
            job.saved(8, "p")
        job.target(2)
        job.ready("w1")
        job.stopped("w0", 11)
        job.lost("w0")
        job.stopped("w1", -1, "aborted")
        assert job.kind == "recover"
        assert job.reason == f"2 -> 1 worker: w0 died; {begun} {from_what}"
        job.formed("w1", 8 if saved else 0)
        job.ready("w2")
        job.stopped("w1", 20)
        assert "gone" not in job.reason


def test_the_newest_state_is_in_the_next_generation_even_if_the_newest_worker_has_it() -> None:
    job = running(3)
    job.target(2)
    job.stopped("w0 w1", 10, "torn")
    assert job.stopped("w2", 11) == [job.form("w0 w2")]


def test_fewer_than_min_survivors_wait_and_resume() -> None:
    job = running(2, low=2)
    job.lost("w1")
    assert job.stopped("w0", 10, "aborted") == []
    assert job.phase is Phase.WAITING
    assert job.kind == "wait"
    assert job.reason == "w1 died; 1 of at least 2 workers left: waiting for others"
    assert job.ready("w2") == [job.form("w0 w2")]
    assert (job.kind, job.reason) == ("regrow", "2 workers: enough workers again")


def test_all_workers_gone_go_on_from_the_newest_checkpoint() -> None:
    job = running(2, restore="old")
    job.saved(8, "step-8")
    job.saved(4, "step-4")
    assert job.lost("w0") == [job.abort("w1"), job.start("w2")]
    assert job.lost("w1") == [job.start("w3")]
    assert job.phase is Phase.WAITING
    assert job.ready("w3") == [job.form("w3", restore="step-8")]
    job.formed("w3", 8)
    assert (job.phase, job.state.step) == (Phase.RUNNING, 8)


def test_a_silent_worker_is_killed_and_treated_as_lost() -> None:
    job = running(2)
    assert job.tick(4.0, hearing="w0") == []
    reason = (
        "no heartbeat for 4.2 s, its process is stopped or cannot be reached (allowed: 4 s, "
        "--heartbeat-timeout)"
    )
    assert job.tick(0.25, hearing="w0") == [
        job.kill("w1", reason),
        job.abort("w0"),
        job.start("w2"),
    ]


def test_who_alone_holds_the_state_is_waited_for_when_silent_and_named() -> None:
    job = running(2)
    assert job.tick(10.0) == [], "neither is given up: the state would be gone"
    assert "no sign of life" not in job.reason
    assert job.tick(0.25) == []
    assert job.reason == (
        "rank 1 (w1) has given no sign of life for 10 s: its process is stopped or cannot be "
        "reached. No responsive worker holds its state, so the job waits for it, 600 s at most "
        "(--unresponsive-timeout)"
    )
    told = len(job.decisions)
    assert job.tick(100.0) == []
    assert len(job.decisions) == told
    assert job.tick(2.0, hearing="w0") == [], "w0 is back, and w1 may be about to be"
    (killed, *_) = job.tick(0.5, hearing="w0")
    assert isinstance(killed, KillWorker), "w0 holds it too, and answers"


def test_who_alone_holds_the_state_is_given_up_in_the_end() -> None:
    job = running(1, unresponsive_timeout_s=20.0)
    assert job.tick(20.0) == []
    reason = (
        "no heartbeat for 20.2 s, its process is stopped or cannot be reached (allowed: 20 s, "
        "--unresponsive-timeout)"
    )
    assert job.tick(0.25)[0] == job.kill("w0", reason)


def test_a_joiner_without_the_state_does_not_make_its_source_dispensable() -> None:
    job = running(1, high=2)
    job.target(2)
    job.ready("w1")
    job.stopped("w0", 11)
    assert job.phase is Phase.FORMING
    assert job.tick(5.0, hearing="w1") == []
    job.formed("w1", 11)
    killed = job.tick(0.25, hearing="w1")[0]
    assert isinstance(killed, KillWorker)
    assert killed.worker_id == "w0"


def test_a_starting_worker_may_be_silent_for_two_minutes() -> None:
    job = Driver(1, 2)
    assert job.tick(120.0) == []
    reason = (
        "no heartbeat for 120.2 s, its process is stopped or cannot be reached (allowed: 120 s, "
        "while it starts)"
    )
    assert job.tick(0.25)[0] == job.kill("w0", reason)


def test_a_controller_that_was_suspended_blames_nobody() -> None:
    job = running(2)
    job.now += 3600.0
    assert job.tick(0.25) == []
    assert job.tick(3.75) == []
    assert len(job.tick(0.5, hearing="w0")) == 3


# --- giving up --------------------------------------------------------------------------------


def test_a_script_that_raises_before_the_first_step_fails_at_once() -> None:
    job = Driver(2, 2)
    reason = "the script failed before the first step"
    assert job.lost("w0", "raised", TRACEBACK) == [
        job.let_go("w0", "raised in the script"),
        job.let_go("w1", reason),
        job.fail(reason, TRACEBACK),
    ]
    assert job.phase is Phase.FAILED


def test_a_script_that_returns_before_its_first_step_fails_at_once() -> None:
    job = Driver(1, 1)
    job.finished("w0", 0)
    assert job.phase is Phase.FAILED
    assert "returned before its first step" in job.state.detail


def test_a_script_that_raises_on_every_worker_fails_with_its_traceback() -> None:
    job = running(2)
    job.saved(10, "step-10")
    assert job.lost("w0", "raised", TRACEBACK)[:2] == [
        job.let_go("w0", "raised in the script"),
        job.abort("w1"),
    ]
    actions = job.lost("w1", "raised", TRACEBACK)
    reason = "the script raised on every worker after step 10; step 10 is saved in step-10"
    assert actions[-1] == job.fail(reason, TRACEBACK)


def test_a_script_that_keeps_raising_at_one_step_fails_with_its_traceback() -> None:
    job = running(4, max_failures=2)
    job.lost("w3", "raised", TRACEBACK)
    job.stopped("w0 w1 w2", 10, "aborted")
    job.formed("w0 w1 w2", 10)
    assert job.lost("w1", "raised", TRACEBACK)[-1] == job.abort("w0 w2")
    assert job.stopped("w0 w2", 10, "aborted") == [job.save("w0")]
    reason = (
        "the script raised 2 times after step 10 (--max-failures 2); step 10 is saved in step-10"
    )
    assert job.saved(10, "step-10")[-1] == job.fail(reason, TRACEBACK)


def test_a_worker_that_raises_once_is_replaced() -> None:
    job = running(2)
    job.lost("w0", "raised", TRACEBACK)
    job.stopped("w1", 10, "aborted")
    assert (job.phase, job.state.members) == (Phase.FORMING, (WorkerId("w1"),))
    assert job.reason == "2 -> 1 worker: w0 raised in the script: ValueError: bad sample"


def test_replacements_that_keep_failing_come_ever_more_rarely() -> None:
    job = running(1, max_failures=1)
    job.target(2)
    assert job.lost("w1", "start_failed") == [job.start("w2")]
    assert job.lost("w2", "start_failed") == []
    assert job.kind == "keep"
    assert job.reason == (
        "2 new workers in a row were lost within 3 steps (--max-failures 1); "
        "going on with 1 worker, the next attempt to replace it in 30 s"
    )
    assert job.tick(29.75, hearing="w0") == []
    assert job.tick(0.25, hearing="w0") == [job.start("w3")]
    job.lost("w3", "start_failed")
    assert job.reason.endswith("in 60 s")
    assert job.tick(59.75, hearing="w0") == []
    assert job.target(3) == [job.start("w4"), job.start("w5")]


def test_workers_that_fail_together_are_one_failed_attempt() -> None:
    job = running(1, max_failures=1)
    job.target(4)
    for name in ("w1", "w2", "w3"):
        assert len(job.lost(name, "start_failed")) == 1
    assert job.state.failed_starts == 1


def test_a_newcomer_that_lasts_three_steps_clears_the_count() -> None:
    job = running(1, max_failures=1)
    job.target(2)
    job.lost("w1", "start_failed")
    job.beat("w0", 50)
    assert job.state.failed_starts == 1
    job.ready("w2")
    job.stopped("w0", 51)
    job.formed("w0 w2", 51)
    job.beat("w2", 53)
    assert job.state.failed_starts == 1
    job.beat("w2", 54)
    assert job.state.failed_starts == 0


def test_generations_that_break_without_progress_end_the_job_below_min() -> None:
    job = running(4, low=3, max_failures=1)
    job.lost("w3")
    job.stopped("w0 w1 w2", 10, "aborted")
    job.formed("w0 w1 w2", 10)
    job.lost("w2")
    assert job.stopped("w0 w1", 10, "aborted") == [job.save("w0")]
    assert job.saved(10, "step-10")[-1] == job.fail(
        "2 generations in a row broke without a committed step (--max-failures 1); "
        "2 workers left, MIN is 3; step 10 is saved in step-10"
    )


def test_a_committed_step_between_two_losses_forgives_the_first() -> None:
    job = running(4, low=3, max_failures=1)
    job.lost("w3")
    job.stopped("w0 w1 w2", 10, "aborted")
    job.formed("w0 w1 w2", 10)
    job.lost("w2")
    job.stopped("w0", 11)
    job.stopped("w1", 10, "aborted")
    assert job.phase is Phase.WAITING


def test_collectives_that_keep_failing_though_nobody_is_lost_end_the_job() -> None:
    job = running(2, max_failures=1)
    job.stopped("w0 w1", 10, "no route to host")
    assert job.stopped("w0 w1", 10, "no route to host") == [job.save("w0")]
    assert job.saved(10, "step-10")[-1] == job.fail(
        "2 generations in a row broke without a committed step (--max-failures 1), though no "
        "worker was lost (w0: no route to host): check that the workers' nodes can reach each "
        "other; step 10 is saved in step-10"
    )


def test_a_worker_that_raises_before_it_is_a_member_does_not_blame_the_script() -> None:
    job = running(1, max_failures=1)
    job.target(2)
    assert job.lost("w1", "raised", TRACEBACK)[-1] == job.start("w2")
    assert job.state.num_raised == 0


def test_a_worker_that_raised_holds_the_state_of_step_0_too() -> None:
    job = Driver(2, 2)
    job.ready("w0")
    job.ready("w1")
    job.formed("w0 w1", 0)
    job.raised("w0", 0)
    assert WorkerId("w0") in job.state.workers
    job.lost("w1")
    assert job.state.holders == (WorkerId("w0"),)


def test_as_many_broken_generations_as_failed_starts_are_told_of_as_generations() -> None:
    job = running(2, low=2, max_failures=0)
    job.target(3)
    job.lost("w2", "start_failed")
    assert (job.state.failed_starts, job.state.strikes) == (1, 0)
    job.lost("w1")
    assert (job.state.failed_starts, job.state.strikes) == (1, 1)
    job.stopped("w0", 10, "aborted")
    assert job.saved(10, "step-10")[-1] == job.fail(
        "1 generations in a row broke without a committed step (--max-failures 0); "
        "1 worker left, MIN is 2; step 10 is saved in step-10"
    )


def test_the_last_line_of_a_traceback_is_told_up_to_160_characters() -> None:
    assert in_short(f"Traceback\n{'x' * 200}\n\n") == "x" * 160
    assert in_short(" \n") == ""


def test_newcomers_that_fail_do_not_make_one_broken_generation_one_too_many() -> None:
    job = running(2, max_failures=1)
    job.target(3)
    job.lost("w2", "start_failed")
    job.lost("w3", "start_failed")
    assert job.stopped("w0 w1", 10, "no route to host") == [job.form("w0 w1")]


def test_preemptions_are_never_counted() -> None:
    job = running(2, max_failures=0)
    job.lost("w1", "preempted")
    job.stopped("w0", 10, "aborted")
    assert job.lost("w2", "preempted") == [job.start("w3")]
    assert (job.state.strikes, job.state.failed_starts) == (0, 0)


# Checkpoints that cannot be begun with


def test_a_refused_checkpoint_fails_the_job_at_the_first_try_and_is_not_recommended() -> None:
    job = Driver(2, initial=2, restore="step-8", max_failures=3)
    job.ready("w0")
    job.ready("w1")
    actions = job.lost("w0", "refused", "the checkpoint step-8 is of another model")
    assert actions[-1] == job.fail(
        "the checkpoint was refused", "the checkpoint step-8 is of another model"
    )
    assert job.phase is Phase.FAILED
    assert job.state.restore is None


def test_a_damaged_checkpoint_that_was_passed_over_is_none_to_go_back_to() -> None:
    job = running(2)
    job.saved(8, "step-8")
    job.lost("w0")
    job.lost("w1")
    job.ready("w2")
    job.passed_over(4, "step-4", "step-8 is corrupt")
    assert (job.kind, job.reason) == ("recover", "from step-4 instead: step-8 is corrupt")
    job.formed("w2", 4)
    assert job.lost("w2")[:1] == [job.start("w4")]
    assert job.ready("w3") == [job.form("w3", restore="step-4")]
    job.formed("w3", 4)
    job.saved(6, "step-6")
    assert job.state.restore == "step-6", "of a lower step than the one that was damaged"


def test_a_file_that_could_not_be_written_changes_nothing() -> None:
    job = running(2)
    before = job.state
    assert job.file_lost("/runs/job/logs/w0.log") == []
    assert job.state == before
