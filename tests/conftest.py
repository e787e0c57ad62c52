"""Settings of the whole test run: derandomised properties, one thread, no telemetry, and nothing
kept between runs in the user's cache."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="supple-tests-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

settings.register_profile("supple", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("supple")
