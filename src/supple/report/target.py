"""Where a picture or another file of results is to be written, checked before the work."""

from pathlib import Path

from supple.core.spec import SpecError


def refuse_unwritable(path: Path, option: str) -> None:
    """Raise `SpecError` unless a file can be written at `path`, whose folder exists. Leaves what is
    there as it is."""
    advice = "Give a file in a folder that may be written to."
    try:
        if path.is_dir():
            inside = path / (path.name or "plan.png")
            raise SpecError(f"{option} {path} is a folder. Give a file, such as {inside}.")
        real = path.resolve()  # what a link names is made and removed, never the link
        if not real.parent.is_dir():
            raise SpecError(f"{option} {path}: there is no folder {path.parent}. Make it first.")
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise SpecError(f"{option} {path} is no ordinary file. {advice}")
        real.open("ab").close()
        if is_new:
            real.unlink()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, SpecError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"{option} {path} cannot be written: {why}. {advice}") from None
