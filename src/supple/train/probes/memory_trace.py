"""Trace the peak memory of a script's training step on fake tensors, without computing it.

Fake tensors have shapes and no data; torch's memory tracker counts their bytes.

A model far larger than this machine can be traced, on a machine without an accelerator.
"""

import logging
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor, nn
from torch._subclasses.fake_tensor import (  # no public name
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim import SGD, AdamW, Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from supple.core.spec import SpecError
from supple.core.training.memory import TracedMemory
from supple.train.data.loader import Loader, MicroBatch
from supple.train.probes.stand_in import StandIn
from supple.train.probes.traceable import ReadableValues, traceable_habits
from supple.train.recipe import Recipe
from supple.train.start.script import PLAIN, Start, user_traceback
from supple.train.state.optimizers import members_of
from supple.train.step.engine import TrainingError

_TORCHS_OWN_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_STEPS = 2
"""Traced steps per size: in the second one the optimizer's state exists, as in all later ones."""
_FEW = 4
"""Samples; a smaller micro-batch is traced at its double too, as it has no useful fractions."""
_FACTOR, _MOST = 4, 1024
"""If the peak does not grow with the batch, `_FACTOR` times the size is traced next, up to `_MOST`
samples, which are read for it."""

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adam": (AdamW, {}),
    "sgd-momentum": (SGD, {"momentum": 0.9}),
    "sgd": (SGD, {}),
}
"""Optimizers that can replace the script's own. torch's Adafactor reads values: not traceable."""


class TraceFailed(Exception):
    """The script cannot be traced; the message is complete."""


_STEP = "the step"


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedJob:
    """The result of a memory trace of a script."""

    traces: tuple[TracedMemory, ...]
    """At least one; the largest micro-batch first."""
    batch_size: int
    dataset_size: int | None
    """None: not known without reading the data."""
    untraced: tuple[tuple[int, str], ...]
    """Micro-batch sizes at which the script failed, each with the last line of the error."""


def trace_memory(
    script: str,
    function: str,
    *,
    recompute: bool = False,
    optimizer: str | None = None,
    verbose: bool = False,
    start: Start = PLAIN,
    on_size: Callable[[int], None] = lambda _size: None,
) -> TracedJob:
    """Trace peak bytes at the script's micro-batch, at a half, a quarter and an eighth of it, and
    at larger sizes if these do not show the bytes per sample.

    `recompute` checkpoints the activations of every block: each entry of a `ModuleList` or
    `Sequential`. `optimizer`, a key of `OPTIMIZERS`, replaces the script's. `verbose` keeps whole
    tracebacks. `on_size` is told every micro-batch size before it is traced. Raises `SpecError`
    before any work, `TraceFailed` if the script cannot be traced at its own micro-batch."""
    tracer = MemoryTracer(recompute, optimizer, on_size)
    untraced: list[tuple[int, str]] = []
    num_found = 0
    while (tracer.pending or not tracer.found) and (
        problem := _attempt(tracer, script, function, verbose, start)
    ):
        if not tracer.found:
            raise TraceFailed(problem)
        # A loop that is left early is run again, as long as each run traces another size.
        if _NEEDED not in problem or len(tracer.found) == num_found:
            untraced.append((tracer.pending.pop(0), problem.splitlines()[-1]))
        num_found = len(tracer.found)
    return TracedJob(
        traces=tuple(sorted(tracer.found, key=lambda trace: -trace.micro_batch_size)),
        batch_size=tracer.batch_size,
        dataset_size=tracer.dataset_size,
        untraced=tuple(untraced),
    )


_NEEDED = f"the {_STEPS} batches that a trace takes"


def _attempt(
    tracer: "MemoryTracer", script: str, function: str, verbose: bool, start: Start
) -> str:
    """Trace the pending sizes; return why some could not be traced, else an empty text."""
    job = StandIn(tracer, build=tracer.build, make=tracer.make)
    before = _TORCHS_OWN_LOG.level
    if not verbose:  # torch logs the errors that it raises; they are reported here
        _TORCHS_OWN_LOG.setLevel(logging.CRITICAL)
    try:
        with traceable_habits():
            problem = job.run(script, function, _NEEDED, start)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        problem = (
            f"{script} reads a tensor's value while it trains ({error}), and a trace computes no "
            "values. Take nonzero(), masks and the like out of the loop, or measure with `supple "
            "plan`."
        )
    except (TrainingError, SpecError) as error:
        problem = str(error)
    except Exception as error:
        problem = f"{script} failed while it was traced:\n{user_traceback(error, whole=verbose)}"
    finally:
        _TORCHS_OWN_LOG.setLevel(before)
    return problem if tracer.pending or not tracer.found else ""


