"""A small net with dropout and batch norm on the digits; rank 0 writes the last weights."""

import os

import torch
import torch.nn.functional as F
from torch import nn

import supple
from examples.digits import load


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, 10),
    )


def train(job: supple.Job) -> None:
    dataset, _, _ = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size=64, epochs=1000):
        job.step(F.cross_entropy(model(x), y))
    if job.rank == 0:
        torch.save(model.state_dict(), os.environ["SUPPLE_BENCH_WEIGHTS"])
