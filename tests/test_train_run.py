"""What one run says of itself in the end: did it finish, and is it saved?"""

import os
from pathlib import Path
from typing import Any

import pytest

from supple.cli import training as train_run
from supple.cluster import launch
from supple.control.controller import Outcome
from supple.core.spec import TrainSpec


@pytest.mark.parametrize(
    ("outcome", "is_well"),
    [
        (Outcome(status="finished", reason="done"), True),
        (Outcome(status="finished", reason="done, NOT saved", saved=False), False),
        (Outcome(status="stopped", reason="Ctrl-C", checkpoint="step-9"), True),
        (Outcome(status="stopped", reason="Ctrl-C", checkpoint="step-8", saved=False), False),
        (Outcome(status="failed", reason="raised", checkpoint="step-9"), False),
    ],
)
def test_a_run_is_well_if_it_finished_or_was_stopped_and_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, is_well: bool
) -> None:
    def train(*_: Any, **__: Any) -> Outcome:
        return outcome

    monkeypatch.setattr(launch, "train", train)
    script = tmp_path / "train.py"
    script.write_text("def train(job):\n    pass\n")
    spec = TrainSpec(name=f"run-{os.getpid()}", script=str(script), run_dir=str(tmp_path / "runs"))
    assert train_run.run(spec, resume=None, as_json=False, verbose=False) is is_well
