"""Settings of the whole test run: derandomised properties, one thread, no telemetry."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

settings.register_profile("supple", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("supple")
