"""The digits job without an end, for `benchmarks/soak.py`."""

import time

import torch
import torch.nn.functional as F

import supple
from examples.digits import build_model, load

_STEP_S = 0.01
"""Asleep in each step: the cores are for the processes that start."""


def train(job: supple.Job) -> None:
    dataset, _, _ = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size=61, epochs=1_000_000):
        time.sleep(_STEP_S)
        job.step(F.cross_entropy(model(x), y))
