"""What `supple plan` measures of a script: the sizes, and the samples that a step really has."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from supple.cluster.measure import _ALONE  # pyright: ignore[reportPrivateUsage]
from supple.train.probes.probe import Probe, ProbeReport, ProbeSize
from supple.train.probes.stand_in import MeasurementComplete, StandIn
from supple.train.step.noise_meter import NoiseMeter

NUM_STEPS, NUM_NOISE_STEPS = 3, 4


class Script:
    """A training function that remembers the micro-batches it was given."""

    def __init__(self, dataset: Any, **batches: Any) -> None:
        self.dataset = dataset
        self.batches = batches
        self.given: list[list[float]] = []

    def __call__(self, job: Any) -> None:
        model = job.model(lambda: nn.Linear(1, 1))
        job.optimizer(torch.optim.SGD, lr=1e-9)
        for x in job.batches(self.dataset, **self.batches):
            (x,) = x if isinstance(x, list) else (x,)
            self.given.append(x.flatten().tolist())
            job.step(F.mse_loss(model(x), x))

    @property
    def sizes(self) -> set[int]:
        return {len(batch) for batch in self.given}


def samples(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)).unsqueeze(1))


class Stream(IterableDataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.count)).unsqueeze(1))


class Counted(Stream):
    def __len__(self) -> int:
        return self.count


def measure(
    script: Callable[[Any], None],
    phases: Sequence[ProbeSize] = _ALONE,
    *,
    num_noise_steps: int = NUM_NOISE_STEPS,
    step_budget_s: float = 3600.0,
) -> ProbeReport:
    probe = Probe(
        phases,
        None,
        num_steps=NUM_STEPS,
        num_noise_steps=num_noise_steps,
        step_budget_s=step_budget_s,
    )
    with pytest.raises(MeasurementComplete):
        script(StandIn(probe))
    return probe.report_made


def cuts(report: ProbeReport) -> list[tuple[int, int]]:
    return [(phase.micro_batch_size, phase.num_accumulation_steps) for phase in report.phases]


def test_without_a_cap_the_whole_batch_is_one_micro_batch_and_its_parts_are_measured_too() -> None:
    script = Script(samples(640), batch_size=64)
    report = measure(script)
    assert cuts(report) == [(64, 1), (32, 1), (16, 1), (32, 2)]
    assert script.sizes == {64, 32, 16} and report.largest_micro_batch is None


def test_the_cap_of_the_script_on_a_micro_batch_is_kept_and_told() -> None:
    script = Script(samples(640), batch_size=64, micro_batch_size=8)
    report = measure(script)
    assert cuts(report) == [(8, 8), (4, 1), (2, 1), (4, 2)]
    assert script.sizes == {8, 4, 2}
    assert report.largest_micro_batch == 8 and report.base_batch_size == 64


@pytest.mark.parametrize(
    ("workers", "cap", "micro", "num_pieces"), [(3, 64, 22, 1), (3, 8, 8, 3), (2, 8, 8, 4)]
)
def test_the_share_of_a_worker_is_cut_as_a_plan_cuts_it(
    workers: int, cap: int, micro: int, num_pieces: int
) -> None:
    script = Script(samples(640), batch_size=64, micro_batch_size=cap)
    assert cuts(measure(script, [ProbeSize(divide_by=workers)])) == [(micro, num_pieces)]
    assert sum(map(len, script.given[:num_pieces])) == -(-64 // workers)


def test_a_batch_larger_than_the_dataset_is_that_of_all_its_samples() -> None:
    script = Script(samples(3), batch_size=5000, epochs=2)
    report = measure(script)
    assert cuts(report) == [(3, 1), (1, 1), (1, 1), (1, 2)]
    assert script.sizes == {3, 1}
    assert (report.batch_size, report.base_batch_size, report.dataset_size) == (5000, 3, 3)


def test_of_one_sample_every_step_has_one() -> None:
    script = Script(samples(1), batch_size=5000)
    assert cuts(measure(script)) == [(1, 1)] * 4 and script.sizes == {1}


@pytest.mark.parametrize("dataset", [samples(70), Counted(70)])
def test_the_short_last_batch_of_an_epoch_is_left_out(dataset: Any) -> None:
    script = Script(dataset, batch_size=51)
    measure(script, [ProbeSize()])
    assert script.sizes == {51}
    assert len(script.given) == NUM_NOISE_STEPS + NUM_STEPS


def test_every_epoch_has_its_own_order_as_in_training() -> None:
    """The noise scale comes of steps that differ in their samples."""
    script = Script(samples(70), batch_size=51)
    measure(script, [ProbeSize()])
    assert len({tuple(batch) for batch in script.given}) == len(script.given)


def test_samples_that_whole_batches_use_up_are_read_as_in_training() -> None:
    script = Script(samples(64), batch_size=32)
    measure(script, [ProbeSize()])
    first_epoch = script.given[0] + script.given[1]
    assert sorted(first_epoch) == list(range(64))


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_length_of_shards_is_that_of_one_epoch(epochs: int) -> None:
    script = Script([Counted(30), Counted(40)], batch_size=10, epochs=epochs)
    report = measure(script, [ProbeSize()])
    assert (report.dataset_size, report.epochs) == (70, epochs)


def test_nothing_is_measured_of_a_dataset_without_a_length() -> None:
    script = Script(Stream(70), batch_size=10)
    report = measure(script)
    assert report.dataset_size is None and report.phases == () and script.given == []


def test_steps_that_are_timed_take_no_norms_for_the_noise_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With small micro-batches the norms take longer than the step."""
    script = Script(samples(640), batch_size=64, micro_batch_size=8)
    at: list[int] = []
    norm = NoiseMeter._sq_norm  # pyright: ignore[reportPrivateUsage]

    def watched(self: NoiseMeter, gradients: Sequence[Tensor]) -> float:
        at.append(len(script.given))
        return norm(self, gradients)

    monkeypatch.setattr(NoiseMeter, "_sq_norm", watched)
    measure(script, [ProbeSize()])
    assert at and max(at) <= NUM_NOISE_STEPS * 8
    before = len(at)
    measure(script, [ProbeSize()], num_noise_steps=0)
    assert [call for call in at[before:] if call > len(script.given) - NUM_STEPS * 8] == []


