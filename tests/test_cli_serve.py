"""`supple serve` and `supple update`: what is refused at once, before Ray is started."""

import socket
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from supple.cli.app import app
from supple.control.lock import only_service
from supple.core.service.latency import LatencyPoint
from supple.serve.models.profiling import StoredProfile, machine, place, source_of, write

GOOD = "class Model:\n    def predict(self, batch):\n        return batch\n"


@pytest.fixture(autouse=True)
def in_a_folder_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUPPLE_TOKEN", raising=False)
    Path("app.py").write_text(GOOD)
    Path("short").write_text("abc\n")
    Path("young/checkpoints").mkdir(parents=True)


def supple(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


REFUSALS = {
    "serve app.py": "names no class",
    "serve absent.py:Model": "absent.py does not exist",
    "serve app.py:Modle": "Did you mean app.py:Model?",
    "serve app.py:Model --slo fast": "Write pSHARE=TIME, as in p99=100ms",
    "serve app.py:Model --slo p100=1s": "below 100",
    "serve app.py:Model --replicas 4:2": "Write the smaller first",
    "serve app.py:Model --host 0.0.0.0": "no token was given",
    "serve app.py:Model --host no.such.host.invalid": "--host no.such.host.invalid is not known",
    "serve app.py:Model --host 203.0.113.7": "--host 203.0.113.7 cannot be listened on",
    "serve app.py:Model --token-file absent": "--token-file absent cannot be read",
    "serve app.py:Model --token-file short": "the token has 3 characters",
    "serve app.py:Model --cors * --cors example.com": "--cors 'example.com' is no origin",
    "serve app.py:Model --max-body 0": "--max-body is 0",
    "serve app.py:Model --idle never": "--idle",
    "serve app.py:Model --name a/b": "not usable as a folder",
    "serve app.py:Model --replicas 2:4 --initial 5": "--initial is 5: it must be between 2 and 4",
    "serve app.py:Model --hourly-budget 3": "the price of a replica is not known",
    "serve app.py:Model --price 2 --hourly-budget 1": "Raise the budget",
    "serve app.py:Model --follow": "there is no run to follow",
    "serve app.py:Model --weights w.pt --follow": "there is no run to follow",
    "serve app.py:Model --weights young": "has published no weights yet",
    "update nobody": "no running job 'nobody'",
}


@pytest.mark.parametrize("line", REFUSALS)
def test_nonsense_is_refused_before_anything_starts(line: str) -> None:
    result = supple(*line.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("supple: ") and REFUSALS[line] in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use_is_refused_before_anything_starts(option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        # The last of two values counts: the default port may be in use, too.
        result = supple("serve", "app.py:Model", "--port", "0", option, port)
    assert result.exit_code == 2 and f"{option} {port} cannot be used" in result.stderr


def test_a_port_of_a_service_that_still_starts_is_refused_before_anything_starts() -> None:
    with only_service("another", {"--grpc-port": 18_101}):
        result = supple("serve", "app.py:Model", "--port", "0", "--grpc-port", "18101")
    assert result.exit_code == 2, result.output
    assert "--grpc-port 18101 cannot be used: another service" in result.stderr


def test_a_promise_the_stored_profile_rules_out_is_refused_before_anything_starts() -> None:
    target = "app.py:Model"
    slow = StoredProfile(
        target=target,
        source=source_of(target),
        machine=machine(),
        startup_s=1.0,
        memory_bytes=1,
        lengths=((1, (LatencyPoint(batch_size=1, p50_s=0.2, p99_s=0.3),)),),
    )
    write(slow, place(target))
    result = supple("serve", target, "--port", "0", "--slo", "p99=100ms")
    assert result.exit_code == 2, result.output
    assert "one prediction of one input takes 300ms" in result.stderr
