"""Two hosts on one machine: network namespaces joined by one link that the test can cut."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_START_LIMIT_S = 60.0


def why_not() -> str:
    """Why this machine lets no test make namespaces; empty if it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"supple-try-{os.getpid()}"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if tried.returncode != 0:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return ""


class Hosts:
    """Hosts `near` and `far`, each with one address and no route to anywhere else."""

    near_address, far_address = "10.77.0.1", "10.77.0.2"

    def __init__(self) -> None:
        self.near, self.far = (f"supple-{os.getpid()}-{side}" for side in ("near", "far"))
        self._link = f"sup{os.getpid()}"[:13]

    def inside(self, host: str) -> list[str]:
        """What to put before a command so that it runs on `host`."""
        return ["ip", "netns", "exec", host]

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        _ip("-n", self.near, "link", "set", f"{self._link}n", "down")

    def build(self) -> None:
        ends = ((self.near, "n", self.near_address), (self.far, "f", self.far_address))
        for host, _, _ in ends:
            _ip("netns", "add", host)
            _ip("-n", host, "link", "set", "lo", "up")
        _ip("link", "add", f"{self._link}n", "type", "veth", "peer", "name", f"{self._link}f")
        for host, side, address in ends:
            _ip("link", "set", f"{self._link}{side}", "netns", host)
            _ip("-n", host, "address", "add", f"{address}/24", "dev", f"{self._link}{side}")
            _ip("-n", host, "link", "set", f"{self._link}{side}", "up")

    def remove(self) -> None:
        for host in (self.near, self.far):
            _end_all(host)
            _ip("netns", "delete", host)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Made now, and removed with every process that runs on them."""
    hosts = Hosts()
    try:
        hosts.build()
        yield hosts
    finally:
        hosts.remove()


@contextmanager
def ray_node(hosts: Hosts, host: str, folder: Path, *arguments: str) -> Iterator[None]:
    """A Ray node on `host`, from when it says that it has started. What it started in turn ends
    with its host: behind a cut link it takes long to end by itself."""
    log = folder / f"{host}.log"
    command = [*hosts.inside(host), sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_for(log, "Ray runtime started", process)
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(log: Path, words: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while words not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"Ray did not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def _end_all(host: str) -> None:
    """Kill what still runs on `host`, until nothing does."""
    deadline = time.monotonic() + 20
    while pids := _ip("netns", "pids", host).split():
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise AssertionError(f"processes {pids} on {host} do not end")
        time.sleep(0.1)


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
