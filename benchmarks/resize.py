"""The pause of a planned grow 2→3 and shrink 3→2 with 102 MB of train state, beside torchrun
elastic, Ray Train elastic and the floor: a bare group re-form and a broadcast of the same bytes.

    python benchmarks/resize.py

A pause is the time from the last step committed before to the first step committed after, on
rank 0, less one ordinary step; the same for everybody.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.machine import report
from benchmarks.peers import floor, ray_train, torchrun
from benchmarks.runs import training, wait_until_running
from supple.control.socket import send_request

_LEAST_S = 1e-3
"""A shorter pause cannot be told from the scatter of steps."""
_PAIRS = 5
_STEADY_S = 2.5


def pauses() -> tuple[list[float], list[float]]:
    """Pauses in seconds of every grow and every shrink in one run of a minute or two."""
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "2:3", "--schedule", "0s:2"),
            env={workload.STEPS_ENV: folder},
        ) as (process, run_path):
            name = run_path.name
            wait_until_running(name, 2)
            for size in (3, 2) * _PAIRS:
                time.sleep(_STEADY_S)
                send_request(name, {"ask": "resize", "num_workers": size})
                wait_until_running(name, size)
            time.sleep(_STEADY_S)
            send_request(name, {"ask": "stop"})
            process.wait(60)
        return split_pauses([row for row in workload.committed_steps(Path(folder)) if row[1] == 0])


def split_pauses(
    rows: list[tuple[float, int, int, int]],
) -> tuple[list[float], list[float]]:
    """(grow, shrink) pauses out of rank 0's committed steps."""
    gaps: dict[int, list[float]] = {}
    for before, after in itertools.pairwise(rows):
        if before[2] == after[2]:
            gaps.setdefault(after[2], []).append(after[0] - before[0])
    ordinary = {size: statistics.median(values) for size, values in gaps.items()}
    grows, shrinks = [], []
    for before, after in itertools.pairwise(rows):
        if before[2] != after[2]:
            pause = max(_LEAST_S, after[0] - before[0] - ordinary[after[2]])
            (grows if after[2] > before[2] else shrinks).append(pause)
    return grows, shrinks


def main() -> None:
    grows, shrinks = pauses()
    grow, shrink = statistics.median(grows), statistics.median(shrinks)
    metrics = {
        "grow_pause_s": grow,
        "shrink_pause_s": shrink,
        "grow_pause_max_s": max(grows),
        "shrink_pause_max_s": max(shrinks),
        "num_grows": float(len(grows)),
        "num_shrinks": float(len(shrinks)),
    }
    theirs_grow, theirs_shrink = torchrun.pause_grow_2_to_3(), torchrun.pause_shrink_3_to_2()
    metrics |= {
        "torchrun_grow_pause_s": theirs_grow,
        "torchrun_shrink_pause_s": theirs_shrink,
        "grow_vs_torchrun": theirs_grow / grow,
        "shrink_vs_torchrun": theirs_shrink / shrink,
    }
    ray_grow, ray_shrink = ray_train.pauses()
    metrics |= {
        "ray_train_grow_pause_s": ray_grow,
        "ray_train_shrink_pause_s": ray_shrink,
        "grow_vs_ray_train": ray_grow / grow,
        "shrink_vs_ray_train": ray_shrink / shrink,
    }
    floor_grow, floor_shrink = floor.floor_grow(), floor.floor_shrink()
    metrics |= {
        "floor_grow_s": floor_grow,
        "floor_shrink_s": floor_shrink,
        "grow_vs_floor": grow / floor_grow,
        "shrink_vs_floor": shrink / floor_shrink,
    }
    report("resize", metrics)


if __name__ == "__main__":
    main()
