"""The planner inside a running job: it grows a job that scales and leaves one that does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from supple.core.job.ledger import prove
from tests.cluster.runs import TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.timeout(240)]

SCRIPT = """
import time
import torch
import torch.nn.functional as F
from examples.digits import accuracy, build_model, load

def train(job):
    dataset, *test = load()
    model = job.model(build_model)
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    for x, y in job.batches(dataset, batch_size={batch}, epochs={epochs}):
        time.sleep({pause})
        job.step(F.cross_entropy(model(x), y))
    assert accuracy(model, *test) > 0.95
"""

ENDLESS = 100_000


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, shared_ray: str) -> Iterator[TrainRun]:
    script = tmp_path / "script.py"
    batch, epochs, pause, arguments = request.param
    script.write_text(SCRIPT.format(batch=batch, epochs=epochs, pause=pause))
    where = ("--address", shared_ray, *arguments.split())
    started = TrainRun(script, tmp_path, *where, name=f"advice-{tmp_path.name}"[:60])
    yield started
    started.close()


@pytest.mark.parametrize("run", [(60, ENDLESS, "0.003 * len(x)", "--workers 1:3")], indirect=True)
def test_a_job_whose_steps_shrink_with_the_share_is_grown_to_the_most_it_may_have(
    run: TrainRun,
) -> None:
    assert len(run.wait_running(1)) == 1
    asked = run.wait("TargetChanged")
    assert asked["num_workers"] == 2
    assert "samples/s expected at 2 workers" in asked["reason"]
    run.wait_running(3)


@pytest.mark.parametrize("run", [(60, ENDLESS, "0.1", "--workers 1:3")], indirect=True)
def test_a_job_whose_steps_take_as_long_with_a_smaller_share_tries_two_workers_once(
    run: TrainRun,
) -> None:
    run.wait_running(2)
    given_back = run.wait("TargetChanged")
    assert given_back["num_workers"] == 1
    assert "add too little" in given_back["reason"]
    run.wait_running(1)
    since = run.wait("Progress", lambda record: record["num_workers"] == 1)
    # Two more rounds of advice: every five seconds, of ten steps a second.
    run.wait("Progress", lambda record: record["step"] >= since["step"] + 120)
    assert [record["num_workers"] for record in run.of_type("TargetChanged")] == [2, 1]


@pytest.mark.parametrize(
    "run", [(16, 8, "0.03", "--workers 2 --batch adaptive --ledger")], indirect=True
)
def test_a_batch_below_the_noise_scale_grows_while_the_job_runs_and_nothing_is_lost(
    run: TrainRun,
) -> None:
    asked = run.wait("BatchChanged")
    assert asked["global_batch_size"] == 32
    assert "batch 16 to 32: noise scale" in asked["reason"]
    decided = run.wait("Decision", lambda record: record["decision_kind"] == "batch")
    assert decided["reason"] == asked["reason"]
    assert run.end(limit_s=150) == 0, run.errors()
    told = run.of_type("Progress")
    assert {16, 32} <= {record["global_batch_size"] for record in told} <= {16, 32, 64}
    assert {record["num_workers"] for record in told} == {2}
    for record in told:
        assert record["lr"] <= 1e-3 * (record["global_batch_size"] / 16) ** 0.5 * 1.0001
    assert max(record["lr"] for record in told) > 1e-3
    report = prove(run.ledger(), expected=range(1500))
    assert report.samples_seen == 8 * 1500
    assert report.is_exact, str(report)
