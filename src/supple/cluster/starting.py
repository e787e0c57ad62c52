"""Start and stop a private Ray on this machine: reachable only from here and by this user, and
removed without a trace.

A signal does not interrupt the start: Ray would then leave its raylet's agents behind, which look
for their parent for a minute before they end.
"""

import atexit
import contextlib
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import ray
from ray._private import ray_constants, utils
from ray._private.node import Node

from supple.cluster.afterwards import MARK, watch_over
from supple.cluster.ray_folder import RayFolder
from supple.core.spec import SpecError

_TOKEN: Final = secrets.token_hex(32)
"""Ray's processes answer only to holders of it. Ray would write its own token into the user's home,
readable by every user, and would not start without a home."""
_UNUSED: Final = ("start_monitor", "start_log_monitor", "start_api_server")
"""Starters of Ray processes without a use here: the autoscaler, which has no node to add; the log
monitor, which sends the output of workers to a driver; the dashboard."""
_LEAST_FREE: Final = 100 * 1024 * 1024
"""Free bytes below which a failed start is blamed on the disk."""
_LEAST_FILES: Final = 4096
"""Limit on open files below which a failed start is blamed on that limit."""
_JOIN_S: Final = 30.0
"""Longest wait for the head of a running cluster, in s; it answers within 3 s on a busy machine."""
_folder: RayFolder | None = None
_guards: list[subprocess.Popen[bytes]] = []
"""At most one process, which ends what an earlier Ray leaves behind."""
_set: list[str] = []
"""Environment variables of this process that were set for the running Ray."""


def start_ray(folder: RayFolder, *, num_cpus: int, settings: Mapping[str, str]) -> None:
    """Start Ray in this process, with its files in `folder`. Its processes get `settings` as
    environment variables; those already set here win. Raises `SpecError` if Ray does not start."""
    global _folder
    environment = dict(settings) | {
        # Off: Ray uses the loopback interface only.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "RAY_AUTH_TOKEN": _TOKEN,
        # torch's default folder for compiled code may have been made by another user.
        "TORCHINDUCTOR_CACHE_DIR": str(folder.path / "inductor"),
    }
    if "RAY_AUTH_MODE" not in os.environ:
        _set.append("RAY_AUTH_MODE")  # Ray sets it to "token"
    os.environ.pop(MARK, None)  # of a Ray that this process is a worker of
    environment[MARK] = str(folder.path)
    for name in environment.keys() - os.environ.keys():
        os.environ[name] = environment[name]
        _set.append(name)
    atexit.register(stop_ray)
    _folder = folder
    _guard(environment[MARK])
    many_machines = ray_constants.ENABLE_RAY_CLUSTER  # read when Ray was imported
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with to_its_end(), as_small_as_it_gets():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder.for_ray),
            )
    except Exception as error:  # Ray's exception type differs with the cause
        _folder = None  # its logs stay until the next start
        stop_ray()
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SpecError(
            f"Ray cannot start on this machine: {why}. {_what_it_lacks(folder.path)}"
        ) from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = many_machines


@contextlib.contextmanager
def as_small_as_it_gets() -> Iterator[None]:
    """Ray starts without the processes in `_UNUSED`, and with its agent as where the dashboard's
    dependencies are not installed: without a web server, whose imports the raylet would wait for.
    Ray has parameters for this which `ray.init` does not take."""
    replaced: list[tuple[Any, str, Any]] = [(Node, name, None) for name in _UNUSED]
    replaced.append((utils, "get_dashboard_dependency_error", "not needed"))
    with contextlib.ExitStack() as back:
        for owner, name, answer in replaced:
            if hasattr(owner, name):
                back.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, lambda *_, answer=answer, **__: answer)
        yield


def _guard(which: str) -> None:
    while _guards:
        _guards.pop().communicate()
    guard = watch_over(which)
    if guard is not None:
        _guards.append(guard)


def _what_it_lacks(folder: Path) -> str:
    """Return advice for a failed start: free disk space, the open-file limit, or Ray's logs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if free < _LEAST_FREE:
        return (
            f"It keeps its files in {folder.parent}, where {free:,} bytes are free: make room, or "
            "give it another folder (RAY_TMPDIR)."
        )
    if soft < _LEAST_FILES:
        return (
            f"This shell allows a process {soft:,} open files, and Ray needs some hundreds for "
            f"every worker: raise it (ulimit -n {_LEAST_FILES})."
        )
    return f"Its logs are in {folder} until Supple is started again; see also `supple doctor`."


def stop_ray(keep_logs: Path | None = None) -> None:
    """Shut Ray down, or leave the cluster; copy its logs to `keep_logs`, remove its folder."""
    global _folder
    ray.shutdown()
    if _folder is not None:
        if keep_logs is not None:
            with contextlib.suppress(OSError, shutil.Error):
                logs = _folder.for_ray / "session_latest" / "logs"
                shutil.copytree(logs, keep_logs, dirs_exist_ok=True)
        _folder.remove()
        _folder = None
    while _set:
        os.environ.pop(_set.pop(), None)


def join_ray(address: str) -> None:
    """Connect this process to the cluster whose head is at `address` (HOST:PORT, or "auto"). A
    signal is handled at once: there is nothing to clean up. Raises `SpecError` if no head answers
    within `_JOIN_S`, and Ray's errors.

    Ray itself would try for minutes, in a call into C that no signal interrupts, so the call has a
    thread of its own.
    """
    _refuse_unreachable(address)
    joined = threading.Event()
    problems: list[BaseException] = []

    def join() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException as error:
            problems.append(error)
        joined.set()

    threading.Thread(target=join, name="join Ray", daemon=True).start()
    if not joined.wait(_JOIN_S):
        raise SpecError(
            f"the head of the Ray cluster at {address} has not answered for {_JOIN_S:g} s. Check "
            "it with `ray status`, or leave --address out to train on this machine."
        )
    if problems:
        raise problems[0]


def _refuse_unreachable(address: str) -> None:
    """Raise `ConnectionError` or another `OSError` if nothing listens at `address`."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_JOIN_S).close()


@contextlib.contextmanager
def to_its_end() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block, in which Ray starts (seconds); then shut
    Ray down and raise `KeyboardInterrupt` or `SystemExit`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    received: list[int] = []

    def wait(number: int, _: object) -> None:
        if not received:
            # Not print: the main thread may be in the middle of one.
            os.write(2, b"supple: Ray is starting, and cannot be interrupted: ending when it has\n")
        received.append(number)

    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if received:
            stop_ray()
        for number, handler in before.items():
            if signal.getsignal(number) is wait:  # Ray has its own for SIGTERM, once it runs
                signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if received:
        raise SystemExit(128 + signal.SIGTERM)