@final
class MemoryTracer:
    """An instrument that counts the bytes of `_STEPS` steps at several sizes, on fake tensors."""

    def __init__(
        self,
        recompute: bool,
        optimizer: str | None,
        on_size: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self._on_size = on_size
        self.found: list[TracedMemory] = []
        self.pending: list[int] = []
        """Sizes still to trace, the current one first."""
        self.batch_size = 0
        self.dataset_size: int | None = None
        self._instead = None if optimizer is None else OPTIMIZERS[optimizer]
        self._recompute = recompute
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def build(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build the script's model from fake tensors."""
        with self._fake:
            model = build()
        if self._recompute:
            blocks = _blocks(model)
            apply_activation_checkpointing(
                model,
                checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, preserve_rng_state=False),
                check_fn=lambda module: id(module) in blocks,
            )
        return model

    def make(
        self, cls: Callable[..., Optimizer], params: Iterable[Tensor], lr: float, **options: Any
    ) -> Optimizer:
        """Make the script's optimizer, or the requested replacement."""
        if self._instead is not None:
            cls, options = self._instead
        with self._fake:
            return cls(params, lr=lr, **options)

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        options, self._optimizer = recipe.batches, recipe.optimizer
        options = replace(options, epochs=1, num_loader_processes=0)
        loader = options.loader(recipe.seed, to_measure=True)
        if not self.found:
            self.batch_size, self.dataset_size = options.batch_size, loader.samples_total
            self.pending = _sizes(options.micro_batch_size or options.batch_size, self.dataset_size)
        while self.pending:
            batch = _first(loader, self.pending[0])
            tracker = _Tracker()
            self._on_size(batch.num_samples)
            with self._fake, ReadableValues():
                tracker.track_external(recipe.model, *members_of(recipe.optimizer))
                with tracker:
                    for _ in range(_STEPS):
                        tracker.reset_mod_stats()
                        data = pytree.tree_map_only(Tensor, self._fake.from_tensor, batch.data)
                        yield replace(batch, data=data)
            if batch.num_samples < self.pending[0]:
                self.dataset_size = batch.num_samples  # iterable data that ended
            self.pending.pop(0)
            if batch.num_samples not in {trace.micro_batch_size for trace in self.found}:
                self.found.append(_account(recipe, batch.num_samples, tracker))
                self.pending = self.pending or _larger(self.found, self.dataset_size)

    def step(
        self,
        loss: Tensor,
        micro: MicroBatch,
        clip_norm: float | None,
        optimizer: Optimizer | None,
    ) -> bool:
        loss.backward()
        (optimizer or self._optimizer).step()
        # `GradientReducer` keeps the gradients, as views of flat buckets.
        self._optimizer.zero_grad(set_to_none=False)
        return True


@final
class _Tracker(MemTracker):
    """torch's tracker, which refuses a second call of a whole model in a step (a critic, two views
    of an image) and allows one of a part: here every model is part of the step."""

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        parents = self._mod_tracker.parents
        parents.add(_STEP)
        super()._pre_fw_hook(module, inputs)
        parents.discard(_STEP)


def _account(recipe: Recipe, size: int, tracker: MemTracker) -> TracedMemory:
    model, optimizer = recipe.model, recipe.optimizer
    peak = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values() if parts)
    params = list(model.parameters())
    blocks = _blocks(model)
    return TracedMemory(
        micro_batch_size=size,
        peak_bytes=peak,
        parameter_bytes=_bytes(params),
        gradient_bytes=_bytes([param for param in params if param.requires_grad]),
        optimizer_bytes=_bytes(
            value
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        largest_block_bytes=max(
            (_bytes(module.parameters()) for module in model.modules() if id(module) in blocks),
            default=_bytes(params),
        ),
    )


def _sizes(largest: int, dataset_size: int | None) -> list[int]:
    """Return the sizes to trace, the largest first: the script is known to run with it."""
    most = largest if dataset_size is None else min(largest, dataset_size)
    sizes = [most, *sorted({max(1, most // part) for part in (2, 4, 8)} - {most}, reverse=True)]
    if most < _FEW and (dataset_size is None or 2 * most <= dataset_size):
        sizes.append(2 * most)
    return sizes


def _larger(found: list[TracedMemory], dataset_size: int | None) -> list[int]:
    """Return a larger size to trace if the peak does not grow with the batch (the optimizer step
    sets it), and the dataset has so many samples, at most `_MOST`."""
    ordered = sorted(found, key=lambda trace: trace.micro_batch_size)
    size = _FACTOR * ordered[-1].micro_batch_size
    grows = len(ordered) > 1 and ordered[-1].peak_bytes > ordered[-2].peak_bytes
    return [] if grows or size > min(_MOST, dataset_size or _MOST) else [size]


def _first(loader: Loader, size: int) -> MicroBatch:
    """Return a real micro-batch; only its shapes and types are used."""
    with _disable_current_modes():
        loader.place(loader.position, 0, 1, size, size)
        return next(iter(loader.feed()))


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _blocks(model: nn.Module) -> set[int]:
    """Return ids of the outermost `ModuleList` and `Sequential` entries with parameters."""
    found: set[int] = set()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            holds = isinstance(module, nn.ModuleList | nn.Sequential)
            if holds and next(child.parameters(), None) is not None:
                found.add(id(child))
            else:
                visit(child)

    visit(model)
    return found
