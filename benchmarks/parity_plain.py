"""`Plain`: ordinary PyTorch behind the calls of a `Job`: what a training function of parity.py does
without Supple.

It has a DataLoader, `zero_grad`, `backward`, `clip_grad_norm_`, `LambdaLR` and `step`, in the order
in which everybody writes them, and nothing of Supple.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

Workers = Callable[[int], int]
"""The number of workers at a step."""


class Plain:
    """Trains on the whole batch. With `workers`, on the parts that so many workers would compute,
    one after another: gradients are accumulated, the buffers' changes averaged.

    `order`: the samples of every step, for a script whose order is random.
    """

    rank, world_size, generation, is_leading = 0, 1, 0, True

    def __init__(
        self,
        *,
        workers: Workers | None = None,
        order: Sequence[Sequence[int]] | None = None,
        max_steps: int | None = None,
    ) -> None:
        self.models: dict[str, nn.Module] = {}
        self.kept: dict[str, Any] = {}
        self.step_count = self.epoch = 0
        self._optimizers: list[Any] = []
        self._schedules: list[tuple[Any, Callable[[float], float]]] = []
        self._schedulers: list[Any] = []
        self._workers, self._order, self._max_steps = workers, order, max_steps
        self._part, self._num_parts, self._share = 0, 1, 1.0
        self._buffers: list[list[Tensor]] = []

    def model(self, build: Callable[[], nn.Module], *, name: str = "model") -> nn.Module:
        if not self.models:
            torch.manual_seed(0)
        self.models[name] = build()
        return self.models[name]

    def optimizer(
        self,
        cls: Any,
        *,
        lr: float,
        params: Any = None,
        model: nn.Module | None = None,
        schedule: Any = None,
        **options: Any,
    ) -> Any:
        model = model or self.whole
        made = cls(model.parameters() if params is None else params(model), lr=lr, **options)
        self._optimizers.append(made)
        if schedule is not None:
            self._schedules.append((made, schedule))
        return made

    def keep(self, name: str, thing: Any) -> None:
        self.kept[name] = thing

    def report(self, **metrics: Any) -> None: ...

    @property
    def whole(self) -> nn.Module:
        """The model; of several, a `ModuleDict` by name."""
        models = list(self.models.values())
        return models[0] if len(models) == 1 else nn.ModuleDict(self.models)

    def batches(self, dataset: Any, *, epochs: int = 1, **options: Any) -> Iterator[Any]:
        batches = self._batches(dataset, epochs, options)
        total = len(batches)
        if not self._schedulers:
            self._schedulers = [
                torch.optim.lr_scheduler.LambdaLR(made, lambda at, of=of: of(at / total))
                for made, of in self._schedules
            ]
        collate = options.get("collate_fn") or torch.utils.data.default_collate
        before, first = self.step_count, self.epoch
        for at, indices in enumerate(batches):
            self.epoch = first + at * epochs // total
            if self._max_steps is not None and self.step_count >= self._max_steps:
                return
            parts = [indices]
            if self._workers is not None:
                cut = torch.tensor(indices).tensor_split(self._workers(self.step_count))
                parts = [part.tolist() for part in cut if len(part)]
            self._num_parts, start = len(parts), self._state_of_buffers()
            self._buffers = []
            for self._part, part in enumerate(parts):
                self._share = len(part) / len(indices)
                self._set_buffers(start)
                yield collate([dataset[index] for index in part])
            self.step_count = before + at + 1  # where optimizers take turns, it counts here
        self.epoch = first + epochs

    def step(
        self,
        loss: Tensor,
        *,
        weight: Any = None,
        clip_norm: float | None = None,
        optimizer: Any = None,
    ) -> bool:
        stepped = [optimizer] if optimizer is not None else self._optimizers
        if self._part == 0:
            for one in stepped:
                one.zero_grad()
        (loss * self._share if self._num_parts > 1 else loss).backward()
        self._average_buffers()
        if self._part < self._num_parts - 1:
            return False
        if clip_norm is not None:
            groups = [group["params"] for one in stepped for group in one.param_groups]
            nn.utils.clip_grad_norm_([param for group in groups for param in group], clip_norm)
        for one in stepped:
            one.step()
        for scheduler in self._schedulers:
            if any(scheduler.optimizer is one for one in stepped):
                scheduler.step()
        self.step_count += optimizer is None
        return True

    def _batches(self, dataset: Any, epochs: int, options: Any) -> list[list[int]]:
        if self._order is not None:
            return [list(step) for step in self._order]
        cut = {key: options[key] for key in ("batch_size", "drop_last") if key in options}
        if "batch_sampler" in options:
            cut = {"batch_sampler": options["batch_sampler"]}
        loader = DataLoader(range(len(dataset)), collate_fn=list, **cut)  # type: ignore[arg-type]
        return [batch for _ in range(epochs) for batch in loader]

    # -- as several workers would ----------------------------------------------------------

    def _state_of_buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.whole.buffers()] if self._workers else []

    def _set_buffers(self, values: Sequence[Tensor]) -> None:
        for buffer, value in zip(self.whole.buffers(), values, strict=bool(values)):
            buffer.data.copy_(value)

    def _average_buffers(self) -> None:
        """After the last part: running statistics are averaged, others are the first part's."""
        if self._workers is None:
            return
        self._buffers.append([buffer * self._share for buffer in self.whole.buffers()])
        if self._part == self._num_parts - 1:
            for index, buffer in enumerate(self.whole.buffers()):
                if buffer.is_floating_point():
                    buffer.data.copy_(torch.stack([part[index] for part in self._buffers]).sum(0))
