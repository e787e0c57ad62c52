"""The command line: a table of commands, each imported when it is used.

So `supple --help` imports neither numpy nor torch nor Ray, whatever a command needs.
"""

import importlib
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from supple import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command: a function of its own name in `module`, and NAME_EPILOG there, below its help; or
    a group of commands of that name."""

    module: str
    line: str
    """Its line in `supple --help`, short enough for a terminal."""


COMMANDS = {
    "plan": Command(
        module="supple.cli.planning.plan",
        line="How many workers, accelerators or replicas, and why.",
    ),
    "train": Command(
        module="supple.cli.train",
        line="Train a script with a number of workers that changes.",
    ),
    "serve": Command(
        module="supple.cli.serve",
        line="Serve a model to a latency promise.",
    ),
    "simulate": Command(
        module="supple.cli.simulate",
        line="Replay a trace with the code that decides in production.",
    ),
    "load": Command(
        module="supple.cli.load",
        line="Put load on a service, and report its latency.",
    ),
    "status": Command(
        module="supple.cli.running",
        line="Show the jobs that run on this machine.",
    ),
    "resize": Command(
        module="supple.cli.running",
        line="Change the number of workers of a running job.",
    ),
    "preempt": Command(
        module="supple.cli.running",
        line="Tell a running job that some workers will be taken.",
    ),
    "stop": Command(
        module="supple.cli.running",
        line="Stop a running job after the step in flight, and save.",
    ),
    "update": Command(
        module="supple.cli.serve",
        line="Give a running service other code or weights.",
    ),
    "doctor": Command(
        module="supple.cli.running",
        line="Check what this machine offers, and what is missing.",
    ),
}
_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


@final
class Commands(TyperGroup):
    """The commands of the table."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        module = importlib.import_module(command.module)
        found = getattr(module, cmd_name)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(**_SETTINGS)
            cls = getattr(module, f"{cmd_name.capitalize()}Command", None)
            alone.command(cls=cls, epilog=getattr(module, f"{cmd_name.upper()}_EPILOG"))(found)
            found = alone
        built = get_command(found)
        built.name = cmd_name
        return built

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0].lower(), COMMANDS, n=1)
            hint = f" Do you mean {near[0]!r}?" if near else " `supple --help` lists them."
            ctx.fail(f"no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.line) for name, command in COMMANDS.items()])


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    epilog="Examples:\n\n  supple plan train.py --deadline 2h\n\n"
    "  supple train train.py --workers 1:4\n\n  supple COMMAND --help",
    **_SETTINGS,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"supple {__version__}")
        raise typer.Exit


@app.callback()
def _supple(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Elastic training for PyTorch: how many workers a job deserves, and changing the number while
    it runs."""
