"""What `supple plan` takes a subject for, and which options it takes with it."""

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supple.cli.app import app
from supple.cli.planning.answer import picture
from supple.cli.planning.subject import Kind, Question, kind_of
from supple.core.spec import SpecError
from tests.described import toml

TRAIN = {"hidden": "64", "layers": "2", "heads": "2", "samples": "99", "batch_size": "9"}
SOURCE = """
class Model: ...
def train(job): ...
def Fit(job): ...
def both(job): ...
class both: ...
class then: ...
def then(job): ...
"""
OPTIONS = {field.name for field in dataclasses.fields(Question)} - {"subject", "as_json", "verbose"}
S, A, E, T, L, M, R = Kind
TAKEN = {
    S: "max_workers deadline budget price interconnect workers_per_node batch lr_rule "
    "measure_workers history probes plot arguments",
    A: "memory_size optimizer arguments",
    E: "max_workers deadline budget price interconnect local_link workers_per_node accelerator "
    "memory_size optimizer batch history probes plot arguments",
    T: "max_workers deadline budget price interconnect local_link workers_per_node accelerator "
    "memory_size batch measured history probes plot",
    L: "max_workers price workers_per_node accelerator measured rate itl plot",
    M: "max_workers price slo rate lengths again plot",
    R: "deadline budget price history counts batch_size plot",
}
"""What docs/planning.md and the help say each subject is planned with."""
SUBJECTS = {
    S: "app.py",
    A: "app.py",
    E: "app.py",
    T: "t.toml",
    L: "s.toml",
    M: "app.py:Model",
    R: "runs.csv",
}


@pytest.fixture(autouse=True)
def in_a_folder_with_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("app.py").write_text(SOURCE)
    Path("t.toml").write_text(toml("train", TRAIN))
    Path("s.toml").write_text("\ufeff" + toml("serve", {"parameters": "8B"}))
    Path("a:b.TOML").write_text(toml("serve", {"parameters": "8B"}))


def asked(subject: str, **given: object) -> Question:
    none = dict.fromkeys(OPTIONS, None)
    return Question(**none | given, subject=subject, as_json=False, verbose=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("subject", "kind", "path", "name"),
    [
        ("app.py", S, "app.py", ""),
        ("app.py:train", S, "app.py", "train"),
        ("app.py:Fit", S, "app.py", "Fit"),
        ("app.py:Model", M, "app.py", "Model"),
        ("app.py:both", M, "app.py", "both"),
        ("app.py:then", S, "app.py", "then"),
        ("app.py:Elsewhere", M, "app.py", "Elsewhere"),
        ("app.py:elsewhere", S, "app.py", "elsewhere"),
        ("absent.py:Model", M, "absent.py", "Model"),
        ("absent.py:model", S, "absent.py", "model"),
        ("saved.PT2", M, "saved.PT2", ""),
        ("RUNS.CSV", R, "RUNS.CSV", ""),
        ("t.toml", T, "t.toml", ""),
        ("t.toml:train", T, "t.toml", "train"),
        ("s.toml", L, "s.toml", ""),
        ("a:b.TOML", L, "a:b.TOML", ""),
        ("noext", S, "noext", ""),
    ],
)
def test_a_subject_is_known_by_its_name_and_what_the_file_defines(
    subject: str, kind: Kind, path: str, name: str
) -> None:
    assert kind_of(asked(subject)) == (kind, path, name)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"accelerator": ""}, E),
        ({"memory_size": ""}, A),
        ({"accelerator": "", "memory_size": ""}, E),
    ],
)
def test_a_script_is_planned_elsewhere_with_an_accelerator_and_its_memory_traced_with_that_alone(
    given: dict[str, str], kind: Kind
) -> None:
    assert kind_of(asked("app.py:train", **given))[0] is kind


@pytest.mark.parametrize("kind", Kind)
def test_a_subject_takes_the_options_that_mean_something_for_it_and_no_other(kind: Kind) -> None:
    def takes(option: str) -> bool:
        needed = {A: {"memory_size": "80"}, E: {"accelerator": "h100"}}.get(kind, {})
        try:
            return kind_of(asked(SUBJECTS[kind], **needed | {option: "1"}))[0] is kind
        except SpecError as error:
            told = str(error)
        names = {"memory_size": "memory", "arguments": ""}
        flag = names.get(option, option.replace("_", "-"))
        return not told.startswith(f"--{flag} was given, and {SUBJECTS[kind]} is ")

    assert {option for option in OPTIONS if takes(option)} == set(TAKEN[kind].split())


def test_a_picture_that_cannot_be_written_is_one_message_after_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("supple.cli.planning.runs.check_plot", lambda _: None)
    monkeypatch.setattr("supple.cli.planning.runs._draw", full)
    Path("runs.csv").write_text("num_workers,minutes\n8,400\n16,210\n")
    result = CliRunner().invoke(app, ["plan", "runs.csv", "--plot", "p.png"])
    assert result.exit_code == 1 and "Recommended: " in result.stdout
    told = "supple: the picture p.png could not be written: No space left on device.\n"
    assert result.stderr == told


def test_a_picture_that_is_written_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with picture(Path("p.png")):
        pass
    assert capsys.readouterr().err == "picture p.png\n"
