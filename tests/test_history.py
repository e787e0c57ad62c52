"""Previous runs of a task, read from a file."""

import os
import threading
from pathlib import Path

import pytest

from supple.core.spec import SpecError
from supple.core.training.learning_rate import TunedRate
from supple.core.training.samples import Run, SamplesModel
from supple.inputs.history import best_rates, read_history, read_known


def written(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text)
    return path


def read_curve(history: Path | None, probes: Path | None = None) -> SamplesModel:
    return read_known(history, probes).curve()


def test_every_line_is_a_run(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "batch_size,samples_to_target,learning_rate,reached,note\n"
        "64,1e6,0.1,1,first\n256,1.2e6,0.2,,\n1024,5e6,,0,stopped\n",
    )
    assert read_history(path) == [
        Run(batch_size=64, samples=1e6, lr=0.1),
        Run(batch_size=256, samples=1.2e6, lr=0.2),
        Run(batch_size=1024, samples=5e6, reached=False),
    ]


def test_a_curve_says_what_it_rests_on(tmp_path: Path) -> None:
    path = written(tmp_path, "batch_size,samples_to_target\n64,1e6\n256,1.2e6\n")
    assert read_curve(path).why == "from runs of this task at 2 batch sizes, 64 to 256"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: it needs batch_size, samples_to_target"),
        ("batch,samples\n1,2\n", "no column batch_size, samples_to_target: it needs"),
        (
            "batch_size,samples_to_target\n64,1e6\n128,soon\n",
            "line 3: samples_to_target is 'soon': not a number",
        ),
        ("batch_size,samples_to_target\n64\n", "line 2: the row has 1 cell and the header 2"),
        ("batch_size,samples_to_target\n64,1e6\n", "none of these compares two sizes"),
        (
            "batch_size,samples_to_target\n64,-1\n128,2\n",
            "line 2: samples_to_target is -1: it must be positive and finite",
        ),
        (
            "batch_size,samples_to_target\n0,1\n128,2\n",
            "line 2: batch_size is 0: it must be positive and finite",
        ),
        ("batch_size,samples_to_target\n64,1\n64,90\n128,9\n", "runs.csv: .* 64 took 1 and 90"),
        (
            "batch_size,samples_to_target,reached\n64,1,1\n64,1,n\n",
            "line 3: reached is 'n': .* Give 1",
        ),
    ],
)
def test_a_history_without_meaning_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){said}"):
        read_curve(written(tmp_path, text))


def test_two_probes_alone_compare_batch_sizes_and_say_so(tmp_path: Path) -> None:
    path = tmp_path / "probes.csv"
    path.write_text("batch_size,samples\n64,10000\n1024,20000\n")
    curve = read_curve(None, path)
    assert curve.why == "from short probes at 2 batch sizes"
    found = curve.efficiency(64, 1024)
    assert found.low < 0.5 < found.high


def test_runs_of_the_task_are_trusted_before_probes(tmp_path: Path) -> None:
    path = tmp_path / "probes.csv"
    path.write_text("batch_size,samples\n64,10000\n1024,20000\n")
    runs = written(tmp_path, "batch_size,samples_to_target\n64,1e6\n1024,1.1e6\n")
    both = read_curve(runs, path)
    assert both.why.startswith("from runs of this task")
    assert both.efficiency(64, 1024).value > 0.7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_size,samples_to_target\n64,1\n", "the probes .* no column samples"),
        ("batch_size,samples\n64,ten\n", "line 2: samples is 'ten': not a number"),
        ("batch_size,samples\n512,1000\n1024,1e8\n", "probes at batch 512 and 1024 took"),
        ("batch_size,samples\n64,100\n", "the probes .*none of these compares two sizes"),
    ],
)
def test_probes_without_meaning_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){said}"):
        read_curve(None, written(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_curve(tmp_path / "absent.csv")


def test_the_rate_of_a_batch_size_is_that_of_its_best_run() -> None:
    runs = [
        Run(batch_size=256, samples=2e6, lr=0.4),
        Run(batch_size=64, samples=1.5e6, lr=0.05),
        Run(batch_size=64, samples=1e6, lr=0.1),
        Run(batch_size=64, samples=9e5),
        Run(batch_size=1024, samples=1e5, lr=9.0, reached=False),
    ]
    assert best_rates(runs) == (
        TunedRate(batch_size=64, lr=0.1),
        TunedRate(batch_size=256, lr=0.4),
    )


def test_seeds_at_one_rate_count_by_their_mean_and_not_by_the_luckiest() -> None:
    lucky = [Run(batch_size=64, samples=samples, lr=0.1) for samples in (5e5, 2e6, 2e6)]
    steady = [Run(batch_size=64, samples=samples, lr=0.2) for samples in (1.1e6, 1.2e6)]
    assert best_rates([*lucky, *steady]) == (TunedRate(batch_size=64, lr=0.2),)


def test_a_run_that_is_left_out_of_the_curve_has_no_say_in_the_rates() -> None:
    runs = [Run(batch_size=2.0**k, samples=1e6, lr=0.1 * k) for k in range(6, 11)]
    absurd = Run(batch_size=700, samples=1e12, lr=1e-9)
    assert best_rates([*runs, absurd]) == best_rates(runs)


def test_one_batch_size_waits_for_the_noise_scale_that_is_measured_later(tmp_path: Path) -> None:
    known = read_known(written(tmp_path, "batch_size,samples_to_target\n64,1e6\n"), None)
    assert not known.compares_sizes
    assert known.curve(noise_scale=500.0).why.startswith("from the gradient noise scale, 500")
    with pytest.raises(SpecError, match="measure the noise scale"):
        known.curve()


def test_a_history_that_can_be_read_only_once_is_read_once(tmp_path: Path) -> None:
    """What a shell's <(command) hands over."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "batch_size,samples_to_target,learning_rate\n64,1e6,0.1\n256,1.2e6,0.2\n"
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    known = read_known(pipe, None)
    writer.join()
    assert known.compares_sizes
    assert known.rates == (TunedRate(batch_size=64, lr=0.1), TunedRate(batch_size=256, lr=0.2))
