"""The two models of `benchmarks/recovery.py`, and the script that trains one of them with Supple.

Every committed step is written down by every rank, at the moment the optimizer ran. Part of a
forward pass is spent asleep, as a process is whose accelerator computes: three workers on two cores
would otherwise measure the cores.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import supple
from benchmarks.workload import STEPS_ENV

NUM_SAMPLES = 2_400
BATCH_SIZE = 48
MODEL_ENV = "SUPPLE_BENCH_MODEL"
"""Which of `MODELS` to train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An MLP of five layers, `width` wide; a forward pass takes at least `forward_s`, and the
    samples are fetched by `num_workers` processes."""

    width: int
    forward_s: float
    num_workers: int

    def build(self) -> nn.Module:
        hidden = [(nn.Linear(self.width, self.width), nn.ReLU()) for _ in range(4)]
        layers = [layer for pair in hidden for layer in pair]
        return nn.Sequential(
            nn.Linear(64, self.width), nn.ReLU(), *layers, nn.Linear(self.width, 10)
        )


MODELS = {
    "small": Model(width=64, forward_s=0.025, num_workers=0),
    "large": Model(width=1448, forward_s=0.28, num_workers=2),
}
"""One gradient bucket and steps of 30 ms; several (34 MB) and steps of 300 ms and more."""


def asked() -> Model:
    """The model that the environment names."""
    return MODELS[os.environ[MODEL_ENV]]


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random samples, fetched one by one: a plain `TensorDataset` is indexed in the training
    process whatever `num_workers` says, and would start no processes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._inputs = torch.randn(NUM_SAMPLES, 64, generator=generator)
        self._targets = torch.randint(0, 10, (NUM_SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._inputs[index], self._targets[index]


def train(job: supple.Job) -> None:
    chosen = asked()
    model = job.model(chosen.build)
    optimizer = job.optimizer(torch.optim.AdamW, lr=1e-4)
    path = Path(os.environ[STEPS_ENV]) / f"{os.getpid()}.steps"
    with path.open("a", buffering=1) as file:

        def write_down(*_: object) -> None:
            if job.generation > 0:
                file.write(f"{time.time()} {job.generation} {job.rank} {job.step_count + 1}\n")

        optimizer.register_step_post_hook(write_down)
        batches = job.batches(
            Samples(), batch_size=BATCH_SIZE, epochs=10_000, num_workers=chosen.num_workers
        )
        for inputs, targets in batches:
            time.sleep(chosen.forward_s)
            job.step(nn.functional.cross_entropy(model(inputs), targets))


@dataclass(frozen=True, slots=True, order=True)
class Committed:
    """One step, as one rank committed it."""

    at: float
    generation: int
    rank: int
    step: int


def committed(folder: Path) -> list[Committed]:
    """Every step that was written down in `folder`, by time; a line cut short by a kill is none."""
    found: list[Committed] = []
    for file in folder.glob("*.steps"):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                at, generation, rank, step = line.split()
                found.append(Committed(float(at), int(generation), int(rank), int(step)))
    return sorted(found)
