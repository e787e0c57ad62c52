"""The script's own arguments: everything after `--` on the command lines of train and plan."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

ScriptArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- ARGUMENTS", help="After --: the command line of the script, its sys.argv."
    ),
]


class ScriptCommand(TyperCommand):
    """A command whose subject is a script, which takes what stands after `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        own, mark, behind = args[:at], args[at : at + 1], args[at + 1 :]
        self._refuse_options_of_the_script(ctx, own)
        rest = super().parse_args(ctx, [*self.completed(own), *mark, *behind])
        found = list(ctx.params.get("arguments") or ())
        if len(found) > len(behind) and not ctx.resilient_parsing:
            _refuse(ctx, found[: len(found) - len(behind)])
        ctx.params["arguments"] = tuple(behind)
        return rest

    def completed(self, own: list[str]) -> list[str]:
        """Return the command's own words as they are parsed."""
        return own

    def _refuse_options_of_the_script(self, ctx: Any, own: Sequence[str]) -> None:
        """Refuse an option that is like none of this command; a misspelt one is refused later, with
        those it may mean."""
        known = [name for param in self.get_params(ctx) for name in param.opts]
        for index, word in enumerate(own):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known and not _is_near(name, known):
                _refuse(ctx, own[index:])


def _refuse(ctx: Any, words: Sequence[str]) -> None:
    ctx.fail(
        f"{words[0]} is no option of `supple {ctx.info_name}`. What is for the script comes last, "
        f"after --: -- {' '.join(words)}"
    )


def _is_near(name: str, known: Sequence[str]) -> bool:
    """Return whether the name is one of `known`, misspelt: `--wokers`, and not `--epochs` for
    `--probes`."""
    return bool(get_close_matches(name, known, n=1, cutoff=0.8))
