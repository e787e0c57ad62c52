"""1,000 resizes of one small job: what grows in the driver, in the worker that stays, in Ray's GCS.

    python benchmarks/soak.py [--resizes 1000] [--seconds 540]

The job grows from one worker to two and shrinks again, over and over: every second resize starts a
process, every other ends one. The first fifth is warm-up. A slope is the median of the slopes
between all pairs of samples (Theil-Sen), so that one odd sample moves nothing. On a machine too
slow for 1,000 resizes in 540 s there are fewer, and `resizes` says how many.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from scipy.stats import theilslopes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import report
from benchmarks.runs import training, wait_until_running
from supple.control.socket import send_request

_SCRIPT = Path(__file__).resolve().parent / "soak_script.py"
_RESIZES = 1000
_LIMIT_S = 540.0
_WARM_UP = 0.2


class Sample:
    """What the processes of the job hold, after so many resizes."""

    def __init__(self, resizes: int, driver: int, worker: int, gcs: int) -> None:
        processes = [psutil.Process(pid) for pid in (driver, worker, gcs)]
        self.resizes = resizes
        self.mib = tuple(p.memory_full_info().uss / 2**20 for p in processes)
        self.fds = sum(p.num_fds() for p in processes[:2])
        self.threads = sum(p.num_threads() for p in processes[:2])
        shared = os.statvfs("/dev/shm")
        self.shm_mib = (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 2**20


def soak(resizes: int, limit_s: float) -> tuple[list[Sample], float]:
    """A sample after every second resize, and the seconds they all took."""
    samples: list[Sample] = []
    with training(
        _SCRIPT, *("--workers", "1:2", "--schedule", "0s:1", "--max-failures", "1000")
    ) as (process, run_path):
        name = run_path.name
        worker = next(iter(wait_until_running(name, 1)["pids"].values()))
        children = psutil.Process(process.pid).children()
        gcs = next(child.pid for child in children if child.name() == "gcs_server")
        began = time.monotonic()
        while len(samples) * 2 < resizes and time.monotonic() - began < limit_s:
            for size in (2, 1):
                send_request(name, {"ask": "resize", "num_workers": size})
                wait_until_running(name, size)
            samples.append(Sample(2 * len(samples) + 2, process.pid, worker, gcs))
        return samples, time.monotonic() - began


def per_1000(samples: Sequence[Sample], values: Sequence[float]) -> float:
    return 1000.0 * float(theilslopes(values, [sample.resizes for sample in samples]).slope)


def growth(values: Sequence[float]) -> float:
    """From the first quarter to the last, between their medians."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resizes", type=int, default=_RESIZES)
    parser.add_argument("--seconds", type=float, default=_LIMIT_S)
    asked = parser.parse_args()
    samples, seconds = soak(asked.resizes, asked.seconds)
    warm = samples[int(len(samples) * _WARM_UP) :]
    driver, worker, gcs = ([sample.mib[which] for sample in warm] for which in range(3))
    report(
        "soak",
        {
            "driver_mib_per_1000": per_1000(warm, driver),
            "worker_mib_per_1000": per_1000(warm, worker),
            "gcs_mib_per_1000": per_1000(warm, gcs),
            "fds_growth": growth([float(sample.fds) for sample in warm]),
            "threads_growth": growth([float(sample.threads) for sample in warm]),
            "shm_growth_mib": growth([sample.shm_mib for sample in warm]),
            "resizes": float(samples[-1].resizes),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
