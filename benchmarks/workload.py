"""The training script of `benchmarks/resize.py` and `recovery.py`: about 100 MB of train state.

An MLP of 8.5 M float32 parameters with AdamW: parameters and two moments make 102 MB. Every
committed step is written down with its wall-clock time, at the moment the optimizer ran.
"""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import supple

WIDTH = 1448
NUM_SAMPLES = 200_000
BATCH_SIZE = 48
STEPS_ENV = "SUPPLE_BENCH_STEPS"
"""The folder to write committed steps into."""


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        *[layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())],
        nn.Linear(WIDTH, 10),
    )


def make_dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(NUM_SAMPLES, 64, generator=generator),
        torch.randint(0, 10, (NUM_SAMPLES,), generator=generator),
    )


def train(job: supple.Job) -> None:
    model = job.model(build_model)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-4)
    folder = os.environ.get(STEPS_ENV)
    if folder:
        file = open(Path(folder) / f"{os.getpid()}.txt", "a", buffering=1)  # noqa: SIM115

        def write_down(*_: object) -> None:
            if job.generation > 0:
                file.write(f"{time.time()} {job.rank} {job.world_size} {job.step_count + 1}\n")

        optimizer.register_step_post_hook(write_down)
    for inputs, targets in job.batches(make_dataset(), batch_size=BATCH_SIZE):
        job.step(nn.functional.cross_entropy(model(inputs), targets))


def committed_steps(folder: Path) -> list[tuple[float, int, int, int]]:
    """(time, rank, world size, step) of every committed step, by time."""
    return sorted(
        (float(t), int(rank), int(size), int(step))
        for file in folder.glob("*.txt")
        for t, rank, size, step in (line.split() for line in file.read_text().splitlines())
    )
