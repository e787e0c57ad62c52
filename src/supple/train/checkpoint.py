"""Durable checkpoints: atomic, checksummed, safe to load, written behind the training loop.

A checkpoint is a folder `step-00001200` with `state.pt` and `manifest.json` (its SHA-256, size,
step and the model's signature). It is written into a temporary folder beside it, flushed to the
disk, and renamed; so it is whole or it is not there. An older one is removed only after a newer
one is whole. Loading checks the sum first and then unpickles with `weights_only`.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

_TEMPORARY = ".writing-"
_STATE, _MANIFEST = "state.pt", "manifest.json"


class CheckpointError(Exception):
    """A checkpoint cannot be written or read. The message is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint whose sum was verified, and those newer ones that were not good."""

    path: Path
    step: int
    skipped: tuple[str, ...]
    """What is wrong with each newer one."""


@final
class CheckpointStore:
    """The checkpoints of one job, in `directory`; keeps the newest `keep`."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self._directory = Path(directory)
        self._keep = keep
        self._writing: threading.Thread | None = None
        self._lock = threading.Lock()

    @staticmethod
    def containing(path: str) -> "CheckpointStore":
        """The store that the checkpoint at `path` lies in."""
        return CheckpointStore(Path(path).parent)

    def save(self, step: int, payload: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Write `payload` (tensors and primitives) and return once it is on the disk.

        Raises `CheckpointError` and leaves every earlier checkpoint as it was.
        """
        with self._lock:
            target = self._directory / f"step-{step:08d}"
            temporary = self._directory / f"{_TEMPORARY}{os.getpid()}-{step:08d}"
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
                temporary.mkdir()
                manifest = {"step": step, **meta, **_write_state(temporary / _STATE, payload)}
                _write_text(temporary / _MANIFEST, json.dumps(manifest))
                if target.exists():
                    shutil.rmtree(target)
                os.replace(temporary, target)
                _flush_folder(self._directory)
            except (OSError, RuntimeError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise self._cannot_write(target, error, payload) from None
            for old in self._paths()[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
            return target

    def save_async(
        self,
        step: int,
        payload: Mapping[str, Any],
        meta: Mapping[str, Any],
        told: Callable[[str, str], None],
    ) -> None:
        """Write in a thread and call `told(path, "")` or `told("", error)` from it.

        `payload` must be a private copy. While one is being written, another is not begun.
        """
        if self._writing is not None and self._writing.is_alive():
            told("", f"step {step} was not saved: the save before it is still being written.")
            return

        def write() -> None:
            try:
                path = self.save(step, payload, meta)
            except CheckpointError as error:
                told("", str(error))
            else:
                told(str(path), "")

        self._writing = threading.Thread(target=write, daemon=True, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing.join()

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint that verifies; None if there is none."""
        skipped: list[str] = []
        for path in self._paths():
            try:
                manifest = _verify(path)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            return CheckpointInfo(path=path, step=int(manifest["step"]), skipped=tuple(skipped))
        return None

    def load(
        self, path: str | Path, *, expected_signature: Sequence[Sequence[Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(payload, manifest) of a checkpoint. Raises `CheckpointError` if it is not whole, or if
        its model is another than `expected_signature` ([name, shape, dtype] of every tensor)."""
        path = Path(path)
        try:
            manifest = _verify(path)
        except CheckpointError as error:
            other = self.latest()
            hint = (
                f" The last good one is step {other.step}: resume with --resume {other.path}."
                if other is not None and other.path != path
                else " No other good one is in its folder: start without --resume."
            )
            raise CheckpointError(f"{error}{hint}") from None
        _compare(path, manifest.get("signature", []), expected_signature)
        payload = torch.load(path / _STATE, weights_only=True, map_location="cpu")
        return payload, manifest

    def _paths(self) -> list[Path]:
        """Newest first."""
        if not self._directory.is_dir():
            return []
        return sorted(self._directory.glob("step-*"), reverse=True)

    def _remove_leftovers(self) -> None:
        for leftover in self._directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _cannot_write(
        self, target: Path, error: Exception, payload: Mapping[str, Any]
    ) -> CheckpointError:
        last = self.latest()
        kept = f" The last good one is kept: {last.path}." if last else " There is no earlier one."
        number = getattr(error, "errno", None)
        needed = _size_of(payload)
        free = shutil.disk_usage(_existing(self._directory)).free
        if number in (errno.ENOSPC, errno.EDQUOT) or free < needed:
            return CheckpointError(
                f"the checkpoint {target} does not fit: it needs {needed:,} bytes, {free:,} are "
                f"free. Nothing was left behind.{kept} Free some space; the next save tries again."
            )
        return CheckpointError(
            f"the checkpoint {target} cannot be written: {str(error).splitlines()[0]}.{kept} "
            "Check the folder's permissions, or give another --run-dir."
        )


def _write_state(path: Path, payload: Mapping[str, Any]) -> dict[str, Any]:
    with path.open("wb") as file:
        torch.save(dict(payload), file)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": _sum_of(path), "bytes": path.stat().st_size}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint."""
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist.")
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        expected = manifest["sha256"]
        actual = _sum_of(path / _STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__} in its "
            f"{_MANIFEST} or {_STATE} ({str(error).splitlines()[0]})."
        ) from None
    if actual != expected:
        raise CheckpointError(
            f"the checkpoint {path} is corrupt: {_STATE} has SHA-256 {actual[:12]}…, its manifest "
            f"says {expected[:12]}…."
        )
    return manifest


def _compare(path: Path, saved: Sequence[Sequence[Any]], expected: Sequence[Sequence[Any]]) -> None:
    if [list(row) for row in saved] == [list(row) for row in expected]:
        return
    theirs = {row[0]: (list(row[1]), row[2]) for row in saved}
    ours = {row[0]: (list(row[1]), row[2]) for row in expected}
    different = [
        f"{name.partition('/')[2]}: {theirs.get(name, 'absent')} there, "
        f"{ours.get(name, 'absent')} here"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]
    raise CheckpointError(
        f"the checkpoint {path} is of another model: {len(different)} tensors differ, first "
        f"{'; '.join(different[:3])}. Resume with the script that wrote it, or start without "
        "--resume."
    )


def _size_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_size_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_size_of(item) for item in value)
    return 8


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
