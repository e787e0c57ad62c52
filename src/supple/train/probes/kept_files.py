"""Keep the user's files as they are while a script is measured: its loop may save over `best.pt`.

In the measuring process every file is copied before the loop writes, renames or removes it. When
all is measured, `files_restored` puts the copies back and removes files that did not exist. It runs
in the planning process, so it also runs after Ctrl-C.
"""

import builtins
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_CACHES = ("__pycache__", "torchinductor", "/.cache/", "/.triton/")
"""Parts of paths that are left alone: files that any run would write, with the same content."""


@contextmanager
def kept_files(folder: str) -> Iterator[None]:
    """Within the block, copy to `folder` every file before this process changes it."""
    real_open = io.open

    def opened(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(mode, str) and set(mode) & set("wax+"):
                _keep(file, folder, real_open)
            return real(file, mode, *args, **options)

        return call

    def changing(real: Callable[..., Any], *which: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            for index in which:
                if index < len(args):
                    _keep(args[index], folder, real_open)
            return real(*args, **options)

        return call

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (builtins, "open", opened(builtins.open)),
        (io, "open", opened(io.open)),
        (os, "replace", changing(os.replace, 0, 1)),
        (os, "rename", changing(os.rename, 0, 1)),
        (os, "remove", changing(os.remove, 0)),
        (os, "unlink", changing(os.unlink, 0)),
        (torch, "save", changing(torch.save, 1)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, made in patches:
        setattr(owner, name, made)
    try:
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)


@contextmanager
def files_restored() -> Iterator[str]:
    """Give the folder for copies, and put all files back after the block."""
    with tempfile.TemporaryDirectory(prefix="supple-plan-", ignore_cleanup_errors=True) as folder:
        try:
            yield folder
        finally:
            restore(folder)


def restore(folder: str) -> None:
    """Put every file back as it was; one that cannot be written is left as it is."""
    for record in Path(folder).glob("*.json"):
        with suppress(OSError, ValueError):
            path = json.loads(record.read_text())
            copy = record.with_suffix(".data")
            if copy.exists():
                shutil.copy2(copy, path)
            elif os.path.isfile(path):
                os.unlink(path)


def _keep(file: Any, folder: str, real_open: Callable[..., Any]) -> None:
    """Copy a file, or note that it does not exist, the first time that it is about to change."""
    if not isinstance(file, str | os.PathLike):
        return
    path = os.path.abspath(os.fsdecode(file))
    special = os.path.exists(path) and not os.path.isfile(path)
    if special or any(part in path for part in (*_CACHES, folder)):
        return
    record = os.path.join(folder, hashlib.sha256(path.encode()).hexdigest()[:32])
    if os.path.exists(record + ".json"):
        return
    with suppress(OSError):
        if os.path.isfile(path):
            shutil.copyfile(path, record + ".part")
            shutil.copystat(path, record + ".part")
            os.link(record + ".part", record + ".data")
        with real_open(record + ".json", "x") as noted:
            noted.write(json.dumps(path))
