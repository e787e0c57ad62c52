"""What torchrun runs: DDP on the benchmark's workload, state in a file on memory, steps logged."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import workload


def main() -> None:
    folder = Path(os.environ[workload.STEPS_ENV])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(workload.build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dataset = workload.make_dataset()
    step = 0
    saved = folder / "state.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True, mmap=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
    log = (folder / f"{os.getpid()}.txt").open("a", buffering=1)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    while True:
        share = -(-workload.BATCH_SIZE // size)
        start = step * workload.BATCH_SIZE + rank * share
        inputs, targets = dataset[order[start : start + share]]
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
