"""Whatever stands in for a job answers a script as `Job` does: every call, property and refusal."""

import inspect
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import supple
from supple.core.spec import SpecError
from supple.train.data.loader import MicroBatch
from supple.train.job import Job
from supple.train.job_protocol import JobProtocol
from supple.train.probes.layer_probe import LayerProbe
from supple.train.probes.memory_trace import MemoryTracer
from supple.train.probes.probe import Probe, ProbeSize
from supple.train.probes.stand_in import MeasurementComplete, StandIn
from supple.train.recipe import Recipe
from supple.train.step.engine import TrainingError
from tests.train.test_memory_trace import RealStep
from tests.train.world import World

X = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X)
FOR_SUPPLE = {"activity", "leave_loop", "membership", "outlive", "step_share", "took_batches"}
"""What a `Job` has besides, and no script may use."""


def timed() -> StandIn:
    sizes = [ProbeSize(), ProbeSize(divide_by=2, num_accumulation_steps=2)]
    probe = Probe(sizes, None, num_steps=2, num_noise_steps=2, step_budget_s=3600.0)
    return StandIn(probe, leads=True, epoch_of=lambda: probe.epoch)


def traced() -> StandIn:
    tracer = MemoryTracer(recompute=False, optimizer=None)
    return StandIn(tracer, build=tracer.build, make=tracer.make)


KINDS: dict[str, Callable[[], JobProtocol]] = {
    "plan": timed,
    "memory": traced,
    "layouts": lambda: StandIn(LayerProbe()),
    "profiled": lambda: StandIn(RealStep(4)),
}
every_stand_in = pytest.mark.parametrize("kind", KINDS)
everyone = pytest.mark.parametrize("kind", ["job", "elastic", *KINDS])


def run(kind: str, train: Callable[[Any], None]) -> None:
    """The training function with a job of this kind, to its end or that of the measurement."""
    if kind == "job":
        supple.run(train)
    elif kind == "elastic":
        world = World(f"protocol-{id(train)}", train)
        try:
            world.start("a")
            world.form(1, ["a"])
            world.finished(["a"])
        finally:
            world.close()
    else:
        try:
            train(KINDS[kind]())
        except MeasurementComplete:
            return


# -- the members ---------------------------------------------------------------------------------


def members(protocol: type) -> list[str]:
    return sorted(name for name in vars(protocol) if not name.startswith("_"))


def departures(job: Any, protocol: type) -> list[str]:
    """Members of the protocol that `job` has not, or has with other arguments."""
    found = []
    for name in members(protocol):
        promised = inspect.getattr_static(protocol, name)
        there = {**vars(type(job)), **vars(job)}
        if name not in there:
            found.append(name)
        elif isinstance(promised, property):
            found += [name] if inspect.isfunction(there[name]) else []
        elif not inspect.isfunction(there[name]) or (
            inspect.signature(there[name]) != inspect.signature(promised)
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("job", [Job(), StandIn(LayerProbe())], ids=lambda job: type(job).__name__)
def test_every_member_of_the_protocol_is_there_with_the_same_arguments(job: Any) -> None:
    assert departures(job, JobProtocol) == []


def test_a_member_that_a_class_lacks_or_takes_otherwise_is_found() -> None:
    class Promised(Protocol):
        @property
        def size(self) -> int: ...
        def keep(self, name: str, *, again: bool = False) -> None: ...

    class Lacks:
        def keep(self, name: str, *, again: bool = False) -> None: ...

    class Renames:
        size = 1

        def keep(self, name: str, *, twice: bool = False) -> None: ...

    class Defaults:
        size = 1

        def keep(self, name: str, *, again: bool = True) -> None: ...

    class Inherits(Promised):
        def size(self) -> int: ...  # type: ignore[override]

    given = (Lacks, Renames, Defaults, Inherits)
    found = [departures(of(), Promised) for of in given]
    assert found == [["size"], ["keep"], ["keep"], ["keep", "size"]]


def test_what_a_job_has_besides_the_protocol_is_named_here_as_for_supple_alone() -> None:
    public = {name for name in vars(Job) if not name.startswith("_")}
    assert public - set(members(JobProtocol)) == FOR_SUPPLE


def test_the_help_of_supple_job_has_the_words_of_the_protocol() -> None:
    for name in members(JobProtocol):
        told = inspect.getdoc(getattr(Job, name))
        assert told and told == inspect.getdoc(getattr(JobProtocol, name))


# -- the behaviour -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """Every property, as a script reads it."""

    rank: int
    world_size: int
    generation: int
    is_leading: bool
    micro_batch_size: int
    step_count: int
    epoch: int
    lr: float


def read(job: JobProtocol) -> Read:
    return Read(**{name: getattr(job, name) for name in Read.__dataclass_fields__})


FIRST = Read(
    rank=0,
    world_size=1,
    generation=0,
    is_leading=False,
    micro_batch_size=0,
    step_count=0,
    epoch=0,
    lr=0.5,
)


class Counted:
    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, values: dict[str, int]) -> None:
        self.steps = values["steps"]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def stack(samples: list[Any]) -> Tensor:
    return torch.stack([sample[0] if isinstance(sample, tuple) else sample for sample in samples])


