"""`Optimizers`: several optimizers of one job, with the interface of one.

The train state, the rehearsal and the learning rates see their parameter groups and their states in
the order in which the script made them.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer


@final
class Optimizers:
    """At least two optimizers that share no parameter."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = list(members)
        self.state: MutableMapping[Any, Any] = _States(members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All parameter groups, in the order of the optimizers."""
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)


AnyOptimizer = Optimizer | Optimizers
"""The optimizer of a job, or its optimizers."""


def members_of(optimizer: AnyOptimizer) -> list[Optimizer]:
    """Return the optimizers of a job, in the script's order."""
    return optimizer.members if isinstance(optimizer, Optimizers) else [optimizer]


def name_of(optimizer: AnyOptimizer) -> str:
    """Return the name of the optimizer's class; of several, joined by "and"."""
    return " and ".join(type(member).__name__ for member in members_of(optimizer))


def params_of(optimizer: AnyOptimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in order."""
    return [param for group in optimizer.param_groups for param in group["params"]]


@final
class _States(MutableMapping[Any, Any]):
    """The states of all optimizers as one mapping; a parameter's state is its optimizer's."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members

    def __getitem__(self, key: Tensor) -> Any:
        for member in self._members:
            if key in member.state:
                return member.state[key]
        raise KeyError(key)

    def __setitem__(self, key: Tensor, value: Any) -> None:
        for member in self._members:
            if any(key is param for param in params_of(member)):
                member.state[key] = value
                return
        raise KeyError(key)

    def __delitem__(self, key: Tensor) -> None:
        for member in self._members:
            if key in member.state:
                del member.state[key]
                return
        raise KeyError(key)

    def __iter__(self) -> Iterator[Any]:
        return iter([key for member in self._members for key in member.state])

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)
