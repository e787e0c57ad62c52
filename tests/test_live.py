"""What a person sees while a job trains, in a terminal and in a pipe, and what it came to."""

import io
from typing import Any

import pytest
from rich.console import Console

from supple.core.types import (
    CheckpointFailed,
    CheckpointSaved,
    Decision,
    FormGroup,
    GroupFormed,
    JobId,
    KillWorker,
    LossCause,
    Progress,
    StartWorker,
    StopWorker,
    WorkerFinished,
    WorkerId,
    WorkerLost,
)
from supple.core.words import in_words
from supple.report.live import LiveLine, Tally, duration, progress_parts, speed_parts

JOB = JobId("digits")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def made_progress(**changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "generation": 3,
        "step": 100,
        "epoch": 1,
        "num_epochs": 4,
        "samples_done": 25_000,
        "samples_total": 100_000,
        "num_workers": 2,
        "global_batch_size": 250,
        "lr": 3e-4,
        "step_time_s": 0.1,
        "forward_time_s": 0.0,
        "backward_time_s": 0.0,
        "optimizer_time_s": 0.0,
        "sync_time_s": 0.0,
        "micro_batch_size": 1,
        "num_accumulation_steps": 1,
        "largest_micro_batch": 1,
        "num_nodes": 1,
        "most_per_node": 1,
        "data_time_s": 0.0,
        "noise_scale": None,
        "efficiency": None,
        "base_batch_size": 64,
        "base_lr": 1e-3,
        "optimizer": "AdamW",
        "gradient_bytes": 4000,
        "metrics": {"loss": 0.51234},
    }
    return Progress(**(fields | changes))


def text_of(progress: Progress, max_steps: int | None = None) -> str:
    parts = [*progress_parts("digits", progress, max_steps), ("  ", ""), *speed_parts(progress)]
    return "".join(text for text, _ in parts)


def decision(kind: str, reason: str) -> Decision:
    return Decision(job_id=JOB, generation=1, kind=kind, num_workers=2, reason=reason)


def plain() -> tuple[io.StringIO, Clock, LiveLine]:
    stream, clock = io.StringIO(), Clock()
    return stream, clock, LiveLine(Console(file=stream, highlight=False), "digits", clock=clock)


def test_the_line_says_how_far_how_long_with_what_and_how_fast() -> None:
    text = text_of(made_progress())
    assert text.startswith("digits  ━━━━━━──────────────────  25%  30s left")
    for part in (
        "2 workers  generation 3",
        "2,500 samples/s",
        "loss 0.5123",
        "batch 250",
        "lr 0.0003",
    ):
        assert part in text
    assert "epoch 2/4" in text and "step 100" in text
    assert "goodput" not in text


def test_goodput_is_shown_once_the_efficiency_is_known() -> None:
    assert "goodput 2,000" in text_of(made_progress(efficiency=0.8))


def test_where_no_end_is_known_there_is_no_bar_and_no_time_left() -> None:
    text = text_of(made_progress(samples_total=None))
    assert "━" not in text and "left" not in text and "%" not in text


def test_the_end_that_comes_first_counts() -> None:
    assert " 50%  10s left" in text_of(made_progress(), max_steps=200)
    assert " 25%  30s left" in text_of(made_progress(), max_steps=10_000)


def test_more_samples_than_expected_do_not_overflow_the_bar() -> None:
    text = text_of(made_progress(samples_done=130_000))
    assert text.count("━") == 24 and "0s left" in text


def test_a_speed_that_is_not_known_yet_is_not_shown() -> None:
    """As where a resumed run reports its state before its first step."""
    text = text_of(made_progress(step_time_s=0.0, efficiency=0.9))
    assert "25%" in text and not any(word in text for word in ("samples/s", "left", "goodput"))


@pytest.mark.parametrize(("epoch", "shown"), [(0, "1/4"), (3, "4/4"), (4, "4/4"), (7, "4/4")])
def test_the_epoch_is_never_beyond_the_last(epoch: int, shown: str) -> None:
    assert f"epoch {shown}  " in text_of(made_progress(epoch=epoch, num_epochs=4))


