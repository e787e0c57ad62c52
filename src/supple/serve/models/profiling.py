"""Measure a model's latency profile in a separate process, store it as JSON, and read it.

Start-up is the time from the start of the process to the model's first answer; memory is the peak
of the process. The batches have 1, 2, 4 … rows of zeros of the declared inputs. If a declared dim
has any length, each requested length is measured.
"""

import contextlib
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from supple.core.service.latency import LatencyPoint, LatencyProfile, ProfileError
from supple.core.spec import SpecError
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel, check_target, load_model

_FORMAT: Final = 1
_MOST_SAMPLES: Final = 50
_LEAST_SAMPLES: Final = 5  # timed calls for each batch size, even beyond `SECONDS_PER_BATCH`
SECONDS_PER_BATCH = 0.5
"""Measuring time for each batch size."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StoredProfile:
    """The stored measurements of one model on one machine."""

    target: str
    source: str
    """SHA-256 of the model's file: a changed file is another model."""
    machine: str
    startup_s: float
    memory_bytes: int
    """Peak of the process, and of its GPU if it used one."""
    lengths: tuple[tuple[int, tuple[LatencyPoint, ...]], ...]
    """Points by input length, ascending; one entry where no dim has an open length."""

    def profile(self, length: int | None = None) -> LatencyProfile:
        """The profile at the shortest measured length that is at least `length`; otherwise, or
        without `length`, at the longest: the SLO includes the longest requests."""
        fitting = [points for size, points in self.lengths if length is None or size >= length]
        points = fitting[0] if fitting and length is not None else self.lengths[-1][1]
        return LatencyProfile(
            points=points, startup_s=self.startup_s, memory_bytes=self.memory_bytes
        )


