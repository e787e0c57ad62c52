"""The file in which a worker writes down which samples it really used (`supple train --ledger`).

`supple.core.job.ledger` proves from these files that every sample was used exactly once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from supple.train.logfile import LogFile, Lost


@final
class Ledger:
    """Appends one JSON line a micro-batch; a line is in the kernel before the step can commit, so
    it survives the death of this process. Training goes on where it cannot be written: `lost` is
    called, and the proof must be told."""

    def __init__(self, path: Path, lost: Lost) -> None:
        self._file = LogFile(path, lost)

    def read(self, generation: int, step: int, epoch: int, rank: int, ids: Sequence[Any]) -> None:
        """This rank feeds the samples `ids` to `step` (counted from 0) in `generation`."""
        record = {
            "kind": "read",
            "generation": generation,
            "step": step,
            "epoch": epoch,
            "rank": rank,
            "ids": list(ids),
        }
        self._file.write(json.dumps(record) + "\n")
