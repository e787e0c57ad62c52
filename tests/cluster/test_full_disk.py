"""A whole run, whose logs, ledger, event log and terminal can be written no more, trains on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from supple.core.job.ledger import LedgerError, prove
from tests.cluster.runs import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SCRIPT = """
import resource
import torch
from torch import nn
from torch.utils.data import TensorDataset

def train(job):
    # Of this process alone: what its files may grow to. The kernel then refuses as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    model = job.model(lambda: nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=0.01)
    x = torch.ones(256, 1)
    for a, b in job.batches(TensorDataset(x, x), batch_size=8, epochs=5):
        print("x" * 500)
        job.step(((model(a) - b) ** 2).mean())
"""


def test_a_run_whose_disk_and_terminal_are_full_finishes_and_says_what_is_incomplete(
    tmp_path: Path,
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    name = f"test-full-{os.getpid()}"
    folder = tmp_path / name
    (folder / "events.jsonl").mkdir(parents=True)  # where it cannot be written
    command = [sys.executable, "-m", "supple", "train", str(script), "--workers", "2", "--ledger"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, "--name", name, "--run-dir", str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=220,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "finished: training finished after 160 steps" in done.stderr
    logs, ledger = folder / "logs", folder / "ledger"
    for file, cause in (
        ("stdout", "No space left on device"),
        (folder / "events.jsonl", "Is a directory"),
        (logs / "w0.log", "File too large"),
        (logs / "w1.log", "File too large"),
        (ledger / "w0.jsonl", "File too large"),
    ):
        assert done.stderr.count(f"supple: {file} cannot be written any more, from step ") == 1
        assert any(
            line.startswith(f"  incomplete   {file} from step ") and line.endswith(cause)
            for line in done.stderr.splitlines()
        ), done.stderr
    assert "picture      none, it could not be drawn: Is a directory" in done.stderr
    for log in (logs / "w0.log", logs / "w1.log"):
        assert {len(line) for line in log.read_text().splitlines()} == {500}
    records = [
        json.loads(line) for file in ledger.iterdir() for line in file.read_text().splitlines()
    ]
    with pytest.raises(LedgerError, match=r"incomplete from step \d+ on: .*w\d\.jsonl"):
        prove(records, expected=range(256))
    assert "Traceback" not in done.stderr
