"""The event log and the controller's part of the ledger."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from supple.control.controller import Outcome
from supple.core.job.ledger import LedgerError, prove
from supple.core.spec import Objective, TrainSpec
from supple.core.types import (
    Decision,
    FileLost,
    FormGroup,
    GroupFormed,
    JobId,
    Progress,
    WorkerFinished,
    WorkerId,
    WorkerLost,
)
from supple.report.eventlog import EventLog, LedgerLog, last_run, to_plain
from supple.train.start.logfile import LogFile

JOB = JobId("digits")
W0, W1 = WorkerId("w0"), WorkerId("w1")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def made_progress(**changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "generation": 1,
        "step": 10,
        "epoch": 0,
        "num_epochs": 2,
        "samples_done": 640,
        "samples_total": 3000,
        "num_workers": 2,
        "global_batch_size": 64,
        "lr": 1e-3,
        "step_time_s": 0.01,
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
        "metrics": {"loss": 0.5},
    }
    return Progress(**(fields | changes))


def never(path: str, error: str) -> None:
    raise AssertionError(f"{path} was lost: {error}")


def lines(file: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.getvalue().splitlines()]


def test_every_kind_of_record_has_its_kind_its_type_and_its_fields() -> None:
    clock, file = Clock(), io.StringIO()
    log = EventLog(file, clock=clock)
    log.began(TrainSpec(name="digits", script="digits.py"))
    log.happened(
        WorkerLost(job_id=JOB, generation=1, worker_id=W0, cause="died", detail="signal 9")
    )
    log.acted(
        FormGroup(job_id=JOB, generation=2, members=(W0, W1), global_batch_size=None, restore=None)
    )
    log.decided(Decision(job_id=JOB, generation=2, kind="recover", num_workers=1, reason="w0 died"))
    log.progressed(made_progress())
    log.printed("test accuracy 97 %")
    clock.time += 2.5
    log.ended(Outcome(status="finished", reason="training finished"))
    written = lines(file)
    assert [(record["kind"], record["type"]) for record in written] == [
        ("begin", "TrainSpec"),
        ("event", "WorkerLost"),
        ("action", "FormGroup"),
        ("decision", "Decision"),
        ("progress", "Progress"),
        ("print", "Line"),
        ("end", "Outcome"),
    ]
    assert written[0]["name"] == "digits"
    assert (written[1]["worker_id"], written[1]["cause"]) == ("w0", "died")
    assert written[2]["members"] == ["w0", "w1"]
    assert (written[3]["decision_kind"], written[3]["reason"]) == ("recover", "w0 died")
    assert written[4]["metrics"] == {"loss": 0.5}
    assert written[5]["line"] == "test accuracy 97 %"
    assert (written[0]["t"], written[6]["t"]) == (0.0, 2.5)
    assert all("time" in record for record in written)


def test_a_loss_that_is_not_a_number_is_null_in_the_log() -> None:
    file = io.StringIO()
    EventLog(file).progressed(made_progress(metrics={"loss": float("nan"), "norm": float("inf")}))
    assert "NaN" not in file.getvalue() and "Infinity" not in file.getvalue()
    assert lines(file)[0]["metrics"] == {"loss": None, "norm": None}


def test_a_full_disk_ends_the_log_in_that_file_and_nothing_else() -> None:
    lost: list[tuple[str, str]] = []
    pipe = io.StringIO()
    disk = LogFile(Path("/dev/full"), lambda *what: lost.append(what))
    log = EventLog(disk, pipe)
    for _ in range(5):
        log.printed("x" * 60)
    assert len(lines(pipe)) == 5
    assert lost == [("/dev/full", "No space left on device")]


def test_a_run_after_one_that_was_cut_in_the_middle_of_a_line_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t": 3.0, "kind": "pri')
    log = EventLog(LogFile(path, never))
    log.began(TrainSpec(name="second", script="x.py"))
    assert [record["name"] for record in last_run(path)] == ["second"]


def test_the_last_run_of_a_file_leaves_out_earlier_runs_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("w") as file:
        for name in ("first", "second"):
            log = EventLog(file)
            log.began(TrainSpec(name=name, script="x.py"))
            log.printed(f"from {name}")
        file.write('{"t": 3.0, "kind": "pri')
    found = last_run(path)
    assert [record["kind"] for record in found] == ["begin", "print"]
    assert found[1]["line"] == "from second"


def test_plain_values_are_what_json_knows() -> None:
    assert to_plain({"a": (1, (2.0, float("-inf"))), 3: "x"}) == {"a": [1, [2.0, None]], "3": "x"}


def formed(worker_id: WorkerId, generation: int, step: int) -> GroupFormed:
    return GroupFormed(job_id=JOB, generation=generation, worker_id=worker_id, step=step)


def test_what_decides_the_count_stands_in_the_record_of_what_was_asked_for() -> None:
    file = io.StringIO()
    spec = TrainSpec(name="digits", script="digits.py", max_workers=2)
    EventLog(file).began(dataclasses.replace(spec, objective=Objective(deadline_s=60.0)))
    assert lines(file)[0]["objective"] == {"deadline_s": 60.0, "budget": None}


def test_the_ledger_has_one_start_a_generation_and_the_end(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "controller.jsonl"
    log = LedgerLog(path, never)
    log.happened(formed(W0, 1, 0))
    log.happened(formed(W1, 1, 0))
    log.happened(formed(W0, 3, 7))
    log.happened(WorkerFinished(job_id=JOB, generation=3, worker_id=W0, step=12))
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"kind": "generation", "generation": 1, "start_step": 0},
        {"kind": "generation", "generation": 3, "start_step": 7},
        {"kind": "end", "step": 12},
    ]


def test_the_ledger_of_a_run_that_went_back_ends_where_it_really_ended(tmp_path: Path) -> None:
    """All workers died at step 9, and the run went on from a checkpoint of step 4."""
    log = LedgerLog(tmp_path / "controller.jsonl", never)
    log.happened(formed(W0, 1, 0))
    log.happened(formed(W0, 2, 9))
    log.happened(formed(W1, 3, 4))
    log.happened(WorkerFinished(job_id=JOB, generation=3, worker_id=W1, step=6))
    log.close()
    written = (tmp_path / "controller.jsonl").read_text()
    records = [json.loads(line) for line in written.splitlines()]
    assert records[-1] == {"kind": "end", "step": 6}
    reads = [
        {"kind": "read", "generation": generation, "step": step, "epoch": 0, "ids": [step]}
        for generation, steps in ((1, range(9)), (2, range(9, 10)), (3, range(4, 6)))
        for step in steps
    ]
    report = prove([*records, *reads], expected=range(6), num_epochs=1)
    assert report.is_exact, str(report)


def test_a_ledger_that_cannot_be_written_does_not_end_training_and_is_told_of_once(
    tmp_path: Path,
) -> None:
    told: list[FileLost] = []
    path = tmp_path / "controller.jsonl"

    def lost(file: str, error: str) -> None:
        """As a run does: everybody hears of it, who lost it too."""
        told.append(FileLost(job_id=JOB, generation=1, step=0, path=file, error=error))
        log.happened(told[-1])

    log = LedgerLog(path, lost)
    path.mkdir()
    log.happened(formed(W0, 1, 0))
    log.close()
    assert path.is_dir()
    assert [(event.path, event.error) for event in told] == [(str(path), "Is a directory")]


def test_a_ledger_written_again_has_every_record_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "controller.jsonl"
    log = LedgerLog(path, lambda *_: None)
    path.mkdir()
    log.happened(formed(W0, 1, 0))
    path.rmdir()
    log.happened(WorkerFinished(job_id=JOB, generation=1, worker_id=W0, step=3))
    log.close()
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["generation", "end"]


def test_a_workers_ledger_that_was_lost_makes_the_proof_say_from_which_step(tmp_path: Path) -> None:
    log = LedgerLog(tmp_path / "ledger" / "controller.jsonl", never)
    log.happened(formed(W0, 1, 0))
    lost: dict[str, Any] = {"job_id": JOB, "generation": 1, "step": 2, "error": "No space left"}
    log.happened(FileLost(path=str(tmp_path / "logs" / "w0.log"), **lost))
    records = [{"kind": "read", "generation": 1, "step": s, "epoch": 0, "ids": [s]} for s in (0, 1)]
    log.happened(WorkerFinished(job_id=JOB, generation=1, worker_id=W0, step=2))
    log.close()
    written = (tmp_path / "ledger" / "controller.jsonl").read_text().splitlines()
    proven = prove([*records, *map(json.loads, written)], expected=range(2), num_epochs=1)
    assert proven.is_exact, "a log is no part of the proof"

    log.happened(FileLost(path=str(tmp_path / "ledger" / "w0.jsonl"), **lost))
    log.close()
    written = (tmp_path / "ledger" / "controller.jsonl").read_text().splitlines()
    with pytest.raises(LedgerError, match=r"incomplete from step 2 on: .*w0\.jsonl.*No space left"):
        prove([*records, *map(json.loads, written)], expected=range(9), num_epochs=1)
