"""`Rehearsal`: undoes one trial step on a real batch, and checks that the state can be saved.

The step imports, allocates and warms up what the first real step needs, and shows which buffers the
forward pass changes. State that could not be saved is refused here, before the first step. After it
everything is as it was built, so a worker without a state has the initial one.
"""

import copy
import random
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from supple.train.checkpoint.folder import refuse_unsafe
from supple.train.own_steps import plain_attributes, refuse_state_in_attributes
from supple.train.state.names import named_params
from supple.train.state.optimizers import members_of, name_of
from supple.train.state.train_state import TrainState, private
from supple.train.step.engine import TrainingError

_IN_A_SETTING = "Give it to the optimizer as a plain value, or leave it out"
_IN_THE_OPTIMIZER = "Let the optimizer keep it as a tensor or a plain value"
_IN_STATE_DICT = "Convert it in its state_dict()"


def check_kept(name: str, thing: Any, others: Mapping[str, Any], *, in_loop: bool) -> None:
    """Raise `TrainingError` unless `thing` can be kept beside `others`. It must be known before the
    loop, so that the rehearsal can undo its changes."""
    if in_loop:
        raise TrainingError(
            f"job.keep({name!r}, ...) was called in the loop: put it before job.batches, so that "
            "what is kept is known before the first step."
        )
    missing = [
        method
        for method in ("state_dict", "load_state_dict")
        if not callable(getattr(thing, method, None))
    ]
    if missing:
        raise TrainingError(
            f"job.keep({name!r}, ...) was given a {type(thing).__name__} without "
            f"{' and '.join(missing)}: what is kept is saved and moved by these two methods. Give "
            "an object that has both."
        )
    if name in others and others[name] is not thing:
        raise TrainingError(
            f"job.keep({name!r}, ...) was called twice with different objects: only one of them "
            "would be saved. Give each its own name."
        )


@final
class Rehearsal:
    """A copy of a train state, made on construction and put back by `undo`.

    Raises `TrainingError` if something in the state could not be saved.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._refuse_what_cannot_be_saved()
        self._tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        optimizer = state.optimizer
        self._settings = [copy.deepcopy(_settings(group)) for group in optimizer.param_groups]
        self._optimizer_state = [(key, copy.deepcopy(of)) for key, of in optimizer.state.items()]
        self._kept = {name: _saved(name, thing) for name, thing in state.kept.items()}
        self._random_state = _random_state()
        self._attributes = [(one, plain_attributes(one)) for one in members_of(optimizer)]
        self._frozen = state.frozen()

    def undo(self) -> list[str]:
        """Restore the state and drop the gradients; return the names of buffers that had changed.

        They are found by value: a batch norm's forward pass does not raise the version counters of
        its buffers. Allocated memory stays with the state, for a state it receives. Raises
        `TrainingError` if the step has added something that could not be saved.
        """
        self._refuse_what_cannot_be_saved()
        for one, attributes in self._attributes:
            refuse_state_in_attributes(one, attributes)
        now = self._state.tensors()
        before = self._tensors
        other = [
            name for name in before if name not in now or now[name].shape != before[name].shape
        ]
        if other:
            raise TrainingError(
                f"the {other[0].replace('/', ' ')} had another shape before the first step, or is "
                "gone after it: what all workers share must keep its shape. Build it with its "
                "final shape."
            )
        changed = [name for name, tensor in before.items() if not _same(now[name], tensor)]
        with torch.no_grad():
            for name, tensor in before.items():
                now[name].copy_(tensor)
        optimizer = self._state.optimizer
        optimizer.state.clear()
        optimizer.state.update(self._optimizer_state)
        for group, before in zip(optimizer.param_groups, self._settings, strict=False):
            for key in [key for key in group if key != "params" and key not in before]:
                del group[key]
            group.update(before)
        optimizer.zero_grad(set_to_none=True)
        self._state.freeze(self._frozen)
        for name, before in self._kept.items():
            try:
                self._state.kept[name].load_state_dict(before)
            except Exception as error:
                raise TrainingError(
                    f"job.keep({name!r}, ...): load_state_dict() with the result of state_dict() "
                    f"raised {type(error).__name__}: {error}. A worker that joins, or resumes, "
                    "could not restore it. Correct the two methods."
                ) from error
        made = {name: tensor for name, tensor in now.items() if name.startswith("optimizer/")}
        self._state.spare = made | self._tensors
        _set_random_state(self._random_state)
        return [name.removeprefix("buffer/") for name in changed if name.startswith("buffer/")]

    def _refuse_what_cannot_be_saved(self) -> None:
        """Raise `TrainingError` for state that cannot be saved; run before and after the step."""
        optimizer = self._state.optimizer
        for number, group in enumerate(optimizer.param_groups):
            for key, value in _settings(group).items():
                where = f"the setting {key!r} of the optimizer's parameter group {number}"
                _refuse_unsafe(value, where, _IN_A_SETTING)
        names = {id(param): name for name, param in named_params(self._state.model).items()}
        for param, values in optimizer.state.items():
            if id(param) not in names:
                raise TrainingError(
                    f"the optimizer {name_of(optimizer)} keeps state under {param!r}, "
                    "which is not one of the model's parameters: only their state is saved "
                    "and moved to a worker that joins. Put it into the parameter groups."
                )
            for key, value in values.items():
                where = f"the optimizer's state {key!r} of {names[id(param)]}"
                _refuse_unsafe(value, where, _IN_THE_OPTIMIZER)
        for name, thing in self._state.kept.items():
            _saved(name, thing)


def _saved(name: str, thing: Any) -> Any:
    """Return a private copy of `thing.state_dict()`. Raises `TrainingError`."""
    try:
        value = thing.state_dict()
    except Exception as error:
        raise TrainingError(
            f"job.keep({name!r}, ...): its state_dict() raised {type(error).__name__}: {error}. "
            "It could be neither saved nor moved to a worker that joins. Correct it, or do not "
            "keep it."
        ) from error
    _refuse_unsafe(value, f"the state_dict() of job.keep({name!r}, ...)", _IN_STATE_DICT)
    return private(value)


def _refuse_unsafe(value: Any, where: str, advice: str) -> None:
    try:
        refuse_unsafe(value, where, advice)
    except (TypeError, RecursionError) as error:
        raise TrainingError(f"{error}.") from None


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return one.equal(other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _random_state() -> Any:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _set_random_state(state: Any) -> None:
    of_torch, of_numpy, of_python = state
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}
