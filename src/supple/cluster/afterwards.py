"""Nothing of a Ray that this process started outlives it, even if it is killed.

The kernel ends Ray's servers with the process that started them. Not so the agents and workers that
the raylet started in turn: without a GCS to take their leave of, they stay for a minute or more. So
a small process waits for the end of this one (the end of its standard input) and ends them.

This file is also that process's program, started on its own: it imports the standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_GRACE_S = 5.0
"""What still runs so long after this process's end is killed: a worker may be saving."""
_LIMIT_S = 20.0
_AGAIN_S = 0.25


MARK = "SUPPLE_RAY"
"""The variable in the environment of a Ray's processes that says which Ray they belong to."""


def watch_over(which: str) -> "subprocess.Popen[bytes] | None":
    """The process that ends what this Ray leaves behind; let go of it to have it done now. None
    where there is no /proc to find it in."""
    if sys.platform != "linux":
        return None
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, which],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def left_behind(which: str) -> list[int]:
    """The processes that still run as this Ray's: agents, workers, and what a worker started that
    did not become another program."""
    mark = f"{MARK}={which}".encode()
    found: list[int] = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if file.read(5) != b"ray::":
                    continue
            with open(f"/proc/{name}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue
    return found


def end_left_behind(which: str, *, grace_s: float = _GRACE_S) -> None:
    """Wait `grace_s` for them to end by themselves, kill the rest, and return when none is left."""
    began = time.monotonic()
    while (left := left_behind(which)) and time.monotonic() - began < grace_s + _LIMIT_S:
        if time.monotonic() - began >= grace_s:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_AGAIN_S)


def main() -> None:
    sys.stdin.buffer.read()
    end_left_behind(sys.argv[1])


if __name__ == "__main__":
    main()
