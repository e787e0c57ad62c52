"""When and how a running job saves: rank 0, between two steps, written by a thread behind it."""

import time
from collections.abc import Mapping
from typing import Any, final

from supple.core.types import CheckpointFailed, CheckpointSaved
from supple.train.checkpoint import CheckpointError, CheckpointStore, DiskFullError
from supple.train.mailbox import Mailbox
from supple.train.member import Identity
from supple.train.state import TrainState


@final
class Saver:
    """Durable checkpoints of one job; without a store it is never due."""

    def __init__(
        self,
        store: CheckpointStore | None,
        every_s: float,
        identity: Identity | None,
        mailbox: Mailbox | None,
    ) -> None:
        self._store = store
        self._every_s = every_s
        self._identity = identity
        self._mailbox = mailbox
        self._last = time.monotonic()
        self._saved_step = -1
        self._left: tuple[int, Mapping[str, Any], Mapping[str, Any]] | None = None
        """(step, payload, meta): a copy of what the job held when its script left the loop."""

    def due(self) -> bool:
        """Has the time come again? Asking starts the next interval."""
        if self._store is None or time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return True

    def behind(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Copy now, write while training goes on; the outcome is told as an event."""
        step = int(scalars["step"])
        self._write_behind(step, state.payload(scalars), _meta(state, scalars), generation)

    def leave(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """The script has left its loop, and may change the weights now: copy them at once, and
        write behind it. From now on this copy is what `now` saves."""
        if self._store is None:
            return
        step, meta = int(scalars["step"]), _meta(state, scalars)
        try:
            self._left = step, state.payload(scalars), meta
        except Exception as error:  # of an object of the script's (`job.keep`)
            self._tell(step, generation, "", f"it cannot be copied: {error}.")
            return
        self._store.wait()
        if step != self._saved_step:
            self._write_behind(step, self._left[1], meta, generation)

    def wait(self) -> None:
        """Until nothing is being written, and the outcome was told."""
        if self._store is not None:
            self._store.wait()

    def finish(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """The run is at its end: save it, after what is still being written. The outcome is told as
        an event; a run that cannot be saved has still been trained."""
        if self._store is None:
            return
        try:
            path, error, is_full = self.now(state, scalars), "", False
        except CheckpointError as problem:
            path, error, is_full = "", str(problem), isinstance(problem, DiskFullError)
        if path is not None:
            self._tell(int(scalars["step"]), generation, path, error, is_full)

    def now(self, state: TrainState, scalars: dict[str, Any]) -> str | None:
        """Write before returning; the path. None: this step was saved, and told, before. Raises
        `CheckpointError`."""
        assert self._store is not None, "our bug: a job without a run folder was told to save"
        self._store.wait()
        if self._left is None:
            step, meta = int(scalars["step"]), _meta(state, scalars)
            if step == self._saved_step:
                return None
            payload: Mapping[str, Any] = state.payload(scalars)
        else:
            step, payload, meta = self._left
            if step == self._saved_step:
                return None
        path = self._store.save(step, payload, meta)
        self._saved_step = step
        return str(path)

    def _write_behind(
        self, step: int, payload: Mapping[str, Any], meta: Mapping[str, Any], generation: int
    ) -> None:
        assert self._store is not None

        def told(path: str, error: str) -> None:
            if path:
                self._saved_step = step
            self._tell(step, generation, path, error)

        self._store.save_async(step, payload, meta, told)

    def load(self, path: str, state: TrainState) -> dict[str, Any]:
        """Restore `state` from `path`; the job's scalars. Raises `CheckpointError`."""
        store = self._store or CheckpointStore.containing(path)
        payload, _ = store.load(path, expected_signature=state.signature())
        return state.restore(payload)

    def _tell(
        self, step: int, generation: int, path: str, error: str, is_full: bool = False
    ) -> None:
        if self._mailbox is None or self._identity is None:
            return
        job_id = self._identity.job_id
        self._mailbox.emit(
            CheckpointFailed(
                job_id=job_id,
                generation=generation,
                step=step,
                error=error,
                is_disk_full=is_full,
            )
            if error
            else CheckpointSaved(job_id=job_id, generation=generation, step=step, path=path)
        )


def _meta(state: TrainState, scalars: dict[str, Any]) -> dict[str, Any]:
    return {"step": scalars["step"], "signature": state.signature()}
