"""Metrics of one replica in Prometheus' text format.

Every series has the labels `model` and `replica`, so that the pages of all replicas can be merged.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Final, final

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
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`."""
        for index, bound in enumerate(self._bounds):
            if value <= bound:
                self._counts[index] += 1
                break
        else:
            self._counts[-1] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the lines of this histogram; `labels` is without braces."""
        totals = list(accumulate(self._counts))
        for bound, total in zip((*self._bounds, "+Inf"), totals, strict=True):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum!r}"
        yield f"{name}_count{{{labels}}} {totals[-1]}"


@final
class Meters:
    """The counters and histograms of one replica."""

    def __init__(self, *, model: str, replica: str) -> None:
        self._labels = f'model="{model}",replica="{replica}"'
        self._requests: dict[int, int] = defaultdict(int)
        self.num_arrived = 0
        """Number of inference requests received so far."""
        self._latency = Histogram(LATENCY_BUCKETS_S)
        self._predict = Histogram(LATENCY_BUCKETS_S)
        self._batch = Histogram(BATCH_BUCKETS)
        self._waiting: Callable[[], int] = lambda: 0

    def watch_waiting(self, num_waiting: Callable[[], int]) -> None:
        """Use `num_waiting()` as the length of the queue."""
        self._waiting = num_waiting

    def answered(self, status: int, took_s: float) -> None:
        """Record the HTTP status and the duration of one inference request."""
        self._requests[status] += 1
        self._latency.observe(took_s)

    def batch(self, rows: int, took_s: float) -> None:
        """Record the rows and the duration of one call of the model."""
        self._batch.observe(rows)
        self._predict.observe(took_s)

    def text(self) -> bytes:
        """Return the metrics page."""
        return ("\n".join(self._page()) + "\n").encode()

    def _page(self) -> Iterator[str]:
        name = "supple_requests_total"
        yield f"# HELP {name} Inference requests answered, by HTTP status."
        yield f"# TYPE {name} counter"
        for status, count in sorted(self._requests.items()):
            yield f'{name}{{{self._labels},status="{status}"}} {count}'
        for name, what, histogram in (
            (
                "supple_request_duration_seconds",
                "From the request's arrival at the replica to its answer.",
                self._latency,
            ),
            ("supple_predict_duration_seconds", "One call of the model.", self._predict),
            ("supple_batch_rows", "Rows in one call of the model.", self._batch),
        ):
            yield f"# HELP {name} {what}"
            yield f"# TYPE {name} histogram"
            yield from histogram.lines(name, self._labels)
        yield "# HELP supple_requests_waiting Requests that are in no batch yet."
        yield "# TYPE supple_requests_waiting gauge"
        yield f"supple_requests_waiting{{{self._labels}}} {self._waiting()}"


def merge(pages: Sequence[bytes]) -> bytes:
    """Merge the pages of several replicas; the format requires a metric's lines to be adjacent."""
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in pages:
        metric = ""
        for line in text.decode("utf-8", "replace").splitlines():
            if line.startswith("# HELP "):
                metric = line.split(" ", 3)[2]
                comments.setdefault(metric, [])
                samples.setdefault(metric, [])
            if line.startswith("#"):
                if line not in comments.setdefault(metric, []):
                    comments[metric].append(line)
            elif line:
                samples.setdefault(metric, []).append(line)
    lines = [line for metric in samples for line in (*comments.get(metric, ()), *samples[metric])]
    return ("\n".join(lines) + "\n").encode()
