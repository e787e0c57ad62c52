"""What a job tells of itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.core.types import Progress
from supple.train.job import Job
from supple.train.reporter import Reporter


def told(num_steps: int, micro_batch_size: int | None = None, **spec: Any) -> list[Progress]:
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(64, 3), torch.randint(2, (64,)))
    found: list[Progress] = []
    job = Job(TrainSpec(name="job", script="", max_steps=num_steps, **spec), observe=found.append)
    model = job.model(lambda: torch.nn.Linear(3, 2))
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in job.batches(dataset, batch_size=16, epochs=100, micro_batch_size=micro_batch_size):
        loss = F.cross_entropy(model(x), y)
        job.step(loss)
        job.report(loss=loss, doubled=2 * float(loss.detach()))
    return found


def test_the_last_progress_tells_of_the_whole_run_and_of_the_last_metrics() -> None:
    last = told(10)[-1]
    assert (last.step, last.samples_done, last.samples_total) == (10, 160, 6400)
    assert (last.epoch, last.num_epochs, last.num_workers) == (2, 100, 1)
    assert (last.optimizer, last.base_lr, last.lr) == ("SGD", 0.5, 0.5)
    assert last.gradient_bytes == 4 * (3 * 2 + 2)
    assert last.metrics["doubled"] == 2 * last.metrics["loss"] > 0


def test_the_parts_of_a_step_are_those_that_were_measured_and_make_up_the_whole() -> None:
    last = told(10)[-1]
    parts = (
        last.forward_time_s,
        last.backward_time_s,
        last.optimizer_time_s,
        last.sync_time_s,
        last.data_time_s,
    )
    assert all(part >= 0 for part in parts) and min(parts[:3]) > 0
    assert last.step_time_s > 0.5 * sum(parts) > 0, "medians, part by part"
    assert (last.micro_batch_size, last.num_accumulation_steps) == (16, 1)
    assert (last.num_nodes, last.most_per_node) == (1, 1)


def test_micro_batches_are_told_as_they_are_cut() -> None:
    capped = told(3, micro_batch_size=6)[-1]
    assert (capped.micro_batch_size, capped.num_accumulation_steps) == (6, 3)
    shards = told(3, reproducible=True, num_logical_shards=5)[-1]
    assert (shards.micro_batch_size, shards.num_accumulation_steps) == (4, 5)


def test_a_metric_keeps_no_graph_alive() -> None:
    reporter = Reporter()
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * 2).sum()
    reporter.note({"loss": loss})
    kept = reporter._metrics["loss"]
    assert isinstance(kept, torch.Tensor)
    assert kept.grad_fn is None
