"""Who gives no sign of life, who only does not answer, and what is gone for everybody."""

from supple.core.job.lifecycle import Phase
from supple.core.types import Action, ClusterLost, KillWorker, Noticed
from tests.core.job_driver import Driver, running


def test_a_worker_whose_process_runs_is_not_dead_and_it_is_said_once_that_it_does_not_answer() -> (
    None
):
    job = running(2)
    for _ in range(1200):  # five minutes
        job.beat("w1", 0, is_answer=False)
        assert job.tick(0.25, hearing="w0") == []
    said = [d.reason for d in job.decisions if "has not answered" in d.reason]
    assert len(said) == 1
    assert said[0].startswith(
        "the interpreter of rank 1 (w1) has not answered for 10 s, though its process runs"
    )
    assert "--unresponsive-timeout" in said[0]


def test_it_is_said_again_after_an_answer() -> None:
    job = running(2)
    for _ in range(2):
        for _ in range(60):
            job.beat("w1", 0, is_answer=False)
            job.tick(0.25, hearing="w0")
        job.beat("w1", 0)
    assert len([d for d in job.decisions if "has not answered" in d.reason]) == 2


def test_an_interpreter_that_never_answers_again_is_given_up_and_the_option_is_named() -> None:
    job = running(2, unresponsive_timeout_s=20.0)
    actions: list[Action] = []
    while not actions:
        job.beat("w1", 0, is_answer=False)
        actions = job.tick(0.25, hearing="w0")
    reason = (
        "its process runs, but its interpreter has not answered for 20 s (allowed: 20 s, "
        "--unresponsive-timeout)"
    )
    assert actions == [job.kill("w1", reason), job.abort("w0"), job.start("w2")]


def test_what_a_person_should_know_is_told_and_changes_nothing() -> None:
    job = running(2)
    assert job.send(Noticed, text="the fence cannot be written") == []
    assert (job.kind, job.reason) == ("keep", "the fence cannot be written")


# --- who may be given up ----------------------------------------------------------------------


def test_what_came_when_a_suspended_controller_woke_is_no_credit_for_the_time_after() -> None:
    job = running(2)
    job.now += 3600.0
    job.beat("w0", 10)
    job.beat("w1", 10)
    assert job.tick(0.25) == []
    assert job.tick(4.0, hearing="w0") == []
    assert isinstance(job.tick(0.25, hearing="w0")[0], KillWorker), "of w1, after 4.25 s"


def test_nor_for_an_interpreter_that_answers_no_more() -> None:
    job = running(2, unresponsive_timeout_s=5.0)
    job.now += 3600.0
    job.beat("w1", 10)
    job.tick(0.25, hearing="w0")
    actions: list[Action] = []
    for _ in range(21):
        assert actions == []
        job.beat("w1", 10, is_answer=False)
        actions = job.tick(0.25, hearing="w0")
    assert isinstance(actions[0], KillWorker), "after 5.25 s"


def test_a_holder_of_the_state_is_given_up_if_another_was_heard_in_half_the_time_out() -> None:
    job = running(2)
    job.tick(2.25, hearing="w1")
    assert isinstance(job.tick(2.0)[0], KillWorker), "w1 was heard 2 s before"
    job = running(2)
    job.tick(2.0, hearing="w1")
    assert job.tick(2.25) == [], "w1 was heard 2.25 s before, and may be lost too"


def test_a_holder_is_given_up_while_a_generation_forms_if_another_has_its_step() -> None:
    job = running(2)
    job.batch(32)
    job.stopped("w0 w1", 11)
    assert job.phase is Phase.FORMING
    assert job.tick(4.0, hearing="w1") == []
    assert isinstance(job.tick(0.25, hearing="w1")[0], KillWorker)


def test_a_holder_that_is_a_step_ahead_of_the_generation_is_given_up() -> None:
    job = running(2)
    job.beat("w0", 11)
    actions: list[Action] = []
    for _ in range(17):
        assert actions == []
        job.beat("w1", 10)
        actions = job.tick(0.25)
    assert isinstance(actions[0], KillWorker), "the survivor redoes one step"


