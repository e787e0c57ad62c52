"""Throughput and token latency of a language model that nobody has run: ML.ENERGY Benchmark v3.

Leave one family out (every variant of one base model: same publisher, same sizes), fit the rest,
and ask for every row of the family. Handed in: the sizes of the model, the accelerators, the limit
on concurrent sequences, the task and the mean length of the answers. Of the rows seen, also the
median latency and the sequences that ran at once, which tell parameters apart. Baseline: the
roofline of Pope et al. 2022, weights over the memory's speed or arithmetic over the peak, whichever
is larger, times one factor fitted to the same rows.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np

from benchmarks.accuracy.score import Score, coverage, covered, median, relative_errors
from supple.core.layouts.model import DEVICES
from supple.core.llm.decoding import Decoder, DecodingRun, Workload, weights_fit
from supple.core.llm.inference import ServingMeasurement, fit_inference
from supple.core.types import Estimate

WORKLOADS = {
    "gpqa": Workload(name="gpqa", prompt_tokens=300),
    "lm-arena-chat": Workload(name="lm-arena-chat", prompt_tokens=300),
    "image-chat": Workload(name="image-chat", prompt_tokens=1000, media_s=0.02),
    "video-chat": Workload(name="video-chat", prompt_tokens=5000, media_s=0.1),
    "sourcegraph-fim": Workload(name="sourcegraph-fim", prompt_tokens=1500),
}
"""Orders of magnitude of the prompts; not in the data."""

_NEEDED = (
    *("total_params_b", "num_gpus", "max_num_seqs", "avg_output_tokens"),
    *("output_throughput_tokens_per_s", "itl_p90_ms"),
)


def read(data: Path) -> list[tuple[str, ServingMeasurement]]:
    """Name of the model and what was measured, row by row; without rows that lack a number, and
    those whose weights, by the sizes stated, cannot have fitted."""
    with (data / "inference" / "llm.csv").open(newline="") as file:
        whole = [row for row in csv.DictReader(file) if all(_known(row, name) for name in _NEEDED)]
    rows = [(row["model_id"], measurement(row)) for row in whole]
    return [(name, row) for name, row in rows if weights_fit(row.run)]


def measurement(row: Mapping[str, str]) -> ServingMeasurement:
    publisher = row["model_id"].partition("/")[0]
    total, activated = row["total_params_b"], row["activated_params_b"] or row["total_params_b"]
    model = Decoder(
        family=f"{publisher} {total}B" + (f"-A{activated}B" if activated != total else ""),
        num_parameters=1e9 * float(total),
        num_activated=1e9 * float(activated),
        bytes_per_weight=weight_bytes(row["weight_precision"]),
    )
    task = row["task"]
    return ServingMeasurement(
        run=DecodingRun(
            model=model,
            device=DEVICES[row["gpu"].lower()],
            num_devices=int(row["num_gpus"]),
            concurrency=int(row["max_num_seqs"]),
            workload=WORKLOADS.get(task, Workload(name=task, prompt_tokens=500)),
            output_tokens=float(row["avg_output_tokens"]),
        ),
        tokens_per_s=float(row["output_throughput_tokens_per_s"]),
        itl_p90_s=1e-3 * float(row["itl_p90_ms"]),
        itl_p50_s=1e-3 * number if (number := _known(row, "itl_p50_ms")) else None,
        running=_known(row, "avg_batch_size"),
    )


def _known(row: Mapping[str, str], name: str) -> float | None:
    """None where the column is blank, not there, or not a positive number."""
    text = (row.get(name) or "").strip()
    value = float(text) if text else 0.0
    return value if 0.0 < value < math.inf else None


def weight_bytes(precision: str) -> float:
    """Of one weight with its scale: `bfloat16`, `fp8`, `mxfp4` and their like."""
    return 0.55 if "4" in precision else 1.0 if "8" in precision else 2.0


def roofline(run: DecodingRun) -> float:
    """Seconds of a decoding step (Pope et al. 2022, section 2)."""
    weights = run.model.num_parameters * run.model.bytes_per_weight
    peak = run.device.flops_per_s * 2.0 / max(run.model.bytes_per_weight, 1.0)
    read_s = weights / (run.num_devices * run.device.memory_bytes_per_s)
    return max(read_s, 2.0 * run.model.num_activated * run.concurrency / (run.num_devices * peak))


def baseline(
    seen: Sequence[ServingMeasurement], asked: Sequence[ServingMeasurement]
) -> tuple[list[float], list[float]]:
    """Throughput and latency by the roofline, each times its median ratio on the rows seen (1 where
    none is)."""
    if not seen:
        return [m.run.concurrency / roofline(m.run) for m in asked], [
            roofline(m.run) for m in asked
        ]
    rates = [m.tokens_per_s * roofline(m.run) / m.run.concurrency for m in seen]
    waits = [m.itl_p90_s / roofline(m.run) for m in seen]
    return (
        [float(np.median(rates)) * m.run.concurrency / roofline(m.run) for m in asked],
        [float(np.median(waits)) * roofline(m.run) for m in asked],
    )


class Held:
    """Predictions of every row, its group held out."""

    def __init__(self, rows: Sequence[ServingMeasurement], group: Callable[[int], str]) -> None:
        empty = Estimate(value=1.0, low=1.0, high=1.0, source="assumed")
        self.rates, self.waits = [empty] * len(rows), [empty] * len(rows)
        self.plain_rates, self.plain_waits = np.zeros(len(rows)), np.zeros(len(rows))
        names = [group(i) for i in range(len(rows))]
        for name in sorted(set(names)):
            held = [i for i, other in enumerate(names) if other == name]
            seen = [row for row, other in zip(rows, names, strict=True) if other != name]
            model = fit_inference(seen)
            asked = [rows[i] for i in held]
            for i, found in zip(held, model.predict_all([m.run for m in asked]), strict=True):
                self.rates[i], self.waits[i] = found.tokens_per_s, found.itl_p90_s
            self.plain_rates[held], self.plain_waits[held] = baseline(seen, asked)


def twin_ratios(rows: Sequence[ServingMeasurement]) -> list[tuple[float, float]]:
    """Throughput and latency of one row over another's that nothing handed in tells apart (the
    lengths of answers differ a little), each pair both ways."""
    alike: dict[Hashable, list[ServingMeasurement]] = defaultdict(list)
    for row in rows:
        run = row.run
        key = (run.model, run.device.name, run.num_devices, run.concurrency, run.workload.name)
        alike[key].append(row)
    return [
        (a.tokens_per_s / b.tokens_per_s, a.itl_p90_s / b.itl_p90_s)
        for group in alike.values()
        for a, b in permutations(group, 2)
    ]


def _is_wild(name: str, run: DecodingRun) -> bool:
    """Rows that nothing handed in explains: docs/accuracy.md says what is known of them."""
    alone = run.device.name == "b200" and run.num_devices == 1
    return (alone and run.workload.media_s > 0) or (
        "Omni" in name and run.workload.name == "video-chat"
    )


def measure(data: Path) -> Score:
    """Families held out; as a second figure, single models whose siblings are seen."""
    named = read(data)
    rows = [m for _, m in named]
    rates, waits = [m.tokens_per_s for m in rows], [m.itl_p90_s for m in rows]
    families = Held(rows, lambda i: rows[i].run.model.family)
    singles = Held(rows, lambda i: named[i][0])
    held_rates, held_waits = covered(families.rates, rates), covered(families.waits, waits)
    metrics: dict[str, float] = {}
    notes: list[str] = []
    for suffix, held in (("", families), ("_with_siblings", singles)):
        for what, found, plain, true in (
            ("throughput", held.rates, held.plain_rates, rates),
            ("itl", held.waits, held.plain_waits, waits),
        ):
            errors = relative_errors([e.value for e in found], true)
            name = f"inference_{what}{suffix}"
            metrics[f"{name}_mape"] = float(np.mean(errors))
            metrics[f"{name}_mape_baseline"] = float(np.mean(relative_errors(plain, true)))
            metrics[f"{name}_interval_coverage"] = coverage(covered(found, true))
            notes.append(f"{name}: median {100 * median(errors):.1f} %")
    error = relative_errors([e.value for e in families.rates], rates)
    late = relative_errors([e.value for e in families.waits], waits)
    wild = np.array([_is_wild(named[i][0], rows[i].run) for i in range(len(rows))])
    if wild.any() and not wild.all():
        notes.append(
            f"{wild.sum()} rows (single B200 with pictures or video, Omni with video) make "
            f"{100 * error[wild].sum() / error.sum():.0f} % of the throughput's error and "
            f"{100 * late[wild].sum() / late.sum():.0f} % of the latency's; the others are "
            f"{100 * np.mean(error[~wild]):.1f} and {100 * np.mean(late[~wild]):.1f} % off"
        )
    for family in sorted({m.run.model.family for m in rows}):
        index = [i for i, m in enumerate(rows) if m.run.model.family == family]
        notes.append(
            f"{family}: {len(index)} rows, throughput {100 * np.mean(error[index]):.0f} %, latency "
            f"{100 * np.mean(late[index]):.0f} %, intervals hold "
            f"{100 * np.mean(np.array(held_rates)[index]):.0f} and "
            f"{100 * np.mean(np.array(held_waits)[index]):.0f} %"
        )
    twins = twin_ratios(rows)
    if twins:
        metrics["inference_throughput_twins"] = float(np.mean([abs(a - 1.0) for a, _ in twins]))
        metrics["inference_itl_twins"] = float(np.mean([abs(b - 1.0) for _, b in twins]))
    # The form alone: a run that was measured is otherwise given as measured.
    full = replace(fit_inference(rows), measured=()).predict_all([m.run for m in rows])
    metrics["inference_throughput_floor_mape"] = float(
        np.mean(relative_errors([p.tokens_per_s.value for p in full], rates))
    )
    metrics["inference_itl_floor_mape"] = float(
        np.mean(relative_errors([p.itl_p90_s.value for p in full], waits))
    )
    metrics["inference_interval_coverage"] = coverage(held_rates + held_waits)
    return Score(
        task="inference",
        shows="tokens/s (right), seconds between tokens (left)",
        metrics=metrics,
        covered=held_rates + held_waits,
        notes=notes,
        points=[
            *zip(families.rates, rates, strict=True),
            *zip(families.waits, waits, strict=True),
        ],
    )
