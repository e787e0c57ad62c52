"""The models the serving benchmarks serve, and the policy that makes chaos."""

import os
import time
from typing import Any, Final

POISON: Final = -666
"""The number that ends the process which computes it."""


class Adds:
    """Adds one to each number, in a moment: a request is lost unless the right sum comes back."""

    inputs = {"x": "int64[4]"}  # noqa: RUF012
    outputs = {"y": "int64[4]"}  # noqa: RUF012
    work_s = 0.002

    def load(self, weights: str | None = None) -> None:
        """There are none; most names will do."""
        if weights == "raises":
            raise OSError("no such weights")
        if weights == "hangs":
            time.sleep(1e6)
        self.weights = weights

    def predict(self, batch: Any) -> Any:
        time.sleep(self.work_s)
        if (batch == POISON).any():
            os._exit(1)
        return batch / 2 if self.weights == "nonsense" else batch + 1


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
    """A scaling policy that wants another number of replicas as soon as it has what it wanted.

    A policy as a user of Ray Serve may plug one in: that is how the scale events come about.
    """

    def __init__(self, *, counts: list[int], rest_s: float, patience_s: float) -> None:
        self.counts = counts
        self.rest_s = rest_s
        self.patience_s = patience_s
        self.turn = 0
        self.since_s = time.monotonic()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        wanted = self.counts[self.turn % len(self.counts)]
        waited_s = time.monotonic() - self.since_s
        reached = context.current_num_replicas == wanted
        if (reached and waited_s > self.rest_s) or waited_s > self.patience_s:
            self.turn += 1
            self.since_s = time.monotonic()
        return self.counts[self.turn % len(self.counts)], {}