def test_who_holds_no_state_is_given_up_though_nobody_else_is_heard() -> None:
    job = running(1)
    job.target(2)
    job.ready("w1")
    job.stopped("w0", 11)
    assert job.tick(4.0) == []
    killed = job.tick(0.25)[0]
    assert isinstance(killed, KillWorker)
    assert killed.worker_id == "w1"


def test_who_alone_holds_the_weights_before_the_first_step_is_waited_for() -> None:
    job = Driver(1, 1)
    job.ready("w0")
    job.formed("w0", 0)
    assert job.tick(60.0) == []


def test_who_alone_holds_the_state_and_is_silent_is_said_once_to_be_waited_for() -> None:
    job = running(1)
    job.tick(40.0)
    said = [d for d in job.decisions if "no sign of life" in d.reason]
    assert [(d.kind, d.num_workers, d.reason) for d in said] == [
        (
            "keep",
            1,
            "rank 0 (w0) has given no sign of life for 10 s: its process is stopped or cannot be "
            "reached. No responsive worker holds its state, so the job waits for it, 600 s at most "
            "(--unresponsive-timeout)",
        )
    ]


def test_a_worker_that_starts_is_silent_and_nothing_is_said_of_it() -> None:
    job = running(1)
    job.target(2)
    job.tick(60.0, hearing="w0")
    assert [d.reason for d in job.decisions if "no sign of life" in d.reason] == []


def test_the_reason_of_a_kill_has_the_silence_and_the_option_that_allows_it() -> None:
    job = running(2)
    assert job.tick(4.0, hearing="w0") == []
    reason = (
        "no heartbeat for 4.2 s, its process is stopped or cannot be reached (allowed: 4 s, "
        "--heartbeat-timeout)"
    )
    assert job.tick(0.25, hearing="w0")[0] == job.kill("w1", reason)


def test_who_was_away_with_another_gets_half_the_time_out_from_its_return() -> None:
    job = running(3)
    job.tick(12.0)
    assert job.tick(2.25, hearing="w1") == [], "w1 is back after 0.25 s; the others have 2 s left"
    killed = [a.worker_id for a in job.tick(0.25, hearing="w1") if isinstance(a, KillWorker)]
    assert killed == ["w0", "w2"]


# --- what everything runs on ------------------------------------------------------------------


def test_a_lost_cluster_ends_the_job_saved_by_a_survivor_and_failed() -> None:
    job = running(2)
    asked = job.send(ClusterLost, reason="Ray's raylet was killed")
    assert asked == [job.announce("w0 w1")]
    assert job.stopped("w0 w1", 15) == [job.save("w0")]
    reason = "Ray's raylet was killed; step 15 is saved in step-15"
    assert job.saved(15, "step-15")[-1] == job.fail(reason)
    assert job.phase is Phase.FAILED


def test_a_cluster_lost_while_the_job_stops_leaves_it_a_stop_if_it_could_be_saved() -> None:
    job = running(1)
    job.stop()
    job.send(ClusterLost, reason="Ray's raylet was killed")
    job.stopped("w0", 15)
    reason = "Ctrl-C: stopped at step 15; step 15 is saved in step-15"
    assert job.saved(15, "step-15")[-1] == job.finish(reason, stopped=True)


def test_of_a_worker_that_starts_in_silence_it_is_not_said_that_its_process_runs() -> None:
    job = Driver(1, 2)
    assert job.tick(60.0) == []
    assert not [d.reason for d in job.decisions if "process runs" in d.reason]


def test_workers_that_were_away_together_are_all_waited_for_when_the_first_is_back() -> None:
    job = running(3)
    job.tick(12.0)
    assert job.tick(1.75, hearing="w1") == []
    assert job.tick(20.0, hearing="w0 w1 w2") == []


def test_who_alone_holds_the_state_is_no_other_to_itself() -> None:
    """Also where it was heard lately, as a very long --heartbeat-timeout has it."""
    job = running(1, heartbeat_timeout_s=100.0, unresponsive_timeout_s=12.0)
    assert job.tick(12.0) == []
    assert job.tick(0.25)[0].reason.startswith("no heartbeat for 12.2 s")
