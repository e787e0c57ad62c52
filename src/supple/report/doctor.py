"""Check this machine for Supple: versions, memory, disk, accelerators, networking, Ray."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import ray
import torch

from supple.cluster.ray import connect
from supple.cluster.starting import stop_ray
from supple.core.spec import SpecError, TrainSpec
from supple.train.generation.group import CollectiveFailed, form
from supple.train.generation.rendezvous import Rendezvous

_LEAST_BYTES = 2**30
_LEAST_SHARED_BYTES = 64 * 2**20
_SHARED = Path("/dev/shm")
_USAGE = "RAY_USAGE_STATS_ENABLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check; `advice` is empty if it passed."""

    what: str
    found: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        return not self.advice


def examine(*, with_ray: bool) -> Iterator[Finding]:
    """Yield the result of each check when it is done: versions, cores, memory, disk, accelerators,
    telemetry, a process group and, `with_ray`, the start of Ray, which takes some seconds."""
    yield Finding(what="supple", found=version("supple"))
    yield Finding(what="python", found=platform.python_version())
    yield Finding(what="torch", found=torch.__version__)
    yield Finding(what="ray", found=ray.__version__)
    yield Finding(what="cores", found=str(os.cpu_count()))
    memory = psutil.virtual_memory()
    yield _room(
        "memory",
        memory.available,
        _LEAST_BYTES,
        "Close other programs: a worker needs about 0.5 GiB beside the model.",
    )
    yield _room(
        "disk here",
        shutil.disk_usage(".").free,
        _LEAST_BYTES,
        "Make room, or give `supple train` a --run-dir on another disk, for its checkpoints.",
    )
    if _SHARED.is_dir():
        yield _room(
            "shared memory",
            shutil.disk_usage(_SHARED).free,
            _LEAST_SHARED_BYTES,
            "Enlarge /dev/shm (in a container: --shm-size=2g): DataLoader workers hand over "
            "batches in it.",
        )
    yield _accelerators()
    yield _telemetry()
    yield _group()
    if with_ray:
        yield _ray()


def _room(what: str, free_bytes: int, least_bytes: int, advice: str) -> Finding:
    return Finding(
        what=what,
        found=f"{free_bytes / 2**30:.1f} GiB free",
        advice=advice if free_bytes < least_bytes else "",
    )


def _accelerators() -> Finding:
    if not torch.cuda.is_available():
        return Finding(what="accelerators", found="none: workers run on the processor")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(what="accelerators", found=", ".join(names))


def _telemetry() -> Finding:
    if os.environ.get(_USAGE, "0") == "0":
        return Finding(what="telemetry", found="off, Ray's usage reports too")
    return Finding(
        what="telemetry",
        found=f"Ray's usage reports are on: {_USAGE} is set",
        advice=f"Unset {_USAGE}, or set it to 0.",
    )


def _group() -> Finding:
    """Form a process group of one and reduce; it fails without gloo or if loopback is blocked."""
    try:
        meeting = Rendezvous("127.0.0.1")
        group = form(
            meeting.address, key="doctor", rank=0, size=1, host="127.0.0.1", aborted=lambda: False
        )
        group.wait([group.all_reduce(torch.ones(1))])
        group.close()
    except (CollectiveFailed, SpecError) as error:
        return Finding(
            what="process group",
            found=f"cannot form: {error}",
            advice="Allow connections to 127.0.0.1, and install a torch that has gloo.",
        )
    return Finding(what="process group", found="forms on loopback and reduces")


def _ray() -> Finding:
    began = time.monotonic()
    try:
        connect(TrainSpec(name="doctor", script=""))
        nodes = ray.nodes()
        stop_ray()
    except Exception as error:
        return Finding(
            what="ray starts",
            found=f"no: {type(error).__name__}: {error}",
            advice="Read those logs, and check that no other Ray uses its ports (`ray stop`).",
        )
    return Finding(
        what="ray starts", found=f"with {len(nodes)} node in {time.monotonic() - began:.1f} s"
    )