def machine() -> str:
    """Describe this machine by the properties that determine the time of a batch."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def source_of(target: str) -> str:
    """Return the SHA-256 of the file of `target`. Raises `SpecError` if it has no such class."""
    path, _ = check_target(target)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def place(target: str) -> Path:
    """Return the path of the stored profile of `target`, relative to the working folder."""
    path, class_name = check_target(target)
    return Path("supple-runs/profiles") / f"{Path(path).stem}-{class_name}.json"


def known(target: str, path: Path | None = None) -> StoredProfile | None:
    """Return the stored profile of the current version of `target` on this machine; None if there
    is none. Raises `SpecError` for a file that is no profile."""
    path = path or place(target)
    if not path.exists():
        return None
    found = read(path)
    return found if (found.source, found.machine) == (source_of(target), machine()) else None


def refresh(target: str, points: Sequence[LatencyPoint]) -> bool:
    """Replace stored points by those measured in service, size by size; return whether a profile
    was updated. A profile of several input lengths is not: the length of the traffic is unknown."""
    found = known(target)
    if found is None or len(found.lengths) != 1 or not points:
        return False
    ((length, stored),) = found.lengths
    by_size = {point.batch_size: point for point in (*stored, *points)}
    fresh = tuple(by_size[size] for size in sorted(by_size))
    write(replace(found, lengths=((length, fresh),)), place(target))
    return True


def write(profile: StoredProfile, path: Path) -> None:
    """Write the profile atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps({"format": _FORMAT} | asdict(profile), indent=1)
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def read(path: Path) -> StoredProfile:
    """Read a stored profile. Raises `SpecError` for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("format") != _FORMAT:
            raise ValueError("it has another format")
        lengths = tuple(
            (int(length), tuple(LatencyPoint(**point) for point in points))
            for length, points in found.pop("lengths")
        )
        profile = StoredProfile(**found, lengths=lengths)
        profile.profile()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SpecError(
            f"{path} is no stored profile ({type(error).__name__}: {error}). Delete it, or "
            "measure anew: supple plan FILE:CLASS --again."
        ) from None
    return profile


def measure(target: str, *, lengths: Sequence[int] = (1,)) -> StoredProfile:
    """Load the model in a new process and measure the time of its batches at each length.

    Raises `SpecError` for a model that cannot be measured and `ModelFault` for one that fails.
    """
    source = source_of(target)
    command = [
        sys.executable,
        "-m",
        "supple.serve.models.profiling",
        target,
        str(SECONDS_PER_BATCH),
    ]
    began_s = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            [*command, *map(str, lengths)], stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            first = process.stdout.readline()
            startup_s = time.monotonic() - began_s
            rest = process.stdout.read()
            process.wait()
        except BaseException:
            process.kill()
            raise
        stderr.seek(0)
        errors = stderr.read()
    answers = [json.loads(line) for line in (first, rest.strip()) if line.startswith("{")]
    for answer in answers:
        if "refused" in answer:
            raise SpecError(answer["refused"])
        if "fault" in answer:
            raise ModelFault(answer["fault"])
    if process.returncode or len(answers) != 2:
        last = (errors.strip() or "nothing").splitlines()[-1]
        raise ModelFault(
            f"the process that measures {target} ended with {process.returncode}: {last}"
        )
    found = answers[1]
    try:
        return StoredProfile(
            target=target,
            source=source,
            machine=machine(),
            startup_s=startup_s,
            memory_bytes=found["memory_bytes"],
            lengths=tuple(
                (length, tuple(LatencyPoint(**point) for point in points))
                for length, points in found["lengths"]
            ),
        )
    except ProfileError as error:
        raise ModelFault(str(error)) from None


def _points(model: ServedModel, length: int, seconds: float) -> list[LatencyPoint]:
    sizes = [size for size in (2**power for power in range(32)) if size < model.max_batch]
    points: list[LatencyPoint] = []
    for size in (*sizes, model.max_batch):
        example = model.example(size, length)
        model.predict(example)  # not timed: the first call of a shape may compile or allocate
        times: list[float] = []
        end_s = time.monotonic() + seconds
        while len(times) < _LEAST_SAMPLES or (
            len(times) < _MOST_SAMPLES and time.monotonic() < end_s
        ):
            began_s = time.perf_counter()
            model.predict(example)
            times.append(max(time.perf_counter() - began_s, 1e-7))
        times.sort()
        points.append(
            LatencyPoint(
                batch_size=size,
                p50_s=times[len(times) // 2],
                p99_s=times[min(len(times) - 1, round(0.99 * len(times)))],
                num_samples=len(times),
            )
        )
    return points


def _memory_bytes() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used += int(torch.cuda.max_memory_allocated())
    return used


def _answer(target: str, seconds: float, lengths: Sequence[int]) -> dict[str, Any]:
    model = load_model(target)
    if not model.example() or any(spec.dtype.kind == "O" for spec in model.inputs):
        raise SpecError(
            f"{target} declares no inputs, or takes strings, so there is nothing to measure it "
            'with. Declare numbers in the class: inputs = {"x": "float32[64]"}.'
        )
    free = any(length == -1 for spec in model.inputs for length in spec.shape)
    wanted = sorted(set(lengths)) if free else [1]
    model.predict(model.example(1, wanted[0]))
    _write_line({"ready": True})
    measured = [(n, [asdict(p) for p in _points(model, n, seconds)]) for n in wanted]
    return {"lengths": measured, "memory_bytes": _memory_bytes()}


def _write_line(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=sys.__stdout__, flush=True)


def main(arguments: Sequence[str]) -> None:
    """Entry point of the measuring process. It writes one JSON line after the model's first answer,
    and one at the end."""
    target, seconds, *lengths = arguments
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the two lines alone
            answer = _answer(target, float(seconds), [int(length) for length in lengths])
    except SpecError as error:
        answer = {"refused": str(error)}
    except ModelFault as error:
        answer = {"fault": str(error)}
    _write_line(answer)


if __name__ == "__main__":
    main(sys.argv[1:])
