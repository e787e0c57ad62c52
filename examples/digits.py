"""Handwritten digits (scikit-learn's, 1,797 real scans) with a small network: over 95 % in seconds.

python examples/digits.py                                # one worker, for debugging
supple plan examples/digits.py                           # how many workers does it deserve?
supple train examples/digits.py --workers 1:3            # elastic
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import supple

EPOCHS = 30


def load() -> tuple[TensorDataset, torch.Tensor, torch.Tensor]:
    """1,500 scans to train on, 297 to test on."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16.0
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return TensorDataset(x[:1500], y[:1500]), x[1500:], y[1500:]


def build_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def train(job: supple.Job) -> None:
    dataset, test_x, test_y = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3, schedule=lambda done: 1.0 - done)
    for x, y in job.batches(dataset, batch_size=64, epochs=EPOCHS):
        loss = F.cross_entropy(model(x), y)
        job.step(loss)
        job.report(loss=loss)
    right = accuracy(model, test_x, test_y)
    if job.rank == 0:
        print(f"test accuracy {right:.1%} after {job.step_count} steps")
    assert right > 0.95, f"test accuracy is {right:.1%}, expected more than 95 %"


if __name__ == "__main__":
    supple.run(train)
