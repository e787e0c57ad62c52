"""The `supple` command, also as `python -m supple`.

It imports almost nothing before its error handling is installed, so that Ctrl-C during imports and
output that cannot be written end in at most one line.
"""

import signal
import sys

_FAILED, _INTERRUPTED = 1, 130


def main() -> None:
    """Run the command line and end with `SystemExit`."""
    try:
        code = _run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == _INTERRUPTED:
        # After an interrupted exec(), which imports use, Python would end itself by the signal. The
        # next exec() resets that.
        exec("")
        _print("stopped by Ctrl-C.")
    sys.exit(code)


def _run() -> str | int | None:
    """Run the app and return the exit code."""
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
        _print(
            f"the answer could not be written to stdout: {lost.strerror}. Make room, or send it "
            "elsewhere, and run the command again."
        )
    output.give_up()
    return code or _FAILED


def _print(line: str) -> None:
    try:
        print(f"supple: {line}", file=sys.stderr, flush=True)
    except OSError:
        return  # stderr is closed


if __name__ == "__main__":
    main()
