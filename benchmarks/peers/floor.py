"""The floor of a resize: bare processes re-form a gloo group and broadcast the same bytes once."""

import json
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
_ROUNDS = 9
_NUM_BYTES = 102_000_000


def floor_grow() -> float:
    """Median seconds of 2 → 3: drop the group of two, form one of three, broadcast."""
    return statistics.median(_rounds(2, 3))


def floor_shrink() -> float:
    """Median seconds of 3 → 2, with the same broadcast among the two that stay."""
    return statistics.median(_rounds(3, 2))


def _rounds(before: int, after: int) -> list[float]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(store.port), str(rank), str(before), str(after)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(before, after))
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return json.loads(outputs[0].splitlines()[-1])


def _group(port: int, key: str, rank: int, size: int) -> object:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return dist.ProcessGroupGloo(dist.PrefixStore(key, store), rank, size, timedelta(seconds=60))


def _rank(port: int, rank: int, before: int, after: int) -> list[float]:
    torch.set_num_threads(1)
    state = torch.ones(_NUM_BYTES // 4)
    flag = torch.zeros(1)
    everyone = _group(port, "everyone", rank, max(before, after))
    took: list[float] = []
    for round_number in range(_ROUNDS):
        old = _group(port, f"old{round_number}", rank, before) if rank < before else None
        if old is not None:
            old.allreduce([flag]).wait()
        everyone.allreduce([flag]).wait()
        began = time.perf_counter()
        if rank < after:
            del old
            new = _group(port, f"new{round_number}", rank, after)
            options = dist.BroadcastOptions()
            options.rootRank = 0
            new.broadcast([state], options).wait()
            took.append(time.perf_counter() - began)
        everyone.allreduce([flag]).wait()
    return took


if __name__ == "__main__":
    print(json.dumps(_rank(*(int(argument) for argument in sys.argv[1:5]))))
