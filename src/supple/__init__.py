"""Supple: elastic training for PyTorch. How many workers, measured, and changed while it runs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supple.cli.function import Run, RunFailed, run
    from supple.core.spec import SpecError
    from supple.train.checkpoint.published import load_weights
    from supple.train.job import Job

__all__ = ["Job", "Run", "RunFailed", "SpecError", "__version__", "load_weights", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import torch when a name that needs it is first used, so that `supple.core` stays light."""
    if name == "Job":
        from supple.train.job import Job

        return Job
    if name in ("Run", "RunFailed", "run"):
        from supple.cli import function

        return getattr(function, name)
    if name == "SpecError":
        from supple.core.spec import SpecError

        return SpecError
    if name == "load_weights":
        from supple.train.checkpoint.published import load_weights

        return load_weights
    raise AttributeError(f"module 'supple' has no attribute {name!r}")
