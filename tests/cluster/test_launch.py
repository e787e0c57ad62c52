"""What is settled before a run begins: its folder, what it resumes from, what it must not lose."""

from pathlib import Path

import pytest

from supple.cluster import launch
from supple.core.spec import SpecError, TrainSpec
from supple.train.checkpoint import CheckpointStore
from tests.train.crashes import SIGNATURE, state_of


def spec(folder: Path) -> TrainSpec:
    return TrainSpec(name="job", script="train.py", run_dir=str(folder))


def saved(folder: Path, *steps: int) -> list[Path]:
    store = CheckpointStore(folder / "job" / "checkpoints")
    return [store.save(step, state_of(step), {"signature": SIGNATURE}) for step in steps]


def test_a_run_begun_anew_does_not_replace_an_earlier_ones_checkpoints(tmp_path: Path) -> None:
    for number in (1, 2):
        saved(tmp_path, 10 * number)
        said = launch.set_aside(spec(tmp_path))
        kept = tmp_path / "job" / f"checkpoints-{number}"
        assert str(kept) in said
        assert "--resume latest" in said
        found = CheckpointStore(kept).latest()
        assert found is not None
        assert found.step == 10 * number
    assert not (tmp_path / "job" / "checkpoints").exists()


def test_nothing_is_moved_where_nothing_was_saved(tmp_path: Path) -> None:
    assert launch.set_aside(spec(tmp_path)) == ""
    (tmp_path / "job" / "checkpoints").mkdir(parents=True)
    assert launch.set_aside(spec(tmp_path)) == ""
    assert (tmp_path / "job" / "checkpoints").is_dir()


def test_resume_takes_the_last_one_that_is_whole_and_says_what_it_passed_over(
    tmp_path: Path,
) -> None:
    good, bad = saved(tmp_path, 10, 20)
    with (bad / "state.pt").open("r+b") as file:
        file.write(b"x")
    resumed, said = launch.resumed(spec(tmp_path), "latest")
    assert resumed.resume == str(good)
    assert "step 10" in said
    assert "corrupt" in said


def test_resume_takes_a_folder_that_is_named(tmp_path: Path) -> None:
    first, _ = saved(tmp_path, 10, 20)
    resumed, _ = launch.resumed(spec(tmp_path), str(first))
    assert resumed.resume == str(first.resolve())


def test_a_checkpoints_folder_that_is_a_file_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "checkpoints").write_text("")
    with pytest.raises(SpecError, match=r"--resume latest: .*cannot be listed"):
        launch.resumed(spec(tmp_path), "latest")
