"""What this machine offers to Supple, and what is missing."""

import os
import platform
import shutil
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; where it is not ok, `found` says what to do."""

    what: str
    found: str
    ok: bool = True


def examine() -> list[Finding]:
    """Look at versions, cores, memory, disk, accelerators, and whether a group can form."""
    import psutil
    import ray
    import torch

    memory = psutil.virtual_memory()
    free_bytes = shutil.disk_usage(".").free
    return [
        Finding(what="python", found=platform.python_version()),
        Finding(what="torch", found=torch.__version__),
        Finding(what="ray", found=ray.__version__),
        Finding(what="cores", found=str(os.cpu_count())),
        Finding(
            what="memory",
            found=f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
            ok=memory.available > 2**30,
        ),
        Finding(
            what="disk here",
            found=f"{free_bytes / 2**30:.1f} GiB free",
            ok=free_bytes > 2**30,
        ),
        Finding(
            what="accelerators",
            found=f"{torch.cuda.device_count()} CUDA"
            if torch.cuda.is_available()
            else "none: workers run on the processor",
        ),
        _group(),
    ]


def _group() -> Finding:
    import torch

    from supple.core.spec import SpecError
    from supple.train.group import CollectiveFailed, Rendezvous, form

    try:
        meeting = Rendezvous("127.0.0.1")
        group = form(
            meeting.address, key="doctor", rank=0, size=1, host="127.0.0.1", aborted=lambda: False
        )
        group.wait([group.all_reduce(torch.ones(1))])
        group.close()
    except (CollectiveFailed, SpecError) as error:
        return Finding(what="process group", found=f"cannot form: {error}", ok=False)
    return Finding(what="process group", found="forms on loopback")
