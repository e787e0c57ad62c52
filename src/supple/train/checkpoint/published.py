"""The weights a training job has published: its durable checkpoints, for whoever serves them."""

from pathlib import Path

import torch
from torch import nn

from supple.train.checkpoint.folder import MANIFEST, CheckpointError
from supple.train.checkpoint.store import CheckpointStore


def newest(path: str | Path) -> Path:
    """The checkpoint saved last in the run or the folder of checkpoints at `path`, its sums not
    verified yet; a checkpoint itself is that. Raises `CheckpointError` where there is none."""
    path = Path(path)
    folder = _store_folder(path)
    if folder is None:
        return path
    found = CheckpointStore(folder).saved()
    if not found:
        raise CheckpointError(
            f"the run {path} has published no weights yet: it has no checkpoint. Train with "
            "--checkpoint-every, or wait for its end."
        )
    return found[0]


def load_weights(model: nn.Module, path: str | Path) -> int:
    """Put the weights that `supple train` saved at `path` into `model`; returns their step.

    `path` is a run's folder (`supple-runs/NAME`) or one checkpoint in it. A checkpoint that is gone
    because newer ones took its place, or is damaged, gives way to the newest whole one beside it.
    Raises `CheckpointError` if there is none, or if it is of another model; `model` is as it was.
    """
    path = Path(path)
    folder = _store_folder(path)
    store = CheckpointStore(path.parent if folder is None else folder)
    at = path
    if folder is not None or not (path / MANIFEST).is_file():
        found = store.latest()
        if found is None:
            raise CheckpointError(
                f"{path} holds no weights: it is neither a run of supple train with a checkpoint "
                "nor a checkpoint. Give supple-runs/NAME."
            )
        at = found.path
    tensors = _tensors(model)
    signature = [[name, list(t.shape), str(t.dtype)] for name, t in tensors.items()]
    payload, manifest = store.load(at, expected_signature=signature)
    described = payload["description"]["tensors"]
    with torch.no_grad():
        for (name, *_), tensor in zip(described, payload["tensors"], strict=True):
            if name in tensors:
                tensors[name].copy_(tensor)
    return int(manifest["step"])


def _store_folder(path: Path) -> Path | None:
    """Where the checkpoints of a run lie; None if `path` is neither a run nor such a folder."""
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if path.is_dir() and not (path / MANIFEST).exists() and CheckpointStore(path).saved():
        return path
    return None


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names they have in a checkpoint."""
    found = {f"param/{name}": p.detach() for name, p in model.named_parameters()}
    return found | {f"buffer/{name}": b.detach() for name, b in model.named_buffers()}
