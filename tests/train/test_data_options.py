"""Options of `job.batches` with the names of torch's DataLoader: honoured, or refused by name."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler, TensorDataset, get_worker_info

import supple
from supple.core.spec import SpecError, TrainSpec
from supple.train.data import loader as loader_module
from supple.train.data.loader import make_loader
from supple.train.job import Job
from supple.train.probes.layer_probe import LayerProbe
from supple.train.probes.probe import Probe, ProbeSize
from supple.train.probes.stand_in import StandIn
from supple.train.start.script import StepShare, single_sample_advice
from tests.train.world import World

X = torch.randn(37, 4, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X)


class Rows:
    """The rows of X, fetched one by one."""

    def __init__(self) -> None:
        self.opened_by = -1

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        mine = isinstance(info.dataset, Rows) and info.dataset is self if info else None
        return X[index], self.opened_by, -1 if info is None else info.id, mine


class Script:
    """A script of one linear layer; the sizes of its micro-batches, and its steps and samples."""

    def __init__(self, dataset: Any = DATA, make: Any = None, **options: Any) -> None:
        self.dataset = dataset
        self.options = {"batch_size": 8} | options
        self.make: Callable[[], nn.Module] = make or (lambda: nn.Linear(4, 1))
        self.sizes: dict[int, list[int]] = {}
        self.weights: dict[int, Tensor] = {}

    def __call__(self, job: Any) -> None:
        model = job.model(self.make)
        job.optimizer(torch.optim.SGD, lr=0.1)
        sizes = self.sizes[id(job)] = []
        for batch in job.batches(self.dataset, **self.options):
            sizes.append(len(batch[0]))
            job.step(model(batch[0]).square().mean())
        self.weights[id(job)] = nn.utils.parameters_to_vector(model.parameters()).detach()


def steps_of(**options: Any) -> tuple[list[int], Job]:
    """The sizes of the steps past the rehearsal, and the job."""
    script = Script(**options)
    job = supple.run(script)
    return script.sizes[id(job)][1:], job


# -- what they do --------------------------------------------------------------------------------


def test_drop_last_leaves_out_the_last_batch_of_every_epoch() -> None:
    sizes, job = steps_of(drop_last=True, epochs=3)
    assert sizes == [8] * 12
    assert (job.step_count, job.epoch) == (12, 3)
    assert steps_of(drop_last=False)[0] == [8, 8, 8, 8, 5]


@pytest.mark.parametrize("micro", [None, 3])
def test_a_batch_sampler_gives_each_step_its_samples(micro: int | None) -> None:
    batches = [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9], [10]]
    sizes, job = steps_of(batch_size=None, batch_sampler=batches, micro_batch_size=micro)
    assert sizes == ([3, 7, 1] if micro is None else [3, 3, 2, 2, 1])
    assert job.step_count == 3
    assert job.lr == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"drop_last": True},
        {"sampler": [0, 5, 5, 9, 30, 2, 7, 11, 12], "batch_size": 4},
        {"weights": [1.0, 2.0] * 18 + [0.5]},
        {"batch_size": None, "batch_sampler": BatchSampler(SequentialSampler(X), 9, False)},  # type: ignore[arg-type]
        {"batch_size": None, "batch_sampler": [[1, 2, 3], [4], [5, 6, 7, 8]]},
    ],
)
def test_two_workers_train_as_one_on_the_same_batches(options: dict[str, Any]) -> None:
    script = Script(epochs=2, **options)
    alone = supple.run(script)
    world = World(f"options-{id(script)}", script)
    try:
        world.start("a", "b")
        world.form(1, ["a", "b"])
        assert world.finished(["a", "b"]) == [alone.step_count] * 2
    finally:
        world.close()
    for job in world.jobs.values():
        torch.testing.assert_close(script.weights[id(job)], script.weights[id(alone)])


def test_worker_init_fn_runs_first_in_every_process_and_sees_the_scripts_dataset() -> None:
    def open_it(number: int) -> None:
        info = get_worker_info()
        assert info is not None and (info.id, info.num_workers) == (number, 2)
        info.dataset.opened_by = number  # type: ignore[attr-defined]

    loader = make_loader(
        Rows(),
        epochs=1,
        shuffle=False,
        seed=0,
        num_loader_processes=2,
        options={"worker_init_fn": open_it, "prefetch_factor": 1, "timeout": 30.0},
    )
    loader.place(loader.position, 0, 1, 8, 4)
    first, second = [micro.data for micro in loader.feed()]
    for number, (_, opened_by, process, is_mine) in enumerate((first, second)):
        assert set(opened_by.tolist()) == set(process.tolist()) == {number}
        assert all(is_mine.tolist())


def test_worker_init_fn_is_called_for_a_tensor_dataset_too() -> None:
    def refuse(_number: int) -> None:
        raise RuntimeError("it was called")

    with pytest.raises(RuntimeError, match="it was called"):
        steps_of(num_workers=1, worker_init_fn=refuse)


def test_a_generators_seed_changes_the_order() -> None:
    def order(**options: Any) -> list[int]:
        loader = make_loader(DATA, epochs=1, shuffle=True, seed=0, options=options)  # type: ignore[arg-type]
        loader.place(loader.position, 0, 1, 37, 37)
        return [int(index) for micro in loader.feed() for index in micro.ids]

    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    orders = [order(), *(order(generator=generator) for generator in generators)]
    assert orders[1] == orders[2]
    assert orders[0] != orders[1] != orders[3]
    assert sorted(orders[1]) == list(range(37))


def test_batches_are_pinned_only_where_there_is_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(len(tensor)) or tensor)
    monkeypatch.setattr(loader_module.torch.accelerator, "is_available", lambda: False)
    steps_of(pin_memory=True)
    assert pinned == []
    monkeypatch.setattr(loader_module.torch.accelerator, "is_available", lambda: True)
    steps_of(pin_memory=True)
    steps_of(dataset=[lambda: iter(DATA)], batch_size=8, pin_memory=True)
    assert pinned == [8, 8, 8, 8, 8, 5] * 2


def test_the_words_of_a_plain_loader_for_no_processes_are_taken_as_they_are() -> None:
    plain = {"num_workers": 0, "persistent_workers": False, "timeout": 0, "prefetch_factor": None}
    none = {"sampler": None, "batch_sampler": None, "worker_init_fn": None, "generator": None}
    assert steps_of(pin_memory=False, multiprocessing_context=None, **plain, **none)[0][-1] == 5


def test_what_is_measured_has_any_size_and_drops_nothing() -> None:
    """A probe reads batches of its own sizes, in the order of the script's samplers."""

    def sizes(batch: int, **options: Any) -> list[int]:
        given: Any = options
        loader = make_loader(
            DATA, epochs=1, shuffle=False, seed=0, batch_size=8, options=given, to_measure=True
        )
        loader.place(loader.position, 0, 1, batch, batch)
        found = []
        while not loader.done:
            found += [micro.num_samples for micro in loader.feed()]
            loader.commit([])
        return found

    assert sizes(30, drop_last=True) == [30, 7]
    assert sizes(4, batch_sampler=[[0], [1, 2, 3, 4, 5]]) == [4, 2]


