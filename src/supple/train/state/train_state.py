"""`TrainState` and its live transfer between ranks (`share_state`), without the disk.

A state is a list of named tensors plus one small description (names, shapes, dtypes, step,
position, optimizer settings). A transfer sends the description first, then the tensors in buckets
of 16 MiB, divided evenly among the ranks that hold them. A receiver keeps its older or initial
state, receives into separate memory, and swaps when all has arrived. So a peer's death during the
transfer loses no state, and a late message of a dead peer overwrites nothing in use.
"""

import copy
import io
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from supple.train.generation.group import Group
from supple.train.state.names import named_buffers, named_params, plain_name
from supple.train.state.optimizers import AnyOptimizer, name_of, params_of
from supple.train.step.finite import is_finite

_BUCKET_BYTES = 16 * 1024 * 1024
"""Largest message of a transfer."""
_NEVER = -1
"""The version of a rank that holds no state."""


@final
class TrainState:
    """The complete state of training: with it, a new worker goes on like one there from the start.

    `scalars` is the job's part (step, position, batch, ...): plain numbers, strings, lists and
    dicts. `kept` are the user's extra objects with `state_dict` and `load_state_dict`.
    """

    def __init__(self, model: nn.Module, optimizer: AnyOptimizer, kept: Mapping[str, Any]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.kept = kept
        self._finite_buffers = {
            name for name, buffer in named_buffers(model).items() if _is_number(buffer)
        }
        """Buffers that were finite when built; others, such as masks, may hold infinities."""
        self._initially_frozen = self.frozen()
        self._initial_settings = [copy.deepcopy(_settings(g)) for g in optimizer.param_groups]
        self.spare: dict[str, Tensor] = {}
        """Allocated tensors by name, to be reused for the next state that this worker receives."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, in the same order on every rank."""
        found: dict[str, Tensor] = {}
        for name, param in named_params(self.model).items():
            found[f"param/{name}"] = param.detach()
        for name, buffer in named_buffers(self.model).items():
            found[f"buffer/{name}"] = buffer.detach()
        for index, param in enumerate(params_of(self.optimizer)):
            for key, value in sorted(self.optimizer.state.get(param, {}).items()):
                if isinstance(value, Tensor):
                    found[f"optimizer/{index}/{key}"] = value.detach()
        return found

    def frozen(self) -> list[str]:
        """Return the names of the parameters that require no gradient."""
        named = named_params(self.model).items()
        return [name for name, param in named if not param.requires_grad]

    def freeze(self, names: Collection[str]) -> None:
        """Let exactly the parameters of these names require no gradient."""
        for name, param in named_params(self.model).items():
            if param.requires_grad == (name in names):
                param.requires_grad_(name not in names)

    def signature(self) -> list[list[Any]]:
        """Return [name, shape, dtype] of every parameter and buffer, which identify the model."""
        return [
            [name, list(tensor.shape), str(tensor.dtype)]
            for name, tensor in self.tensors().items()
            if not name.startswith("optimizer/")
        ]

    def describe(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return the state without the tensors of model and optimizer; safe for `weights_only`."""
        extra: dict[str, dict[str, Any]] = {}
        for index, param in enumerate(params_of(self.optimizer)):
            rest = {
                key: value
                for key, value in self.optimizer.state.get(param, {}).items()
                if not isinstance(value, Tensor)
            }
            if rest:
                extra[str(index)] = rest
        return {
            "scalars": scalars,
            "tensors": [
                [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
                for name, tensor in self.tensors().items()
            ],
            "groups": [_settings(group) for group in self.optimizer.param_groups],
            "initial_groups": self._initial_settings,
            "frozen": self.frozen(),
            "initial_frozen": self._initially_frozen,
            "extra": extra,
            "kept": {name: thing.state_dict() for name, thing in self.kept.items()},
        }

    def landing(self, description: Mapping[str, Any]) -> list[Tensor]:
        """Return unused memory for the described tensors, in their order."""
        places: list[Tensor] = []
        for name, shape, dtype_name in description["tensors"]:
            dtype = getattr(torch, dtype_name)
            place = self.spare.pop(name, None)
            if place is None or not place.is_contiguous() or not _fits(place, shape, dtype):
                place = torch.empty(shape, dtype=dtype)
            places.append(place)
        self.spare.clear()
        return places

    def take(self, description: Mapping[str, Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Set this state to the described one, with `tensors` in its order; return the scalars.

        The optimizer may keep the given tensors, so the caller must not. Raises `ValueError`, with
        nothing changed, if they are of another model.
        """
        params = params_of(self.optimizer)
        mine = self.tensors()
        settings: list[dict[str, Any]] = [{} for _ in params]
        copies: list[tuple[Tensor, Tensor]] = []
        for (name, shape, dtype_name), tensor in zip(description["tensors"], tensors, strict=True):
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                settings[int(index)][key] = _laid_out_like(params[int(index)], tensor)
                continue
            own = mine.get(name)
            if own is None or not _fits(own, shape, getattr(torch, dtype_name)):
                raise ValueError(
                    f"the state has {name} as {shape} {dtype_name}, this worker "
                    f"{'has no such tensor' if own is None else list(own.shape)}: "
                    "the model differs. Build the same model on every worker."
                )
            copies.append((own, tensor))
        with torch.no_grad():
            for own, tensor in copies:
                own.copy_(tensor)
        for index, rest in description["extra"].items():
            settings[int(index)].update(rest)
        for param, values in zip(params, settings, strict=True):
            if values:
                self.optimizer.state[param] = values
            else:
                self.optimizer.state.pop(param, None)
        for group, values in zip(self.optimizer.param_groups, description["groups"], strict=True):
            group.update(values)
        if "frozen" in description:  # checkpoints of earlier versions do not have it
            self.freeze(description["frozen"])
        for name, thing in self.kept.items():
            if name in description["kept"]:
                thing.load_state_dict(description["kept"][name])
        self.spare.clear()
        return description["scalars"]

    def payload(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return a private CPU copy of the whole state, for a durable checkpoint."""
        return {
            "description": private(self.describe(scalars)),
            "tensors": [
                tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for tensor in self.tensors().values()
            ],
        }

    def restore(self, payload: Mapping[str, Any], *, with_optimizer: bool = True) -> dict[str, Any]:
        """Set this state from `payload`, which is consumed; return the job's scalars.

        Settings of the optimizer that the script has changed since, such as a weight decay, are the
        script's. Without `with_optimizer`, the optimizer begins anew. Raises `ValueError` if the
        payload is of another model, or of another kind of optimizer.
        """
        description, tensors = dict(payload["description"]), payload["tensors"]
        if description.get("initial_frozen") != self._initially_frozen:
            description.pop("frozen", None)  # the script freezes other ones now
        described = [[plain_name(name), *rest] for name, *rest in description["tensors"]]
        if not with_optimizer:
            rows = zip(described, tensors, strict=True)
            kept = [(row, t) for row, t in rows if not row[0].startswith("optimizer/")]
            described, tensors = [row for row, _ in kept], [tensor for _, tensor in kept]
            groups = [_settings(group) for group in self.optimizer.param_groups]
            description = {**description, "extra": {}, "groups": groups}
        else:
            _refuse_other_optimizer(description, self.optimizer)
            description = {**description, "groups": self._merged_settings(description)}
        return self.take({**description, "tensors": described}, tensors)

    def _merged_settings(self, description: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the described settings, with the script's own where the script has changed them:
        others may be state of the optimizer."""
        initial = description.get("initial_groups", self._initial_settings)
        rows = zip(description["groups"], initial, self._initial_settings, strict=True)
        return [
            group | {key: new for key, new in now.items() if key in then and then[key] != new}
            for group, then, now in rows
        ]

    def not_finite(self) -> list[str]:
        """Return names of trained parameters and initially finite buffers that are not finite."""
        trained = {id(param) for param in params_of(self.optimizer)}
        params = [
            name
            for name, param in named_params(self.model).items()
            if id(param) in trained and not is_finite(param.detach())
        ]
        return params + [
            name
            for name, buffer in named_buffers(self.model).items()
            if name in self._finite_buffers and not is_finite(buffer)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Statistics of a state transfer, for the log."""

    source_ranks: tuple[int, ...]
    num_receivers: int
    sent_bytes: int


def share_state(
    group: Group, state: TrainState, scalars: dict[str, Any] | None, version: int | None
) -> tuple[dict[str, Any] | None, Transfer]:
    """Bring every rank to the state of the ranks with the newest version.

    `version` grows with every update; None on a rank without state. Returns this rank's scalars
    (None: no rank had a state, and nothing was done) and the transfer's statistics. Raises
    `CollectiveFailed`; a rank that had a valid state before still has it then.
    """
    mine = torch.tensor([_NEVER if version is None else version], dtype=torch.int64)
    versions: list[int] = group.all_gather(mine).flatten().tolist()
    newest = max(versions)
    sources = [rank for rank, at in enumerate(versions) if at == newest]
    receivers = [rank for rank, at in enumerate(versions) if at != newest]
    if newest == _NEVER:
        return None, Transfer(source_ranks=(), num_receivers=0, sent_bytes=0)
    if not receivers:
        return scalars, Transfer(source_ranks=tuple(sources), num_receivers=0, sent_bytes=0)
    if group.rank in sources:
        assert scalars is not None
        sent = _send(group, state, scalars, sources, receivers)
        return scalars, Transfer(
            source_ranks=tuple(sources), num_receivers=len(receivers), sent_bytes=sent
        )
    received = _receive(group, state, sources)
    return received, Transfer(
        source_ranks=tuple(sources), num_receivers=len(receivers), sent_bytes=0
    )


def _send(
    group: Group,
    state: TrainState,
    scalars: dict[str, Any],
    sources: Sequence[int],
    receivers: Sequence[int],
) -> int:
    works: list[Any] = []
    description = state.describe(scalars)
    if group.rank == sources[0]:
        encoded = _encode(description)
        length = torch.tensor([encoded.numel()], dtype=torch.int64)
        for receiver in receivers:
            works.append(group.send(length, receiver, 0))
            works.append(group.send(encoded, receiver, 1))
    tensors = list(state.tensors().values())
    sent = 0
    buckets = _buckets([tensor.numel() * tensor.element_size() for tensor in tensors])
    for tag, pieces in enumerate(buckets, start=2):
        if sources[tag % len(sources)] != group.rank:
            continue
        message = _pack(tensors, pieces)
        for receiver in receivers:
            works.append(group.send(message, receiver, tag))
            sent += message.numel()
    group.wait_for_messages(works)
    return sent


def _receive(group: Group, state: TrainState, sources: Sequence[int]) -> dict[str, Any]:
    length = torch.zeros(1, dtype=torch.int64)
    group.wait_for_messages([group.receive(length, sources[0], 0)])
    encoded = torch.empty(int(length), dtype=torch.uint8)
    group.wait_for_messages([group.receive(encoded, sources[0], 1)])
    description = torch.load(io.BytesIO(encoded.numpy().tobytes()), weights_only=True)
    landing = state.landing(description)
    arriving: list[tuple[Any, Tensor, list[Piece]]] = []
    buckets = _buckets([tensor.numel() * tensor.element_size() for tensor in landing])
    for tag, pieces in enumerate(buckets, start=2):
        if len(pieces) == 1:
            message = _flat_bytes(landing[pieces[0].tensor])[pieces[0].start : pieces[0].stop]
        else:
            message = torch.empty(sum(p.stop - p.start for p in pieces), dtype=torch.uint8)
        arriving.append((group.receive(message, sources[tag % len(sources)], tag), message, pieces))
    for work, message, pieces in arriving:
        group.wait_for_messages([work])
        if len(pieces) > 1:
            _unpack(landing, pieces, message)
    return state.take(description, landing)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `stop` of tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


def _buckets(sizes: Sequence[int]) -> list[list[Piece]]:
    """Divide tensors of these sizes (bytes) into messages: small ones joined, large ones cut."""
    buckets: list[list[Piece]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size >= _BUCKET_BYTES // 4:
            slices = range(0, size, _BUCKET_BYTES)
            buckets += [[Piece(index, at, min(at + _BUCKET_BYTES, size))] for at in slices]
            room = 0
        elif size:
            if room < size:
                buckets.append([])
                room = _BUCKET_BYTES
            buckets[-1].append(Piece(index, 0, size))
            room -= size
    return buckets


def _pack(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    parts = [_flat_bytes(tensors[piece.tensor])[piece.start : piece.stop] for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpack(landing: Sequence[Tensor], pieces: Sequence[Piece], message: Tensor) -> None:
    offset = 0
    for piece in pieces:
        size = piece.stop - piece.start
        _flat_bytes(landing[piece.tensor]).copy_(message[offset : offset + size])
        offset += size


def _flat_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor's bytes: its own memory if it is contiguous, else a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def private(value: Any) -> Any:
    """Return a deep copy of `value` with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if type(value) in (dict, OrderedDict, Counter):
        return type(value)({key: private(item) for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(private(item) for item in value)
    return copy.deepcopy(value)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _is_number(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and is_finite(tensor)


def _fits(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    return list(tensor.shape) == list(shape) and tensor.dtype == dtype


def _laid_out_like(param: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return `tensor` in the parameter's memory format, if it has the parameter's shape."""
    if tensor.shape != param.shape or tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def _encode(description: dict[str, Any]) -> Tensor:
    stream = io.BytesIO()
    torch.save(description, stream)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


def _refuse_other_optimizer(description: Mapping[str, Any], optimizer: AnyOptimizer) -> None:
    """Raise `ValueError` if the described optimizer has other groups or parameters, or if each of
    the two has settings that the other lacks: a later step would fail, or differ."""
    there, here = description["groups"], optimizer.param_groups
    if len(there) != len(here):
        raise ValueError(f"its optimizer has {len(there)} parameter groups, this one {len(here)}")
    for theirs, ours in zip(there, here, strict=True):
        only_there, only_here = set(theirs) - set(ours), set(ours) - set(theirs) - {"params"}
        if only_there and only_here:
            raise ValueError(
                f"its optimizer has {', '.join(sorted(only_there))} among its settings, this "
                f"script's {name_of(optimizer)} has {', '.join(sorted(only_here))}"
            )
    owners = [
        name.split("/", 2)[1]
        for name, *_ in description["tensors"]
        if name.startswith("optimizer/")
    ]
    num_there = 1 + max((int(owner) for owner in owners), default=-1)
    num_here = len(params_of(optimizer))
    if num_there > num_here:
        raise ValueError(f"its optimizer has {num_there} parameters, this one {num_here}")
