"""The command line: what it refuses and how, what it prints, and how it talks to a running job."""

import asyncio
import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from supple import __version__
from supple.cli.app import app
from supple.cli.errors import file_of, messages, split_target
from supple.cli.train import with_bare_resume
from supple.cli.training import OPTIONS, ending, resume_command
from supple.control.controller import Outcome
from supple.control.socket import ControlServer
from supple.core.spec import KNEE_RULE, Objective, SpecError, TrainSpec
from supple.report.eventlog import last_run
from supple.report.live import Tally
from tests.described import toml

ROOT = Path(__file__).parent.parent
COMMANDS = (
    *("train", "plan", "resize", "preempt", "stop", "status", "doctor"),
    *("serve", "update", "load", "simulate"),
)
SMALL = {"hidden": "64", "layers": "2", "heads": "2", "samples": "99", "batch_size": "9"}
GOOD = "def train(job):\n    pass\n"
JOB = f"cli-test-{os.getpid()}"


@pytest.fixture(autouse=True)
def in_a_folder_with_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in {
        "good.py": GOOD,
        "nothing.py": "x = 1\n",
        "other.py": "def main(job):\n    pass\n",
        "model.py": "class Model:\n    def predict(self, batch):\n        return {}\n",
        "two.py": "def train(job, more):\n    pass\n",
        "broken.py": "def train(job:\n",
        "nul.py": "x = 1\0\n",
        "small.toml": toml("train", SMALL) + toml("serve", {"parameters": "8B"}),
        "broken.toml": "[train\n",
        "empty.toml": "",
        "typo.toml": "[train]\nhiden = 64\n",
        "flat.toml": "train = 3\n",
        "a:b.toml": toml("train", SMALL) + toml("serve", {"parameters": "8B"}),
        "runs.csv": "num_workers,minutes\n8,400\n16,210\n",
    }.items():
        Path(name).write_text(source)
    os.mkfifo("pipe.toml")
    os.mkfifo("pipe.py")
    Path("large.toml").write_text(f"# {'x' * 2**20}")
    Path("folder.py").mkdir()
    Path("folder.toml").mkdir()
    Path("pictures.png").mkdir()
    Path("pictures").mkdir()
    Path("a_file").write_text("")
    Path("not_a_checkpoint").mkdir()


