"""A small training with what people do around a step: a warm-up, logging, an evaluation every 50
steps, a checkpoint of the best weights; and its twin without. For `benchmarks/plan.py`."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

_GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(16_384, 128, generator=_GENERATOR)
LABELS = (INPUTS[:, :2].sum(1) > 0).long()
HELD_OUT, HELD_OUT_LABELS = INPUTS[:8_192], LABELS[:8_192]
BATCH_SIZE, EVALUATE_EVERY = 128, 50
TIMES: list[float] = []
"""When every step was committed."""


def build() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 2)
    )


def warm_up(done: float) -> float:
    return min(1.0, done / 0.05 + 1e-3)


def evaluate(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        parts = zip(HELD_OUT.split(256), HELD_OUT_LABELS.split(256), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    model.train()
    return right / len(HELD_OUT)


def train(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.AdamW, lr=1e-3, schedule=warm_up)
    folder = Path(tempfile.mkdtemp(prefix="supple-habits-"))
    best = 0.0
    with (folder / "log.jsonl").open("a") as log:
        for x, y in job.batches(TensorDataset(INPUTS, LABELS), batch_size=BATCH_SIZE, epochs=4):
            loss = F.cross_entropy(model(x), y)
            job.step(loss, clip_norm=1.0)
            TIMES.append(time.perf_counter())
            log.write(json.dumps({"step": job.step_count, "lr": job.lr, "loss": loss.item()}))
            job.report(loss=loss)
            if job.step_count % EVALUATE_EVERY == 0:
                accuracy = evaluate(model)
                if job.is_leading and accuracy > best:
                    best = accuracy
                    torch.save(model.state_dict(), folder / "best.pt")


def plain(job: Any) -> None:
    model = job.model(build)
    job.optimizer(torch.optim.AdamW, lr=1e-3, schedule=warm_up)
    for x, y in job.batches(TensorDataset(INPUTS, LABELS), batch_size=BATCH_SIZE, epochs=4):
        job.step(F.cross_entropy(model(x), y), clip_norm=1.0)
        TIMES.append(time.perf_counter())


if __name__ == "__main__":
    import itertools
    import statistics
    import sys

    import supple

    torch.set_num_threads(1)
    supple.run({"train": train, "plain": plain}[sys.argv[1]])
    gaps = [after - before for before, after in itertools.pairwise(TIMES[2:])]
    print(json.dumps({"typical_s": statistics.median(gaps), "mean_s": statistics.fmean(gaps)}))