def test_a_pipe_gets_a_line_every_five_seconds_and_one_a_decision_without_escape_codes() -> None:
    stream, clock, live = plain()
    with live:
        live.decided(decision("start", "2 workers ready"))
        for tenth in range(120):
            clock.time = tenth / 10
            live.progressed(made_progress())
        live.decided(decision("grow", "2 -> 3 workers: w2 ready"))
    lines = stream.getvalue().splitlines()
    assert sum("samples/s" in line for line in lines) == 3
    assert lines[0].split() == ["0.0s", "start:", "2", "workers", "ready"]
    assert lines[-1].endswith("11.9s  grow: 2 -> 3 workers: w2 ready")
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_long_reason_stays_on_one_line_in_a_pipe() -> None:
    stream, _, live = plain()
    live.decided(decision("grow", "because " * 60))
    assert len(stream.getvalue().splitlines()) == 1


def test_what_the_script_prints_is_shown_as_it_is() -> None:
    stream, _, live = plain()
    live.printed("accuracy [bold]97[/bold] :smile:")
    assert "accuracy [bold]97[/bold] :smile:" in stream.getvalue()


def test_lost_workers_and_checkpoints_are_told() -> None:
    stream, _, live = plain()
    live.happened(WorkerLost(job_id=JOB, generation=1, worker_id=WorkerId("w1"), cause="silent"))
    live.happened(CheckpointSaved(job_id=JOB, generation=1, step=7, path="runs/step-7"))
    live.happened(CheckpointFailed(job_id=JOB, generation=1, step=9, error="the disk is full"))
    told = stream.getvalue()
    assert "lost w1 (silent)" in told and "runs/step-7" in told
    assert "NOT saved, step 9: the disk is full" in told


def test_a_terminal_keeps_the_line_below_and_scrolls_decisions_above_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, highlight=False)
    with LiveLine(console, "digits", clock=Clock()) as live:
        live.decided(decision("start", "2 workers ready"))
        live.progressed(made_progress())
    shown = stream.getvalue()
    assert "\x1b[" in shown
    assert "start: 2 workers ready" in shown
    assert "25%" in shown and "2 workers" in shown and "lr 0.0003" in shown
    assert "…" in shown, "cut at the width instead of wrapped"


def started(tally: Tally, *names: str) -> None:
    for name in names:
        tally.acted(StartWorker(job_id=JOB, generation=0, worker_id=WorkerId(name)))


def form(tally: Tally, generation: int, *names: str, step: int = 0) -> None:
    members = tuple(WorkerId(name) for name in names)
    tally.acted(
        FormGroup(
            job_id=JOB,
            generation=generation,
            members=members,
            global_batch_size=None,
            restore=None,
        )
    )
    for member in members:
        tally.happened(GroupFormed(job_id=JOB, generation=generation, worker_id=member, step=step))


def lose(tally: Tally, name: str, cause: LossCause = "died") -> None:
    tally.happened(WorkerLost(job_id=JOB, generation=1, worker_id=WorkerId(name), cause=cause))


def test_a_run_is_summed_up_with_resizes_recoveries_and_what_it_cost() -> None:
    clock = Clock()
    tally = Tally(clock=clock)
    started(tally, "w0", "w1")
    form(tally, 1, "w0", "w1")
    clock.time = 1800.0
    started(tally, "w2")
    form(tally, 2, "w0", "w1", "w2", step=50)
    clock.time = 3600.0
    lose(tally, "w0")
    form(tally, 3, "w1", "w2", step=80)
    clock.time = 5400.0
    for name in ("w1", "w2"):
        tally.happened(
            WorkerFinished(job_id=JOB, generation=3, worker_id=WorkerId(name), step=1234)
        )
    clock.time = 7200.0
    assert tally.summary(2.0) == (
        "1,234 steps in 2h00m on 2 to 3 workers: 1 resize, 1 recovery; 3.5 accelerator-hours, "
        "cost 7"
    )
    assert tally.summary(1000.0).endswith("cost 3,500")


