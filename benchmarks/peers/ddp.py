"""A bare DistributedDataParallel loop on gloo: the fastest loop one would write by hand."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[2]
NUM_WORKERS = 2


def step_times(num_steps: int) -> list[float]:
    """Seconds between rank 0's steps, with the model and data of `benchmarks/workload.py`."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), folder, str(num_steps)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(NUM_WORKERS)
        ]
        try:
            outputs = [process.communicate(timeout=180)[0] for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    return json.loads(outputs[0].splitlines()[-1])


def _rank(rank: int, folder: str, num_steps: int) -> list[float]:
    sys.path.insert(0, str(ROOT))
    from benchmarks import workload

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=NUM_WORKERS
    )
    torch.manual_seed(0)
    model = DistributedDataParallel(workload.build_model(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dataset = workload.make_dataset()
    share = workload.BATCH_SIZE // NUM_WORKERS
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    times = [time.perf_counter()]
    for step in range(num_steps):
        start = step * workload.BATCH_SIZE + rank * share
        inputs, targets = dataset[order[start : start + share]]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        times.append(time.perf_counter())
    dist.destroy_process_group()
    return [after - before for before, after in itertools.pairwise(times)]


if __name__ == "__main__":
    print(json.dumps(_rank(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