class Awkward:
    """A script that uses everything, with every keyword, and leaves its loop after `most`."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.early: list[Any] = []
        self.before: list[Read] = []
        self.inside: list[tuple[Read, int, int]] = []
        """(read after a batch came, its samples, steps that were committed by then)"""
        self.after: list[Read] = []
        self.counted = Counted()

    def __call__(self, job: JobProtocol) -> None:
        self.early = [getattr(job, name) for name in Read.__dataclass_fields__ if name != "lr"]
        model = job.model(build)
        optimizer = job.optimizer(
            torch.optim.SGD, lr=0.5, schedule=lambda done: 1.0 - done / 2, momentum=0.9
        )
        assert optimizer.param_groups[0]["momentum"] == 0.9
        job.keep("counted", self.counted)
        job.keep("counted", self.counted)
        self.before.append(read(job))
        committed = 0
        loop = job.batches(
            DATA,
            batch_size=8,
            epochs=2,
            shuffle=False,
            collate_fn=stack,
            num_workers=0,
            micro_batch_size=4,
        )
        for number, x in enumerate(loop):
            self.inside.append((read(job), len(x), committed))
            job.report(lr=job.lr, size=job.micro_batch_size, step=job.step_count)
            loss = model(x).square().mean()
            if job.step(loss, clip_norm=1.0):
                committed += 1
                self.counted.steps += 1
            job.report(loss=loss, epoch=job.epoch)
            if number + 1 == self.most:
                break
        self.after.append(read(job))


@everyone
def test_one_awkward_script_reads_the_truth_everywhere(kind: str) -> None:
    script = Awkward()
    run(kind, script)
    assert script.early == [0, 1, 0, False, 0, 0, 0]
    assert script.before == [FIRST]
    first, size, _ = script.inside[0]
    assert first == Read(**vars(FIRST) | {"micro_batch_size": 4}) and size == 4
    assert len(script.inside) >= 2
    for seen, size, committed in script.inside:
        assert (seen.micro_batch_size, seen.step_count) == (size, committed)
        assert (seen.rank, seen.world_size) == (0, 1)
        assert 0 <= seen.epoch < 2
    assert script.inside[-1][2] > 0


@everyone
def test_a_job_and_a_plan_lead_past_the_first_turn_and_a_job_goes_on_to_other_rates(
    kind: str,
) -> None:
    """What is measured stays at the beginning of the run, and its steps are thrown away. What the
    leader does around its steps, such as an evaluation, belongs to a plan."""
    script = Awkward()
    run(kind, script)
    trains = kind in ("job", "elastic")
    leads = [seen.is_leading for seen, _, _ in script.inside]
    if kind == "plan":
        assert leads == [seen.step_count > 0 for seen, _, _ in script.inside]
    else:
        assert leads[1:] == [trains] * (len(leads) - 1)
    assert {seen.generation for seen, _, _ in script.inside[1:]} == {int(kind == "elastic")}
    rates = {seen.lr for seen, _, _ in script.inside}
    assert rates == ({0.5 - step / 32 for step in range(8)} if trains else {0.5})
    ends = Read(**vars(FIRST) | {"micro_batch_size": 4, "step_count": 8, "epoch": 2, "lr": 0.25})
    ends = Read(**vars(ends) | {"is_leading": True, "generation": int(kind == "elastic")})
    assert script.after == ([ends] if trains else [])


@everyone
def test_a_loop_left_by_break_is_over_and_everything_can_be_read_behind_it(kind: str) -> None:
    script = Awkward(most=2)
    run(kind, script)
    (after,) = script.after
    assert len(script.inside) == 2 and after.micro_batch_size == script.inside[-1][1]
    assert after.step_count == script.counted.steps
    assert float(torch.ones(3).sum()) == 3.0, "nothing fake is left behind"


@pytest.mark.parametrize("kind", ["job", "plan", "layouts", "profiled"])
def test_the_model_has_the_same_initial_weights_as_in_training(kind: str) -> None:
    made: list[Tensor] = []

    def train(job: JobProtocol) -> None:
        torch.manual_seed(99)
        made.append(nn.utils.parameters_to_vector(job.model(build).parameters()))

    run(kind, train)
    torch.manual_seed(0)
    assert torch.equal(made[0], nn.utils.parameters_to_vector(build().parameters()))


class Recorder:
    """An instrument that takes one batch, and notes when it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.given: list[tuple[float, float | None]] = []

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        self.recipe = recipe
        try:
            yield MicroBatch(data=X[:4], num_samples=4, ids=range(4), is_last=True)
        finally:
            self.closed = True

    def step(self, loss: Tensor, micro: MicroBatch, clip_norm: Any, optimizer: Any) -> bool:
        self.given.append((micro.num_samples, clip_norm))
        return True


