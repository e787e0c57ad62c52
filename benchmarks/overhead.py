"""Samples per second against a bare DDP loop: same model, same data, two workers, noise scale on.

    python benchmarks/overhead.py

Both are measured in turn, five times, in this one run; each ratio is of neighbours in time.
"""

import itertools
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.machine import report
from benchmarks.peers import ddp
from benchmarks.runs import training

_ROUNDS = 5
_STEPS = 120
_SKIP = 20


def ours() -> float:
    """Median step time in seconds of our loop."""
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "2", "--max-steps", str(_STEPS)),
            env={workload.STEPS_ENV: folder},
        ) as (process, _):
            process.wait(120)
        times = [row[0] for row in workload.committed_steps(Path(folder)) if row[1] == 0]
    steps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(steps[_SKIP:])


def main() -> None:
    ratios, mine, theirs = [], [], []
    for _ in range(_ROUNDS):
        bare = statistics.median(ddp.step_times(_STEPS)[_SKIP:])
        supple = ours()
        ratios.append(bare / supple)
        mine.append(workload.BATCH_SIZE / supple)
        theirs.append(workload.BATCH_SIZE / bare)
    report(
        "overhead",
        {
            "throughput_vs_ddp": statistics.median(ratios),
            "throughput_vs_ddp_min": min(ratios),
            "throughput_vs_ddp_max": max(ratios),
            "samples_per_s": statistics.median(mine),
            "ddp_samples_per_s": statistics.median(theirs),
            "rounds": float(_ROUNDS),
        },
    )


if __name__ == "__main__":
    main()
