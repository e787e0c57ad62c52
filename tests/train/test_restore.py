"""A job that begins with a checkpoint: what does not fit is refused, what was damaged is passed
over."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from supple.core.types import CheckpointPassedOver
from supple.train.checkpoint.store import CheckpointRefused, CheckpointStore
from supple.train.job import Job
from tests.train.world import World


class Memory:
    """What a script keeps. `size` must be that of the state it is given."""

    def __init__(self, size: int) -> None:
        self.values = [0] * size

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["values"]) != len(self.values):
            raise IndexError(f"{len(state['values'])} values for {len(self.values)}")
        self.values = state["values"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """A training script, and how it differs from the one that wrote the checkpoint."""

    optimizer: Any = torch.optim.AdamW
    num_features: int = 3
    num_samples: int = 40
    kept: int = 4
    shards: bool = False

    def __call__(self, job: Job) -> None:
        model = job.model(lambda: nn.Linear(self.num_features, 1))
        job.optimizer(self.optimizer, lr=0.01)
        job.keep("memory", Memory(self.kept))
        x = torch.ones(self.num_samples, self.num_features)
        data: Any = [list(zip(x, x[:, :1], strict=True)).__iter__] if self.shards else None
        data = data or TensorDataset(x, x[:, :1])
        for a, b in job.batches(data, batch_size=8, epochs=2):
            job.step(F.mse_loss(model(a), b))


@pytest.fixture
def worlds() -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def trained(worlds: list[World], folder: Path) -> Path:
    """The checkpoint that a run of the script left."""
    world = World("writes", Script(), folder, max_steps=4)
    worlds.append(world)
    world.start("a")
    world.form(1, ["a"])
    world.finished(["a"])
    (path,) = CheckpointStore(folder).saved()
    return path


def refusal(worlds: list[World], script: Script, path: Path) -> str:
    """Why a job that was told to resume from `path` refuses it."""
    world = World("resumes", script, path.parent, resume=str(path))
    worlds.append(world)
    world.start("x")
    world.form(1, ["x"], restore=str(path))
    with pytest.raises(CheckpointRefused) as caught:
        world.finished(["x"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(num_features=5), ["of another model", "weight is [1, 3]", "[1, 5] torch.float32"]),
        (
            Script(optimizer=torch.optim.SGD),
            [
                "the optimizer was AdamW, and is SGD; what it",
                "--allow-changes optimizer",
            ],
        ),
        (
            Script(num_samples=24),
            ["the dataset had 40 samples, and has 24; samples would", "--allow-changes data"],
        ),
        (Script(shards=True), ["does not fit this script"]),
        (Script(kept=7), ["does not fit this script", "IndexError: 4 values for 7"]),
    ],
)
def test_what_only_a_worker_can_know_is_refused_by_name(
    worlds: list[World], tmp_path: Path, script: Script, words: list[str]
) -> None:
    path = trained(worlds, tmp_path)
    told = refusal(worlds, script, path)
    for word in [str(path), *words, "without --resume"]:
        assert word in told


def strange(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    """A checkpoint whose sums are right and whose state is not what Supple writes."""

    def save(path: Path) -> Path:
        payload = torch.load(path / "state.pt", weights_only=True)
        signature = [
            ["param/weight", [1, 3], "torch.float32"],
            ["param/bias", [1], "torch.float32"],
        ]
        change(payload)
        return CheckpointStore(path.parent).save(4, payload, {"signature": signature})

    return save


@pytest.mark.parametrize(
    "save",
    [
        strange(lambda payload: payload.clear()),
        strange(lambda payload: payload.update(description=[1, 2])),
        strange(lambda payload: payload["tensors"].pop()),
        strange(lambda payload: payload["description"].pop("scalars")),
        strange(lambda payload: payload["description"]["scalars"].update(step="ten")),
        strange(lambda payload: payload["description"]["scalars"].update(step=-5)),
        strange(lambda payload: payload["description"]["scalars"].update(step=10**30)),
        strange(lambda payload: payload["description"]["scalars"].update(position={})),
        strange(lambda payload: payload["description"]["groups"].append({})),
        strange(lambda payload: payload["description"].update(extra={"9": {"x": 1}})),
        strange(
            lambda payload: payload["description"]["tensors"][-1].__setitem__(0, "optimizer/7/x")
        ),
        strange(lambda payload: payload["description"]["kept"].update(memory=3)),
    ],
)
def test_a_state_that_supple_did_not_write_is_refused(
    worlds: list[World], tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    path = save(trained(worlds, tmp_path))
    assert f"the checkpoint {path} does not fit this script" in refusal(worlds, Script(), path)


def test_a_checkpoint_damaged_while_the_job_ran_gives_way_to_the_last_good_one(
    worlds: list[World], tmp_path: Path
) -> None:
    good = trained(worlds, tmp_path)
    bad = CheckpointStore(tmp_path).save(12, {"x": 1}, {})
    os.truncate(bad / "state.pt", 10)
    world = World("recovers", Script(), tmp_path)
    worlds.append(world)
    world.start("x", "y")
    world.form(7, ["x", "y"], restore=str(bad))
    assert world.formed(7, ["x", "y"]) == [4, 4]
    told = world.wait("x", CheckpointPassedOver)
    assert (told.path, told.step) == (str(good), 4)
    assert f"the checkpoint {bad} is corrupt: state.pt" in told.reason


def test_with_no_good_one_left_a_damaged_checkpoint_is_refused(
    worlds: list[World], tmp_path: Path
) -> None:
    path = trained(worlds, tmp_path)
    os.truncate(path / "state.pt", 10)
    world = World("gives-up", Script(), tmp_path)
    worlds.append(world)
    world.start("x")
    world.form(7, ["x"], restore=str(path))
    with pytest.raises(CheckpointRefused, match="No good one is beside it"):
        world.finished(["x"])


def test_the_checkpoint_that_was_asked_for_is_never_exchanged_for_another(
    worlds: list[World], tmp_path: Path
) -> None:
    trained(worlds, tmp_path)
    bad = CheckpointStore(tmp_path).save(12, {"x": 1}, {})
    os.truncate(bad / "state.pt", 10)
    assert "A good one is of step 4" in refusal(worlds, Script(), bad)
