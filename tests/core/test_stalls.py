"""Who holds the others up: said once within ten seconds, and shed after --stall-timeout."""

import pytest

from supple.core.job.lifecycle import Phase
from supple.core.types import FailJob, KillWorker
from tests.core.job_driver import Driver, running


def said(job: Driver) -> list[str]:
    return [decision.reason for decision in job.decisions if " been " in decision.reason]


def test_a_rank_whose_data_does_not_come_is_named_after_ten_seconds_once() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.tick(9.75, hearing="w0 w1")
    assert said(job) == []
    job.tick(30.0, hearing="w0 w1")
    assert said(job) == [
        "rank 1 (w1) has been fetching data (the dataset, collate_fn) for 10 s; rank 0 (w0) cannot "
        "continue without it; it is replaced after 60 s (--stall-timeout)"
    ]


def test_a_rank_whose_data_does_not_come_is_replaced_and_the_others_go_on() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.tick(59.75, hearing="w0 w1")
    reason = (
        "it had been fetching data (the dataset, collate_fn) for 60 s while rank 0 (w0) waited "
        "(--stall-timeout 60s)"
    )
    assert job.tick(0.25, hearing="w0 w1") == [
        job.kill("w1", reason),
        job.abort("w0"),
        job.start("w2"),
    ]
    assert job.stopped("w0", 10, "aborted") == [job.form("w0")]


def test_a_rank_that_holds_up_a_resize_is_replaced_too() -> None:
    job = running(2)
    job.batch(32)
    job.beat("w1", 10, doing="data")
    job.stopped("w0", 10, "aborted")
    assert job.tick(59.75, hearing="w0 w1") == []
    actions = job.tick(0.25, hearing="w0 w1")
    assert isinstance(actions[0], KillWorker)
    assert job.form("w0", batch=32) in actions


def test_a_rank_in_the_scripts_own_code_may_take_ten_times_as_long() -> None:
    job = running(2, stall_timeout_s=5.0)
    job.beat("w0", 10, doing="script")
    job.beat("w1", 10, doing="waiting")
    assert job.tick(49.75, hearing="w0 w1") == []
    assert len(job.tick(0.25, hearing="w0 w1")) == 3


def test_what_took_long_before_may_take_long_again() -> None:
    job = running(2)
    for step in (11, 12):
        job.beat("w0", 10, doing="waiting")
        job.beat("w1", 10, doing="data")
        assert job.tick(50.0, hearing="w0 w1") == []
        job.beat("w1", step, doing="script")
    assert len(said(job)) == 1


@pytest.mark.slow
def test_ten_times_as_long_as_it_ever_took_is_too_long() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.tick(50.0, hearing="w0 w1")
    job.beat("w1", 10, doing="script")
    job.beat("w1", 11, doing="data")
    job.beat("w0", 11, doing="waiting")
    assert job.tick(499.75, hearing="w0 w1") == []
    assert isinstance(job.tick(0.25, hearing="w0 w1")[0], KillWorker)


def test_what_takes_three_times_as_long_as_it_ever_took_is_said() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.tick(5.0, hearing="w0 w1")
    job.beat("w1", 10, doing="script")
    job.beat("w1", 11, doing="data")
    job.tick(14.75, hearing="w0 w1")
    assert said(job) == []
    job.tick(0.25, hearing="w0 w1")
    assert len(said(job)) == 1


def test_only_what_a_worker_itself_does_sets_what_is_usual() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.tick(5.0, hearing="w0 w1")
    job.beat("w0", 11, doing="script")
    job.beat("w1", 11, doing="script")
    assert dict(job.state.longest) == {"data": 5.0}


def test_a_heartbeat_that_was_late_does_not_begin_a_stretch_anew_but_a_second_does() -> None:
    """Of which the first took 5 s, so that 15 s are no longer unusual."""
    for late_s, said_after_s in ((0.75, 10.0), (1.0, 16.0)):
        job = running(2)
        job.beat("w0", 10, doing="waiting")
        job.beat("w1", 10, doing="data")
        began = job.now
        job.tick(5.0, hearing="w0 w1")
        job.beat("w1", 10, doing="data", since_s=5.0 - late_s)
        while not said(job):
            job.tick(0.25, hearing="w0 w1")
        assert job.now - began == said_after_s


def test_a_save_is_not_said_before_it_has_taken_long_itself() -> None:
    job = running(1)
    job.beat("w0", 10, doing="saving")  # another save, of before
    job.tick(5.0, hearing="w0")
    job.stop()
    job.stopped("w0", 11)
    assert job.phase is Phase.SAVING
    job.tick(9.75, hearing="w0")
    assert said(job) == []
    job.tick(0.25, hearing="w0")
    assert len(said(job)) == 1


