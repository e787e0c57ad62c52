"""Handwritten digits (scikit-learn's, 1,797 real scans) with a small convolutional net: over 98 %.

python examples/convnet.py                            # one worker, for debugging
supple plan examples/convnet.py                       # how many workers does it deserve?
supple train examples/convnet.py --workers 1:4        # train, with a number of workers that changes
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import supple

EPOCHS = 4


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Every scan nine times: moved by one pixel up or down, left or right, or not at all."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return 9 * len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scan, shift = divmod(index, 9)
        moved = torch.roll(self.images[scan], (shift // 3 - 1, shift % 3 - 1), dims=(-2, -1))
        return moved, self.labels[scan]


def load() -> tuple[Shifted, Tensor, Tensor]:
    """1,500 scans to train on, 297 to test on."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(digits.target)[order]
    return Shifted(images[:1500], labels[:1500]), images[1500:], labels[1500:]


def build_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).float().mean())


def train(job: supple.Job) -> None:
    dataset, test_images, test_labels = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=3e-3, schedule=lambda done: 1.0 - done)
    for images, labels in job.batches(dataset, batch_size=90, epochs=EPOCHS):
        loss = F.cross_entropy(model(images), labels)
        job.step(loss)
        job.report(loss=loss)
    right = accuracy(model, test_images, test_labels)
    if job.rank == 0:
        print(f"test accuracy {right:.1%} after {job.step_count} steps")
    assert right > 0.98, f"test accuracy is {right:.1%}, expected more than 98 %"


if __name__ == "__main__":
    supple.run(train)
