"""What a replica does about a model that hangs and about new weights: in this process, without Ray.

What Ray makes of it is in `test_serve_faults.py` and `test_serve_update.py`."""

import asyncio
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supple.serve.executor import Executor
from supple.serve.meters import Meters
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel, load_model
from supple.serve.surface import Surface, SurfaceSettings
from tests.hurried import run_hurried

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray Serve's own
    from supple.cluster.services.replica import Replica, _end_soon

HUNG = "predict() has not returned for 30 s"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the weights "late" wait for; open at the latest when the test has ended."""
    waits_for = threading.Event()
    GATES.append(waits_for)
    yield waits_for
    waits_for.set()
    GATES.clear()


GATES: list[threading.Event] = []
SOURCE = """
from tests.cluster import test_replica

class Model:
    inputs = {"x": "float32[1]"}

    def load(self, weights=None):
        if weights == "late":
            test_replica.GATES[-1].wait(60)
        self.weights = weights

    def predict(self, batch):
        return batch
"""


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    (file := tmp_path / "app.py").write_text(SOURCE)
    return load_model(f"{file}:Model", name="m", weights="old")


def replica(model: ServedModel) -> Any:
    """A replica of weights "old" as it is after its start; make it inside an event loop."""
    made: Any = object.__new__(Replica)
    made._executor = Executor(model, timeout_s=30.0)
    meters = Meters(model="m", replica="r")
    made._surface = Surface(model, made._executor, meters, SurfaceSettings())
    made._weights = "old"
    return made


def test_a_replica_is_healthy_until_its_model_hangs(model: ServedModel) -> None:
    async def go() -> None:
        asked = replica(model)
        asked.check_health()
        asked._executor.stuck = HUNG
        with pytest.raises(ModelFault, match="has not returned for 30 s"):
            asked.check_health()
        asked._executor.close()

    asyncio.run(go())


def test_other_weights_take_the_place_of_those_that_are_served_and_the_same_change_nothing(
    model: ServedModel,
) -> None:
    async def go() -> None:
        asked = replica(model)
        for weights in ("old", "new"):
            await asked.reconfigure({"weights": weights, "patience_s": 60.0})
            assert (asked._executor.model is model) == (weights == "old")
        renewed = asked._executor.model
        await asked.reconfigure({"weights": "new", "patience_s": 60.0})
        assert asked._executor.model is renewed
        asked._executor.close()

    asyncio.run(go())


def test_weights_that_take_too_long_to_load_are_given_up(
    model: ServedModel, gate: threading.Event
) -> None:
    async def go() -> None:
        asked = replica(model)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        with pytest.raises(TimeoutError):
            await asked.reconfigure({"weights": "late", "patience_s": 600.0})
        assert loop.time() - began_s == pytest.approx(600.0)
        assert asked._executor.model is model
        assert asked._weights == "old", "so that the same may be tried again"
        gate.set()
        asked._executor.close()

    run_hurried(go())


def test_a_process_whose_model_hangs_ends_a_quarter_of_a_second_after_its_last_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def go() -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[float, int]] = loop.create_future()
        monkeypatch.setattr(os, "_exit", lambda code: ended.set_result((loop.time(), code)))
        _end_soon()
        return await ended

    at_s, code = run_hurried(go())
    assert at_s == pytest.approx(0.25) and code == 1