def test_an_instrument_is_handed_all_that_the_script_stated() -> None:
    recorder, script = Recorder(), Awkward()
    with pytest.raises(MeasurementComplete):
        script(StandIn(recorder))
    recipe = recorder.recipe
    assert isinstance(recipe.model, nn.Sequential)
    assert isinstance(recipe.optimizer, torch.optim.SGD)
    assert (recipe.rate.base_lr, recipe.rate.base_batch) == (0.5, 8)
    assert recipe.rate.schedule(1.0) == 0.5
    assert recipe.kept == {"counted": script.counted}
    asked = recipe.batches
    assert (asked.dataset, asked.collate_fn) == (DATA, stack)
    assert (asked.batch_size, asked.epochs, asked.micro_batch_size) == (8, 2, 4)
    assert (asked.shuffle, asked.num_loader_processes) == (False, 0)
    assert recorder.given == [(4, 1.0)]


def test_an_instrument_is_closed_at_once_where_the_script_leaves_or_does_not_step() -> None:
    left, unstepped = Recorder(), Recorder()
    Awkward(most=1)(StandIn(left))
    assert left.closed
    job = StandIn(unstepped)
    prepared(job)
    with closing(job.batches(DATA, batch_size=8)) as loop:  # type: ignore[type-var]
        next(loop)
        with pytest.raises(TrainingError) as refused:
            next(loop)
        assert unstepped.closed and refused.tb, "also while the traceback keeps the loop's frames"


def test_a_stand_in_tells_the_rank_that_it_was_given() -> None:
    job = StandIn(LayerProbe(), rank=1, world_size=3)
    assert (job.rank, job.world_size, job.is_leading) == (1, 3, False)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("pass", "train(job) in {} returned without taking a batch: loop over job.batches"),
        ("next(job.batches([1], batch_size=1))", "was left before all was measured: let it go on"),
    ],
)
def test_a_script_that_returns_too_early_is_told_what_is_wanting(
    tmp_path: Path, body: str, words: str
) -> None:
    script = tmp_path / "early.py"
    script.write_text(
        "import torch\n\ndef train(job):\n    job.model(lambda: torch.nn.Linear(1, 1))\n"
        f"    job.optimizer(torch.optim.SGD, lr=0.1)\n    {body}\n"
    )
    assert words.format(script) in StandIn(LayerProbe()).run(str(script), "train")


# -- the refusals --------------------------------------------------------------------------------


def prepared(job: JobProtocol, **changes: Any) -> nn.Module:
    model = job.model(build)
    job.optimizer(torch.optim.SGD, **{"lr": 0.1} | changes)
    return model


def batches(job: JobProtocol, dataset: Any = DATA, **changes: Any) -> Iterator[Any]:
    return job.batches(dataset, **{"batch_size": 8, "collate_fn": stack} | changes)


