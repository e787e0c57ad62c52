"""When and how a running job saves: rank 0, between two steps, written by a thread behind it."""

import time
from typing import Any, final

from supple.core.types import CheckpointFailed, CheckpointSaved
from supple.train.checkpoint import CheckpointError, CheckpointStore
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

    def due(self) -> bool:
        """Has the time come again? Asking starts the next interval."""
        if self._store is None or time.monotonic() - self._last < self._every_s:
            return False
        self._last = time.monotonic()
        return True

    def behind(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Copy now, write while training goes on; the outcome is told as an event."""
        assert self._store is not None
        step = int(scalars["step"])

        def told(path: str, error: str) -> None:
            self._tell(step, generation, path, error)

        meta = _meta(state, scalars, generation)
        self._store.save_async(step, state.payload(scalars), meta, told)

    def finish(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """The run is at its end: save it, after what is still being written. The outcome is told as
        an event; a run that cannot be saved has still been trained."""
        if self._store is None:
            return
        self._store.wait()
        try:
            path, error = self.now(state, scalars, generation), ""
        except CheckpointError as problem:
            path, error = "", str(problem)
        self._tell(int(scalars["step"]), generation, path, error)

    def now(self, state: TrainState, scalars: dict[str, Any], generation: int) -> str:
        """Write before returning; the path. Raises `CheckpointError`."""
        assert self._store is not None, "our bug: a job without a run folder was told to save"
        meta = _meta(state, scalars, generation)
        return str(self._store.save(int(scalars["step"]), state.payload(scalars), meta))

    def load(self, path: str, state: TrainState) -> dict[str, Any]:
        """Restore `state` from `path`; the job's scalars. Raises `CheckpointError`."""
        store = self._store or CheckpointStore.containing(path)
        payload, _ = store.load(path, expected_signature=state.signature())
        return state.restore(payload)

    def _tell(self, step: int, generation: int, path: str, error: str) -> None:
        if self._mailbox is None or self._identity is None:
            return
        job_id = self._identity.job_id
        self._mailbox.emit(
            CheckpointFailed(job_id=job_id, generation=generation, step=step, error=error)
            if error
            else CheckpointSaved(job_id=job_id, generation=generation, step=step, path=path)
        )


def _meta(state: TrainState, scalars: dict[str, Any], generation: int) -> dict[str, Any]:
    return {
        "step": scalars["step"],
        "generation": generation,
        "signature": state.signature(),
    }