def test_a_batch_samplers_batch_is_rehearsed_in_the_share_of_one_worker() -> None:
    script = Script(batch_size=None, batch_sampler=[list(range(9)), [9, 10]])
    world = World("rehearsed-share", script)
    world.rehearsal_size = 3
    try:
        world.start("a")
        world.form(1, ["a"])
        world.finished(["a"])
    finally:
        world.close()
    assert script.sizes[id(world.jobs["a"])] == [3, 9, 2]


def test_workers_with_other_samples_stop_before_the_first_step_is_applied() -> None:
    class Different(Script):
        def __call__(self, job: Any) -> None:
            self.options = self.options | {"sampler": [0, 1, 2] if self.sizes else [3, 4, 5]}
            super().__call__(job)

    script = Different()
    world = World("different", script)
    world.start("a")
    world.start("b")
    world.form(1, ["a", "b"])
    with pytest.raises(SpecError, match="workers read their data in different orders in epoch 0"):
        world.finished(["a", "b"])
    world.close()
    assert [job.step_count for job in world.jobs.values()] == [0, 0]


# -- refusals ------------------------------------------------------------------------------------


def numbers() -> Iterator[Tensor]:
    yield from X


SHARDS = [numbers]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"droplast": True}, "there is no such option. Did you mean drop_last?"),
        ({"in_order": True}, "there is no such option. The others are drop_last, sampler"),
        ({"batch_size": None}, "called without batch_size"),
        ({"shuffle": True, "sampler": [1]}, "sampler=..., shuffle=...): both decide the order"),
        ({"weights": [1.0] * 37, "sampler": [1]}, "sampler=..., weights=...)"),
        ({"batch_sampler": [[1]], "batch_size": 8}, "batch_sampler=..., batch_size=...)"),
        (
            {"batch_sampler": [[1]], "batch_size": None, "drop_last": True},
            "batch_sampler=..., drop_last=...)",
        ),
        ({"generator": 5}, "generator=...) was given a int"),
        ({"prefetch_factor": 2}, "prefetch_factor=2) is an option of the processes"),
        ({"timeout": 5}, "num_workers=0 starts none"),
        ({"persistent_workers": True}, "persistent_workers=True) is an option"),
        ({"num_workers": 1, "persistent_workers": False}, "live as long as the loop"),
        ({"num_workers": 1, "prefetch_factor": 0}, "prefetch_factor=0, timeout=0"),
        ({"num_workers": 1, "timeout": -1}, "prefetch_factor=2, timeout=-1"),
        ({"num_workers": 1, "multiprocessing_context": "spawn"}, "has the definitions of your"),
        ({"dataset": SHARDS, "drop_last": True}, "drop_last=...) with iterable shards"),
        ({"dataset": SHARDS, "sampler": [1]}, "sampler=...) with iterable shards"),
        ({"dataset": SHARDS, "weights": [1.0]}, "weights=...) with iterable shards"),
        ({"dataset": SHARDS, "worker_init_fn": print}, "Leave worker_init_fn out"),
        (
            {"dataset": SHARDS, "batch_sampler": [[1]], "batch_size": None},
            "batch_sampler=...) with iterable shards",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        steps_of(**options)
    assert words in str(refused.value)


def test_a_batch_sampler_with_an_adaptive_batch_is_refused() -> None:
    job = Job(TrainSpec(name="options", script="", batch="adaptive"))
    with pytest.raises(SpecError, match="with --batch adaptive: both decide the size"):
        Script(batch_size=None, batch_sampler=[[1, 2]])(job)


# -- one sample in front of a BatchNorm ----------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def test_a_last_batch_of_one_sample_in_front_of_a_batch_norm_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        steps_of(make=normed, batch_size=12)
    (note,) = raised.value.__notes__
    assert "the last batch of an epoch of 37 samples has 1 (batch_size=12)" in note
    assert "drop_last=True" in note
    assert steps_of(make=normed, batch_size=12, drop_last=True)[0] == [12] * 3


def test_another_value_error_gets_no_note() -> None:
    def stop() -> nn.Module:
        raise ValueError("not ours")

    with pytest.raises(ValueError, match="not ours") as raised:
        steps_of(make=stop)
    assert not hasattr(raised.value, "__notes__")


def test_a_workers_share_of_one_sample_says_how_many_workers_there_are() -> None:
    script = Script(make=normed, batch_size=2)
    world = World("one-each", script)
    world.start("a", "b")
    world.form(1, ["a", "b"])
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        world.finished(["a", "b"])
    advice = single_sample_advice(raised.value, world.jobs["a"].step_share)
    assert "a step takes 2, and this worker's share is 1 on 2 workers" in advice
    assert "a batch_size of at least 4, or train with fewer workers" in advice


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("batch_size=2", "share is 1 on 4 workers. Give job.batches a batch_size of at least 8"),
        ("batch_size=16, micro_batch_size=2", "Give job.batches a larger micro_batch_size"),
    ],
)
def test_a_measured_share_of_one_sample_says_what_to_do(
    tmp_path: Path, options: str, words: str
) -> None:
    script = tmp_path / "norm.py"
    script.write_text(
        "import torch\n"
        "def train(job):\n"
        "    model = job.model(lambda: torch.nn.BatchNorm1d(2))\n"
        "    job.optimizer(torch.optim.SGD, lr=0.1)\n"
        "    rows = torch.utils.data.TensorDataset(torch.randn(64, 2))\n"
        f"    for (x,) in job.batches(rows, {options}):\n"
        "        job.step(model(x).mean())\n"
    )
    phases = [ProbeSize(divide_by=4, num_accumulation_steps=1)]
    probe = Probe(phases, None, num_steps=1, num_noise_steps=0, step_budget_s=9.0)
    with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
        StandIn(probe).run(str(script), "train")
    assert words in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("own", "step", "workers", "words"),
    [
        (1, 5, 4, "this worker's share is 1 on 4 workers. Give job.batches(..., drop_last=True)"),
        (1, 1, 4, "whose last batch has at least 8; a GroupNorm"),
        (3, 32, 1, "one worker computes all 3, and it is cut into micro-batches. Give job.batches"),
        (1, 32, 32, "a batch_size of at least 64, or train with fewer workers"),
    ],
)
def test_the_advice_has_the_numbers(own: int, step: int, workers: int, words: str) -> None:
    share = StepShare(
        micro_batch=1, own=own, step=step, batch_size=32, num_workers=workers, epoch=101
    )
    error = ValueError("Expected more than 1 value per channel when training, got input size")
    assert words in single_sample_advice(error, share)
    assert single_sample_advice(ValueError("shapes differ"), share) == ""


