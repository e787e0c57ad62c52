"""Draw a load run: requests and answers per second over time, and every latency."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from supple.core.service.spec import Slo
from supple.load.generator import Outcomes
from supple.report.style import ACCENT, DPI, QUIET, WARN, number_label, plain_log, tidy

_MOST_POINTS = 20_000


def draw_load(outcomes: Outcomes, path: Path, *, title: str, slo: Slo | None) -> None:
    """Draw into `path`: above, requests per second by outcome; below, latency against scheduled
    time, with crosses for requests without an answer."""
    ended = outcomes.status != 0
    good = (outcomes.status >= 200) & (outcomes.status < 300)
    figure = Figure(figsize=(9, 6), layout="constrained")
    rates, latencies = figure.subplots(2, 1, sharex=True)
    last_s = float(outcomes.due_s[ended].max()) if ended.any() else 1.0
    width_s = max(last_s / 120, 1e-3)
    edges = np.arange(0.0, last_s + width_s, width_s)
    for mask, color, label in (
        (ended, QUIET, "all"),
        (good, ACCENT, "answered"),
        (ended & ~good, WARN, "refused or failed"),
    ):
        counts, _ = np.histogram(outcomes.due_s[mask], edges)
        rates.step(edges[:-1], counts / width_s, where="post", color=color, label=label)
    rates.set_ylabel("requests per second")
    rates.set_ylim(bottom=0)
    rates.legend(frameon=False, ncols=3)
    rates.set_title(title, loc="left")
    for mask, color, marker in ((good, ACCENT, "."), (ended & ~good, WARN, "x")):
        found = np.flatnonzero(mask)
        shown = found[:: max(1, len(found) // _MOST_POINTS)]
        latencies.plot(
            outcomes.due_s[shown],
            np.maximum(outcomes.latency_s[shown], 1e-5) * 1e3,
            marker,
            color=color,
            markersize=3,
            alpha=0.4,
        )
    if slo is not None:
        latencies.axhline(slo.within_s * 1e3, color=WARN, linewidth=1, linestyle="--")
    latencies.set_yscale("log")
    shown_ms = np.maximum(outcomes.latency_s[ended], 1e-5) * 1e3
    if shown_ms.size:
        plain_log(latencies.yaxis, number_label, float(shown_ms.min()), float(shown_ms.max()))
    latencies.set_ylabel("latency, ms")
    latencies.set_xlabel("seconds")
    for axes in (rates, latencies):
        tidy(axes)
    figure.savefig(path, dpi=DPI)
