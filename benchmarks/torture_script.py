"""The digits job, long enough to be resized and killed a hundred times."""

import torch
import torch.nn.functional as F

import supple
from examples.digits import build_model, load


def train(job: supple.Job) -> None:
    dataset, _, _ = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size=61, epochs=100_000):
        job.step(F.cross_entropy(model(x), y))