def test_a_single_worker_whose_data_does_not_come_ends_the_job_saved() -> None:
    job = running(1)
    job.beat("w0", 10, doing="data")
    assert job.tick(59.75, hearing="w0") == []
    assert job.tick(0.25, hearing="w0") == [job.abort("w0")]
    assert job.tick(3.0, hearing="w0") == [job.save("w0")]
    ended = job.saved(10, "step-10")[-1]
    assert isinstance(ended, FailJob)
    assert ended.reason == (
        "rank 0 (w0) had been fetching data for 60 s without a result (--stall-timeout 60s); "
        "step 10 is saved in step-10"
    )


def test_a_single_worker_in_the_scripts_own_code_is_never_shed() -> None:
    job = running(1)
    job.beat("w0", 10, doing="script")
    assert job.tick(3600.0, hearing="w0", every=2.0) == []
    assert len(said(job)) == 1


def test_nobody_is_shed_who_alone_holds_the_newest_state() -> None:
    job = running(2, heartbeat_timeout_s=1000.0)
    job.beat("w0", 10, doing="waiting", since_s=120.0)
    job.beat("w1", 11, doing="data", since_s=120.0)
    assert job.tick(10.0) == []


def test_a_worker_that_cannot_say_what_it_does_is_not_taken_to_be_stuck() -> None:
    """Its interpreter is busy: proof of its life comes from elsewhere."""
    job = running(2, heartbeat_timeout_s=1000.0)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="waiting")
    assert job.tick(120.0) == []
    assert said(job) == []


def test_ranks_that_wait_for_each_other_form_anew() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="waiting")
    assert job.tick(59.75, hearing="w0 w1") == []
    assert said(job) == [
        "rank 0 (w0), rank 1 (w1) have been waiting for other ranks for 10 s: nothing arrives from "
        "the others"
    ]
    assert job.tick(0.25, hearing="w0 w1") == [job.abort("w0 w1")]
    assert job.state.why[1] == "all ranks waited for each other for 60 s"


def test_a_rank_that_is_shed_while_the_only_other_waits_is_the_cause_that_is_told() -> None:
    job = running(2, stall_timeout_s=12.0)
    job.beat("w0", 10, doing="data")
    job.beat("w1", 10, doing="waiting")
    job.tick(12.0, hearing="w0 w1")
    assert job.state.why[1].startswith("w0 held the others up: it had been fetching data")
    job.stopped("w1", 10, "aborted")
    assert job.reason.startswith("2 -> 1 worker: w0 held the others up: it had been fetching data")


def test_ranks_that_wait_for_each_other_again_and_again_end_the_job_saved() -> None:
    job = running(2, max_failures=2)
    for generation in (1, 2, 3):
        assert job.state.generation == generation
        job.beat("w0", 10, doing="waiting")
        job.beat("w1", 10, doing="waiting")
        assert job.tick(60.0, hearing="w0 w1") == [job.abort("w0 w1")]
        actions = job.stopped("w0 w1", 10, "aborted")
        job.formed("w0 w1", 10)
    assert actions == [job.save("w0")]
    ended = job.saved(10, "step-10")[-1]
    assert isinstance(ended, FailJob)
    assert ended.saved
    assert "3 generations in a row broke without a committed step" in ended.reason
    assert "all ranks waited for each other for 60 s" in ended.reason


def test_workers_that_do_not_come_up_are_named_with_the_cause_once() -> None:
    job = Driver(2, 2)
    for name in ("w0", "w1"):
        job.beat(name, 0, doing="queued")
    job.tick(60.0, hearing="w0 w1")
    assert said(job) == [
        "w0, w1 have been waiting for a process in the cluster for 10 s: each needs a free place "
        "of 1 CPU"
    ]
    job.beat("w0", 0, doing="starting")
    job.tick(20.0, hearing="w0 w1")
    assert said(job)[1:] == ["w0 has been starting (imports, building the model) for 10 s"]


def test_a_generation_that_takes_long_to_form_says_who_is_missing() -> None:
    job = running(2)
    job.batch(32)
    job.stopped("w0 w1", 11)
    job.formed("w0", 11)
    job.beat("w1", 11, doing="forming")
    job.tick(20.0, hearing="w0 w1")
    assert job.phase is Phase.FORMING
    assert said(job) == [
        "rank 1 (w1) has been forming its group for 10 s; generation 2 begins when all have formed "
        "it"
    ]


def test_a_save_that_takes_long_is_said() -> None:
    job = running(1)
    job.stop()
    job.stopped("w0", 11)
    job.beat("w0", 11, doing="saving")
    job.tick(20.0, hearing="w0")
    assert said(job) == ["rank 0 (w0) has been saving for 10 s"]


def test_a_controller_that_was_suspended_finds_nobody_stuck() -> None:
    job = running(2)
    job.beat("w0", 10, doing="waiting")
    job.beat("w1", 10, doing="data")
    job.now += 3600.0
    job.beat("w0", 10, doing="waiting", since_s=1.0)
    job.beat("w1", 10, doing="data", since_s=1.0)
    assert job.tick(5.0, hearing="w0 w1") == []
    assert said(job) == []
    assert not job.state.longest
