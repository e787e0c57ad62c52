"""What the command line refuses at once, before torch and Ray are imported, and how any error is
reported: one message on stderr, exit code 2 for a refusal and 1 for a failure."""

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import typer

from supple.cli import output
from supple.core.spec import SpecError
from supple.train.start.script import find_module

REFUSED, FAILED = 2, 1


@contextmanager
def messages(verbose: bool = False) -> Iterator[None]:
    """An error is one message on stderr: a refusal with exit code 2, a failure with 1. No
    traceback unless `verbose`."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if verbose or (isinstance(error, OSError) and output.lost()):
            raise  # what could not be printed is reported by the entry point
        if isinstance(error, SpecError):
            typer.echo(f"supple: {error}", err=True)
            raise typer.Exit(REFUSED) from None
        ours = type(error).__module__.startswith("supple.")
        typer.echo(f"supple: {error if ours else _unexpected(error)}", err=True)
        raise typer.Exit(FAILED) from None


def _unexpected(error: Exception) -> str:
    text = str(error).rstrip(".")
    return f"unexpected {type(error).__name__}: {text}. Run again with --verbose for its traceback."


def own_address(host: str) -> str:
    """The number of the address `host` names. Raises `SpecError` unless this machine has it."""
    advice = (
        "Give 127.0.0.1 for this machine alone, 0.0.0.0 for every address it has, or one of them."
    )
    try:
        family, _, _, _, found = socket.getaddrinfo(
            host.strip("[]"), None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no name of a host"
        raise SpecError(f"--host {host or repr(host)} is not known: {why}. {advice}") from None
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        try:
            probe.bind((found[0], 0))
        except OSError as error:
            raise SpecError(
                f"--host {host} cannot be listened on: {error.strerror}. {advice}"
            ) from None
    return str(found[0])


def refuse_used_port(port: int, option: str = "--port") -> None:
    """Raise `SpecError` if another program of this machine listens on `port`; 0 means any."""
    if port == 0:
        return
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise SpecError(
                f"{option} {port} cannot be used: {error.strerror}. Give another, or 0 to take a "
                "free one."
            ) from None


def split_target(target: str) -> tuple[str, str]:
    """`"train.py:main"` as ("train.py", "main"); the function is `train` unless named."""
    path, colon, function = target.rpartition(":")
    return (path, function) if colon and function.isidentifier() else (target, "train")


def file_of(script: str) -> tuple[str, str]:
    """The file of a script, and its dotted name where it was given as a module: ("train.py", "") or
    ("package/module.py", "package.module"). A file of that very name wins."""
    is_name = all(part.isidentifier() for part in script.split("."))
    if not is_name or script.endswith(".py") or Path(script).exists():
        return script, ""
    found = find_module(script)
    return (script, "") if found is None else (str(found), script)
