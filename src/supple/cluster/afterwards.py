"""End the processes that a private Ray leaves behind, even if its starter is killed.

The kernel ends Ray's servers with the process that started them, but not the agents and workers
that the raylet started: without a GCS they stay for a minute or more. So a small process waits for
the end of this one (the end of its standard input) and ends them.

This file is also that process's program, so it imports only the standard library.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

_GRACE_S = 5.0
"""Time from this process's end until the rest is killed: a worker may be saving."""
_LIMIT_S = 20.0
"""Time after the grace period for which killing is retried."""
_AGAIN_S = 0.25

MARK = "SUPPLE_RAY"
"""Environment variable of a Ray's processes that holds the folder of their Ray."""


def watch_over(which: str) -> "subprocess.Popen[bytes] | None":
    """Start the process that ends what this Ray leaves behind; it begins when its standard input is
    closed. None where there is no /proc to search."""
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
    """Return the pids of this Ray's agents and workers, and of the workers' forked children."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                is_titled = file.read(5) == b"ray::"
            if is_titled and (_is_marked(name, which) or _has_open_file(name, which)):
                found.append(int(name))
        except OSError:
            continue
    return found


def _is_marked(pid: str, which: str) -> bool:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return f"{MARK}={which}".encode() in file.read().split(b"\0")


def _has_open_file(pid: str, folder: str) -> bool:
    """True if the process has a file of `folder` open. An agent has its log there; the title that
    it gives itself overwrites its environment, and the mark with it."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}").startswith(f"{folder}/"):
                return True
    return False


def end_left_behind(which: str, *, grace_s: float = _GRACE_S) -> None:
    """Wait `grace_s` for this Ray's processes to end, kill the rest; return when none is left."""
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
