"""`supple plan app.py:Model`: a real model measured in a process of its own, and the answer."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supple.cli.app import app
from supple.core.service.latency import LatencyPoint
from supple.core.spec import SpecError
from supple.serve.models import profiling
from supple.serve.models.profiling import (
    StoredProfile,
    known,
    machine,
    place,
    read,
    refresh,
    source_of,
    write,
)

MODEL = """
import numpy as np

class Model:
    inputs = {"x": "float32[-1]"}
    max_batch = 6

    def load(self):
        print("loading")

    def predict(self, batch):
        return batch.sum(axis=1)

class Silent:
    def predict(self, batch):
        return batch

class Broken:
    inputs = {"x": "float32[2]"}

    def predict(self, batch):
        raise ValueError("no weights")

class Ends:
    inputs = {"x": "float32[2]"}

    def predict(self, batch):
        import os
        os._exit(7)
"""


def stored() -> StoredProfile:
    def points(factor: float) -> tuple[LatencyPoint, ...]:
        return tuple(
            LatencyPoint(batch_size=b, p50_s=factor * b, p99_s=2 * factor * b) for b in (1, 4)
        )

    return StoredProfile(
        target="app.py:Model",
        source="0" * 64,
        machine="a machine",
        startup_s=2.0,
        memory_bytes=3,
        lengths=((16, points(0.01)), (64, points(0.04))),
    )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "SECONDS_PER_BATCH", 0.001)
    path = tmp_path / "app.py"
    path.write_text(MODEL)
    return path


def test_a_stored_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "a.json"
    write(stored(), path)
    assert read(path) == stored()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "lengths": []}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SpecError, match="is no stored profile"):
        read(path)


@pytest.mark.parametrize(("length", "expected"), [(1, 0.01), (16, 0.01), (17, 0.04), (None, 0.04)])
def test_a_length_is_answered_with_what_was_measured_at_least_as_long(
    length: int | None, expected: float
) -> None:
    assert stored().profile(length).seconds(1) == pytest.approx(expected)


@pytest.mark.slow
def test_a_model_is_measured_stored_and_known_until_its_file_changes(model: Path) -> None:
    arguments = ["plan", "app.py:Model", "--lengths", "2,8", "--json"]
    first = CliRunner().invoke(app, [*arguments, "--plot", "profile.png"])
    assert first.exit_code == 0, first.output
    data = json.loads(first.stdout)
    found = data["profile"]
    assert data["recommended"] in data["rows"]
    assert [length for length, _ in found["lengths"]] == [2, 8]
    assert [point["batch_size"] for point in found["lengths"][0][1]] == [1, 2, 4, 6]
    assert found["startup_s"] > 0 and found["memory_bytes"] > 2**20 and not found["reused"]
    assert (model.parent / "profile.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout)["profile"] == found | {"reused": True}
    table = CliRunner().invoke(app, arguments[:-1])
    for words in ("length 8", "per second", "a batch costs", "start-up"):
        assert words in table.stdout
    model.write_text(MODEL + "\n# changed\n")
    assert not json.loads(CliRunner().invoke(app, arguments).stdout)["profile"]["reused"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("Silent", 2, "declares no inputs"),
        ("Broken", 1, "ValueError: no weights"),
        ("Ends", 1, "ended with 7"),
        ("Other", 2, "has no class Other"),
    ],
)
def test_a_model_that_cannot_be_measured_is_told(
    model: Path, name: str, code: int, words: str
) -> None:
    result = CliRunner().invoke(app, ["plan", f"{model.name}:{name}"])
    assert result.exit_code == code and words in result.stderr, result.output
    assert not (model.parent / "supple-runs").exists()


@pytest.mark.parametrize("text", ["0", "a", "", "4,-1"])
def test_lengths_that_are_none_are_refused(model: Path, text: str) -> None:
    result = CliRunner().invoke(app, ["plan", f"{model.name}:Model", "--lengths", text])
    assert result.exit_code == 2 and "--lengths" in result.stderr


@pytest.mark.slow
def test_traffic_refreshes_the_sizes_it_had(model: Path) -> None:
    target = "app.py:Model"
    live = (LatencyPoint(batch_size=4, p50_s=0.5, p99_s=0.6, num_samples=9),)
    assert known(target) is None and not refresh(target, live)
    assert CliRunner().invoke(app, ["plan", target]).exit_code == 0
    before = known(target)
    assert before is not None and refresh(target, live)
    after = known(target)
    assert after is not None
    ((_, was),), ((_, now),) = before.lengths, after.lengths
    assert [p.batch_size for p in now] == [p.batch_size for p in was] == [1, 2, 4, 6]
    assert [p for p in now if p.batch_size == 4] == list(live)
    assert [p for p in now if p.batch_size != 4] == [p for p in was if p.batch_size != 4]


@pytest.mark.slow
def test_traffic_does_not_say_how_long_its_inputs_were(model: Path) -> None:
    arguments = ["plan", "app.py:Model", "--lengths", "2,8"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert not refresh("app.py:Model", (LatencyPoint(batch_size=1, p50_s=1.0, p99_s=1.0),))


def test_where_a_profile_cannot_be_stored_nothing_is_measured(model: Path) -> None:
    (model.parent / "supple-runs").write_text("no folder")
    result = CliRunner().invoke(app, ["plan", "app.py:Model"])
    assert result.exit_code == 2
    assert "there is no folder supple-runs" in result.stderr


def test_a_promise_and_a_rate_are_answered_with_replicas(model: Path) -> None:
    write(of_this_file(model), place("app.py:Model"))
    result = CliRunner().invoke(
        app, ["plan", "app.py:Model", "--slo", "p99=500ms", "--rate", "300", "--price", "2"]
    )
    assert result.exit_code == 0, result.output
    for words in ("replicas", "in time", "per hour", "Recommended: ", "known from"):
        assert words in result.output
    data = json.loads(
        CliRunner()
        .invoke(app, ["plan", "app.py:Model", "--slo", "p99=500ms", "--rate", "300", "--json"])
        .stdout
    )
    assert data["recommended"] in data["rows"] and data["profile"]["reused"]
    assert data["recommended"]["attainment"] >= 0.99


def test_a_promise_that_no_replica_keeps_is_an_answer_with_another_exit_code(model: Path) -> None:
    write(of_this_file(model), place("app.py:Model"))
    for rate in ([], ["--rate", "9"]):
        arguments = ["plan", "app.py:Model", "--slo", "p99=1ms", *rate, "--json"]
        told = CliRunner().invoke(app, arguments)
        assert told.exit_code == 1 and "No number of replicas" in told.stderr
        data = json.loads(told.stdout)
        assert data["infeasible"]["asked"] == "--slo p99=1ms" and data["profile"]["reused"]
    few = ["plan", "app.py:Model", "--slo", "p99=500ms", "--rate", "9000", "--max-workers", "2"]
    told = CliRunner().invoke(app, few)
    assert told.exit_code == 1 and "2 replicas answer at most" in told.stderr


def test_lengths_that_were_not_measured_are_and_without_any_what_is_stored_will_do(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(target: str, *, lengths: list[int]) -> StoredProfile:
        points = stored().lengths[0][1]
        return dataclasses.replace(
            of_this_file(model), target=target, lengths=tuple((n, points) for n in lengths)
        )

    monkeypatch.setattr(profiling, "measure", measured)

    def found(*more: str) -> tuple[list[int], bool]:
        result = CliRunner().invoke(app, ["plan", "app.py:Model", "--json", *more])
        assert result.exit_code == 0 and "not used" not in result.stderr, result.output
        profile = json.loads(result.stdout)["profile"]
        return [length for length, _ in profile["lengths"]], profile["reused"]

    assert found() == ([1], False)
    assert found("--lengths", "16,4") == ([4, 16], False)
    assert found("--lengths", "4,16") == ([4, 16], True)
    assert found() == ([4, 16], True)
    assert found("--lengths", "4") == ([4], False)
    assert found("--lengths", "1") == ([1], False)
    assert found("--again") == ([1], False)


def test_lengths_of_a_model_without_an_open_dim_are_said_not_to_be_used(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "measure", lambda *_, **__: of_this_file(model))
    result = CliRunner().invoke(app, ["plan", "app.py:Model", "--lengths", "16"])
    assert result.exit_code == 0 and "--lengths: not used" in result.stderr


def test_what_cannot_be_stored_is_an_answer_all_the_same_and_leaves_nothing_half(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling, "measure", lambda *_, **__: of_this_file(model))
    monkeypatch.setattr(Path, "replace", full)
    result = CliRunner().invoke(app, ["plan", "app.py:Model", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["recommended"]
    assert "app-Model.json could not be written: No space left on device" in result.stderr
    assert not list(place("app.py:Model").parent.iterdir())


def test_a_damaged_profile_is_told_with_how_to_get_past_it(model: Path) -> None:
    place("app.py:Model").parent.mkdir(parents=True)
    place("app.py:Model").write_text("{")
    result = CliRunner().invoke(app, ["plan", "app.py:Model"])
    assert result.exit_code == 2 and "--again" in result.stderr


def of_this_file(model: Path) -> StoredProfile:
    """A profile that was measured of this file, here, at one length."""
    return dataclasses.replace(
        stored(),
        source=source_of("app.py:Model"),
        machine=machine(),
        lengths=((1, stored().lengths[0][1]),),
    )
