"""A resumed run is the same run, or what has changed is allowed, and the new settings are taken."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import supple
from supple.core.spec import TrainSpec
from supple.train.checkpoint.folder import CheckpointError, CheckpointRefused
from supple.train.checkpoint.store import CheckpointStore
from supple.train.job import Job
from supple.train.state.optimizers import params_of
from supple.train.state.same_run import data_identity

_random = torch.Generator().manual_seed(2)
X, Y = torch.randn(40, 3, generator=_random), torch.randn(40, 1, generator=_random)


class Printed(TensorDataset):
    """A dataset with a fingerprint, as those of Hugging Face have."""

    def __init__(self, fingerprint: str, num_samples: int = 40) -> None:
        super().__init__(X[:num_samples], Y[:num_samples])
        self._fingerprint = fingerprint


class Counting(torch.optim.SGD):
    """Counts its steps in its parameter group, as Prodigy and schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float, k: int = 0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)
        self.param_groups[0]["k"] = k

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.param_groups[0]["k"] += 1


class Script:
    def __init__(
        self,
        *,
        data: Any = None,
        optimizer: Any = torch.optim.AdamW,
        wrap: Any = lambda model: model,
        **settings: Any,
    ) -> None:
        self.data = TensorDataset(X, Y) if data is None else data
        self._optimizer, self._wrap, self._settings = optimizer, wrap, settings
        self.seen: list[Tensor] = []

    def __call__(self, job: Job) -> None:
        self.model = job.model(lambda: self._wrap(nn.Linear(3, 1)))
        self.optimizer = job.optimizer(self._optimizer, **({"lr": 0.01} | self._settings))
        for x, y in job.batches(self.data, batch_size=8, epochs=2):
            if job.is_leading and not self.seen:
                self.settings = {
                    key: value
                    for key, value in self.optimizer.param_groups[0].items()
                    if key != "params"
                }
                state = self.optimizer.state.get(params_of(self.optimizer)[0], {})
                self.state = copy.deepcopy(dict(state))
                self.weights = [p.detach().clone() for p in self.model.parameters()]
            if job.is_leading:
                self.seen.append(x)
            job.step(F.mse_loss(self.model(x), y))


def first(folder: Path, script: Script, **spec: Any) -> Path:
    """The checkpoint after seven steps, two of the second epoch."""
    store = CheckpointStore(folder)
    job = Job(TrainSpec(name="first", script="", max_steps=7, **spec), checkpoints=store)
    script(job)
    found = store.latest()
    assert found is not None and found.step == 7
    return found.path


def resume(path: Path, script: Script, **spec: Any) -> Job:
    job = Job(
        TrainSpec(name="first", script="", resume=str(path), **spec),
        checkpoints=CheckpointStore(path.parent),
    )
    script(job)
    return job


def test_the_scripts_new_settings_win_over_the_checkpoints(tmp_path: Path) -> None:
    path = first(tmp_path, Script(weight_decay=0.1, betas=(0.8, 0.9)))
    again = Script(weight_decay=0.3, betas=(0.8, 0.9), lr=0.002)
    assert resume(path, again).step_count == 10
    assert again.settings["weight_decay"] == 0.3
    assert tuple(again.settings["betas"]) == (0.8, 0.9)
    assert again.optimizer.param_groups[0]["lr"] == 0.002
    assert float(again.state["step"]) == 7.0


def test_a_group_that_the_optimizer_changes_goes_on_where_it_was(tmp_path: Path) -> None:
    path = first(tmp_path, Script(optimizer=Counting))
    again = Script(optimizer=Counting, weight_decay=0.5)
    resume(path, again)
    assert (again.settings["k"], again.settings["weight_decay"]) == (7, 0.5)
    assert again.optimizer.param_groups[0]["k"] == 10


def test_another_optimizer_begins_anew_where_that_is_allowed(tmp_path: Path) -> None:
    one = Script(optimizer=torch.optim.SGD, momentum=0.9)
    path = first(tmp_path, one)
    with pytest.raises(CheckpointRefused, match=r"optimizer was SGD, and is AdamW; .* optimizer"):
        resume(path, Script())
    again = Script()
    assert resume(path, again, allow_changes=("optimizer",)).step_count == 10
    assert again.state == {}
    assert [w.equal(p) for w, p in zip(again.weights, one.model.parameters(), strict=True)]
    assert float(again.optimizer.state[params_of(again.optimizer)[0]]["step"]) == 3.0


def test_other_data_is_refused_and_begins_its_epoch_anew_where_it_is_allowed(
    tmp_path: Path,
) -> None:
    path = first(tmp_path, Script())
    other = TensorDataset(X[:32], Y[:32])
    with pytest.raises(CheckpointRefused, match=r"had 40 samples, and has 32; .*-changes data"):
        resume(path, Script(data=other))
    again = Script(data=other)
    job = resume(path, again, allow_changes=("data",))
    assert job.step_count == 7 + 4
    assert sorted(torch.cat(again.seen)[:, 0].tolist()) == sorted(X[:32, 0].tolist())


def test_a_fingerprint_that_differs_is_other_data(tmp_path: Path) -> None:
    path = first(tmp_path, Script(data=Printed("one")))
    with pytest.raises(CheckpointRefused, match="the dataset has another fingerprint"):
        resume(path, Script(data=Printed("two")))
    assert resume(path, Script()).step_count == 10, "one without a fingerprint may be the same"


def test_the_identity_of_data_is_its_size_and_its_fingerprint() -> None:
    assert data_identity(TensorDataset(X)) == {"size": 40, "fingerprint": None}
    assert data_identity(Printed("p", 8)) == {"size": 8, "fingerprint": "p"}
    assert data_identity([lambda: iter(X), lambda: iter(Y)])["size"] == 2
    assert data_identity(lambda: iter(X))["size"] == 1


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here"), [(compiled, None), (None, compiled)])
def test_weights_of_a_compiled_model_load_into_a_plain_one_and_back(
    tmp_path: Path, there: Any, here: Any
) -> None:
    one = Script(**({"wrap": there} if there else {}))
    path = first(tmp_path, one)
    again = Script(**({"wrap": here} if here else {}))
    assert resume(path, again).step_count == 10
    for wrap in (lambda model: model, compiled):
        model = wrap(nn.Linear(3, 1))
        assert supple.load_weights(model, path) == 7
        for mine, theirs in zip(model.parameters(), again.weights, strict=True):
            assert mine.equal(theirs)


def test_one_of_several_models_loads_by_its_name(tmp_path: Path) -> None:
    models: list[nn.Module] = []

    def train(job: Job) -> None:
        one = job.model(lambda: nn.Linear(3, 1), name="one")
        other = job.model(lambda: nn.BatchNorm1d(3), name="other")
        job.optimizer(torch.optim.SGD, lr=0.1)
        for x, y in job.batches(TensorDataset(X, Y), batch_size=8):
            job.step(F.mse_loss(one(other(x)), y))
        models.extend([one, other])

    store = CheckpointStore(tmp_path)
    train(Job(TrainSpec(name="several", script=""), checkpoints=store))
    one, other = nn.Linear(3, 1), nn.BatchNorm1d(3)
    assert supple.load_weights(one, tmp_path, name="one") == 5
    assert supple.load_weights(other, tmp_path, name="other") == 5
    assert one.weight.equal(models[0].weight)
    assert torch.equal(other.running_mean, models[1].running_mean)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="another model"):
        supple.load_weights(one, tmp_path, name="other")
