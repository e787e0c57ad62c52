"""Check, load and run the user's script, and format its errors without this package's frames."""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import pickle
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from supple.core.spec import SpecError

_SHARED = "/dev/shm"
_MODULE = "supple_user_script"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a script is started: its command line, and its name if it is a module of a package."""

    arguments: tuple[str, ...] = ()
    """`sys.argv[1:]` of the script."""
    module: str = ""
    """The dotted name to import it by; empty: the file is run by its path."""

    @property
    def text(self) -> str:
        """The arguments as a shell takes them."""
        return shlex.join(self.arguments)


PICKLED = ".pkl"
"""Suffix of a script that is a pickled function, written by `supple.run`."""
PLAIN = Start()
"""A file, without arguments."""


def find_module(name: str) -> Path | None:
    """Return the file of the module with this dotted name, searched in the working folder and where
    Python imports from; None if there is none. Nothing is imported."""
    top, *rest = name.split(".")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(top)
        for part in rest:
            if found is None or found.submodule_search_locations is None:
                return None
            # By its last part alone: a dotted name needs its parents to be imported.
            found = PathFinder.find_spec(part, list(found.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    finally:
        sys.path.pop(0)
    is_file = found is not None and found.has_location and found.origin is not None
    return Path(found.origin).resolve() if found and is_file and found.origin else None


def script_hash(script: str) -> str | None:
    """Return the SHA-256 of the script's file; None if it cannot be read."""
    try:
        return hashlib.sha256(Path(script).read_bytes()).hexdigest()
    except OSError:
        return None


