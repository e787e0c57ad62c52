"""Read, write and verify one checkpoint folder: `state.pt` and `manifest.json`.

`state.pt` holds the state. `manifest.json` holds the SHA-256 and size of `state.pt`, the step, the
model's signature, the writer and the time, and a SHA-256 of itself. Reading checks the sums first,
then unpickles with `weights_only`; writing refuses values that could not be read back this way.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import stat
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

import torch

from supple.train.state.names import plain_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

STATE, MANIFEST = "state.pt", "manifest.json"
_MANIFEST_BYTES = 256 * 1024 * 1024
"""Largest size of a manifest that is read."""
_MOST = 2**62
"""Largest number of steps or bytes; sums of it still fit into 64 bits."""

_SAFE = frozenset(
    {torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device}
    | {int, float, complex, bool, str, bytes, bytearray, type(None)}
    | {dict, OrderedDict, Counter, list, tuple, set}
)
"""The exact types that `torch.load(weights_only=True)` can load; subclasses are refused."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message is complete for the user."""


class CheckpointRefused(CheckpointError):
    """A job cannot begin with this checkpoint; a retry would fail as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json` of a checkpoint whose sums were verified."""

    step: int
    signature: list[list[Any]]
    """[name, shape, dtype] of every parameter and buffer."""
    meta: dict[str, Any]
    """Everything in the file, with the writer's own entries."""


