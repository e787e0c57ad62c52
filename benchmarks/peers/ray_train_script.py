"""What Ray Train runs, in a process of its own: elastic DDP on the benchmark's workload over a
cluster that gains a place for a worker and loses it again.

    python ray_train_script.py FOLDER

Rank 0 of every worker group writes its steps into FOLDER, as all peers do.
"""

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

_LIMIT_S = 120.0


def loop(config: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks import workload

    folder = Path(config["folder"])
    torch.set_num_threads(1)
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
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    with (folder / f"{os.getpid()}.txt").open("a", buffering=1) as log:
        while not (folder / "end").exists():
            share = -(-workload.BATCH_SIZE // size)
            start = step * workload.BATCH_SIZE + rank * share
            inputs, targets = dataset[order[start : start + share]]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            log.write(f"{time.time()} {rank} {size} {step}\n")
            if rank == 0 and step == 10:
                # Once, and well before the change: saving is not counted against it.
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


def change(cluster: Any, folder: Path) -> None:
    """A third place appears, and goes again, each once the group before has stepped a while."""
    from benchmarks import workload

    def wait_for(size: int, count: int) -> None:
        deadline = time.monotonic() + _LIMIT_S
        since = time.time()
        while time.monotonic() < deadline:
            rows = workload.committed_steps(folder)
            if sum(1 for t, rank, of, _ in rows if rank == 0 and of == size and t > since) >= count:
                return
            time.sleep(0.1)

    try:
        wait_for(2, 20)
        added = cluster.add_node(num_cpus=1, resources={"place": 1})
        wait_for(3, 20)
        cluster.remove_node(added, allow_graceful=True)
        wait_for(2, 10)
    finally:
        (folder / "end").touch()


def main() -> None:
    folder = Path(sys.argv[1])
    import ray
    from ray.cluster_utils import Cluster
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 3, "resources": {"place": 2}, "include_dashboard": False},
    )
    ray.init(
        address=cluster.address,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        log_to_driver=False,
    )
    trainer = TorchTrainer(
        loop,
        train_loop_config={"folder": str(folder)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=(2, 3),
            resources_per_worker={"CPU": 1, "place": 1},
            elastic_resize_monitor_interval_s=1.0,
        ),
        run_config=RunConfig(
            storage_path=str(folder / "storage"), failure_config=FailureConfig(max_failures=10)
        ),
    )
    # The cluster may be changed from the main thread only.
    training = threading.Thread(target=trainer.fit, daemon=True)
    training.start()
    change(cluster, folder)
    training.join(_LIMIT_S)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
