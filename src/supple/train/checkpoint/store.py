"""`CheckpointStore`: saves, lists, verifies, loads and removes the checkpoints of a job.

A checkpoint is a folder `000007-step-1200`: the seventh save, after step 1200. It is written into a
temporary folder beside it, flushed to the disk, and renamed, so it is whole or absent. An older one
is removed only after a newer one is whole. The newest is the one saved last, not the one of the
highest step: a restarted job, or one resumed from an earlier step, goes on from there. A live
worker that its job has dropped cannot write (`fence.py`).
"""

import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from supple.train.checkpoint.fence import Barrier
from supple.train.checkpoint.folder import (
    CheckpointError,
    CheckpointRefused,
    flush_folder,
    read_state,
    refuse_other_model,
    size_of,
    verify,
    verify_loadable,
    write,
)

__all__ = [
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointRefused",
    "CheckpointStore",
    "DiskFullError",
]

_TEMPORARY = ".temporary-"
_NAME = re.compile(r"(\d+)-step-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, a limit on file size."""


class DiskFullError(CheckpointError):
    """There is no room for the checkpoint on the disk; another worker would fail as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint whose sums were verified, and the newer ones that were damaged."""

    path: Path
    step: int
    skipped: tuple[str, ...]
    """The defect of each newer one, as text."""


@final
class CheckpointStore:
    """A job's checkpoints: keeps the last `keep`, and writes while `barrier` allows it."""

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        *,
        barrier: Barrier | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """`about`: JSON values that describe the run, written into every manifest."""
        if keep < 1:
            raise ValueError(f"keep={keep}: the last checkpoint is never removed. Keep 1 or more.")
        self._directory = Path(directory)
        self._keep = keep
        self._barrier = barrier
        self._about = dict(about or {})
        self._writing: threading.Thread | None = None
        self._lock = threading.Lock()

    @staticmethod
    def containing(path: str) -> "CheckpointStore":
        """Return the store of the checkpoint at `path`."""
        return CheckpointStore(Path(path).parent)

    def save(self, step: int, payload: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
        """Write `payload` and return the checkpoint's folder once it is on the disk.

        `payload` consists of tensors, plain values and containers of them; `meta` of JSON values,
        with the model's "signature". If it raises `CheckpointError`, every earlier checkpoint is
        unchanged and nothing else is left behind.
        """
        with self._lock:
            self._refuse_excluded(step)
            temporary = self._directory / f"{_TEMPORARY}{os.getpid()}"
            try:
                self._make_directory()
                self._remove_leftovers()
                temporary.mkdir()
                write(temporary, step, payload, {**meta, **self._about, **self._signed()})
                self._refuse_excluded(step)
                number = 1 + max((_number(path) for path in self._paths()), default=0)
                target = self._directory / f"{number:06d}-step-{step}"
                os.replace(temporary, target)
                flush_folder(self._directory)
            except (OSError, RuntimeError, TypeError, ValueError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                full = isinstance(error, OSError) and error.errno in _FULL
                kind = DiskFullError if full else CheckpointError
                raise kind(self._why_not(step, error, payload)) from None
            except CheckpointError:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            try:
                self._refuse_excluded(step)  # the process may have been stopped before the rename
            except CheckpointError:
                self._remove(target)
                raise
            self._prune()
            return target

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._lock.locked()

    def save_async(
        self,
        step: int,
        payload: Mapping[str, Any],
        meta: Mapping[str, Any],
        on_done: Callable[[str, str], None],
    ) -> None:
        """Write in a thread, which then calls `on_done(path, "")` or `on_done("", error)` once.

        `payload` must be a private copy. While another checkpoint is being written, nothing is
        started and `on_done` is called with an error at once.
        """
        if self._writing is not None and self._writing.is_alive():
            on_done(
                "",
                f"step {step} was not saved: the save before it is still being written to "
                f"{self._directory}, and one is written at a time. Save less often "
                "(--checkpoint-every) or to a faster disk (--run-dir).",
            )
            return

        def write_behind() -> None:
            try:
                path, error = str(self.save(step, payload, meta)), ""
            except Exception as problem:
                path, error = "", str(problem) or type(problem).__name__
            on_done(path, error)

        self._writing = threading.Thread(target=write_behind, daemon=True, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._writing is not None:
            self._writing.join()

    def saved(self) -> Sequence[Path]:
        """Return all checkpoints, the last saved first, without verifying them."""
        return self._paths()

    def latest(self, *, besides: str = "") -> CheckpointInfo | None:
        """Return the last saved checkpoint that is good; None if there is none. See `examine`."""
        return self.examine(besides=besides)[0]

    def examine(self, *, besides: str = "") -> tuple[CheckpointInfo | None, tuple[str, ...]]:
        """Return the last saved checkpoint that verifies and can be loaded, and the defect of each
        newer one.

        The folder named `besides` is skipped. Raises `CheckpointError` if the store's folder exists
        and cannot be listed.
        """
        skipped: list[str] = []
        try:
            paths = self._paths()
        except OSError as error:
            raise CheckpointError(
                f"the checkpoints in {self._directory} cannot be listed: {error.strerror} for user "
                f"id {os.geteuid()}. Run as the user who wrote them, or check --run-dir."
            ) from None
        for path in paths:
            if path.name == besides:
                continue
            try:
                step = verify_loadable(path).step
            except CheckpointError as error:
                skipped.append(str(error))
            else:
                found = CheckpointInfo(path=path, step=step, skipped=tuple(skipped))
                return found, found.skipped
        return None, tuple(skipped)

    def check(self, path: str | Path) -> int:
        """Verify the checkpoint at `path`, and that it can be loaded; return its step.

        Raises `CheckpointError`, with the good checkpoint to resume from instead.
        """
        try:
            return verify_loadable(Path(path)).step
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_alternative_to(Path(path))}") from None

    def load(
        self, path: str | Path, *, expected_signature: Sequence[Sequence[Any]], model: str = ""
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load the checkpoint at `path`; return (payload, manifest).

        Raises `CheckpointError` if it is not whole or not safe to load, with the good checkpoint to
        resume from instead; or if its model differs from `expected_signature`: [name, shape, dtype]
        of every parameter and buffer. `model`: compare only the one of this name of several.
        """
        path = Path(path)
        try:
            manifest = verify(path)
            payload = read_state(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_alternative_to(path)}") from None
        begins = f"param/{model}.", f"buffer/{model}."
        saved = [row for row in manifest.signature if not model or row[0].startswith(begins)]
        refuse_other_model(path, saved, expected_signature)
        return payload, manifest.meta

    def refusal(self, step: int, why: str) -> str:
        """Return the message for a `step` that is refused before any write."""
        return f"step {step} cannot be saved in {self._directory}: {why}. {self._last_good()}"

    def _refuse_excluded(self, step: int) -> None:
        why = "" if self._barrier is None else self._barrier.exclusion_reason()
        if why:
            raise CheckpointError(
                f"step {step} is not saved in {self._directory}: {why}. Only the job's current "
                "workers may write its checkpoints. Nothing was written; this process ends itself."
            )

    def _signed(self) -> dict[str, Any]:
        if self._barrier is None:
            return {}
        writer = self._barrier.writer
        return {"run": writer.run, "worker": writer.worker_id}

    def _make_directory(self) -> None:
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True, exist_ok=True)
            flush_folder(self._directory.parent)

    def _paths(self) -> list[Path]:
        """Paths of all checkpoints, the last saved first."""
        try:
            names = [name for name in os.listdir(self._directory) if _NAME.fullmatch(name)]
        except FileNotFoundError:
            return []
        return sorted((self._directory / name for name in names), key=_number, reverse=True)

    def _prune(self) -> None:
        for old in self._paths()[self._keep :]:
            self._remove(old)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint; rename it first, so that a crash leaves no partial checkpoint."""
        removing = self._directory / f"{_TEMPORARY}{path.name}"
        try:
            os.replace(path, removing)
        except OSError:
            return
        shutil.rmtree(removing, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for leftover in self._directory.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _why_not(self, step: int, error: Exception, payload: Mapping[str, Any]) -> str:
        """Return the message for a save that failed with `error`."""
        problem = f"step {step} cannot be saved in {self._directory}"
        kept = f"Nothing half-written was left behind. {self._last_good()}"
        if not isinstance(error, OSError):
            return f"{problem}: {error}. {kept}"
        if error.errno in _FULL:
            disk = os.statvfs(_existing(self._directory))
            free = disk.f_bavail * disk.f_frsize
            limit = " and a file may not be larger" if error.errno == errno.EFBIG else ""
            if disk.f_files and not disk.f_favail:
                limit = " but no more files can be made: remove some"
            return (
                f"{problem}: {error.strerror}. It needs {size_of(payload):,} bytes, {free:,} are "
                f"free{limit}. {kept} Free some space or give a larger disk (--run-dir); the next "
                "save tries again."
            )
        return (
            f"{problem}: {error.strerror or error} ({error.filename or self._directory}, user id "
            f"{os.geteuid()}). {kept} Make it a folder that this user can write to, or give "
            "another --run-dir."
        )

    def _last_good(self) -> str:
        try:
            last = self.latest()
        except CheckpointError:
            return "Earlier checkpoints were not touched."
        if last is None:
            return "There is no earlier checkpoint."
        return f"The last good one is kept: step {last.step}, {last.path}."


def _alternative_to(path: Path) -> str:
    """Return advice with the good checkpoint beside `path`, or in it if `path` is a run."""
    for folder in (path.parent, path, path / "checkpoints"):
        try:
            other = CheckpointStore(folder).latest(besides=path.name)
        except CheckpointError:
            continue
        if other is not None:
            return f" A good one is of step {other.step}: --resume {other.path}"
    return " No good one is beside it: start without --resume."


def _number(path: Path) -> int:
    """Return the save number in a checkpoint's name."""
    return int(path.name.partition("-")[0])


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
