"""Check that an output file can be written, before the work starts."""

from pathlib import Path

from supple.core.spec import SpecError


def refuse_unwritable(path: Path, option: str) -> None:
    """Raise `SpecError` unless a file can be written at `path`, in an existing folder. An existing
    file is not changed."""
    advice = "Give a file in a writable folder."
    try:
        if path.is_dir():
            inside = path / (path.name or "plan.png")
            raise SpecError(f"{option} {path} is a folder. Give a file, such as {inside}.")
        real = path.resolve()  # a link's target may be created and removed, but not the link
        if not real.parent.is_dir():
            raise SpecError(f"{option} {path}: there is no folder {path.parent}. Create it first.")
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise SpecError(f"{option} {path} is not a regular file. {advice}")
        real.open("ab").close()
        if is_new:
            real.unlink()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, SpecError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"{option} {path} cannot be written: {why}. {advice}") from None
