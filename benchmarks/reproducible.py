"""The weights after 1, 2, 3 and 4 workers and after 20 random histories, bit by bit; and what the
reproducible mode costs.

    python benchmarks/reproducible.py
"""

import itertools
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workload
from benchmarks.machine import report
from benchmarks.runs import training

SCRIPT = Path(__file__).resolve().parent / "reproducible_script.py"
_STEPS = 200
_HISTORIES = 20
_COST_STEPS = 60
_COST_ROUNDS = 3


def final_weights(*arguments: str) -> dict[str, torch.Tensor]:
    """The weights at the end of one reproducible run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.pt"
        with training(
            SCRIPT,
            *("--reproducible", "--max-steps", str(_STEPS), *arguments),
            env={"SUPPLE_BENCH_WEIGHTS": str(out)},
        ) as (process, _):
            process.wait(120)
        return torch.load(out, weights_only=True)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


def history(chooser: random.Random) -> str:
    """A random schedule: up to six sizes between 1 and 4 in the first seconds."""
    at_s, parts = 0.0, []
    for _ in range(chooser.randint(3, 6)):
        parts.append(f"{at_s:.1f}s:{chooser.randint(1, 4)}")
        at_s += chooser.uniform(0.3, 2.5)
    return ",".join(parts)


def step_time(*arguments: str) -> float:
    """Median seconds of a step of the 102 MB workload with two workers."""
    with tempfile.TemporaryDirectory() as folder:
        with training(
            Path(workload.__file__),
            *("--workers", "2", "--max-steps", str(_COST_STEPS), *arguments),
            env={workload.STEPS_ENV: folder},
        ) as (process, _):
            process.wait(120)
        times = [row[0] for row in workload.committed_steps(Path(folder)) if row[1] == 0]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(gaps[10:])


def main() -> None:
    chooser = random.Random(5)
    expected = final_weights("--workers", "1")
    others = [final_weights("--workers", str(count)) for count in (2, 3, 4)]
    others += [
        final_weights("--workers", "1:4", "--schedule", history(chooser)) for _ in range(_HISTORIES)
    ]
    mismatches = sum(not same(expected, other) for other in others)
    costs = [
        step_time("--reproducible", "--logical-shards", "2") / step_time()
        for _ in range(_COST_ROUNDS)
    ]
    report(
        "reproducible",
        {
            "mismatches": float(mismatches),
            "histories": float(_HISTORIES),
            "worker_counts": 4.0,
            "step_cost": statistics.median(costs),
            "step_cost_min": min(costs),
            "step_cost_max": max(costs),
        },
    )


if __name__ == "__main__":
    main()
