"""Measure a model's layers on one worker, for planning where to cut it into pipeline stages."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from supple.core.layouts.stages import MeasuredLayer
from supple.core.training.memory import TracedMemory
from supple.train.data.loader import MicroBatch
from supple.train.probes.stand_in import StandIn
from supple.train.recipe import Recipe
from supple.train.start.script import PLAIN, Start
from supple.train.state.optimizers import name_of
from supple.train.step.engine import TrainingError

_WARM_UP, _STEPS = 2, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Measurements of the layers of a script's model on one worker."""

    layers: tuple[MeasuredLayer, ...]
    """In the order they are called."""
    base_batch_size: int
    base_lr: float
    total_samples: int
    epochs: int
    optimizer_name: str


def measure_layers(
    script: str, function: str, traces: Sequence[TracedMemory], start: Start = PLAIN
) -> LayerReport:
    """Measure the time of every layer at the script's batch and at half of it.

    The backward pass is timed as a whole and divided among the layers like the forward pass. A
    layer is a child of the model, or of a `ModuleList` or `Sequential` in it. `traces` (largest
    first) give the bytes. Raises `TrainingError` for a model that calls a layer twice."""
    probe = LayerProbe()
    if problem := StandIn(probe).run(script, function, start=start):
        raise TrainingError(problem)
    return probe.report_made(traces)


@dataclass(slots=True)
class _Seen:
    """One layer's forward times (s) by micro-batch size, and its output's size."""

    forward_s: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    output_bytes: int = 0
    began: float = 0.0


@final
class LayerProbe:
    """An instrument that times the layers of the model on one repeated batch."""

    def __init__(self) -> None:
        self._layers: list[nn.Module] = []
        self._seen: dict[int, _Seen] = {}
        self._order: list[int] = []
        self._size = 0
        self._sizes: list[int] = []
        self._backward_s: dict[int, list[float]] = {}

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        options, self._recipe = recipe.batches, recipe
        options = replace(options, num_loader_processes=0)
        loader = options.loader(recipe.seed, to_measure=True)
        known = loader.samples_total
        self._total = known or options.batch_size
        largest = min(
            options.micro_batch_size or options.batch_size,
            known // options.epochs if known else options.batch_size,
        )
        self._epochs = options.epochs if known else 1
        self._sizes = sorted({largest, max(1, largest // 2)}, reverse=True)
        self._layers = _layers(recipe.model)
        for layer in self._layers:
            self._seen[id(layer)] = _Seen()
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)
        for size in self._sizes:
            self._size = size
            loader.place(loader.position, 0, 1, size, size)
            batch = next(iter(loader.feed()))
            for step in range(_WARM_UP + _STEPS):
                self._keeps = step >= _WARM_UP
                self._order = []
                yield batch

    def step(
        self,
        loss: Tensor,
        micro: MicroBatch,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
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
        (optimizer or self._recipe.optimizer).step()
        self._recipe.optimizer.zero_grad()
        return True

    def report_made(self, traces: Sequence[TracedMemory]) -> LayerReport:
        first = traces[0]
        by_id = {id(layer): layer for layer in self._layers if id(layer) in self._order}
        large, small = self._sizes[0], self._sizes[-1]
        whole = {size: sum(self._forward(key, size) for key in by_id) for size in self._sizes}
        back = {size: _median(self._backward_s[size]) / whole[size] for size in self._sizes}
        outputs = sum(seen.output_bytes for seen in self._seen.values()) or 1
        per_sample = (first.peak_bytes - first.state_bytes) / first.micro_batch_size
        num_parameters = sum(param.numel() for param in self._recipe.model.parameters())
        # Parameters outside all layers are counted in the first layer.
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
        recipe = self._recipe
        return LayerReport(
            layers=tuple(found),
            base_batch_size=recipe.batches.batch_size,
            base_lr=recipe.rate.base_lr,
            total_samples=self._total,
            epochs=self._epochs,
            optimizer_name=name_of(recipe.optimizer),
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
    """Return the model's children, or theirs for a `ModuleList` or `Sequential`."""
    found: list[nn.Module] = []
    for child in model.children() if list(model.children()) else [model]:
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += _layers(child)
        else:
            found.append(child)
    return found


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
