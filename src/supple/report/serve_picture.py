"""Draw a simulated service: load, replicas, and the share of requests answered in time."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from supple.core.service.scenario import Floats, Scenario
from supple.core.service.simulator import ServingRun

_INK, _QUIET = "#1f2933", "#9aa5b1"
_COLOURS = {
    "supple": "#2f6fde",
    "ray_serve_default": "#d64545",
    "ray_serve_tuned": "#e8890c",
    "knative": "#2f9e44",
    "static": "#9aa5b1",
    "clairvoyant": "#7048e8",
}
_LABELS = {
    "supple": "Supple",
    "ray_serve_default": "Ray Serve, defaults",
    "ray_serve_tuned": "Ray Serve, tuned",
    "knative": "Knative",
    "static": "best constant count",
    "clairvoyant": "clairvoyant",
}
_NUM_SPANS = 60
"""Number of time intervals for which SLO attainment is plotted."""
_DPI = 140


_THIN = {"linewidth": 1.0, "alpha": 0.75}
"""Lines of the other policies."""


def draw_serving(
    scenario: Scenario, runs: Mapping[str, ServingRun], target: Path, *, title: str
) -> None:
    """Draw the runs of one scenario, by autoscaler, into `target`."""
    end_s = max(float(scenario.arrivals_s[-1]), 1.0)
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    load, replicas, met = figure.subplots(3, 1, sharex=True, height_ratios=(2, 3, 2))
    figure.suptitle(
        f"{title}: {scenario.slo}, cold start {scenario.profile.startup_s:g} s",
        x=0.01,
        ha="left",
        fontweight="bold",
        color=_INK,
    )
    width = max(1.0, end_s / 600.0)
    edges = np.arange(0.0, end_s + width, width)
    counts = np.histogram(scenario.arrivals_s, bins=edges)[0]
    load.fill_between(edges[:-1] / 60, counts / width, step="post", color=_QUIET, alpha=0.6)
    load.set_ylabel("requests/s")
    capacity = scenario.profile.capacity_per_s(scenario.max_batch_size)
    replicas.fill_between(
        edges[:-1] / 60,
        counts / width / capacity,
        step="post",
        color=_QUIET,
        alpha=0.35,
        label="busy at least",
    )
    for name, run in reversed(list(runs.items())):
        style = {"linewidth": 2.0, "alpha": 1.0} if name == "supple" else _THIN
        timeline = run.timeline
        shown = timeline.at_s <= end_s
        replicas.step(
            timeline.at_s[shown] / 60,
            (timeline.ready + timeline.starting)[shown],
            where="post",
            color=_COLOURS[name],
            **style,
            label=f"{_LABELS[name]}: {run.slo_attainment:.2%} in time, "
            f"{run.replica_hours:.1f} replica-hours",
        )
        at, share = attained(scenario, run)
        met.plot(at / 60, 100 * share, color=_COLOURS[name], **style)
    replicas.set_ylabel("replicas, starting ones included")
    handles, labels = replicas.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower left", ncols=2, frameon=False)
    replicas.set_ylim(bottom=0)
    met.axhline(100 * scenario.slo.share, color=_INK, linewidth=0.8, linestyle=":")
    met.set_ylabel("in time, %")
    met.set_ylim(-2, 102)
    met.set_xlabel("minutes")
    for axes in (load, replicas, met):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    figure.savefig(target, dpi=_DPI)


def attained(scenario: Scenario, run: ServingRun) -> tuple[Floats, Floats]:
    """Return SLO attainment over time: the middles of `_NUM_SPANS` intervals in seconds, and the
    share of the requests arriving in each that was answered in time (NaN without requests)."""
    arrivals = scenario.arrivals_s
    edges = np.linspace(0.0, max(float(arrivals[-1]), 1.0), _NUM_SPANS + 1)
    edges[-1] += 1e-6
    every = np.histogram(arrivals, bins=edges)[0].astype(np.float64)
    good = np.histogram(arrivals[run.in_time], bins=edges)[0]
    share = np.divide(good, every, out=np.full(len(every), np.nan), where=every > 0)
    return 0.5 * (edges[1:] + edges[:-1]), share