def test_slow_steps_are_fewer_but_tell_the_noise_scale_still() -> None:
    script = Script(samples(640), batch_size=64)
    report = measure(script, num_noise_steps=50, step_budget_s=0.0)
    assert [phase.num_steps for phase in report.phases] == [1] * 4
    assert report.noise_scale is not None


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


STEP_S = 0.002


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    monkeypatch.setattr(time, "monotonic", made)
    return made


def habit(clock: Clock, before: Callable[[Any], None], after: Callable[[Any], None]) -> ProbeReport:
    """Measure a script whose steps take `STEP_S`, with habits before and after each step."""

    def train(job: Any) -> None:
        model = job.model(lambda: nn.Linear(1, 1))
        job.optimizer(torch.optim.SGD, lr=1e-9)
        for (x,) in job.batches(samples(640), batch_size=64):
            before(job)
            clock.now += STEP_S
            job.step(F.mse_loss(model(x), x))
            after(job)

    probe = Probe(
        _ALONE,
        None,
        num_steps=6,
        num_noise_steps=12,
        step_budget_s=0.25,
        num_loop_steps=250,
        loop_budget_s=3.0,
    )
    with pytest.raises(MeasurementComplete):
        train(StandIn(probe, leads=True, epoch_of=lambda: probe.epoch))
    return probe.report_made


def evaluate(clock: Clock, seconds: float, every: int) -> Callable[[Any], None]:
    def run(job: Any) -> None:
        if job.is_leading and job.step_count % every == 0:
            clock.now += seconds

    return run


def nothing(_job: Any) -> None:
    return None


@pytest.mark.parametrize("every", [2, 3, 10, 100])
@pytest.mark.parametrize("is_before", [False, True])
def test_an_evaluation_around_a_step_is_no_step_time(
    clock: Clock, every: int, is_before: bool
) -> None:
    habits = evaluate(clock, 0.5, every), nothing
    report = habit(clock, *(habits if is_before else habits[::-1]))
    if is_before and every < 3:
        return  # every other step is an evaluation: no median can tell
    steps = [phase.times.step_time_s for phase in report.phases]
    assert steps == pytest.approx([STEP_S, STEP_S, STEP_S, 2 * STEP_S])


@pytest.mark.parametrize("first", [12, 13])
def test_an_evaluation_as_long_as_the_phase_is_not_the_only_step_that_is_timed(
    clock: Clock, first: int
) -> None:
    """It comes with a timed step, before the forward pass, and uses up the phase's time."""

    def before(job: Any) -> None:
        if job.step_count % 30 == first:
            clock.now += 20.0

    report = habit(clock, before, nothing)
    assert report.phases[0].times.step_time_s == pytest.approx(STEP_S)
    assert report.phases[0].num_steps >= 2


@pytest.mark.parametrize("every", [10, 50, 100])
def test_its_share_of_the_loop_is_measured(clock: Clock, every: int) -> None:
    """Micro-batches of one step meet the habit more than once, as in training."""
    report = habit(clock, nothing, evaluate(clock, 0.5, every))
    assert report.loop.per_step.value == pytest.approx(0.5 / every, rel=0.1)


def test_logging_in_every_turn_is_measured_beside_the_step(clock: Clock) -> None:
    def log(_job: Any) -> None:
        clock.now += 0.001

    report = habit(clock, nothing, log)
    assert report.loop.per_step.value == pytest.approx(0.001, rel=0.05)
    assert report.phases[0].times.step_time_s == pytest.approx(STEP_S)


def test_a_script_reads_the_epochs_as_they_pass_and_never_one_beyond_the_last() -> None:
    seen: list[int] = []

    def train(job: Any) -> None:
        model = job.model(lambda: nn.Linear(1, 1))
        job.optimizer(torch.optim.SGD, lr=1e-9)
        for (x,) in job.batches(samples(64), batch_size=32, epochs=3):
            seen.append(job.epoch)
            job.step(F.mse_loss(model(x), x))

    probe = Probe([ProbeSize()], None, num_steps=9, num_noise_steps=2, step_budget_s=3600.0)
    with pytest.raises(MeasurementComplete):
        train(StandIn(probe, epoch_of=lambda: probe.epoch))
    assert seen == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
