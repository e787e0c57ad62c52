"""A Ray of our own on this machine: started to its end or not at all, reachable from this machine
and by this user only, and gone without a trace.

Interrupted while it waits for its raylet, Ray knows of no node to shut down, and leaves the agents
of that raylet behind: they look for their parent for a minute before they give up.
"""

import atexit
import contextlib
import logging
import os
import resource
import secrets
import shutil
import signal
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
"""Without it Ray's processes answer nobody. Ray would write its own into the user's home, for every
user to read, and where there is no home it would not start."""
_UNASKED: Final = ("start_monitor", "start_log_monitor", "start_api_server")
"""Processes of Ray that nobody here asks: its autoscaler, which has no node to add; the one that
sends what workers print to a driver, which has them by itself; the dashboard."""
_LEAST_FREE: Final = 100 * 1024 * 1024
_LEAST_FILES: Final = 4096
_folder: RayFolder | None = None
_guards: list[subprocess.Popen[bytes]] = []
"""At most one. It ends what its Ray leaves behind when this process ends or starts another."""
_set: list[str] = []
"""Names of this process's environment that were set for the Ray that runs."""


def start_ray(folder: RayFolder, *, num_cpus: int, settings: Mapping[str, str]) -> None:
    """Start Ray in this process, and in `folder`. Its processes get `settings` in their
    environment, but for what this process's says already. Raises `SpecError` if Ray does not
    start."""
    global _folder
    environment = dict(settings) | {
        # Ray's switch for machines whose firewall asks about every port; then it uses loopback.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        "RAY_AUTH_TOKEN": _TOKEN,
        # What torch compiles, and runs, would be in a folder that anyone may have made before.
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
    except Exception as error:  # its kind is Ray's own affair, and differs with what is lacking
        _folder = None  # what its logs say stays until the next start
        stop_ray()
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SpecError(
            f"Ray cannot start on this machine: {why}. {_what_it_lacks(folder.path)}"
        ) from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = many_machines


@contextlib.contextmanager
def as_small_as_it_gets() -> Iterator[None]:
    """Ray starts without the processes in `_UNASKED`, and with its agent as where the dashboard's
    dependencies are not installed: without a web server, whose imports the raylet would wait for.
    Ray has parameters for this which `ray.init` does not take."""
    replaced: list[tuple[Any, str, Any]] = [(Node, name, None) for name in _UNASKED]
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
    """What to do where Ray does not start, by what it needs: room for its files, and open files."""
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
    """Shut Ray down, or leave the cluster, and remove what it left; its logs are copied to
    `keep_logs`."""
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


@contextlib.contextmanager
def to_its_end() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, some seconds, in which Ray starts; then Ray
    is shut down, and `KeyboardInterrupt` or `SystemExit` raised."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals come to the main thread
        return
    came: list[int] = []

    def wait(number: int, _: object) -> None:
        if not came:
            # Not print: the main thread may be in the middle of one.
            os.write(2, b"supple: Ray is starting, and cannot be interrupted: ending when it has\n")
        came.append(number)

    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if came:
            stop_ray()
        for number, handler in before.items():
            if signal.getsignal(number) is wait:  # Ray has its own for SIGTERM, once it runs
                signal.signal(number, handler)
    if signal.SIGINT in came:
        raise KeyboardInterrupt
    if came:
        raise SystemExit(128 + signal.SIGTERM)
