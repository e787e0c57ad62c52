"""A small net with dropout and batch norm on the digits; rank 0 writes down a digest of all weights
and buffers after every committed step."""

import hashlib
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import supple
from examples.digits import load

FOLDER_ENV = "SUPPLE_BENCH_DIGESTS"
PAUSE_ENV = "SUPPLE_BENCH_PAUSE"
"""Seconds a step is made to take longer, so that it is still running when the workers change."""


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def digest(model: nn.Module) -> str:
    sums = hashlib.sha256()
    for tensor in model.state_dict().values():
        sums.update(tensor.numpy().tobytes())
    return sums.hexdigest()


def train(job: supple.Job) -> None:
    dataset, _, _ = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    pause = float(os.environ.get(PAUSE_ENV, "0"))
    path = Path(os.environ[FOLDER_ENV]) / f"{os.getpid()}.txt"
    with path.open("a", buffering=1) as file:
        for x, y in job.batches(dataset, batch_size=64, epochs=1000):
            time.sleep(pause)
            if job.step(F.cross_entropy(model(x), y)) and job.rank == 0:
                line = f"{job.step_count} {job.world_size} {job.generation} {digest(model)}\n"
                file.write(line)


def digests(folder: Path) -> list[tuple[int, int, int, str]]:
    """(step, number of workers, generation, digest) of every committed step, by step."""
    rows = (line.split() for file in folder.glob("*.txt") for line in file.read_text().splitlines())
    return sorted((int(step), int(size), int(gen), found) for step, size, gen, found in rows)
