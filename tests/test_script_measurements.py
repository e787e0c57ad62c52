"""What `supple plan` measured is found again: of the same script, on the same machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from supple.core.planning.measured import ScriptMeasurements
from supple.inputs import script_measurements
from supple.inputs.script_measurements import keep, kept
from supple.train.start.script import Start
from tests.core.test_advisor import MEASURED


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "supple" / "measured"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("def train(job): ...\n")
    return path


def found(script: Path, function: str = "train") -> ScriptMeasurements | None:
    earlier = kept(str(script), function)
    return None if earlier is None else earlier.found


def test_what_was_measured_is_found_again_as_it_was(script: Path) -> None:
    assert kept(str(script), "train") is None
    keep(MEASURED, str(script), "train")
    earlier = kept(str(script), "train")
    assert earlier is not None and earlier.found == MEASURED
    assert earlier.when.startswith("20")
    newer = replace(MEASURED, noise_scale=12.5)
    keep(newer, str(script), "train")
    assert found(script) == newer


def test_another_text_function_path_or_machine_is_another_script(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(MEASURED, str(script), "train")
    assert found(script, "other") is None
    for start in (Start(arguments=("--epochs", "3")), Start(module="theirs.train")):
        assert kept(str(script), "train", start) is None
    twin = script.with_name("twin.py")
    twin.write_text(script.read_text())
    assert found(twin) is None
    script.write_text(script.read_text() + "# changed\n")
    assert found(script) is None
    script.write_text("def train(job): ...\n")
    assert found(script) == MEASURED
    monkeypatch.setattr(script_measurements.platform, "node", lambda: "another")
    assert found(script) is None


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"found": {}, "measured_at": 1}', "null"])
def test_a_damaged_file_is_as_good_as_none(cache: Path, script: Path, damage: str) -> None:
    keep(MEASURED, str(script), "train")
    (file,) = cache.glob("*.json")
    file.write_text(damage)
    assert found(script) is None


def test_a_record_of_another_version_is_as_good_as_none(cache: Path, script: Path) -> None:
    keep(MEASURED, str(script), "train")
    (file,) = cache.glob("*.json")
    record = json.loads(file.read_text())
    record["found"]["steps"][0]["colour"] = "red"
    file.write_text(json.dumps(record))
    assert found(script) is None


def test_a_place_that_cannot_be_written_to_stops_nobody(cache: Path, script: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder would be")
    keep(MEASURED, str(script), "train")
    assert found(script) is None


def test_only_the_newest_are_kept(
    cache: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_measurements, "_MOST_KEPT", 2)
    for function in ("first", "second", "third"):
        keep(MEASURED, str(script), function)
    assert len(list(cache.glob("*"))) == 2
    assert found(script, "first") is None and found(script, "third") == MEASURED