def loop(job: JobProtocol, turn: Callable[[JobProtocol, Tensor, int], None]) -> None:
    """A loop whose every turn steps, and then does what `turn(job, loss, number)` does."""
    model, turns = prepared(job), list[Tensor]()
    for x in batches(job):
        loss = model(x).square().mean()
        if not turns or turn is not skip:
            job.step(loss)
        turn(job, loss, len(turns))
        turns.append(x)


def skip(_job: JobProtocol, _loss: Tensor, _number: int) -> None:
    """Does not step from the second turn on."""


REFUSED: dict[str, tuple[type, Callable[[JobProtocol], Any]]] = {
    "model was called twice": (TrainingError, lambda job: [job.model(build), job.model(build)]),
    "optimizer was called before job.model": (
        TrainingError,
        lambda job: job.optimizer(torch.optim.SGD, lr=0.1),
    ),
    "no parameter that requires a gradient": (
        TrainingError,
        lambda job: [job.model(nn.Identity), job.optimizer(torch.optim.SGD, lr=0.1)],
    ),
    "lr=nan": (SpecError, lambda job: prepared(job, lr=float("nan"))),
    "lr='0.1'": (SpecError, lambda job: prepared(job, lr="0.1")),
    "lr was read before job.optimizer": (TrainingError, lambda job: [job.model(build), job.lr]),
    "batches was called before": (TrainingError, lambda job: next(batches(job))),
    "before job.model and job.optimizer": (
        TrainingError,
        lambda job: [job.model(build), next(batches(job))],
    ),
    "batches was called again before its loop had ended": (
        TrainingError,
        lambda job: loop(job, lambda job, loss, number: next(batches(job))),
    ),
    "batch_size=0": (SpecError, lambda job: [prepared(job), next(batches(job, batch_size=0))]),
    "epochs=0": (SpecError, lambda job: [prepared(job), next(batches(job, epochs=0))]),
    "micro_batch_size=0": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, micro_batch_size=0))],
    ),
    "a DataLoader was given": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, DataLoader(DATA)))],
    ),
    "num_workers=2 with iterable shards": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, [lambda: iter(X)], num_workers=2))],
    ),
    "drop_last=...) with iterable shards": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, [lambda: iter(X)], drop_last=True))],
    ),
    "without batch_size": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, batch_size=None))],
    ),
    "both decide the order": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, sampler=[1], shuffle=True))],
    ),
    "gave index 32 in epoch 0": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, sampler=[32]))],
    ),
    "no batch would be full": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, batch_size=33, drop_last=True))],
    ),
    "Did you mean drop_last": (
        SpecError,
        lambda job: [prepared(job), next(batches(job, droplast=True))],
    ),
    "without __len__": (SpecError, lambda job: [prepared(job), next(batches(job, object()))]),
    "without state_dict": (TrainingError, lambda job: job.keep("it", [])),
    "twice with different objects": (
        TrainingError,
        lambda job: [job.keep("it", Counted()), job.keep("it", Counted())],
    ),
    "put it before job.batches": (
        TrainingError,
        lambda job: loop(job, lambda job, loss, number: job.keep("it", Counted())),
    ),
    "nothing would be learned": (TrainingError, lambda job: [prepared(job), list(batches(job))]),
    "must be stepped, or it would not count": (TrainingError, lambda job: loop(job, skip)),
    "step was called without a batch": (TrainingError, lambda job: job.step(torch.ones(()))),
    "call it once for every batch": (
        TrainingError,
        lambda job: loop(job, lambda job, loss, number: job.step(loss) and None),
    ),
    "float() argument": (
        TypeError,
        lambda job: loop(job, lambda job, loss, number: job.report(bad=[1])),  # type: ignore[arg-type]
    ),
}


def refusal(kind: str, script: Callable[[JobProtocol], Any]) -> tuple[type, str]:
    """What the script was refused with."""
    try:
        run(kind, script)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("it was not refused")


@every_stand_in
@pytest.mark.parametrize("words", REFUSED)
def test_what_a_job_refuses_is_refused_with_the_same_words(words: str, kind: str) -> None:
    error, script = REFUSED[words]
    told = refusal("job", script)
    assert told[0] is error and words in told[1]
    assert refusal(kind, script) == told
    assert float(torch.ones(3).sum()) == 3.0, "nothing fake is left behind"
