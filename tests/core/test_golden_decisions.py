"""The same view of a job, the same decision: by `supple plan`, at the start of `supple train`, and
while it trains as was predicted. The counts are written down, so that no change of a model or of a
rule goes unseen."""

import pytest

from supple.core.job.advice import better_count
from supple.core.job.advisor import start
from supple.core.planning.choice import PlanTable
from supple.core.planning.measured import ScriptMeasurements, job_view
from supple.core.planning.planner import plan
from supple.core.planning.view import JobView
from supple.core.spec import Limits, Objective, TrainSpec
from supple.core.training.memory import MemoryMeasurement
from tests.core.test_throughput import ALONE, GRADIENT_BYTES, measured

MOST = 8


def view_of(base_batch_size: int, measured_counts: tuple[int, ...]) -> ScriptMeasurements:
    counts = [measured(count, -(-base_batch_size // count)) for count in measured_counts]
    return ScriptMeasurements(
        steps=(*ALONE, *counts),
        collectives=(),
        memory=(MemoryMeasurement(micro_batch_size=32, peak_bytes=10**9),),
        noise_scale=None,
        startups_s=(2.0, 3.0),
        gradient_bytes=GRADIENT_BYTES,
        dataset_size=1_000_000,
        epochs=10,
        base_batch_size=base_batch_size,
        largest_micro_batch=None,
        base_lr=1e-3,
        optimizer_name="AdamW",
        device_memory_bytes=8 * 10**9,
    )


def viewed(found: ScriptMeasurements) -> JobView:
    return job_view(found, interconnect="ethernet-25", workers_per_node=MOST, lr_rule="auto")


KNEE = Objective()
GOLDEN = [
    (256, (1, 2, 4, 8), KNEE, 2),
    (256, (1, 2), KNEE, 2),
    (2048, (1, 2, 4, 8), KNEE, 8),
    (2048, (1, 2, 4, 8), Objective(deadline_s=6000.0), 2),
    (2048, (1, 2, 4, 8), Objective(deadline_s=3000.0), 4),
    (2048, (1, 2, 4, 8), Objective(budget=2.6), 4),
    (2048, (1, 2, 4, 8), Objective(budget=3.2), 8),
]


@pytest.mark.parametrize(("batch", "counts", "objective", "golden"), GOLDEN)
def test_plan_start_and_advice_decide_alike(
    batch: int, counts: tuple[int, ...], objective: Objective, golden: int
) -> None:
    found = view_of(batch, counts)
    view, limits = viewed(found), Limits(max_workers=MOST)
    planned = plan(view, limits, objective)
    assert isinstance(planned, PlanTable)
    assert planned.choice.num_workers == golden
    spec = TrainSpec(
        name="golden",
        script="train.py",
        max_workers=MOST,
        workers_per_node=MOST,
        objective=objective,
    )
    assert start(spec, 0.0, found)[1] == golden
    advice = better_count(
        view,
        limits,
        objective,
        current_workers=golden,
        remaining_samples=view.dataset_size * view.epochs,
        resize_cost_s=1.0,
    )
    assert advice.value == golden, advice.reason
