"""`FenceKeeper`: writes the job's current workers into its run's fence, with a bounded wait."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import final

from supple.control.patience import in_a_thread
from supple.core.types import WorkerId
from supple.train.checkpoint.fence import Fence, next_run

_LIMIT_S = 2.0
"""Longest wait for the disk to take the fence."""
_RETRY_S = 1.0


@final
class FenceKeeper:
    """Writes the newest fence in a thread and retries until it is written. `notify` is called once,
    with a line for the user, if it cannot be written."""

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self.run = next_run(folder, time.time_ns())
        self._folder = folder
        self._notify = notify
        self._wanted: Fence | None = None
        self._written: Fence | None = None
        self._writer: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._is_reported = False

    async def update(self, generation: int, num_started: int, workers: Iterable[WorkerId]) -> None:
        """Allow only these workers, and those started later, to write into the run. The fence is on
        the disk when this returns, unless the disk refuses it or takes longer than `_LIMIT_S`."""
        self._wanted = Fence(
            run=self.run,
            generation=generation,
            num_started=num_started,
            workers=tuple(str(worker_id) for worker_id in workers),
        )
        self._tried.clear()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.ensure_future(self._write())
        try:
            await asyncio.wait_for(self._tried.wait(), _LIMIT_S)
        except TimeoutError:
            self._report(f"it was not written within {_LIMIT_S:g} s")

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer

    async def _write(self) -> None:
        while self._wanted is not None and self._written != self._wanted:
            fence = self._wanted
            try:
                await in_a_thread(partial(fence.write, self._folder))
            except OSError as error:
                self._report(error.strerror or str(error))
                self._tried.set()
                await asyncio.sleep(_RETRY_S)
            else:
                self._written = fence
                if fence == self._wanted:
                    self._tried.set()

    def _report(self, why: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            self._notify(
                f"the fence in {self._folder} cannot be written: {why}. Training goes on; until it "
                "can, a worker that was given up and is still alive could write a checkpoint"
            )
