"""Settings of the whole test run: properties, one thread, no telemetry, what a test may take, and
nothing kept between runs in the user's cache."""

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.examples import NIGHTLY_TIMES, USUAL
from tests.slow_tests import Beginning

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="supple-tests-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

settings.register_profile("supple", derandomize=True, deadline=None, max_examples=USUAL)
# At night other examples each time; what fails is printed so that it can be run again.
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=NIGHTLY_TIMES * USUAL,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("supple")

_BEGAN = pytest.StashKey[Beginning]()


def pytest_collection_finish() -> None:
    """Import what torch imports when the first optimizer is made, so that no test is charged."""
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_BEGAN] = Beginning()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and report.passed and _is_timed(item):
        why = item.stash[_BEGAN].why_too_long()
        if why:
            report.outcome, report.longrepr = "failed", why
    return report


def _is_timed(item: pytest.Item) -> bool:
    """False for a marked test, and where a run is about something else: more examples, mutants."""
    marked = any(item.get_closest_marker(mark) for mark in ("slow", "ray"))
    return not marked and settings().max_examples == USUAL and "MUTANT_UNDER_TEST" not in os.environ
