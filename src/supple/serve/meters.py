"""Counts and times of one replica, in Prometheus' format and as the protocol's model statistics.

Every series has the labels `model` and `replica`, so that the pages of all replicas can be merged.
prometheus_client writes and reads the pages. The counts are kept here, as plain numbers: one
`observe` of its histogram takes 2.7 us, and an inference has three.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Final, final

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

LATENCY_BUCKETS_S: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class Histogram:
    """Counts of observations in buckets with upper bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Return the upper bounds, and the number of observations up to each."""
        bounds = [*(f"{float(bound)}" for bound in self._bounds), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))


@final
class Meters:
    """The counters and histograms of one replica."""

    def __init__(self, *, model: str, replica: str) -> None:
        self._model = model
        self._replica = replica
        self._requests: dict[int, int] = {}
        self._seconds = {True: 0.0, False: 0.0}
        """From arrival to answer, of the requests that succeeded (True) and failed."""
        self.num_arrived = 0
        """Number of inference requests received so far."""
        self._latency = Histogram(LATENCY_BUCKETS_S)
        self._predict = Histogram(LATENCY_BUCKETS_S)
        self._batch = Histogram(BATCH_BUCKETS)
        self._batches: dict[int, tuple[int, float]] = {}
        """Number of model calls, and their seconds, by number of rows."""
        self._num_computed = 0
        self._waited_s = 0.0
        self._computed_s = 0.0
        self._last_s = 0.0
        """When the last inference was answered, in seconds since 1970."""
        self._waiting: Callable[[], int] = lambda: 0

    def watch_waiting(self, num_waiting: Callable[[], int]) -> None:
        """Use `num_waiting()` as the length of the queue."""
        self._waiting = num_waiting

    def answered(self, status: int, took_s: float) -> None:
        """Record the HTTP status and the duration of one inference request."""
        self._requests[status] = self._requests.get(status, 0) + 1
        self._seconds[status == 200] += took_s
        self._latency.observe(took_s)

    def batch(self, rows: int, took_s: float) -> None:
        """Record the rows and the duration of one call of the model."""
        self._batch.observe(rows)
        self._predict.observe(took_s)
        count, seconds = self._batches.get(rows, (0, 0.0))
        self._batches[rows] = (count + 1, seconds + took_s)

    def computed(self, requests: int, waited_s: float, took_s: float) -> None:
        """Record the number of requests of a call of the model, the seconds that all of them waited
        for it, and the seconds of the call."""
        self._num_computed += requests
        self._waited_s += waited_s
        self._computed_s += requests * took_s
        self._last_s = time.time()

    def text(self) -> bytes:
        """Return the metrics page of this replica."""
        return generate_latest(_registry(self._families()))

    def _families(self) -> Iterator[Metric]:
        names, values = ("model", "replica"), (self._model, self._replica)
        requests = CounterMetricFamily(
            "supple_requests_total",
            "Inference requests answered, by HTTP status.",
            labels=(*names, "status"),
        )
        for status, count in sorted(self._requests.items()):
            requests.add_metric((*values, str(status)), count)
        yield requests
        for name, what, histogram in (
            (
                "supple_request_duration_seconds",
                "From the request's arrival at the replica to its answer.",
                self._latency,
            ),
            ("supple_predict_duration_seconds", "One call of the model.", self._predict),
            ("supple_batch_rows", "Rows in one call of the model.", self._batch),
        ):
            family = HistogramMetricFamily(name, what, labels=names)
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family
        waiting = GaugeMetricFamily(
            "supple_requests_waiting", "Requests that are in no batch yet.", labels=names
        )
        waiting.add_metric(values, self._waiting())
        yield waiting

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of this replica, for `merge_statistics`; times in nanoseconds."""
        answered = self._requests.get(200, 0)
        failed = sum(self._requests.values()) - answered
        return {
            "last_inference": int(self._last_s * 1e3),
            "inference_count": sum(rows * count for rows, (count, _) in self._batches.items()),
            "execution_count": sum(count for count, _ in self._batches.values()),
            "inference_stats": {
                "success": _duration(answered, self._seconds[True]),
                "fail": _duration(failed, self._seconds[False]),
                "queue": _duration(self._num_computed, self._waited_s),
                "compute_infer": _duration(self._num_computed, self._computed_s),
            },
            "batch_stats": {
                str(rows): _duration(*batch) for rows, batch in sorted(self._batches.items())
            },
        }


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


@final
class _Collector:
    def __init__(self, families: Iterator[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families


def _registry(families: Iterator[Metric]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(families))  # type: ignore[arg-type]
    return registry


def merge(pages: Sequence[bytes], accept: str = "") -> tuple[bytes, str]:
    """Merge the metrics pages of several replicas; the format requires a metric's lines to be
    adjacent. Return the page and its media type, which a scraper may choose by `accept`."""
    merged: dict[str, Metric] = {}
    for text in pages:
        for family in text_string_to_metric_families(text.decode("utf-8", "replace")):
            merged.setdefault(family.name, family)
            if merged[family.name] is not family:
                merged[family.name].samples += family.samples
    encode, media_type = choose_encoder(accept)
    return encode(_registry(iter(merged.values()))), media_type


def merge_statistics(
    found: Sequence[Mapping[str, Any]], *, model: str, version: str
) -> dict[str, Any]:
    """Return the `ModelStatistics` of the protocol, summed over all replicas. Decoding and encoding
    are not measured by themselves: `compute_input` and `compute_output` have no counts."""
    none = _duration(0, 0.0)
    names = ("success", "fail", "queue", "compute_infer")
    stats = {name: _total([one["inference_stats"][name] for one in found]) for name in names}
    sizes = sorted({int(rows) for one in found for rows in one["batch_stats"]})
    return {
        "name": model,
        "version": version,
        "last_inference": max((one["last_inference"] for one in found), default=0),
        "inference_count": sum(one["inference_count"] for one in found),
        "execution_count": sum(one["execution_count"] for one in found),
        "inference_stats": {
            **stats,
            **dict.fromkeys(("compute_input", "compute_output", "cache_hit", "cache_miss"), none),
        },
        "batch_stats": [
            {
                "batch_size": rows,
                "compute_input": none,
                "compute_infer": _total([one["batch_stats"].get(str(rows), none) for one in found]),
                "compute_output": none,
            }
            for rows in sizes
        ],
    }


def _total(durations: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(duration[key] for duration in durations) for key in ("count", "ns")}
