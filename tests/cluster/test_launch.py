"""What is settled before a run begins: its folder, what it resumes from, what it must not lose."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from supple.cluster import launch
from supple.core.spec import SpecError, TrainSpec
from supple.train.checkpoint.store import CheckpointStore
from tests.train.crashes import SIGNATURE, state_of


def spec(folder: Path) -> TrainSpec:
    return TrainSpec(name="job", script="train.py", run_dir=str(folder))


def saved(folder: Path, *steps: int, about: dict[str, Any] | None = None) -> list[Path]:
    store = CheckpointStore(folder / "job" / "checkpoints", about=about)
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


@pytest.mark.parametrize(
    ("before", "given", "now", "told"),
    [
        (["--epochs", "3"], None, ["--epochs", "3"], "are those of the run: --epochs 3"),
        (["--epochs", "3"], ["--epochs", "3"], ["--epochs", "3"], ""),
        (["--epochs", "3"], ["--epochs", "4"], ["--epochs", "4"], "were --epochs 3, and are --epo"),
        ([], None, [], ""),
        ([], ["a b"], ["a b"], "were none, and are 'a b' from here on"),
        (None, None, [], ""),
    ],
)
def test_a_run_goes_on_with_the_arguments_it_had_and_a_change_is_told(
    tmp_path: Path, before: list[str] | None, given: list[str] | None, now: list[str], told: str
) -> None:
    """A checkpoint of before this version has none."""
    saved(tmp_path, 10, about=None if before is None else {"arguments": before})
    wanted = replace(spec(tmp_path), arguments=tuple(given or ()))
    resumed, _ = launch.resumed(wanted, "latest")
    resumed, line = launch.with_arguments(resumed)
    assert resumed.arguments == tuple(now)
    assert told in line and bool(told) == bool(line)


def test_resume_takes_a_folder_that_is_named(tmp_path: Path) -> None:
    first, _ = saved(tmp_path, 10, 20)
    resumed, _ = launch.resumed(spec(tmp_path), str(first))
    assert resumed.resume == str(first.resolve())


def test_a_checkpoints_folder_that_is_a_file_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "checkpoints").write_text("")
    with pytest.raises(SpecError, match=r"--resume latest: .*cannot be listed"):
        launch.resumed(spec(tmp_path), "latest")


def truncated(path: Path) -> None:
    os.truncate(path / "state.pt", 100)


def another_bit(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def code_to_run(path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    torch.save({"x": Harm()}, path / "state.pt")
    signed(path)


def no_state(path: Path) -> None:
    torch.save([1, 2], path / "state.pt")
    signed(path)


def signed(path: Path, **changes: Any) -> None:
    """Make the manifest's sums right, as one who means harm would."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    state = (path / "state.pt").read_bytes()
    manifest |= {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()} | changes
    manifest.pop("manifest_sha256")
    text = json.dumps(manifest, sort_keys=True).encode()
    manifest["manifest_sha256"] = hashlib.sha256(text).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return damage


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": truncated,
    "another bit": another_bit,
    "code to run": code_to_run,
    "no state": no_state,
    "an empty manifest": lambda path: (path / "manifest.json").write_text("{}"),
    "a list": lambda path: (path / "manifest.json").write_text("[]"),
    "a number": lambda path: (path / "manifest.json").write_text("7"),
    "no text": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"),
    "nested": lambda path: (path / "manifest.json").write_text("[" * 100_000),
    "a huge number": lambda path: (path / "manifest.json").write_text('{"step": 1' + "0" * 9000),
    "a negative step": lambda path: signed(path, step=-1),
    "a step that is text": lambda path: signed(path, step="ten"),
    "a step that is true": lambda path: signed(path, step=True),
    "a step beyond counting": lambda path: signed(path, step=10**30),
    "bytes that are text": lambda path: signed(path, bytes="many"),
    "a sum that is a number": lambda path: signed(path, sha256=5),
    "a signature that is a number": lambda path: signed(path, signature=5),
    "a signature of numbers": lambda path: signed(path, signature=[1, 2]),
    "a signature of strange rows": lambda path: signed(path, signature=[[1, 2, 3]]),
    "a folder as state": in_place_of("state.pt", Path.mkdir),
    "a folder as manifest": in_place_of("manifest.json", Path.mkdir),
    "a pipe as state": in_place_of("state.pt", os.mkfifo),
    "a pipe as manifest": in_place_of("manifest.json", os.mkfifo),
    "an endless device": in_place_of("state.pt", lambda path: path.symlink_to("/dev/zero")),
    "a loop of links": in_place_of("state.pt", lambda path: path.symlink_to(path)),
    "a link to nothing": in_place_of("manifest.json", lambda path: path.symlink_to("nothing")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_anything_starts(
    tmp_path: Path, damage: str
) -> None:
    good, bad = saved(tmp_path, 10, 20)
    DAMAGES[damage](bad)
    with pytest.raises(SpecError, match=f"--resume {good}") as refused:
        launch.resumed(spec(tmp_path), str(bad))
    assert str(bad) in str(refused.value)
    resumed, said = launch.resumed(spec(tmp_path), "latest")
    assert resumed.resume == str(good)
    assert "Skipped: " in said and str(bad) in said


@pytest.mark.parametrize("damage", ["truncated", "code to run", "a list"])
def test_with_no_good_one_left_the_refusal_says_what_is_wrong_with_each(
    tmp_path: Path, damage: str
) -> None:
    for path in saved(tmp_path, 10, 20):
        DAMAGES[damage](path)
    with pytest.raises(SpecError, match="there is no good checkpoint") as refused:
        launch.resumed(spec(tmp_path), "latest")
    assert str(refused.value).count("Skipped:") == 2


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("loop", "file", "folder"):
        with pytest.raises(SpecError, match=f"--resume .*{name}"):
            launch.resumed(spec(tmp_path), str(tmp_path / name))


def test_a_ledger_that_cannot_be_removed_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "w0.jsonl").write_text("")
    launch.remove_ledger(tmp_path)
    assert not list((tmp_path / "ledger").iterdir())
    (tmp_path / "ledger" / "w0.jsonl").mkdir()
    with pytest.raises(SpecError, match=r"w0\.jsonl .*cannot be removed: Is a directory"):
        launch.remove_ledger(tmp_path)


def test_a_name_too_long_for_a_socket_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "train.py"
    script.write_text("def train(job):\n    pass\n")
    long = tmp_path / ("t" * 90) / "job.sock"
    monkeypatch.setattr(launch, "socket_path", lambda _: long)
    with pytest.raises(SpecError, match=f"{len(str(long))} bytes, and the kernel allows 107"):
        launch.prepare(TrainSpec(name="job", script=str(script), run_dir=str(tmp_path)))
