"""What a job tells of itself."""

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from supple.core.spec import TrainSpec
from supple.core.types import Progress
from supple.train.job import Job
from supple.train.reporter import Reporter


def told(num_steps: int) -> list[Progress]:
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(64, 3), torch.randint(2, (64,)))
    found: list[Progress] = []
    job = Job(TrainSpec(name="job", script="", max_steps=num_steps), observe=found.append)
    model = job.model(lambda: torch.nn.Linear(3, 2))
    job.optimizer(torch.optim.SGD, lr=0.5)
    for x, y in job.batches(dataset, batch_size=16, epochs=100):
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


def test_a_metric_keeps_no_graph_alive() -> None:
    reporter = Reporter()
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * 2).sum()
    reporter.note({"loss": loss})
    kept = reporter._metrics["loss"]
    assert isinstance(kept, torch.Tensor)
    assert kept.grad_fn is None