def check(script: str, function: str) -> None:
    """Raise `SpecError` unless `script` is Python and defines `function` taking one argument."""
    path = Path(script)
    try:
        source = path.read_bytes() if script and path.is_file() else None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SpecError(f"the script {script} cannot be read: {why}. Give another.") from None
    if source is None:
        is_folder = bool(script) and path.is_dir()
        near = [] if is_folder else difflib.get_close_matches(path.name, _names_beside(path), n=1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else ""
        what = "is a folder" if is_folder else "does not exist"
        if script and path.exists() and not is_folder:
            what, hint = "is no ordinary file", ""
        name = script or "''"
        raise SpecError(f"the script {name} {what}.{hint} Give the path of a Python file.")
    if path.suffix == PICKLED:
        return
    try:
        tree = ast.parse(source, filename=script)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        why = error.msg if isinstance(error, SyntaxError) else error
        raise SpecError(f"the script {script} is not valid Python: {where}{why}.") from None
    functions = {
        node.name: len(node.args.posonlyargs) + len(node.args.args)
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    if function in imported:
        return
    if function not in functions:
        takes_one = [name for name, count in functions.items() if count == 1]
        hint = (
            f" It has {', '.join(takes_one)}: name the one to run as {script}:{takes_one[0]}."
            if takes_one
            else ""
        )
        raise SpecError(
            f"the script {script} has no function {function}(job).{hint} Supple calls "
            f"`def {function}(job)`: put the training loop in one."
        )
    if functions[function] != 1:
        raise SpecError(
            f"{function} in {script} takes {functions[function]} arguments; it must take exactly "
            "one, the job."
        )


def load(script: str, function: str, start: Start = PLAIN) -> Callable[[Any], None]:
    """Import the script and return its training function. The module's name is not `__main__`, so a
    block under `if __name__ == "__main__"` does not run."""
    path = Path(script).resolve()
    if path.suffix == PICKLED:
        return pickle.loads(path.read_bytes())
    if start.module:
        above = start.module.count(".") + (path.name == "__init__.py")
        _search_first(path.parents[above])
        sys.modules.pop(start.module, None)  # a script is run anew, however it is named
        return getattr(importlib.import_module(start.module), function)
    _search_first(path.parent)
    # An explicit loader accepts any file extension.
    loader = SourceFileLoader(_MODULE, script)
    spec = importlib.util.spec_from_file_location(_MODULE, script, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    loader.exec_module(module)
    return getattr(module, function)


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextmanager
def command_line(script: str, start: Start = PLAIN) -> Iterator[None]:
    """Run the block with the script's command line in `sys.argv`; turn `sys.exit` into
    `SpecError`."""
    ours, sys.argv = sys.argv, [script, *start.arguments]
    try:
        yield
    except SystemExit as end:
        raise SpecError(_ended(script, end, start)) from None
    finally:
        sys.argv = ours


def run(script: str, function: str, job: Any, start: Start = PLAIN, *, seed: int = 0) -> None:
    """Call the training function with `job` in this process, with random generators seeded.

    Its output goes to stderr, as stdout is for the command's result; its changes of the working
    folder are undone. Raises the script's errors, and `SpecError` if it ends the program."""
    from supple.train.start.seeding import seed_everything  # the command line starts without torch

    with command_line(script, start), redirect_stdout(sys.stderr), chdir("."):
        seed_everything(seed)
        train = load(script, function, start)
        seed_everything(seed)
        train(job)


def _ended(script: str, end: SystemExit, start: Start) -> str:
    """Return the message for a script that ended the program."""
    frames = list(traceback.walk_tb(end.__traceback__))
    file = Path(script).resolve()
    lines = [line for frame, line in frames if Path(frame.f_code.co_filename).resolve() == file]
    where = f", line {lines[-1]}," if lines else ""
    parsers = [frame for frame, _ in frames if Path(frame.f_code.co_filename).name == "argparse.py"]
    advice = 'move it under `if __name__ == "__main__":`, which Supple does not run'
    if parsers:
        message = parsers[-2].f_locals.get("message") if len(parsers) > 1 else None
        detail = f" ({message})" if message else ""
        if start.arguments:
            return (
                f"the script {script}{where} does not take the arguments {start.text}{detail}. "
                "Everything after -- is its command line: correct it there."
            )
        return (
            f"the script {script}{where} reads a command line{detail}, and it was given none. Give "
            "every argument a default, give arguments after --, as in `supple train train.py -- "
            f"--epochs 3`, or {advice}."
        )
    return (
        f"the script {script}{where} called sys.exit({end.code!r}) while Supple ran it: a script "
        "that ends itself cannot be measured or trained to its end. Return from the function "
        f"instead. If the code is for running the file by itself, {advice}."
    )


def user_traceback(error: BaseException, *, whole: bool = False) -> str:
    """Format the traceback for the script's author: without frames of this package and of torch's
    private modules. `whole` keeps all frames."""
    frames = traceback.extract_tb(error.__traceback__)
    if not whole:
        frames = [frame for frame in frames if not _is_machinery(frame.filename)]
    lines = (
        ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    )
    lines += traceback.format_exception_only(error)
    return "".join(lines).rstrip()


def _is_machinery(file: str) -> bool:
    package, path = Path(__file__).resolve().parent.parent, Path(file).resolve()
    if file.startswith("<frozen importlib") or path.is_relative_to(package):
        return True
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    if torch is None or not path.is_relative_to(folder := Path(torch).resolve().parent):
        return False
    inside = path.relative_to(folder)
    return inside.match("nn/modules/module.py") or any(part[0] == "_" for part in inside.parts)


def memory_advice(error: BaseException, num_samples: int) -> str:
    """Return advice if `error` means that memory ran out in a micro-batch of `num_samples`; else an
    empty text. Detected by torch's error names for accelerators and for the CPU."""
    ran_out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    text = "".join(traceback.format_exception_only(error))  # str(error) may raise
    if not ran_out and "can't allocate memory" not in text:
        return ""
    if num_samples > 1:
        return (
            f"A micro-batch of {num_samples} samples does not fit into this worker's memory. Give "
            f"job.batches(..., micro_batch_size={num_samples // 2}): the global batch stays what "
            "it is, and is computed in more parts."
        )
    what = "One sample" if num_samples else "The model alone, before the first batch,"
    return (
        f"{what} does not fit into this worker's memory: take a smaller model or smaller samples, "
        "or recompute activations (torch.utils.checkpoint)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One worker's part of a step, in samples."""

    micro_batch: int
    """The micro-batch that was yielded last."""
    own: int
    """The worker's share of the step."""
    step: int
    """All workers together."""
    batch_size: int
    """Global batch size of a full step."""
    num_workers: int
    epoch: int | None
    """The whole epoch; None if not known."""


def single_sample_advice(error: BaseException, share: StepShare) -> str:
    """Return advice if `error` means that a BatchNorm got one sample in training; else an empty
    text. Detected by torch's wording."""
    if share.micro_batch != 1 or "more than 1 value per channel" not in str(error):
        return ""
    of = "" if share.epoch is None else f" of {share.epoch} samples"
    cut = f"this worker's share is {share.own} on {share.num_workers} workers"
    if share.num_workers == 1:
        cut = f"one worker computes all {share.own}" if share.own > 1 else "one worker computes it"
    least = 2 * share.num_workers
    if share.own > 1:
        where = f"a step takes {share.step}, {cut}, and it is cut into micro-batches"
        advice = "Give job.batches a larger micro_batch_size"
    elif share.step < share.batch_size:
        where = (
            f"the last batch of an epoch{of} has {share.step} (batch_size={share.batch_size}), and "
            f"{cut}"
        )
        advice = (
            "Give job.batches(..., drop_last=True), which leaves that batch out, or another "
            f"batch_size whose last batch has at least {least}"
        )
    else:
        where = f"a step takes {share.step}, and {cut}"
        advice = f"Give job.batches a batch_size of at least {least}"
    fewer = ", or train with fewer workers" if 1 == share.own < share.step else ""
    return (
        f"A BatchNorm got 1 sample in training, and one value has no variance: {where}. "
        f"{advice}{fewer}; a GroupNorm or LayerNorm takes single samples."
    )


def shared_memory_advice(error: BaseException) -> str:
    """Return the whole message if `error` means that the processes of `num_workers` had no shared
    memory for their batches; else an empty text. Detected by torch's wording."""
    text = "".join(traceback.format_exception_only(error))
    if "shared memory" not in text or not ("No space left" in text or "Bus error" in text):
        return ""
    room = shutil.disk_usage(_SHARED)
    return (
        f"the processes of job.batches(..., num_workers=...) pass their batches through {_SHARED}, "
        f"which has {room.total:,} bytes, {room.free:,} of them free: no room for the next batch. "
        "Make it larger (a container's: --shm-size=8g), or give smaller batches "
        "(micro_batch_size), fewer processes, or num_workers=0."
    )


def _names_beside(path: Path) -> list[str]:
    try:
        return [
            entry.name
            for entry in path.parent.iterdir()
            if entry.suffix == ".py" and entry.is_file()
        ]
    except OSError:
        return []
