"""A version that cannot be served changes nothing: who is served goes on being served by the old
one, and who asked for the update is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.test_serving import NAME, Clients, Service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SOURCE = """
import os
import time
from pathlib import Path

class Model:
    inputs = {"x": "float32[2]"}
    outputs = {"y": "float32[2]"}

    def load(self, weights=None):
        self.factor = 1 if weights is None else int(Path(weights).read_text())

    def predict(self, batch):
        time.sleep(0.02)
        return batch * self.factor
"""


def loading(first: str) -> str:
    """The source with `first` done before anything else is loaded."""
    return SOURCE.replace("self.factor =", f"{first}; self.factor =")


BROKEN = (
    (SOURCE + "def (", "is not valid Python: line 1", ()),
    ("import not_there\n" + SOURCE, "No module named 'not_there'", ()),
    (loading("1 / 0"), "division by zero", ()),
    (loading("os._exit(3)"), "the trial process ended", ()),
    (loading("time.sleep(1e6)"), "took more than 5 s", ("--start-timeout", "5s")),
    (SOURCE.replace("* self.factor", "> 0"), "output 'y' is bool", ()),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "first"
    path.write_text("2")
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("updated")
    options = ("--replicas", "2", "--weights", str(weights))
    running = Service(folder, *options, token=None, source=SOURCE)
    try:
        running.wait_until_served()
        yield running
    finally:
        running.close()


def update(*options: str) -> "subprocess.CompletedProcess[str]":
    """`supple update` to its end."""
    command = [sys.executable, "-m", "supple", "update", NAME, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(told: str, *options: str) -> None:
    ended = update(*options)
    assert ended.returncode == 1, ended
    assert "was not updated and goes on as it was" in ended.stderr and told in ended.stderr
    assert "/ray/" not in ended.stderr, "no frame of a framework"


def trials(service: Service) -> list[psutil.Process]:
    """The processes in which new versions are tried."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [child for child in children if is_trial(child)]


def is_trial(process: psutil.Process) -> bool:
    try:
        return "ray::_Trial" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_a_version_that_cannot_be_served_changes_nothing_and_is_told(
    service: Service, tmp_path: Path
) -> None:
    pids = sorted(service.replica_pids())
    with Clients(service, {2.0}) as clients:
        for source, told, options in BROKEN:
            service.file.write_text(source)
            refused(told, *options)
            service.wait_until(lambda: not trials(service))
        (damaged := tmp_path / "damaged").write_text("none")
        refused("invalid literal for int()", "--weights", str(damaged))
        clients.more()
    assert sorted(service.replica_pids()) == pids


def test_a_replica_that_comes_after_a_refused_version_is_of_the_old(service: Service) -> None:
    assert service.file.read_text() == BROKEN[-1][0]
    with Clients(service, {2.0}) as clients:
        pids = service.replica_pids()
        os.kill(pids[0], signal.SIGKILL)
        service.wait_until(lambda: len({*service.replica_pids()} - {*pids}) == 1)
        service.wait_until(lambda: service.metrics_of(2))
        clients.more()


def test_the_next_version_is_served_and_the_one_after_that_too(
    service: Service, weights: Path, tmp_path: Path
) -> None:
    with Clients(service, {2.0, 3.0, 12.0}) as clients:
        (second := tmp_path / "second").write_text("3")
        assert update("--weights", str(second)).returncode == 0
        weights.unlink()  # nobody needs them any more: replicas that come load the second
        assert service.infer() == 3
        service.file.write_text(SOURCE.replace("* self.factor", "* self.factor * 4"))
        ended = update("--json")
        assert ended.returncode == 0 and '"update": "done"' in ended.stdout
        assert service.infer() == 12
        clients.more()


def test_what_fails_only_in_the_replicas_is_taken_back_in_all_of_them(
    service: Service, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    once.write_text("5")
    service.file.write_text(loading(f"Path({str(once)!r}).unlink()"))
    with Clients(service, {12.0}) as clients:
        refused("FileNotFoundError")
        clients.more()
        service.wait_until(lambda: service.metrics_of(2))


TIMED_OUT = """
import dataclasses, sys, time
from pathlib import Path
from supple.cluster.services import ingress
from supple.cluster.services import service as serving
from supple.core.service.spec import ServeSpec, parse_slo
from supple.serve.models.faults import ModelFault

file, name, source = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
spec = ServeSpec(
    name=name, target=f"{file}:Model", slo=parse_slo("p99=60s"),
    port=ingress.free_port(), grpc_port=ingress.free_port(),
    min_replicas=1, max_replicas=1, cpus_per_replica=0.1,
)
ingress.connect(spec)
try:
    short = {"predict_timeout_s": 1.0, "patience_s": 20.0}
    before = dataclasses.replace(serving.deployment_of(spec), **short)
    serving.deploy(before)
    file.write_text(source)
    wanted = dataclasses.replace(serving.deployment_of(spec), **short)
    try:
        for _ in serving.updating(wanted, before):
            time.sleep(serving.LOOK_EVERY_S)
        print("taken")
    except ModelFault as fault:
        print("refused:", fault)
    print("running:", serving.num_running(name))
finally:
    serving.shut_down()
"""
"""One replica of which the start may take 20 s, and the leaving of the one before 11 s."""


def test_replicas_that_do_not_come_up_in_time_are_given_up_and_the_old_go_on(
    tmp_path: Path,
) -> None:
    once = tmp_path / "once"
    once.write_text("5")
    first = f"Path({str(once)!r}).unlink() if Path({str(once)!r}).exists() else time.sleep(1e6)"
    (file := tmp_path / "app.py").write_text(SOURCE)
    command = [sys.executable, "-c", TIMED_OUT, str(file), "timed-out", loading(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused: its replicas did not start within 31 s" in done.stdout, done.stdout
    assert "running: 1" in done.stdout, done.stdout
