"""Load the weights that a training job has published as checkpoints, for example to serve them."""

from pathlib import Path

import torch
from torch import nn

from supple.train.checkpoint.folder import MANIFEST, CheckpointError
from supple.train.checkpoint.store import CheckpointStore
from supple.train.state.names import named_buffers, named_params, plain_name


def newest(path: str | Path) -> Path:
    """Return the last saved checkpoint in the run or checkpoint folder at `path`, not verified; a
    checkpoint's own path is returned as it is. Raises `CheckpointError` if there is none."""
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


def load_weights(model: nn.Module, path: str | Path, *, name: str = "") -> int:
    """Load the weights that `supple train` saved at `path` into `model`; return their step.

    `path` is a run's folder (`supple-runs/NAME`) or one checkpoint in it. If that checkpoint has
    been replaced by newer ones or is damaged, the newest whole one beside it is used. `name`: which
    of several models (`job.model(..., name=...)`). Raises
    `CheckpointError`, with `model` unchanged, if there is none or it is of another model.
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
    tensors = _tensors(model, f"{name}." if name else "")
    signature = [[name, list(t.shape), str(t.dtype)] for name, t in tensors.items()]
    payload, manifest = store.load(at, expected_signature=signature, model=name)
    described = payload["description"]["tensors"]
    with torch.no_grad():
        for (saved, *_), tensor in zip(described, payload["tensors"], strict=True):
            if (own := tensors.get(plain_name(saved))) is not None:
                own.copy_(tensor)
    return int(manifest["step"])


def _store_folder(path: Path) -> Path | None:
    """Return the checkpoint folder of the run at `path`, or `path` if it is one; else None."""
    if (path / "checkpoints").is_dir():
        return path / "checkpoints"
    if path.is_dir() and not (path / MANIFEST).exists() and CheckpointStore(path).saved():
        return path
    return None


def _tensors(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return parameters and buffers by their names in a checkpoint."""
    found = {f"param/{prefix}{name}": p.detach() for name, p in named_params(model).items()}
    buffers = named_buffers(model).items()
    return found | {f"buffer/{prefix}{name}": b.detach() for name, b in buffers}
