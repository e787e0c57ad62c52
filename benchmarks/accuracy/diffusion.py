"""Batch latency of a diffusion model that nobody has run: ML.ENERGY Benchmark v3.

Leave one publisher's family out (a name without its size), fit the rest, and ask for every row of
it. Handed in: parameters, pixels, frames, steps, batch, devices and how the sequence is split; not
how many tokens the model makes of a picture. Baseline: arithmetic over the peak (2 operations per
parameter and token, twice for guidance), times one factor fitted to the same rows.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.accuracy.diffusion_form import DiffusionMeasurement, DiffusionRun, fit_diffusion
from benchmarks.accuracy.score import Score, coverage, covered, median, relative_errors
from supple.core.layouts.model import DEVICES
from supple.core.types import Estimate


def measurement(row: Mapping[str, str]) -> DiffusionMeasurement:
    name = row["model_id"].rpartition("/")[2]
    return DiffusionMeasurement(
        run=DiffusionRun(
            family=re.split(r"[-_.\d]", name)[0],
            num_parameters=1e9 * float(row["total_params_b"]),
            device=DEVICES[row["gpu"].lower()],
            ulysses_degree=int(row["ulysses_degree"]),
            ring_degree=int(row["ring_degree"]),
            batch_size=int(row["batch_size"]),
            num_pixels=int(row["height_px"]) * int(row["width_px"]),
            num_frames=int(row["num_frames"]),
            num_steps=int(row["inference_steps"]),
        ),
        batch_s=float(row["batch_latency_s"]),
    )


def plain_s(run: DiffusionRun) -> float:
    """The baseline before its factor."""
    operations = 4.0 * run.num_parameters * run.tokens * run.batch_size * run.num_steps
    return operations / (run.ulysses_degree * run.ring_degree * run.device.flops_per_s)


def measure(data: Path) -> Score:
    """Every row, its family held out."""
    with (data / "inference" / "diffusion.csv").open(newline="") as file:
        named = [(row["model_id"], measurement(row)) for row in csv.DictReader(file)]
    rows = [m for _, m in named]
    found: list[Estimate] = []
    true: list[float] = []
    plain: list[float] = []
    names: list[str] = []
    for family in sorted({m.run.family for m in rows}):
        seen = [m for m in rows if m.run.family != family]
        model = fit_diffusion(seen)
        factor = median([m.batch_s / plain_s(m.run) for m in seen])
        for name, m in named:
            if m.run.family == family:
                found.append(model.predict(m.run))
                true.append(m.batch_s)
                plain.append(factor * plain_s(m.run))
                names.append(name)
    errors = relative_errors([e.value for e in found], true)
    held = covered(found, true)
    # The form alone: a run that was measured is otherwise given as measured.
    full = replace(fit_diffusion(rows), measured=())
    floor = relative_errors([full.predict(m.run).value for m in rows], [m.batch_s for m in rows])
    ratios = np.array([e.value for e in found]) / np.array(true)
    notes = [
        f"{name}: {int(of.sum())} rows, {100 * np.mean(errors[of]):.0f} %, predicted over measured "
        f"{median(ratios[of]):.2f}, intervals hold {100 * np.mean(np.array(held)[of]):.0f} %"
        for name in sorted(set(names))
        for of in [np.array(names) == name]
    ]
    return Score(
        task="diffusion",
        shows="seconds a batch",
        metrics={
            "diffusion_mape": float(np.mean(errors)),
            "diffusion_mape_baseline": float(np.mean(relative_errors(plain, true))),
            "diffusion_median": median(errors),
            "diffusion_floor_mape": float(np.mean(floor)),
            "diffusion_interval_coverage": coverage(held),
        },
        covered=held,
        notes=notes,
        points=list(zip(found, true, strict=True)),
    )
