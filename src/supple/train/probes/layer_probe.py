"""Measures a model layer by layer on one worker, for planning where to cut it into stages."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from supple.core.layouts.stages import MeasuredLayer
from supple.core.training.memory import TracedMemory
from supple.train.arguments import check_batches, check_rate
from supple.train.data.loader import make_loader
from supple.train.script import run
from supple.train.step.engine import TrainingError

_WARM_UP, _STEPS = 2, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one worker measured of a script's model."""

    layers: tuple[MeasuredLayer, ...]
    """In the order they are called."""
    base_batch_size: int
    base_lr: float
    total_samples: int
    epochs: int
    optimizer_name: str


class _Complete(BaseException):
    """Unwinds the user's function when everything is measured. Not an error."""


def measure_layers(script: str, function: str, traces: Sequence[TracedMemory]) -> LayerReport:
    """Forward times of every layer at the script's batch and at half of it; the backward pass,
    which is timed as a whole, is divided among the layers like the forward pass. A layer is a child
    of the model, or of a `ModuleList` or `Sequential` in it. `traces` (largest first) tell the
    bytes. Raises `TrainingError` for a model that calls a layer twice."""
    probe = _LayerProbe()
    try:
        run(script, function, probe)
    except _Complete:
        return probe.report_made(traces)
    raise TrainingError(
        f"{function}(job) in {script} returned without taking a batch: loop over job.batches(...)."
    )


@dataclass(slots=True)
class _Seen:
    """One layer's times and outputs, by micro-batch size."""

    forward_s: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    output_bytes: int = 0
    began: float = 0.0


@final
class _LayerProbe:
    """Looks like a `Job` to a training function."""

    rank, world_size, generation, step_count, epoch = 0, 1, 0, 0, 0

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._seen: dict[int, _Seen] = {}
        self._order: list[int] = []
        self._size = 0
        self._sizes: list[int] = []
        self._backward_s: dict[int, list[float]] = {}

    def model(self, build: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        self._model = build()
        self._layers = _layers(self._model)
        for layer in self._layers:
            self._seen[id(layer)] = _Seen()
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)
        return self._model

    def optimizer(
        self, cls: Callable[..., Optimizer], *, lr: float, schedule: Any = None, **options: Any
    ) -> Optimizer:
        check_rate(lr)
        params = [param for param in self._model.parameters() if param.requires_grad]
        self._optimizer, self._lr = cls(params, lr=lr, **options), lr
        return self._optimizer

    def keep(self, name: str, thing: Any) -> None:
        return

    def report(self, **metrics: Any) -> None:
        return

    def batches(
        self,
        dataset: Any,
        *,
        batch_size: int,
        epochs: int = 1,
        shuffle: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        micro_batch_size: int | None = None,
    ) -> Iterator[Any]:
        check_batches(batch_size=batch_size, epochs=epochs, micro_batch_size=micro_batch_size)
        loader = make_loader(
            dataset, epochs=epochs, shuffle=shuffle, seed=0, collate_fn=collate_fn, num_workers=0
        )
        known = loader.samples_total
        self._batch_size, self._total = batch_size, known or batch_size
        largest = min(micro_batch_size or batch_size, known // epochs if known else batch_size)
        self._epochs = epochs if known else 1
        self._sizes = sorted({largest, max(1, largest // 2)}, reverse=True)
        for size in self._sizes:
            self._size = size
            loader.place(loader.position, 0, 1, size, size)
            batch = next(iter(loader.feed())).data
            for step in range(_WARM_UP + _STEPS):
                self._keeps = step >= _WARM_UP
                self._order = []
                yield batch
        raise _Complete

    def step(self, loss: Tensor, *, clip_norm: float | None = None) -> bool:
        called = len(set(self._order))
        if called < len(self._order) or not called:
            raise TrainingError(
                f"{called} layers of the model were called {len(self._order)} times in one forward "
                "pass: a model is cut into stages only where none is called twice."
            )
        began = time.perf_counter()
        loss.backward()
        if self._keeps:
            self._backward_s.setdefault(self._size, []).append(time.perf_counter() - began)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return True

    def report_made(self, traces: Sequence[TracedMemory]) -> LayerReport:
        first = traces[0]
        by_id = {id(layer): layer for layer in self._layers if id(layer) in self._order}
        large, small = self._sizes[0], self._sizes[-1]
        whole = {size: sum(self._forward(key, size) for key in by_id) for size in self._sizes}
        back = {size: _median(self._backward_s[size]) / whole[size] for size in self._sizes}
        outputs = sum(seen.output_bytes for seen in self._seen.values()) or 1
        per_sample = (first.peak_bytes - first.state_bytes) / first.micro_batch_size
        num_parameters = sum(param.numel() for param in self._model.parameters())
        # What is used without being called, as a bare weight, goes with the first layer.
        called = sum(param.numel() for layer in by_id.values() for param in layer.parameters())
        extra = num_parameters - called
        found: list[MeasuredLayer] = []
        for key in self._order:
            seen, layer = self._seen[key], by_id[key]
            at_large = self._forward(key, large) * (1.0 + back[large])
            at_small = self._forward(key, small) * (1.0 + back[small])
            slope = max(0.0, (at_large - at_small) / max(1, large - small))
            own = sum(param.numel() for param in layer.parameters()) + (0 if found else extra)
            found.append(
                MeasuredLayer(
                    host_s=max(0.0, at_large - slope * large),
                    device_s_per_sample=slope,
                    num_parameters=own,
                    output_bytes_per_sample=max(1, seen.output_bytes // large),
                    state_bytes=first.state_bytes * own / num_parameters,
                    activation_bytes_per_sample=per_sample * seen.output_bytes / outputs,
                )
            )
        return LayerReport(
            layers=tuple(found),
            base_batch_size=self._batch_size,
            base_lr=self._lr,
            total_samples=self._total,
            epochs=self._epochs,
            optimizer_name=type(self._optimizer).__name__,
        )

    def _forward(self, key: int, size: int) -> float:
        return _median(self._seen[key].forward_s[size])

    def _enter(self, layer: nn.Module, _args: Any) -> None:
        self._seen[id(layer)].began = time.perf_counter()

    def _leave(self, layer: nn.Module, _args: Any, output: Any) -> None:
        seen = self._seen[id(layer)]
        self._order.append(id(layer))
        if self._keeps:
            took = time.perf_counter() - seen.began
            seen.forward_s.setdefault(self._size, []).append(took)
        if self._size == self._sizes[0]:
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            seen.output_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Children of the model; a `ModuleList` or `Sequential` stands for its own children."""
    found: list[nn.Module] = []
    for child in model.children() if list(model.children()) else [model]:
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += _layers(child)
        else:
            found.append(child)
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
