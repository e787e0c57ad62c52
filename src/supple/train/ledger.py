"""The file in which a worker writes down which samples it really used (`supple train --ledger`).

`supple.core.ledger` proves from these files that every sample was used exactly once.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final


@final
class Ledger:
    """Appends one JSON line a micro-batch; a line is in the kernel before the step can commit, so
    it survives the death of this process."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

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
        os.write(self._file, (json.dumps(record) + "\n").encode())