def test_a_worker_that_was_let_go_costs_nothing_from_then_on() -> None:
    clock = Clock()
    tally = Tally(clock=clock)
    started(tally, "w0", "w1")
    form(tally, 1, "w0", "w1")
    clock.time = 3600.0
    tally.acted(StopWorker(job_id=JOB, generation=2, worker_id=WorkerId("w1"), reason="shrink"))
    form(tally, 2, "w0", step=9)
    clock.time = 7200.0
    assert "1 resize, 0 recoveries; 3 accelerator-hours" in tally.summary(None)


def test_losing_a_worker_that_was_no_member_is_no_recovery() -> None:
    tally = Tally(clock=Clock())
    started(tally, "w0", "w1")
    form(tally, 1, "w0")
    lose(tally, "w1", "start_failed")
    form(tally, 2, "w0", step=3)
    assert (tally.num_recoveries, tally.num_resizes) == (0, 0)


def test_a_member_that_is_given_up_and_a_joiner_that_dies_are_recoveries() -> None:
    tally = Tally(clock=Clock())
    started(tally, "w0", "w1", "w2")
    form(tally, 1, "w0", "w1")
    tally.acted(KillWorker(job_id=JOB, generation=1, worker_id=WorkerId("w1"), reason="stuck"))
    form(tally, 2, "w0", step=3)
    assert (tally.num_recoveries, tally.num_resizes) == (1, 0)
    members = (WorkerId("w0"), WorkerId("w2"))
    tally.acted(
        FormGroup(job_id=JOB, generation=3, members=members, global_batch_size=None, restore=None)
    )
    lose(tally, "w2")
    form(tally, 4, "w0", step=3)
    assert (tally.num_recoveries, tally.num_resizes) == (2, 0)


def test_a_group_that_never_formed_is_not_counted() -> None:
    tally = Tally(clock=Clock())
    form(tally, 1, "w0", "w1")
    members = (WorkerId("w0"), WorkerId("w1"), WorkerId("w2"))
    tally.acted(
        FormGroup(job_id=JOB, generation=2, members=members, global_batch_size=None, restore=None)
    )
    form(tally, 3, "w0", "w1", step=5)
    assert (tally.num_resizes, tally.sizes) == (0, {2})


def test_a_resumed_run_counts_only_its_own_steps() -> None:
    tally = Tally(clock=Clock())
    form(tally, 1, "w0", step=500)
    tally.progressed(made_progress(step=620))
    assert tally.summary(None).startswith("120 steps (from step 500) in 0s on 1 worker:")


def test_a_run_that_never_began_says_so() -> None:
    assert Tally(clock=Clock()).summary(2.0) == "no step was completed in 0s"


def test_durations_and_counts_read_as_people_write_them() -> None:
    assert [duration(s) for s in (0.4, 59.6, 75.0, 3600.0, 90_000.0, 183_600.0)] == [
        "0s",
        "1m00s",
        "1m15s",
        "1h00m",
        "25h00m",
        "2d03h",
    ]
    assert (in_words(1), in_words(4)) == ("1 worker", "4 workers")


def test_skipped_steps_are_shown_while_it_trains_and_at_the_end() -> None:
    def text(**changes: Any) -> str:
        return "".join(part for part, _ in speed_parts(made_progress(**changes)))

    assert "skipped" not in text()
    assert "1 step skipped (not finite)" in text(skipped_steps=1)
    assert "7 steps skipped (not finite)" in text(skipped_steps=7)
    tally = Tally(clock=Clock())
    form(tally, 1, "w0")
    tally.progressed(made_progress(skipped_steps=7))
    assert tally.summary(None).startswith("100 steps, 7 of the run's skipped (not finite), in 0s")
