"""A plan's answer: the table or JSON on stdout, a picture, and what to do where there is none."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from supple.cli.errors import FAILED
from supple.cli.output import console
from supple.cli.planning.subject import Question
from supple.core.spec import Objective, SpecError
from supple.core.types import Infeasible
from supple.report.eventlog import to_plain

if TYPE_CHECKING:  # numpy is imported by what makes a table, so that `--help` is immediate
    from supple.core.planning.choice import PlanTable


_MOST_RATE = 1e6
"""Requests a second: more than any service known."""


def check_rate(rate: float | None) -> None:
    """Raise `SpecError` for a `--rate` that no service has."""
    if rate is not None and not 0 < rate <= _MOST_RATE:
        raise SpecError(
            f"--rate is {rate:g} requests a second: it must be positive and at most "
            f"{_MOST_RATE:,.0f}, more than any service known. Give what arrives on average."
        )


def tell(line: str) -> None:
    """A line beside the answer, on stderr."""
    typer.echo(line, err=True)


def print_json(data: Mapping[str, Any]) -> None:
    """One line of JSON on stdout, its numbers plain and finite."""
    typer.echo(json.dumps(to_plain(data)))


def check_plot(plot: Path | None) -> None:
    """Raise `SpecError` where the picture could not be drawn, before any work."""
    if plot is not None:
        from supple.report.picture import check_picture

        check_picture(plot)


@contextmanager
def picture(plot: Path) -> Iterator[None]:
    """Around the drawing of `plot`, after the answer: a full disk is one message, and a failure."""
    try:
        yield
    except OSError as error:
        tell(f"supple: the picture {plot} could not be written: {error.strerror}.")
        raise typer.Exit(FAILED) from None
    tell(f"picture {plot}")


def no_plan(why: Infeasible, plot: Path | None) -> typer.Exit:
    """Say why there is no plan; the exit to raise."""
    tell(f"supple: {why}")
    if plot is not None:
        tell("no picture: there is no plan")
    return typer.Exit(FAILED)


def show_plan(
    table: "PlanTable | Infeasible",
    question: Question,
    objective: Objective,
    *,
    title: str,
    first: str,
    besides: Mapping[str, Any] | None = None,
    above: Sequence[str] = (),
    below: Sequence[str] = (),
) -> None:
    """Show `table` with lines above and below it, what to measure `first`, and `besides` it in the
    JSON. Raises `typer.Exit` of a
    failure where there is no plan."""
    from supple.report import plan_view

    if question.as_json:
        print_json({**plan_view.to_json(table, measure_first=first), **(besides or {})})
    if isinstance(table, Infeasible):
        raise no_plan(table, question.plot)
    if not question.as_json:
        plan_view.show(table, console(), measure_first=first, above=above, below=below)
    if question.plot is not None:
        from supple.report.picture import draw_plan

        with picture(question.plot):
            draw_plan(table, question.plot, title=title, objective=objective)
