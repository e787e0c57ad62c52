"""The learning rate at another batch size: what MLPerf's reference points chose.

Leave one batch size out, from the rates at the other sizes; and from the smallest size alone.
Baselines: constant, square root and linear from the nearest other size.
"""

import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.accuracy import samples as references
from benchmarks.accuracy.score import Score, coverage, covered, median, p90
from supple.core.training.goodput import family_of
from supple.core.training.learning_rate import TunedRate, expected_rate
from supple.core.types import Estimate

RULES = {"constant": 0.0, "sqrt": 0.5, "linear": 1.0}


def measure(data: Path) -> Score:
    """Apart from the common coverage: what was chosen is not what was measured to be best.

    Errors are |log(predicted / chosen)|: 0.1 is 10 %, alike in both directions."""
    found: list[Estimate] = []
    true: list[float] = []
    alone: list[float] = []
    alone_rules: dict[str, list[float]] = defaultdict(list)
    alone_held: list[bool] = []
    rules: dict[str, list[float]] = defaultdict(list)
    notes: list[str] = []
    for benchmark, sizes in sorted(references.read(data).items()):
        newest = [said[-1] for _, said in sorted(sizes.items())]
        family = family_of(newest[0].optimizer)
        tuned = [
            TunedRate(batch_size=point.run.batch_size, lr=point.run.lr)
            for point in newest
            if point.run.lr is not None
        ]
        if len(tuned) < 3:
            continue
        first = len(found)
        for index, asked in enumerate(tuned):
            others = tuned[:index] + tuned[index + 1 :]
            found.append(expected_rate(others, asked.batch_size, family).lr)
            true.append(asked.lr)
            nearest = min(
                others, key=lambda rate: abs(math.log(rate.batch_size / asked.batch_size))
            )
            for rule, power in RULES.items():
                lr = nearest.lr * (asked.batch_size / nearest.batch_size) ** power
                rules[rule].append(abs(math.log(lr / asked.lr)))
            one = expected_rate(tuned[:1], asked.batch_size, family)
            if index and one.is_valid:
                alone.append(abs(math.log(one.lr.value / asked.lr)))
                alone_held.append(one.lr.low <= asked.lr <= one.lr.high)
                for rule, power in RULES.items():
                    lr = tuned[0].lr * (asked.batch_size / tuned[0].batch_size) ** power
                    alone_rules[rule].append(abs(math.log(lr / asked.lr)))
        error = logarithmic(found[first:], true[first:])
        notes.append(
            f"{benchmark}, {family}: {len(tuned)} sizes, median {100 * median(error):.0f} %"
        )
    errors = logarithmic(found, true)
    best = min(rules, key=lambda rule: median(rules[rule]))
    best_alone = min(alone_rules, key=lambda rule: median(alone_rules[rule]))
    notes += [
        f"{rule} rule: from the nearest size {in_percent(rules[rule])}; from the smallest "
        f"{in_percent(alone_rules[rule])}"
        for rule in RULES
    ]
    notes.append(
        f"ours from the smallest size, where said to be valid ({len(alone)}): {in_percent(alone)}, "
        f"intervals hold {100 * coverage(alone_held):.0f} %"
    )
    held = covered(found, true)
    return Score(
        task="learning_rate",
        shows="learning rate",
        metrics={
            "learning_rate_error_median": median(errors),
            "learning_rate_error_median_baseline": median(rules[best]),
            "learning_rate_error_p90": p90(errors),
            "learning_rate_error_p90_baseline": p90(rules[best]),
            "learning_rate_alone_error_median": median(alone),
            "learning_rate_alone_error_median_baseline": median(alone_rules[best_alone]),
            "learning_rate_interval_coverage": coverage(held),
        },
        covered=[],
        notes=[*notes, f"baselines: the {best} rule, and the {best_alone} rule from the smallest"],
        points=list(zip(found, true, strict=True)),
    )


def in_percent(errors: list[float]) -> str:
    return f"median {100 * median(errors):.0f} %, p90 {100 * p90(errors):.0f}"


def logarithmic(found: list[Estimate], true: list[float]) -> list[float]:
    values = np.array([estimate.value for estimate in found])
    return list(np.abs(np.log(values / np.array(true))))