# -- seeds ---------------------------------------------------------------------------------------


SPLIT = """
import os, random, sys
import numpy as np, torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

np.random.rand(int(os.environ.get("DRAWS", 0)))

def train(job):
    train_rows, held_out = random_split(TensorDataset(torch.ones(50, 2)), [40, 10])
    drawn = held_out.indices, np.random.permutation(9).tolist(), random.random()
    with open(os.environ["DRAWN"], "a") as file:
        print(drawn, file=file)
    model = job.model(lambda: nn.Linear(2, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    for (x,) in job.batches(train_rows, batch_size=16, drop_last=True, sampler=range(40)):
        if job.step(model(x).mean()):
            print("step", len(x), job.epoch)

if __name__ == "__main__":
    import supple
    supple.run(train)
"""


def test_splits_are_equal_in_every_run_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, drawn = tmp_path / "split.py", tmp_path / "drawn"
    script.write_text(SPLIT)
    monkeypatch.setenv("DRAWN", str(drawn))
    for seed in (5, 6):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        monkeypatch.setenv("DRAWS", str(seed))
        StandIn(LayerProbe()).run(str(script), "train")
    assert len(set(drawn.read_text().splitlines())) == 1


@pytest.mark.slow
def test_a_script_started_by_python_has_the_same_split_and_drops_its_last_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, drawn = tmp_path / "split.py", tmp_path / "drawn"
    script.write_text(SPLIT)
    monkeypatch.setenv("DRAWN", str(drawn))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["step 16 0", "step 16 1"]
    StandIn(LayerProbe()).run(str(script), "train")
    first, second = drawn.read_text().splitlines()
    assert first == second


def test_workers_that_joined_draw_different_numbers_each() -> None:
    drawn: dict[str, list[tuple[float, float, float]]] = {}

    def train(job: Job) -> None:
        model = job.model(lambda: nn.Linear(4, 1))
        job.optimizer(torch.optim.SGD, lr=0.1)
        for (x,) in job.batches(DATA, batch_size=8, micro_batch_size=4):
            if job.generation:
                now = float(torch.rand(())), float(np.random.rand()), random.random()
                drawn.setdefault(str(job.rank), []).append(now)
            job.step(model(x).square().mean())

    world = World("reseeded", train)
    try:
        world.start("a")
        world.form(1, ["a"])
        world.finished(["a"])
    finally:
        world.close()
    (numbers,) = drawn.values()
    kinds = list(zip(*numbers, strict=True))
    assert [len(set(kind)) for kind in kinds] == [len(numbers)] * 3
    fresh = np.random.RandomState(0).rand(len(numbers)).tolist()
    assert not set(fresh) & set(kinds[1]), "the stream before the loop is not that of the loop"
