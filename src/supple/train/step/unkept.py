"""`Unkept`: models and averages of weights that a script changes in its loop, and the job does not
have: a teacher, a target network, an average by hand.

The rehearsal's change of them would stay, and a worker that joins would begin with others. So they
belong into `job.keep`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from supple.train.recipe import BUILT
from supple.train.state.optimizers import params_of
from supple.train.state.train_state import TrainState
from supple.train.step.finite import TrainingError

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


@final
class Unkept:
    """Modules and averages of weights in the script's variables that the job does not have."""

    def __init__(self, frames: Sequence[FrameType], state: TrainState) -> None:
        variables = {name: of for frame in reversed(frames) for name, of in frame.f_locals.items()}
        self._state = state
        self._found: dict[str, Any] = {}
        self._before: dict[str, list[tuple[int, int, float]]] = {}
        for name, value in variables.items():
            _refuse_wrapper(name, value)
            for path, thing in _things(name, value):
                self._found[path] = thing
        self._found = {path: thing for path, thing in self._found.items() if self._own(thing)}
        self._before = {path: self._marks(thing) for path, thing in self._found.items()}

    def check(self, step: int = 1) -> None:
        """Raise `TrainingError` if one has changed since the loop began. It costs a pass over them,
        so it does nothing unless `step` is a power of two."""
        if step & (step - 1):
            return
        for path, thing in self._found.items():
            if self._marks(thing) != self._before[path]:
                raise TrainingError(
                    f"the loop changed {path}, a {type(thing).__name__} that the job neither "
                    "trains nor keeps: the rehearsal's change would stay, it would not be saved, "
                    "and a worker that joins would begin with another. Write "
                    f"job.keep({path.rpartition('.')[2]!r}, ...) before job.batches, with an "
                    "object that has state_dict and load_state_dict."
                )

    def _own(self, thing: Any) -> list[Tensor]:
        """Return the tensors that are not the job's; of a container, only if they may be averages
        of all weights."""
        known = _storages(self._state)
        own = [tensor for tensor in _tensors(thing) if _storage(tensor) not in known]
        if isinstance(thing, nn.Module):
            return [] if thing in BUILT else own
        shapes = {tensor.shape for tensor in own}
        weights = {param.shape for param in params_of(self._state.optimizer)}
        return own if weights <= shapes else []

    def _marks(self, thing: Any) -> list[tuple[int, int, float]]:
        return [(tensor.data_ptr(), tensor.numel(), _sum(tensor)) for tensor in self._own(thing)]


def _refuse_wrapper(name: str, value: Any) -> None:
    kinds = [kind.__name__ for kind in type(value).__mro__ if kind.__name__ in _WRAPPERS]
    if kinds:
        raise TrainingError(
            f"{name} is a {kinds[0]}: job.step sums the gradients over the workers itself, also "
            "while workers join and leave. Leave the wrapper out, and use what job.model returns."
        )


def _things(name: str, value: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Yield modules and containers of tensors in a variable, with their paths."""
    if isinstance(value, nn.Module) or _holds_tensors(value):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(item, nn.Module):
                yield f"{name}[{key!r}]", item
    elif depth > 0 and hasattr(value, "__dict__") and not _is_foreign(value):
        for key, item in vars(value).items():
            yield from _things(f"{name}.{key}", item, depth - 1)


def _is_foreign(value: Any) -> bool:
    module = type(value).__module__.partition(".")[0]
    return isinstance(value, Optimizer | type) or module in ("supple", "torch", "builtins")


def _holds_tensors(value: Any) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    is_container = isinstance(value, Mapping | list | tuple) and len(value) > 0
    return is_container and all(isinstance(item, Tensor) for item in items)


def _tensors(thing: Any) -> Iterable[Tensor]:
    if isinstance(thing, nn.Module):
        return [*thing.parameters(), *thing.buffers()]
    items = thing.values() if isinstance(thing, Mapping) else thing
    return [item for item in items if isinstance(item, Tensor)]


def _storages(state: TrainState) -> set[int]:
    kept = [thing.state_dict() for thing in state.kept.values()]
    saved = [
        value
        for values in kept
        if isinstance(values, Mapping)
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    inside = [tensor for values in kept for tensor in _in_values(values)]
    return {_storage(tensor) for tensor in (*state.tensors().values(), *saved, *inside)}


def _in_values(values: Any) -> list[Tensor]:
    items = values.values() if isinstance(values, Mapping) else ()
    return [tensor for item in items if _holds_tensors(item) for tensor in _tensors(item)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _sum(tensor: Tensor) -> float:
    """A number that changes with the values; NaN becomes one that equals itself."""
    with torch.no_grad():
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return float(flat.detach().sum(dtype=torch.float64).nan_to_num())