def write(folder: Path, step: int, payload: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write both files into the existing `folder`, and flush files and folder to the disk.

    The SHA-256 is computed from the bytes given to the file, not read back. Raises `OSError` from
    the disk, and `ValueError` or `TypeError` for values that are not plain.
    """
    refuse_unsafe(payload)
    with _SummedFile((folder / STATE).open("wb", buffering=0)) as summed:
        try:
            torch.save(dict(payload), summed)
        except RuntimeError:
            # torch's writer replaces the error of a failed write by its own, about positions.
            if summed.failed is not None:
                raise summed.failed from None
            raise
        _flush(summed)
    manifest = {
        **meta,
        "step": step,
        "supple": version("supple"),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bytes": summed.num_bytes,
        "sha256": summed.sha256.hexdigest(),
    }
    manifest["manifest_sha256"] = _sum_of_manifest(manifest)
    with (folder / MANIFEST).open("wb") as file:
        file.write(json.dumps(manifest, indent=1).encode())
        _flush(file)
    flush_folder(folder)


def verify(folder: Path) -> Manifest:
    """Check sizes and sums; return the manifest. Raises `CheckpointError` naming the bad file."""
    rule = f"A checkpoint is a folder with {STATE} and {MANIFEST}."
    try:
        folder.stat()
        for name in (MANIFEST, STATE):
            # Opening a pipe would wait for a writer; a device may have no end.
            if not stat.S_ISREG((folder / name).stat().st_mode):
                raise CheckpointError(f"{folder} is not a checkpoint: {name} is not a file. {rule}")
        manifest = _read_manifest(folder / MANIFEST)
        actual_bytes = (folder / STATE).stat().st_size
        actual = _sum_of(folder / STATE)
    except FileNotFoundError as error:
        if Path(error.filename) == folder:
            raise CheckpointError(f"the checkpoint {folder} does not exist. {rule}") from None
        missing = Path(error.filename).name
        raise CheckpointError(f"{folder} is not a checkpoint: no {missing} in it. {rule}") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is not a checkpoint but a file. {rule}") from None
    except OSError as error:
        raise CheckpointError(_unreadable(folder, error)) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} is corrupt: {MANIFEST} is damaged "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from None
    if (actual_bytes, actual) != (manifest["bytes"], manifest["sha256"]):
        raise CheckpointError(
            f"the checkpoint {folder} is corrupt: {STATE} has {actual_bytes:,} bytes and SHA-256 "
            f"{actual[:12]}…, {MANIFEST} has {manifest['bytes']:,} and {manifest['sha256'][:12]}…."
        )
    return Manifest(step=manifest["step"], signature=manifest.get("signature", []), meta=manifest)


def meta_of(folder: Path) -> dict[str, Any]:
    """Return the entries of the manifest of a checkpoint that was verified before."""
    return _read_manifest(folder / MANIFEST)


def _read_manifest(file: Path) -> dict[str, Any]:
    """Return the validated contents of a manifest. Raises `ValueError`, `KeyError` or `TypeError`
    for anything that `write` does not write."""
    size = file.stat().st_size
    if size > _MANIFEST_BYTES:
        raise ValueError(f"it has {size:,} bytes, and at most {_MANIFEST_BYTES:,} can be right")
    manifest = json.loads(file.read_bytes())
    if not isinstance(manifest, dict):
        raise TypeError(f"it is a {type(manifest).__name__}, not an object")
    if manifest["manifest_sha256"] != _sum_of_manifest(manifest):
        raise ValueError("its SHA-256 is not the one written in it")
    for key in ("step", "bytes"):
        if type(manifest[key]) is not int or not 0 <= manifest[key] <= _MOST:
            raise ValueError(f"its {key} is {str(manifest[key])[:40]!r}, not a number of them")
    if not isinstance(manifest["sha256"], str):
        raise TypeError("its sha256 is not a text")
    for row in manifest.get("signature", []):
        name, shape, dtype = row
        if not (isinstance(name, str) and isinstance(shape, list) and isinstance(dtype, str)):
            raise TypeError(f"its signature has {str(row)[:40]!r}, not a name, a shape and a dtype")
    return manifest


def verify_loadable(folder: Path) -> Manifest:
    """Return the manifest of a whole and loadable checkpoint. Raises `CheckpointError`."""
    manifest = verify(folder)
    read_state(folder, only_look=True)
    return manifest


def read_state(folder: Path, *, only_look: bool = False) -> dict[str, Any]:
    """Load the state of a verified checkpoint to the CPU, without running code from the file.

    With `only_look` its tensors stay on the disk: a check whether it can be read, without the time
    and memory. Raises `CheckpointError` if it holds anything but tensors and plain values.
    """
    try:
        state = torch.load(
            folder / STATE, weights_only=True, map_location="cpu", mmap=only_look or None
        )
    except OSError as error:
        raise CheckpointError(_unreadable(folder, error)) from None
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"would call {culprit[1]}" if culprit else f"is not a state: {_first_line(error)}"
        raise CheckpointError(
            f"the checkpoint {folder} is refused: {STATE} has the SHA-256 it should have but "
            f"{what}. Only tensors and plain values are loaded, and no code is run. Supple did not "
            "write it so: do not trust it."
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be loaded: {STATE} has the SHA-256 it should have, "
            f"and torch fails with {_first_line(error)}."
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"the checkpoint {folder} is refused: {STATE} is a {type(state).__name__}, not the "
            "state of a job. Supple did not write it so."
        )
    return state


def refuse_other_model(
    folder: Path, saved: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]
) -> None:
    """Raise `CheckpointError` naming the first tensors that differ between two signatures."""
    theirs = {plain_name(row[0]): (list(row[1]), row[2]) for row in saved}
    ours = {row[0]: (list(row[1]), row[2]) for row in expected}
    if [*theirs.items()] == [*ours.items()]:
        return
    names = [*ours, *(name for name in theirs if name not in ours)]
    different = [name for name in names if theirs.get(name) != ours.get(name)]
    if different:
        first = "; ".join(
            f"{_plain(name)} is {_tensor(theirs.get(name))} there, {_tensor(ours.get(name))} here"
            for name in different[:3]
        )
        problem = f"{len(different)} of {len(names)} tensors differ, first {first}"
    else:
        there, here = next(pair for pair in zip(theirs, ours, strict=True) if pair[0] != pair[1])
        problem = (
            f"the same {len(names)} tensors in another order, first {_plain(there)} there, "
            f"{_plain(here)} here, and the optimizer's state depends on the order"
        )
    raise CheckpointError(
        f"the checkpoint {folder} is of another model: {problem}. Resume with the script that "
        "wrote it, or start without --resume."
    )


def refuse_unsafe(
    value: Any, where: str = "the state", advice: str = "Convert it in your state_dict()"
) -> None:
    """Raise `TypeError`, with the place, if `value` holds what `weights_only` would not load."""
    if type(value) not in _SAFE:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, and only tensors, "
            "numbers, strings, bytes, None, lists, tuples, sets and dicts of them can be loaded "
            f"again without running code. {advice}"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_unsafe(key, f"a key of {where}", advice)
            refuse_unsafe(item, f"{where}[{key!r}]", advice)
    elif isinstance(value, (list, tuple, set)):
        for index, item in enumerate(value):
            refuse_unsafe(item, f"{where}[{index}]", advice)


def size_of(value: Any) -> int:
    """Return a lower bound of the bytes that `value` takes in a file."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(size_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(size_of(item) for item in value)
    return 8


def flush_folder(folder: Path) -> None:
    """Return once the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@final
class _SummedFile(io.BufferedWriter):
    """A file for `torch.save` that computes the SHA-256 of its data and keeps its first error."""

    def __init__(self, raw: io.RawIOBase) -> None:
        super().__init__(raw)
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self.failed: OSError | None = None

    def write(self, data: "Buffer", /) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.failed = error
            raise
        self.sha256.update(data)
        self.num_bytes += written
        return written


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_of_manifest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _unreadable(folder: Path, error: OSError) -> str:
    name = error.filename or folder
    if error.errno not in (errno.EACCES, errno.EPERM):
        return (
            f"the checkpoint {folder} cannot be read: {name}: {error.strerror}. Check the disk it "
            "is on."
        )
    return (
        f"the checkpoint {folder} cannot be read: {name}: {error.strerror} for user id "
        f"{os.geteuid()}. Run as the user who wrote it, or give read permission on the folder and "
        "both files."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(name: str) -> str:
    """Return a tensor's name in the user's model: `body.weight` for `param/body.weight`."""
    return name.partition("/")[2] or name


def _tensor(described: tuple[list[int], str] | None) -> str:
    return "absent" if described is None else f"{described[0]} {described[1]}"
