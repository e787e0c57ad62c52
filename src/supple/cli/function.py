"""`supple.run`: train a function from Python, in this process or on Ray workers.

A function of a script's `__main__` or of a notebook is sent to the workers by value, with the
globals and the closure that it uses.
"""

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints, overload

from supple.core.spec import SpecError

if TYPE_CHECKING:
    from supple.core.spec import TrainSpec
    from supple.train.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run of `supple.run` on workers came to."""

    status: Literal["finished", "stopped"]
    reason: str
    """One line, as the command prints it."""
    steps: int
    """Committed steps, those before a resume included."""
    metrics: dict[str, float]
    """The last values that the function reported."""
    checkpoint: Path | None
    """The newest checkpoint, for `resume=` and `supple.load_weights`."""
    folder: Path
    """The run's folder: event log, picture, checkpoints, the workers' logs."""


class RunFailed(Exception):
    """A run on workers failed; the text has the reason and the function's traceback."""


@overload
def run(train: "Callable[[Job], None]") -> "Job": ...
@overload
def run(
    train: "Callable[[Job], None]",
    *,
    workers: str | int,
    arguments: Sequence[str] | None = None,
    **options: Any,
) -> Run: ...
def run(
    train: "Callable[[Job], None]",
    *,
    workers: str | int | None = None,
    arguments: Sequence[str] | None = None,
    **options: Any,
) -> "Job | Run":
    """Train `train(job)` in this process, or with `workers` ("1:4", 4) on Ray workers.

    Without `workers`: one worker, no Ray, for debugging; returns the trained job, and exceptions
    pass through, so that a debugger stops where they happen.

    With it: what `supple train` does, with its options by name (`deadline="2h"`, `seed=3`,
    `resume="latest"`, `name="digits"`); returns a `Run`. `arguments` is `sys.argv[1:]` on the
    workers, by default that of this script. Raises `SpecError` for what is refused before any work,
    and `RunFailed`. Interrupting it (Ctrl-C, or a notebook's stop button) saves and returns.
    """
    if workers is None:
        given = {**options, **({} if arguments is None else {"arguments": arguments})}
        if given:
            raise SpecError(
                f"supple.run(train, {', '.join(f'{name}=...' for name in given)}): options are for "
                "a run on workers. Add workers=, such as workers='1:4', or leave them out."
            )
        from supple.train.start.local import run

        return run(train)
    _refuse_wrong(train)
    return _on_workers(train, {**options, "workers": workers}, _arguments(arguments))


def _on_workers(train: Any, options: Mapping[str, Any], arguments: Sequence[str]) -> Run:
    from supple.cli.train import check_free, spec_of
    from supple.cli.training import run_to_end
    from supple.cluster import launch

    given: dict[str, Any] = _defaults() | _as_typed(options)
    name = _name_of(train)
    spec = spec_of(given | {"script": f"{name}.pkl:{name}", "arguments": tuple(arguments)})
    check_free(spec)
    spec = launch.with_function(spec, train)
    resume = "latest" if given["resume"] is True else given["resume"]
    end = _in_a_thread_where_a_loop_runs(
        spec, lambda: run_to_end(spec, resume=resume, as_json=False, verbose=given["verbose"])
    )
    outcome = end.outcome
    if outcome.status == "failed" or not end.is_well:
        raise RunFailed("\n".join(filter(None, (outcome.reason, outcome.detail))))
    return Run(
        status=outcome.status,
        reason=outcome.reason,
        steps=end.tally.last_step,
        metrics=end.tally.metrics,
        checkpoint=None if outcome.checkpoint is None else Path(outcome.checkpoint),
        folder=launch.run_path_of(spec),
    )


def _refuse_wrong(train: Any) -> None:
    """Raise `SpecError` unless `train` can be called with one argument."""
    try:
        inspect.signature(train).bind(None)
    except (TypeError, ValueError):
        raise SpecError(
            f"supple.run({train!r}): it must be a function that takes exactly one argument, the "
            "job. Write `def train(job)`, and give train."
        ) from None


def _name_of(train: Any) -> str:
    name = getattr(train, "__name__", "")
    return name if name.isidentifier() and not name.startswith("_") else "train"


def _arguments(given: Sequence[str] | None) -> Sequence[str]:
    """The script's arguments; none in a notebook, whose command line is the kernel's."""
    if given is not None:
        return given
    return sys.argv[1:] if hasattr(sys.modules["__main__"], "__file__") else ()


def _defaults() -> dict[str, Any]:
    """The options of `supple train` by name, with their defaults."""
    from supple.cli.train import train

    options = inspect.signature(train).parameters
    left_out = ("script", "arguments", "as_json")
    return {name: option.default for name, option in options.items() if name not in left_out}


def _as_typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The given options as the command line has them: numbers and paths are text where an option
    takes text. Raises `SpecError` for an unknown one."""
    known = _defaults()
    for name in options.keys() - known.keys():
        near = get_close_matches(name, known, n=1)
        hint = f" Do you mean {near[0]}=?" if near else ""
        raise SpecError(
            f"supple.run(..., {name}=...): no such option.{hint} Those of `supple train --help` "
            "are known, with _ for -."
        )
    return {name: _as_text(name, value) for name, value in options.items()}


def _as_text(name: str, value: Any) -> Any:
    from supple.cli.train import train

    hint = get_type_hints(train)[name]
    takes_text = str in (hint, *get_args(hint))
    return value if value is None or isinstance(value, bool) or not takes_text else str(value)


def _in_a_thread_where_a_loop_runs(spec: "TrainSpec", act: Callable[[], Any]) -> Any:
    """Return `act()`, which runs an event loop: in a thread of its own where this one has a running
    loop already, as in a notebook. An interrupt stops the job, which saves."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return act()
    from supple.control.socket import send_request

    with ThreadPoolExecutor(1, thread_name_prefix="supple") as beside:
        ending = beside.submit(act)
        while True:
            try:
                return ending.result()
            except KeyboardInterrupt:
                send_request(spec.name, {"ask": "stop"})