def supple(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


REFUSALS: dict[str, tuple[str, list[str]]] = {
    # a script that cannot be trained
    "train absent.py": ("absent.py does not exist", []),
    "train god.py": ("Did you mean good.py?", []),
    "train folder.py": ("folder.py is a folder", []),
    "train nothing.py": ("no function train(job)", ["put the training loop in one"]),
    "train other.py": ("no function train(job)", ["other.py:main"]),
    "train good.py:main": ("no function main(job)", ["good.py:train"]),
    "train two.py": ("takes 2 arguments", ["exactly one"]),
    "train broken.py": ("not valid Python", ["line 1"]),
    "plan absent.py": ("absent.py does not exist", []),
    f"plan {'x' * 300}.py": ("cannot be read: File name too long", []),
    "plan nul.py": ("nul.py is not valid Python", ["null bytes"]),
    f"serve {'x' * 300}.py:Model": ("cannot be read: File name too long", []),
    "serve folder.py:Model": ("folder.py is a folder", ["app.py:Model"]),
    "serve nul.py:Model": ("nul.py is not valid Python", ["null bytes"]),
    "plan nothing.py": ("no function train(job)", []),
    # counts
    "train good.py --deadline 2h --budget 4": ("--deadline and --budget were given", ["the other"]),
    "train good.py --knee --budget 4": ("--budget and --knee were given", ["the other out"]),
    "train good.py --deadline soon": ("'soon': not a time", ["2h"]),
    "train good.py --budget -1": ("positive and finite", []),
    "train good.py --workers 4 --knee": ("--workers 4 decides the count already", ["MIN:MAX"]),
    "train good.py --schedule 0s:1 --deadline 2h": ("--schedule decides the count", ["Leave one"]),
    "train good.py --interconnect string": ("string", ["ethernet-25"]),
    "train good.py --workers 4:2": ("MIN 4 is above MAX 2", ["--workers 2:4"]),
    "train good.py --workers 0": ("MIN is 0", ["between 1 and"]),
    "train good.py --workers -3:2": ("MIN is -3", ["between 1 and"]),
    "train good.py --workers 1:999999999": ("MAX is 999999999", ["between 1 and"]),
    "train good.py --workers many": ("'many': not a whole number", []),
    "train good.py --workers 1.5": ("'1.5': not a whole number", []),
    "train good.py --workers 2:": ("'': not a whole number", []),
    "train good.py --max-steps 0": ("--max-steps is 0", ["at least 1"]),
    "train good.py --logical-shards 0": ("--logical-shards is 0", ["at least 1"]),
    "train good.py --max-failures -1": ("--max-failures is -1", ["at least 0"]),
    "train good.py --cpus-per-worker 0": ("--cpus-per-worker is 0", ["more than 0"]),
    "train good.py --cpus-per-worker nan": ("--cpus-per-worker is nan", []),
    "train good.py --gpus-per-worker -1": ("--gpus-per-worker is -1", []),
    "train good.py --gpus-per-worker inf": ("--gpus-per-worker is inf", ["0 to 1024"]),
    "train good.py --gpus-per-worker nan": ("--gpus-per-worker is nan", []),
    f"train good.py --seed {2**63}": (f"--seed is {2**63}", ["seeds end at"]),
    "train good.py --rendezvous-port 70000": ("--rendezvous-port is 70000", ["65535"]),
    "train good.py --rendezvous-port -1": ("--rendezvous-port is -1", []),
    "train good.py --seed -1": ("--seed is -1", []),
    "plan good.py --max-workers 0": ("--max-workers is 0", []),
    "plan good.py --workers-per-node x": ("'x': not a whole number", []),
    "plan good.py --measure-workers 0": ("--measure-workers is 0", []),
    # times and money
    "train good.py --checkpoint-every never": ("'never': not a time", ["15m"]),
    "train good.py --checkpoint-every 0": ("must be positive", []),
    "train good.py --heartbeat-timeout -4s": ("not a time", []),
    "train good.py --price free": ("'free': not a number", []),
    "train good.py --price -1": ("positive and finite", []),
    "train good.py --price nan": ("positive and finite", []),
    "plan good.py --deadline 2": ("--deadline is 2, a number without a unit: 2h? 2m? 2s?", []),
    "preempt nobody w0 --in 30": ("--in is 30, a number without a unit", []),
    "load http://x --rate 1 --duration 60": ("--duration is 60, a number without a unit", []),
    "plan good.py --deadline soon": ("'soon': not a time", []),
    "plan good.py --deadline inf": ("positive and finite", []),
    "plan good.py --budget 0": ("positive and finite", []),
    "plan good.py --budget 1 --deadline 2h": ("both given", ["choose the one"]),
    # the schedule
    "train good.py --schedule 20s": ("no count", ["20s:2,40s:4"]),
    "train good.py --workers 1:4 --schedule 20s:8": ("8 workers at 20s is outside", ["1:4"]),
    "train good.py --schedule 20s:2,10s:1": ("does not come after", ["increasing"]),
    # names and combinations
    "train good.py --name a/b": ("'a/b' is not usable as a folder", []),
    "train good.py --batch big": ("fixed or adaptive", []),
    "train good.py --lr-rule magic": ("no such rule", ["adascale"]),
    "train good.py --on-non-finite ignore": ("ignore", ["stop or skip"]),
    "plan good.py --lr-rule magic": ("no such rule", ["adascale"]),
    "plan good.py --interconnect rope": ("rope", ["ethernet-25"]),
    "train good.py --reproducible --batch adaptive": ("choose one", []),
    "train good.py --reproducible --workers 1:9": ("8 logical shards", ["--logical-shards"]),
    "plan good.py --history none.csv": ("none.csv cannot be read", ["Give a CSV file"]),
    "plan good.py --plot plan.txt": ("plan.txt", [".png"]),
    "plan good.py --plot nowhere/plan.png": ("no folder nowhere", []),
    "plan good.py --plot pictures.png": ("pictures.png is a folder", ["pictures.png/pictures.png"]),
    "plan good.py --plot pictures": ("pictures is a folder", ["Give a file"]),
    f"plan good.py --plot {'x' * 300}.png": ("cannot be written: File name too long", []),
    "plan small.toml:train --plot pictures.png": ("--plot pictures.png is a folder", []),
    "plan small.toml:serve --plot pictures.png": ("--plot pictures.png is a folder", []),
    "plan runs.csv --plot pictures.png": ("--plot pictures.png is a folder", []),
    "plan good.py --accelerator h100 --plot pictures.png": ("pictures.png is a folder", []),
    # a description of a model
    "plan small.toml": ("has [train] and [serve]", ["small.toml:train or small.toml:serve"]),
    "plan small.toml:tune": ("[tune] was requested", ["[train], to train it"]),
    "plan broken.toml": ("is not valid TOML", ["line 1"]),
    "plan empty.toml": ("the file has neither", ["[train]"]),
    "plan typo.toml": ("an unknown key 'hiden'", ["Do you mean hidden?"]),
    "plan flat.toml": ("train is not a table", ["Write [train]"]),
    "plan pipe.toml": ("pipe.toml is not a regular file", []),
    "plan large.toml": ("large.toml is larger than 1048576 bytes", []),
    "plan pipe.py": ("the script pipe.py is no", []),
    "plan absent.pt2": ("absent.pt2 does not exist", []),
    "plan a:b.toml": ("a:b.toml has [train] and [serve]", []),
    "plan runs.csv:train": ("finished runs have no parts", ["Give runs.csv alone"]),
    "plan folder.toml": ("cannot be read: Is a directory", []),
    # an option of another subject
    "plan good.py --itl 30ms": ("--itl is for a language model to serve", ["Leave it out"]),
    "plan good.py --local-link pcie3": ("--local-link is for a script on an accelerator", []),
    "plan model.py:Model --deadline 2h": ("--deadline is for a script, measured here", []),
    "plan runs.csv --accelerator h100": ("runs.csv is finished runs, a .csv", []),
    "plan model.py:Model --rate 5": ("--rate 5 was given without --slo", ["p99=100ms"]),
    "plan model.py:Model --rate 0 --slo p99=1s": ("--rate is 0 requests a second", []),
    "load http://x --rate 1 --plot pictures.png": ("--plot pictures.png is a folder", []),
    "simulate serve a.csv --slo p99=1s --service 1s --plot pictures.png": ("is a folder", []),
    "plan model.py:Model --plot pictures.png": ("--plot pictures.png is a folder", []),
    # what is on the disk
    "train good.py --resume": ("no good checkpoint", ["Start without --resume"]),
    "train good.py --resume latest": ("no good checkpoint", ["--name"]),
    "train good.py --resume absent": ("--resume absent: no such checkpoint", []),
    "train good.py --run-dir a_file": ("cannot be made", ["--run-dir"]),
    # jobs that do not run
    "resize nobody 3": ("no running job 'nobody'", ["supple train"]),
    "stop nobody": ("no running job 'nobody'", []),
    "status nobody": ("no running job 'nobody'", []),
    "preempt nobody w0": ("no running job 'nobody'", []),
    "preempt nobody w0 --in yesterday": ("'yesterday': not a time", []),
}


@pytest.mark.parametrize("arguments", REFUSALS)
def test_it_refuses_with_one_message_and_exit_code_2(arguments: str) -> None:
    said, more = REFUSALS[arguments]
    result = supple(*arguments.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("supple: ")
    assert len(result.stderr.splitlines()) == 1
    for words in (said, *more):
        assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_picture_that_is_there_is_left_as_it_is_until_there_is_a_new_one() -> None:
    Path("old.png").write_bytes(b"old")
    supple("plan", "absent.py", "--plot", "old.png")
    supple("plan", "absent.py", "--plot", "new.PNG")
    Path("link.png").symlink_to("elsewhere.png")
    supple("plan", "absent.py", "--plot", "link.png")
    assert Path("old.png").read_bytes() == b"old"
    assert not Path("new.PNG").exists() and not Path("elsewhere.png").exists()
    assert Path("link.png").is_symlink()
    Path("loop.png").symlink_to("loop.png")
    told = supple("plan", "absent.py", "--plot", "loop.png")
    assert told.exit_code == 2 and "--plot loop.png cannot be written" in told.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work() -> None:
    Path("closed").mkdir(mode=0o500)
    told = supple("plan", "good.py", "--plot", "closed/plan.png")
    assert told.exit_code == 2 and "cannot be written: Permission denied" in told.stderr


@pytest.mark.parametrize("option", ["--max-workers", "--workers-per-node", "--measure-workers"])
def test_an_empty_number_is_no_number(option: str) -> None:
    """What a shell makes of a variable that is not set."""
    assert f"{option} is '': not a whole number" in supple("plan", "good.py", option, "").stderr


@pytest.mark.parametrize("command", ["train", "plan"])
def test_an_empty_path_is_no_script(command: str) -> None:
    result = supple(command, "", *(("--name", "x") if command == "train" else ()))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "the script '' does not exist" in result.stderr


def test_an_empty_checkpoint_is_none() -> None:
    told = supple("train", "good.py", "--resume", "")
    assert told.exit_code == 2 and "--resume '': no such checkpoint" in told.stderr


def test_a_rule_that_a_fixed_batch_does_not_use_is_said() -> None:
    told = supple("plan", "good.py", "--lr-rule", "linear", "--plot", "plan.txt").stderr
    assert told.startswith("--lr-rule: not used, the batch is fixed. --batch adaptive does.")


def test_a_refusal_starts_nothing_and_leaves_no_folder() -> None:
    before = sorted(path.name for path in Path().iterdir())
    supple("train", "nothing.py")
    supple("train", "good.py", "--workers", "0")
    assert sorted(path.name for path in Path().iterdir()) == before


@pytest.mark.parametrize("arguments", ["train", "train good.py --colour", "dance", "resize digits"])
def test_a_usage_error_names_the_problem_and_exits_with_2(arguments: str) -> None:
    result = supple(*arguments.split())
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example(command: str) -> None:
    result = supple(command, "--help")
    assert result.exit_code == 0
    assert f"supple {command}" in result.stdout.partition("Example")[2]


def test_the_help_lists_every_command_in_one_whole_line() -> None:
    listed = supple("--help").stdout.partition("Commands:\n")[2].splitlines()[: len(COMMANDS)]
    assert {line.split()[0] for line in listed} == set(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_the_version_is_told_and_h_is_help() -> None:
    assert supple("--version").stdout == f"supple {__version__}\n"
    assert supple("plan", "-h").stdout == supple("plan", "--help").stdout


@pytest.mark.parametrize(
    ("wrong", "words"),
    [("trian", "'train'"), ("Plan", "'plan'"), ("plan good.py --dedline 2h", "--deadline")],
)
def test_a_misspelt_word_comes_with_the_right_one(wrong: str, words: str) -> None:
    assert words in supple(*wrong.split()).stderr


def test_the_help_of_plan_states_the_rule_of_the_knee() -> None:
    words = " ".join(supple("plan", "--help").stdout.split())
    assert KNEE_RULE in words


def test_the_help_of_train_documents_its_exit_codes() -> None:
    words = " ".join(supple("train", "--help").stdout.split())
    assert "0 finished" in words and "1 failed" in words and "2 refused" in words


@pytest.mark.slow
def test_refusing_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys\n"
        "from supple.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'ray', 'matplotlib'} & sys.modules.keys()\n"
        "    sys.exit(f'imported {heavy}' if heavy else end.code)\n"
    )
    for arguments, code in ((["--help"], 0), (["train", "absent.py"], 2), (["plan", "no.py"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr


def test_an_unexpected_error_is_one_line_unless_verbose() -> None:
    def fail(verbose: bool) -> None:
        with messages(verbose):
            raise ZeroDivisionError("division by zero")

    with pytest.raises(ZeroDivisionError):
        fail(True)
    with pytest.raises(typer.Exit) as caught:
        fail(False)
    assert caught.value.exit_code == 1


def test_an_unexpected_error_ends_with_one_full_stop(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), messages():
        raise ValueError("it must be positive. Measure it again.")
    assert "Measure it again. Run again with --verbose" in capsys.readouterr().err


def test_verbose_lets_a_refusal_through_with_its_traceback() -> None:
    result = supple("train", "absent.py", "--verbose")
    assert isinstance(result.exception, SpecError)


def test_a_target_may_name_its_function() -> None:
    assert split_target("train.py") == ("train.py", "train")
    assert split_target("train.py:main") == ("train.py", "main")
    assert split_target("C:/train.py") == ("C:/train.py", "train")


def test_a_script_may_be_named_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("package").mkdir()
    Path("package/module.py").write_text(GOOD)
    Path("named").write_text(GOOD)
    here = str(Path.cwd() / "package" / "module.py")
    assert file_of("package.module") == (here, "package.module")
    for path in ("good.py", "named", "package.absent", "absent.py", "a/b.py", "no such.module"):
        assert file_of(path) == (path, "")


def test_what_stands_after_two_dashes_is_for_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    from supple.cli import training

    seen: list[TrainSpec] = []

    def run(spec: TrainSpec, **_: object) -> bool:
        seen.append(spec)
        return True

    monkeypatch.setattr(training, "run", run)
    for words in ("", "--", "-- --epochs 3 -- --json x", "--resume -- --resume"):
        assert supple("train", "good.py", *words.split()).exit_code == 0
    assert [spec.arguments for spec in seen] == [
        (),
        (),
        ("--epochs", "3", "--", "--json", "x"),
        ("--resume",),
    ]


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("words", ["--epochs 3", "--data=x -- --epochs 3", "3", "3 -- --epochs 3"])
def test_what_is_for_the_script_and_stands_before_the_dashes_is_refused(
    command: str, words: str
) -> None:
    result = supple(command, "good.py", *words.split())
    assert result.exit_code == 2
    first = words.split()[0]
    assert f"{first} is no option of `supple {command}`. What is for the script" in result.stderr
    assert f"-- {first}" in result.stderr


def test_resume_may_stand_alone() -> None:
    assert with_bare_resume(["x.py", "--resume"]) == ["x.py", "--resume", "latest"]
    assert with_bare_resume(["--resume", "--json"]) == ["--resume", "latest", "--json"]
    assert with_bare_resume(["--resume", "runs/a"]) == ["--resume", "runs/a"]


# --- what is told at the end --------------------------------------------------------------------

SPEC = TrainSpec(name="digits", script="/x/digits.py", min_workers=1, max_workers=4)


def test_a_stopped_run_says_how_to_go_on() -> None:
    outcome = Outcome(status="stopped", reason="Ctrl-C", checkpoint="/runs/step-00000010")
    told = "\n".join(ending(SPEC, outcome, Tally()))
    assert told.startswith("supple: stopped: Ctrl-C")
    assert "--resume /runs/step-00000010" in told


def test_the_command_that_goes_on_is_one_the_command_line_takes() -> None:
    spec = TrainSpec(
        name="digits",
        script="absent here.py",
        function="main",
        max_workers=4,
        reproducible=True,
        seed=7,
        checkpoint_every_s=90.5,
        on_non_finite="skip",
        price_per_hour=2.5,
        arguments=("--epochs", "3", "a b"),
    )
    command = resume_command(spec, "/runs/step-00000010")
    for words in (
        "--reproducible",
        "--on-non-finite skip",
        "--seed 7",
        "--checkpoint-every 90.5s",
        "--price 2.5",
        "--resume /runs/step-00000010 -- --epochs 3 'a b'",
    ):
        assert words in command
    assert "--ledger" not in command and "--batch" not in command
    result = supple(*shlex.split(command)[1:])
    assert "the script absent here.py does not exist" in result.stderr


def test_every_field_that_shapes_a_job_is_carried_over_when_it_goes_on() -> None:
    elsewhere = {"name", "script", "function", "min_workers", "max_workers", "run_dir", "resume"}
    elsewhere |= {"module", "arguments", "allow_changes"}
    fields = {field.name for field in dataclasses.fields(TrainSpec)}
    by_hand = {"schedule", "objective", "workers_per_node"}  # the last is the machine's
    assert fields - elsewhere - by_hand == OPTIONS.keys()


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (None, ""),
        (Objective(), "--knee"),
        (Objective(deadline_s=90.0), "--deadline 90s"),
        (Objective(budget=2.5), "--budget 2.5"),
    ],
)
def test_what_decides_the_count_is_carried_over_when_a_job_goes_on(
    objective: Objective | None, words: str
) -> None:
    spec = dataclasses.replace(SPEC, min_workers=1, max_workers=4, objective=objective)
    command = resume_command(spec, "/runs/s9")
    given = [word for word in ("--knee", "--deadline", "--budget") if word in command]
    assert words in command and len(given) == bool(words)


def test_a_failed_run_shows_the_scripts_traceback_and_the_last_checkpoint() -> None:
    outcome = Outcome(
        status="failed", reason="w0 raised", detail="ValueError: no data", checkpoint="/runs/s9"
    )
    told = ending(SPEC, outcome, Tally())
    assert "ValueError: no data" in told
    assert any("--resume /runs/s9" in line for line in told)


def test_a_finished_run_needs_no_advice() -> None:
    outcome = Outcome(status="finished", reason="all epochs", checkpoint="/runs/s9")
    assert not any("--resume" in line for line in ending(SPEC, outcome, Tally()))


# --- a running job ------------------------------------------------------------------------------


@pytest.fixture
def running() -> Iterator[list[Mapping[str, Any]]]:
    """A job that answers as the controller does; the requests that it got."""
    requests: list[Mapping[str, Any]] = []

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        requests.append(request)
        match request["ask"]:
            case "resize" if int(request["num_workers"]) > 4:
                raise SpecError("9 workers were asked for, the job has --workers 1:4.")
            case "resize":
                return {"accepted": int(request["num_workers"])}
            case "preempt":
                return {"accepted": list(request["workers"])}
            case "stop":
                return {"accepted": "stop"}
            case _:
                return {
                    "job": JOB,
                    "phase": "running",
                    "generation": 2,
                    "members": ["w0", "w1"],
                    "pids": {"w0": 11, "w1": 12},
                    "progress": {"step": 40},
                }

    loop = asyncio.new_event_loop()
    server = ControlServer(JOB, answer)
    loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield requests
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_resize_asks_the_job(running: list[Mapping[str, Any]]) -> None:
    result = supple("resize", JOB, "3")
    assert (result.exit_code, result.stdout) == (0, f"{JOB}: 3 workers wanted\n")
    assert running == [{"ask": "resize", "num_workers": "3"}]


def test_a_resize_that_the_job_refuses_is_a_refusal(running: list[Mapping[str, Any]]) -> None:
    result = supple("resize", JOB, "9")
    assert result.exit_code == 2
    assert "the job has --workers 1:4" in result.stderr
    assert len(running) == 1


def test_preempt_tells_whom_and_when(running: list[Mapping[str, Any]]) -> None:
    result = supple("preempt", JOB, "w0", "w1", "--in", "2m")
    assert result.exit_code == 0, result.output
    assert running == [{"ask": "preempt", "workers": ["w0", "w1"], "notice_s": 120.0}]


def test_stop_as_json(running: list[Mapping[str, Any]]) -> None:
    assert json.loads(supple("stop", JOB, "--json").stdout) == {"accepted": "stop"}
    assert running == [{"ask": "stop"}]


@pytest.mark.usefixtures("running")
def test_status_shows_one_job_or_all_for_people_and_for_programs() -> None:
    line = f"{JOB}: running, step 40, generation 2, 2 workers: w0 (pid 11), w1 (pid 12)\n"
    assert supple("status", JOB).stdout == line
    assert line in supple("status").stdout
    assert json.loads(supple("status", JOB, "--json").stdout)["pids"] == {"w0": 11, "w1": 12}
    assert JOB in [answer["job"] for answer in json.loads(supple("status", "--json").stdout)]


@pytest.mark.usefixtures("running")
def test_a_second_job_of_the_same_name_is_refused_before_anything_starts() -> None:
    result = supple("train", "good.py", "--name", JOB)
    assert result.exit_code == 2
    assert "already running" in result.stderr
    assert not Path("supple-runs").exists()


def test_a_port_in_use_is_refused_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = supple("train", "good.py", "--rendezvous-port", port)
    assert result.exit_code == 2
    assert f"--rendezvous-port {port} cannot be used" in result.stderr
    assert not Path("supple-runs").exists()


# --- the machine --------------------------------------------------------------------------------


def test_doctor_looks_at_everything_and_says_so_in_json() -> None:
    result = supple("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    for what in ("python", "torch", "ray", "cores", "memory", "disk here", "process group"):
        assert what in findings
    assert findings["process group"]["ok"]
    assert findings["telemetry"]["ok"]
    assert result.exit_code == (0 if all(f["ok"] for f in findings.values()) else 1)


def test_doctor_says_what_to_do_about_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    result = supple("doctor")
    assert result.exit_code == 1
    assert "problem" in result.stdout
    assert "Unset RAY_USAGE_STATS_ENABLED" in result.stdout


# --- with a real Ray ----------------------------------------------------------------------------


def real(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supple", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_run_in_a_pipe_is_told_in_plain_lines_and_leaves_a_log_and_a_picture() -> None:
    script = str(ROOT / "examples" / "digits.py")
    done = real("train", script, "--workers", "1", "--name", f"{JOB}-run", "--run-dir", "runs")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "test accuracy 9" in done.stdout and "samples/s" in done.stdout
    assert "supple: finished" in done.stderr
    assert "720 steps in" in done.stderr and "on 1 worker: 0 resizes, 0 recoveries" in done.stderr
    folder = Path("runs") / f"{JOB}-run"
    records = last_run(folder / "events.jsonl")
    assert (records[0]["kind"], records[-1]["kind"]) == ("begin", "end")
    assert records[-1]["status"] == "finished"
    assert (folder / "run.png").stat().st_size > 10_000
    assert list((folder / "tensorboard").glob("events.out.*"))
