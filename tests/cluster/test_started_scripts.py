"""How scripts are started, as a user starts them: arguments and modules on every worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from supple.control.socket import send_request
from tests.cluster.runs import ROOT, TrainRun

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

ARGUED = """
import argparse
import os
import sys
import torch
from .sizes import SIZE

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--seen", default=None)
options = parser.parse_args()

def train(job):
    if options.seen:
        with open(options.seen, "a") as file:
            print(os.getpid(), *sys.argv[1:], file=file)
    model = job.model(lambda: torch.nn.Linear(SIZE, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = torch.utils.data.TensorDataset(torch.ones(8, SIZE))
    for (x,) in job.batches(data, batch_size=4, epochs=options.epochs):
        job.step(model(x).sum())
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "sizes.py").write_text("SIZE = 3\n")
    (folder / "loop.py").write_text(ARGUED)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_module_and_its_arguments_reach_every_worker_and_a_run_that_goes_on(
    package: Path, tmp_path: Path, shared_ray: str
) -> None:
    name, seen = f"argued-{os.getpid()}", tmp_path / "seen"
    arguments = ["--epochs", "3", "--seen", str(seen)]
    options = ["--workers", "2", "--address", shared_ray]
    run = TrainRun(Path("theirs.loop"), tmp_path, *options, "--", *arguments, name=name)
    try:
        run.wait_running(2)
        status = send_request(name, {"ask": "status"})
        assert (status["script"], status["arguments"]) == ("theirs.loop", arguments)
        assert run.end() == 0, run.errors()
    finally:
        run.close()
    lines = [line.split() for line in seen.read_text().splitlines()]
    assert len({pid for pid, *_ in lines}) == 2
    assert [words for _, *words in lines] == 2 * [arguments]
    (end,) = run.of_type("Outcome")
    assert "after 6 steps" in end["reason"]

    options += ["--resume", "latest", "--max-steps", "7"]
    longer = [*arguments, "--epochs", "4"]
    again = TrainRun(Path("theirs.loop"), tmp_path, *options, "--", *longer, name=name)
    try:
        assert again.end() == 0, again.errors()
    finally:
        again.close()
    assert f"are {' '.join(longer)} from here on" in again.errors()
    assert [line.split()[1:] for line in seen.read_text().splitlines()] == [
        *(2 * [arguments]),
        *(2 * [longer]),
    ]


def test_a_plan_measures_a_script_with_its_arguments(package: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    words = ["theirs.loop", "--max-workers", "2", "--", "--epochs", "2", "--seen", str(seen)]
    done = subprocess.run(
        [sys.executable, "-m", "supple", "plan", *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {tuple(line.split()[1:]) for line in seen.read_text().splitlines()}
    assert found == {("--epochs", "2", "--seen", str(seen))}


PRINTS = """
import logging
import sys
import torch

logging.basicConfig(level=logging.INFO, format="%(message)s")
print("imported")

def train(job):
    model = job.model(lambda: torch.nn.Linear(3, 1))
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = torch.utils.data.TensorDataset(torch.ones(8, 3))
    for (x,) in job.batches(data, batch_size=4, epochs=2):
        job.step(model(x).sum())
        if job.step_count == 2:
            print("printed by", job.rank)
            logging.info("logged by %d", job.rank)
            sys.stderr.write(f"\\r1/2 bar of {job.rank}")
    print("after", job.rank)
"""


@pytest.mark.parametrize("output", ["leader", "all"])
def test_what_ranks_print_and_log_is_shown_of_the_leader_or_of_all_behind_their_rank(
    tmp_path: Path, shared_ray: str, output: str
) -> None:
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    name = f"prints-{output}-{os.getpid()}"
    options = ["--workers", "2", "--address", shared_ray, "--output", output]
    run = TrainRun(script, tmp_path, *options, name=name)
    try:
        assert run.end() == 0, run.errors()
    finally:
        run.close()
    lines = {record["line"] for record in run.of_type("Line")}
    words = ("printed by {}", "logged by {}", "1/2 bar of {}", "after {}")
    if output == "leader":
        assert lines == {word.format(0) for word in words}
    else:
        ranked = {f"[rank {rank}] {word.format(rank)}" for rank in range(2) for word in words}
        assert lines == ranked | {"[w0] imported", "[w1] imported"}
    for worker in ("w0", "w1"):
        log = (tmp_path / name / "logs" / f"{worker}.log").read_text()
        assert "imported" in log and "logged by" in log and "1/2 bar" in log


BY_HAND = """
import asyncio
import sys
import torch
import supple
from sizes import SIZE

FACTOR = 2.0

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((SIZE,), FACTOR)

def made(epochs):
    data = Data()

    def train(job):
        model = job.model(lambda: torch.nn.Linear(SIZE, 1))
        job.optimizer(torch.optim.SGD, lr=0.01)
        for x in job.batches(data, batch_size=4, epochs=epochs):
            job.step(model(x).sum())
        job.report(first=x[0, 0], words=len(sys.argv))

    return train

async def cell(**options):
    return supple.run(made(3), **options)

if __name__ == "__main__":
    options = {"workers": 2, "name": sys.argv[1], "address": sys.argv[2]}
    first = supple.run(made(2), **options)
    again = asyncio.run(cell(**options, resume=first.checkpoint))
    model = torch.nn.Linear(SIZE, 1)
    print(first.steps, again.steps, supple.load_weights(model, again.folder), again.status)
"""


def test_a_function_of_main_is_trained_with_its_closure_and_from_a_running_loop_too(
    tmp_path: Path, shared_ray: str
) -> None:
    (tmp_path / "sizes.py").write_text("SIZE = 3\n")
    script = tmp_path / "by_hand.py"
    script.write_text(BY_HAND)
    done = subprocess.run(
        [sys.executable, str(script), f"hand-{os.getpid()}", shared_ray],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "8 12 12 finished"
