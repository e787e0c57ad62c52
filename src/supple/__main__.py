"""The `supple` command, also as `python -m supple`.

Imports next to nothing before it can answer for it: Ctrl-C while modules load, and output that does
not arrive, end in one plain line at most.
"""

import signal
import sys

_FAILED, _INTERRUPTED = 1, 130


def main() -> None:
    """Run the command line; ends with `SystemExit`."""
    try:
        code = _run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left to do takes a moment
    if code == _INTERRUPTED:
        # Python remembers an interrupted exec(), of which imports are full, and would end itself by
        # the signal. The next exec() makes it forget.
        exec("")
        _tell("stopped by Ctrl-C.")
    sys.exit(code)


def _run() -> str | int | None:
    """The exit code."""
    from supple.cli import output

    output.watch()
    code: str | int | None = 0
    try:
        from supple.cli.app import app

        app(prog_name="supple")
    except SystemExit as end:
        code = end.code
    except OSError:
        if output.lost() is None:
            raise
    lost = output.lost()
    if lost is None:
        return code
    if not isinstance(lost, BrokenPipeError):
        _tell(
            f"the answer could not be written to stdout: {lost.strerror}. Make room, or send it "
            "elsewhere, and run the command again."
        )
    output.give_up()
    return code or _FAILED


def _tell(line: str) -> None:
    try:
        print(f"supple: {line}", file=sys.stderr, flush=True)
    except OSError:
        return  # there is nobody to tell


if __name__ == "__main__":
    main()
