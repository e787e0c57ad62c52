"""Peak memory of a script's training step without computing it: the same operations on fake
tensors, which have shapes and no data, counted by torch's own memory tracker.

A model far larger than this machine can be traced, on a machine without an accelerator.
"""

from collections.abc import Callable, Iterator
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

from supple.core.memory import TracedMemory
from supple.core.spec import SpecError
from supple.train.engine import TrainingError
from supple.train.loader import Loader, make_loader
from supple.train.script import load, user_traceback

_STEPS = 2
"""The second one finds the optimizer's state in place, as all later ones do."""


OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "adam": (AdamW, {}),
    "sgd-momentum": (SGD, {"momentum": 0.9}),
    "sgd": (SGD, {}),
}
"""What may stand in for a script's own. torch's Adafactor reads values, so it cannot be traced."""


class _TraceComplete(BaseException):
    """Unwinds the user's function when everything is traced. Not an error."""


class TraceFailed(Exception):
    """The script cannot be traced; the message is complete."""


def trace_memory(
    script: str, function: str, *, recompute: bool = False, optimizer: str | None = None
) -> list[TracedMemory]:
    """Peak bytes at the script's batch size, at a half, a quarter and an eighth of it, largest
    first. `recompute` checkpoints the activations of every block: each entry of a `ModuleList` or
    `Sequential`. `optimizer`, a key of `OPTIMIZERS`, replaces the script's. Raises `SpecError`
    before any work, `TraceFailed` if the script cannot be traced."""
    tracer = _Tracer(recompute, optimizer)
    try:
        load(script, function)(tracer)
    except _TraceComplete:
        return tracer.found
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise TraceFailed(
            f"{script} reads a tensor's value while it trains ({error}), and a trace computes no "
            "values. Take .item(), nonzero() and the like out of the loop (job.report takes "
            "tensors), or measure with `supple plan`."
        ) from None
    except (TrainingError, SpecError) as error:
        raise TraceFailed(str(error)) from None
    except Exception as error:
        raise TraceFailed(
            f"{script} failed while it was traced:\n{user_traceback(error)}"
        ) from None
    raise TraceFailed(
        f"{function}(job) in {script} returned without taking a batch: loop over job.batches(...)."
    )


@final
class _Tracer:
    """Looks like a `Job` to a training function."""

    rank, world_size, generation, step_count, epoch, lr = 0, 1, 0, 0, 0, 0.0

    def __init__(self, recompute: bool, optimizer: str | None) -> None:
        self.found: list[TracedMemory] = []
        self._instead = None if optimizer is None else OPTIMIZERS[optimizer]
        self._recompute = recompute
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._stepped = True

    def model(self, build: Callable[[], nn.Module]) -> nn.Module:
        with self._fake:
            model = build()
        if self._recompute:
            blocks = _blocks(model)
            apply_activation_checkpointing(
                model,
                checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, preserve_rng_state=False),
                check_fn=lambda module: id(module) in blocks,
            )
        self._model = model
        return model

    def optimizer(
        self, cls: Callable[..., Optimizer], *, lr: float, schedule: Any = None, **options: Any
    ) -> Optimizer:
        if self._model is None:
            raise TrainingError("job.optimizer was called before job.model: swap the two lines.")
        if self._instead is not None:
            cls, options = self._instead
        with self._fake:
            params = [param for param in self._model.parameters() if param.requires_grad]
            self._optimizer = cls(params, lr=lr, **options)
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
        model, optimizer = self._model, self._optimizer
        if model is None or optimizer is None:
            raise TrainingError("job.batches was called before job.model and job.optimizer.")
        largest = micro_batch_size or batch_size
        loader = make_loader(
            dataset, epochs=1, shuffle=shuffle, seed=0, collate_fn=collate_fn, num_workers=0
        )
        for size in sorted({max(1, largest // part) for part in (1, 2, 4, 8)}, reverse=True):
            batch = _first(loader, size)
            tracker = MemTracker()
            with self._fake:
                tracker.track_external(model, optimizer)
                with tracker:
                    for _ in range(_STEPS):
                        tracker.reset_mod_stats()
                        self._stepped = False
                        yield pytree.tree_map_only(Tensor, self._fake.from_tensor, batch)
                        if not self._stepped:
                            raise TrainingError("the loop took a batch and did not call job.step.")
            self.found.append(self._account(size, tracker))
        raise _TraceComplete

    def step(self, loss: Tensor, *, clip_norm: float | None = None) -> bool:
        assert self._optimizer is not None
        loss.backward()
        self._optimizer.step()
        # Ours keeps its gradients, as views of flat buckets.
        self._optimizer.zero_grad(set_to_none=False)
        self._stepped = True
        return True

    def _account(self, size: int, tracker: MemTracker) -> TracedMemory:
        model, optimizer = self._model, self._optimizer
        assert model is not None and optimizer is not None
        peak = sum(
            parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values() if parts
        )
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


def _first(loader: Loader, size: int) -> Any:
    """A real micro-batch: only its shapes and types are used."""
    with _disable_current_modes():
        loader.place(loader.position, 0, 1, size, size)
        return next(iter(loader.feed())).data


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _blocks(model: nn.Module) -> set[int]:
    """Entries of the outermost `ModuleList`s and `Sequential`s that hold parameters."""
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
