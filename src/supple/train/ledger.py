"""`Ledger`: a worker's file of the samples it used (`supple train --ledger`).

`supple.core.job.ledger` proves from these files that every sample was used exactly once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from supple.train.start.logfile import LogFile, Lost


@final
class Ledger:
    """Appends one JSON line per micro-batch. The kernel has a line before the step can commit, so
    it survives the death of this process. If the file cannot be written, training goes on and
    `lost` is called: the ledger proves nothing then."""

    def __init__(self, path: Path, lost: Lost) -> None:
        self._file = LogFile(path, lost)

    def read(self, generation: int, step: int, epoch: int, rank: int, ids: Sequence[Any]) -> None:
        """Record that this rank reads the samples `ids` for `step` (from 0) in `generation`."""
        record = {
            "kind": "read",
            "generation": generation,
            "step": step,
            "epoch": epoch,
            "rank": rank,
            "ids": list(ids),
        }
        self._file.write(json.dumps(record) + "\n")
