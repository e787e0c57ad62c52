"""Read previous runs of a task, and short probes, from CSV files: `--history` and `--probes` of
`supple plan`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from supple.core.spec import SpecError
from supple.core.training.learning_rate import TunedRate
from supple.core.training.previous_runs import (
    best_of_each_size,
    gathered,
    without_absurd,
    without_odd_repeats,
)
from supple.core.training.samples import Run, SamplesModel, fit_samples
from supple.inputs.rows import Row, read_rows

COLUMNS = ("batch_size", "samples_to_target")
OPTIONAL = ("learning_rate", "reached")
PROBE_COLUMNS = ("batch_size", "samples")
_REACHED = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Previous runs and probes. Create it with `read_known`, which validates the files, so that bad
    ones are refused before anything is measured."""

    runs: tuple[Run, ...]
    probes: tuple[Run, ...]
    files: str
    """The names of the files, for messages."""
    compares_sizes: bool
    """Whether the runs compare batch sizes; otherwise `curve` needs a noise scale."""

    def curve(self, noise_scale: float | None = None) -> SamplesModel:
        """Fit samples to target against batch size; from probes alone only ratios are known. Raises
        `SpecError` if no curve fits."""
        try:
            return fit_samples(self.runs, self.probes, noise_scale=noise_scale)
        except ValueError as error:
            raise SpecError(f"{self.files}: {error}") from None

    @property
    def rates(self) -> tuple[TunedRate, ...]:
        return best_rates(self.runs)


def read_known(history: Path | None, probes: Path | None) -> Known:
    """Read the files of `--history` and `--probes`. Raises `SpecError` naming the file and the
    line, also if no curve fits the runs for any noise scale."""
    runs = [] if history is None else read_history(history)
    branches = [] if probes is None else read_probes(probes)
    given = (("the history", history), ("the probes", probes))
    files = " and ".join(f"{what} {path}" for what, path in given if path is not None)
    known = Known(runs=tuple(runs), probes=tuple(branches), files=files, compares_sizes=False)
    tried = known.curve(noise_scale=[*runs, *branches][0].batch_size)
    return replace(known, compares_sizes=tried.compares_sizes)


def read_probes(path: Path) -> list[Run]:
    """Read probes: branches of one checkpoint, each with its own batch size, run to the same loss.
    A line has `batch_size` (global) and `samples`, the number the branch needed. Raises `SpecError`
    naming the file and the line."""
    rows = read_rows(
        path, PROBE_COLUMNS, what="the probes", besides="nothing more; one branch per line"
    )
    return [Run(batch_size=row.batch(), samples=row.number("samples")) for row in rows]


def read_history(path: Path) -> list[Run]:
    """Read previous runs. A line has `batch_size` (global) and `samples_to_target`; optionally
    `learning_rate`, and `reached`, 0 for a run stopped after these samples before the target.

    Raises `SpecError` naming the file and the line."""
    besides = f"if known, {', '.join(OPTIONAL)}; one run per line"
    rows = read_rows(path, COLUMNS, what="the history", besides=besides)
    return [_run(row) for row in rows]


def best_rates(runs: Sequence[Run]) -> tuple[TunedRate, ...]:
    """Return the learning rate with the fewest mean samples to target at each batch size, from runs
    with a learning rate. Outliers, which contradict most other runs, are removed first."""
    usual = without_odd_repeats(runs, "runs")
    agreed = without_absurd(gathered(usual, is_probe=False))
    best = best_of_each_size([point for point in agreed if point.lr and point.beyond is None])
    return tuple(TunedRate(batch_size=point.batch, lr=point.lr) for point in best if point.lr)


def reached(row: Row) -> bool:
    """Whether the run of a line reached its target; an empty cell means yes. Raises `SpecError` for
    a cell that is neither yes nor no."""
    cell = row.text("reached").lower() if "reached" in row else "1"
    if cell not in _REACHED:
        raise row.refusal(
            f"reached is {row.text('reached')!r}: it must state whether the run reached the target",
            "Give 1 if it did and 0 if it was stopped before (or yes and no, true and false)",
        )
    return _REACHED[cell]


def _run(row: Row) -> Run:
    return Run(
        batch_size=row.batch(),
        samples=row.number("samples_to_target"),
        lr=row.number("learning_rate") if "learning_rate" in row else None,
        reached=reached(row),
    )
