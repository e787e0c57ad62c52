"""The models the serving benchmarks serve, and the policy that makes chaos."""

import time
from typing import Any


class Adds:
    """Adds one to each number, in a moment: a request is lost unless the right sum comes back."""

    inputs = {"x": "int64[4]"}  # noqa: RUF012
    outputs = {"y": "int64[4]"}  # noqa: RUF012
    work_s = 0.002

    def load(self, weights: str | None = None) -> None:
        """There are none; any name will do."""

    def predict(self, batch: Any) -> Any:
        time.sleep(self.work_s)
        return batch + 1


class Trivial:
    """Costs nothing: what is left of a request's time is the server's."""

    inputs = {"x": "float32[4]"}  # noqa: RUF012
    outputs = {"y": "float32[4]"}  # noqa: RUF012

    def predict(self, batch: Any) -> Any:
        return batch


class Batched:
    """Ten milliseconds a call, for one row or many: what batching is for."""

    inputs = {"x": "float32[4]"}  # noqa: RUF012
    outputs = {"y": "float32[4]"}  # noqa: RUF012
    work_s = 0.01

    def predict(self, batch: Any) -> Any:
        time.sleep(self.work_s)
        return batch


class Restless:
    """A scaling policy that wants another number of replicas every `every_s` seconds.

    A policy as a user of Ray Serve may plug one in: that is how the scale events come about.
    """

    def __init__(self, *, counts: list[int], every_s: float) -> None:
        self.counts = counts
        self.every_s = every_s
        self.began_s = time.monotonic()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        turn = int((time.monotonic() - self.began_s) / self.every_s)
        return self.counts[turn % len(self.counts)], {}
