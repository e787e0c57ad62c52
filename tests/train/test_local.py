"""`supple.run` without workers: one line of progress now and then, and never an epoch too many."""

import pytest
import torch
from torch.utils.data import TensorDataset

import supple
from supple.train.start import local


def train(job: supple.Job) -> None:
    model = job.model(lambda: torch.nn.Linear(1, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    for (x,) in job.batches(TensorDataset(torch.ones(4, 1)), batch_size=2, epochs=2):
        job.step(model(x).sum())


def test_the_epoch_in_a_line_is_never_beyond_the_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "_EVERY_S", 0.0)
    monkeypatch.setattr("supple.train.reporter._EVERY_S", 0.0)
    assert supple.run(train).step_count == 4
    lines = capsys.readouterr().err.splitlines()
    epochs = [line.partition("  ")[0] for line in lines]
    assert set(epochs) == {"epoch 1/2", "epoch 2/2"} and "samples/s" in lines[-1]
