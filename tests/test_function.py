"""`supple.run` on workers: which options it takes, what it refuses, and what it hands on."""

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import supple
from supple.cli import function, training
from supple.control.controller import Outcome
from supple.core.spec import SpecError, TrainSpec
from supple.report.live import Tally
from supple.train.start.script import check, load

Options = dict[str, Any]


def loop(job: Any) -> None:
    job.append("trained")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainSpec, Options]]:
    """What is run, in a folder of its own, where every run finishes at once."""
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[TrainSpec, Options]] = []

    def run_to_end(spec: TrainSpec, **options: Any) -> training.End:
        seen.append((spec, options | {"thread": threading.current_thread()}))
        tally = Tally()
        tally.last_step, tally.metrics = 20, {"loss": 0.5}
        outcome = Outcome(status="finished", reason="done", checkpoint="/c/000001-step-20")
        return training.End(outcome=outcome, tally=tally)

    monkeypatch.setattr(training, "run_to_end", run_to_end)
    return seen


def test_a_function_is_run_with_the_options_of_the_command_and_a_result_comes_back(
    runs: list[tuple[TrainSpec, Options]],
) -> None:
    result = supple.run(
        loop, workers="1:4", deadline="2h", price=2.5, seed=3, knee=False, resume=True, name="mine"
    )
    ((spec, options),) = runs
    assert (spec.min_workers, spec.max_workers, spec.seed) == (1, 4, 3)
    assert spec.objective is not None and spec.objective.deadline_s == 7200.0
    assert (spec.price_per_hour, spec.name, spec.function) == (2.5, "mine", "loop")
    assert options["resume"] == "latest" and options["verbose"] is False
    assert (result.status, result.steps, result.metrics) == ("finished", 20, {"loss": 0.5})
    assert result.checkpoint == Path("/c/000001-step-20")
    assert result.folder == Path("supple-runs/mine").resolve()


def test_what_the_workers_load_is_the_function_with_its_closure(
    runs: list[tuple[TrainSpec, Options]],
) -> None:
    for word in ("first", "second"):

        def train(job: Any, word: str = word) -> None:
            job.append(word)

        supple.run(train, workers=2)
    spec = runs[-1][0]
    check(spec.script, spec.function)
    found: list[str] = []
    load(spec.script, spec.function)(found)
    assert found == ["second"]
    assert len(list(Path(spec.script).parent.glob("*.pkl"))) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sed": 3}, "sed=...): no such option. Do you mean seed=?"),
        ({"as_json": True}, "as_json=...): no such option"),
        ({"workers": "4:2"}, "MIN 4 is above MAX 2"),
        ({"deadline": 2}, "a number without a unit"),
        ({"workers": None, "seed": 3}, "Add workers="),
    ],
)
def test_what_the_command_would_refuse_is_refused_before_anything_is_written(
    runs: list[tuple[TrainSpec, Options]], options: Options, told: str
) -> None:
    with pytest.raises(supple.SpecError) as caught:
        supple.run(loop, **{"workers": "1:4"} | options)
    assert told in str(caught.value)
    assert runs == [] and list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("given", [lambda: None, lambda a, b: None, "train", None])
def test_what_is_no_function_of_one_argument_is_refused(given: Any) -> None:
    with pytest.raises(SpecError, match="exactly one argument, the job"):
        supple.run(given, workers=2)


def test_a_function_that_cannot_be_pickled_is_refused_with_what_to_do(
    runs: list[tuple[TrainSpec, Options]],
) -> None:
    lock = threading.Lock()

    def train(job: Any) -> None:
        job.append(lock)

    with pytest.raises(SpecError, match=r"train cannot be sent to workers: .*lock.*make inside it"):
        supple.run(train, workers=2)
    assert runs == []


def test_a_script_hands_its_arguments_on_and_a_notebook_has_none(
    runs: list[tuple[TrainSpec, Options]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "3"])
    # A process of pytest-xdist has none.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "train.py", raising=False)
    supple.run(loop, workers=2)
    supple.run(loop, workers=2, arguments=["--epochs", "4"])
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    supple.run(loop, workers=2)
    assert [spec.arguments for spec, _ in runs] == [("--epochs", "3"), ("--epochs", "4"), ()]


def test_in_a_notebook_whose_loop_runs_already_the_job_has_a_thread_of_its_own(
    runs: list[tuple[TrainSpec, Options]],
) -> None:
    async def cell() -> supple.Run:
        return supple.run(loop, workers=2)

    assert asyncio.run(cell()).steps == 20
    supple.run(loop, workers=2)
    beside, here = (options["thread"] for _, options in runs)
    assert beside is not threading.main_thread() and here is threading.main_thread()


def test_an_interrupted_cell_stops_the_job_and_returns_what_was_saved(
    runs: list[tuple[TrainSpec, Options]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[object] = []

    class Ending:
        def result(self) -> str:
            if not requests:
                raise KeyboardInterrupt
            return "ended"

    monkeypatch.setattr(function.ThreadPoolExecutor, "submit", lambda *_: Ending())
    monkeypatch.setattr(
        "supple.control.socket.send_request", lambda *request: requests.append(request)
    )

    async def cell() -> str:
        spec = TrainSpec(name="cell", script="")
        return function._in_a_thread_where_a_loop_runs(spec, lambda: None)

    assert asyncio.run(cell()) == "ended"
    assert requests == [("cell", {"ask": "stop"})]


def test_a_run_that_failed_raises_with_the_functions_traceback(
    runs: list[tuple[TrainSpec, Options]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_to_end(*_: Any, **__: Any) -> training.End:
        outcome = Outcome(status="failed", reason="the script raised", detail="Traceback …\nKeyErr")
        return training.End(outcome=outcome, tally=Tally())

    monkeypatch.setattr(training, "run_to_end", run_to_end)
    with pytest.raises(supple.RunFailed, match=r"the script raised\nTraceback …\nKeyErr"):
        supple.run(loop, workers=2)
