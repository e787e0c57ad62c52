"""The planner inside a running job: it grows a job that scales and leaves one that does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

SCRIPT = """
import time
import torch
import torch.nn.functional as F
from examples.digits import build_model, load

def train(job):
    dataset, _, _ = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size=60, epochs=100_000):
        time.sleep({pause})
        job.step(F.cross_entropy(model(x), y))
"""


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrainRun]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(pause=request.param))
    started = TrainRun(script, tmp_path, "--workers", "1:3", name=f"advice-{tmp_path.name}"[:60])
    yield started
    started.close()


@pytest.mark.parametrize("run", ["0.003 * len(x)"], indirect=True)
def test_a_job_whose_steps_shrink_with_the_share_is_grown_to_the_most_it_may_have(
    run: TrainRun,
) -> None:
    assert len(run.wait_running(1)) == 1
    asked = run.wait("TargetChanged")
    assert asked["num_workers"] > 1
    assert "of a worker" in asked["reason"]
    run.wait_running(3)


@pytest.mark.parametrize("run", ["0.1"], indirect=True)
def test_a_job_whose_steps_take_as_long_with_a_smaller_share_goes_back_to_one(
    run: TrainRun,
) -> None:
    run.wait_running(1)
    formed = run.wait("Progress", lambda record: record["step"] >= 80)
    assert formed["num_workers"] == 1
