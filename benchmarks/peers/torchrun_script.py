"""What torchrun runs: DDP on the benchmark's workload (or on a model of `recovery_models`, with its
pause and its DataLoader workers), state in a file on memory, steps logged."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import recovery_models, workload

_MOST_STEPS = 10_000


def batches(
    dataset: TensorDataset, step: int, rank: int, share: int, num_workers: int
) -> Iterator[Sequence[torch.Tensor]]:
    """This rank's share of every step from `step` on, over and over."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    firsts = [at * workload.BATCH_SIZE + rank * share for at in range(step, step + _MOST_STEPS)]
    chosen = (order[torch.arange(first, first + share) % len(order)] for first in firsts)
    if num_workers == 0:
        return (dataset[indices] for indices in chosen)
    sampler = [indices.tolist() for indices in chosen]
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers))


def main() -> None:
    folder = Path(os.environ[workload.STEPS_ENV])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    asked = recovery_models.asked() if recovery_models.MODEL_ENV in os.environ else None
    model = DistributedDataParallel(asked.build() if asked else workload.build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dataset = recovery_models.Samples() if asked else workload.make_dataset()
    step = 0
    saved = folder / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True, mmap=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    log = (folder / f"{os.getpid()}.txt").open("a", buffering=1)
    share = -(-workload.BATCH_SIZE // size)
    for inputs, targets in batches(dataset, step, rank, share, asked.num_workers if asked else 0):
        time.sleep(asked.forward_s if asked else 0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        step += 1
        log.write(f"{time.time()} {rank} {size} {step}\n")
        if rank == 0 and step == 10:
            # Once, and well before the change: the cost of saving is not counted against it.
            part = folder / "state.part"
            torch.save(
                {
                    "model": model.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                },
                part,
            )
            part.rename(saved)


if __name__ == "__main__":
    main()
