"""When and how a running job saves: rank 0, between two steps, written by a thread behind it.

Weights that are not finite numbers are not saved: the last good checkpoint stays the last.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from supple.core.spec import SpecError
from supple.core.types import CheckpointFailed, CheckpointPassedOver, CheckpointSaved
from supple.train.checkpoint import CheckpointError, CheckpointRefused, CheckpointStore
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

        try:
            payload = self._payload(state, scalars)
        except CheckpointError as error:
            told("", str(error))
            return
        self._store.save_async(step, payload, _meta(state, scalars, generation), told)

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
        payload = self._payload(state, scalars)
        meta = _meta(state, scalars, generation)
        return str(self._store.save(int(scalars["step"]), payload, meta))

    def restore(
        self, path: str, state: TrainState, take: Callable[[dict[str, Any]], None], *, asked: bool
    ) -> None:
        """Bring `state` to the checkpoint at `path`, and hand the job's scalars to `take`.

        One that was not `asked` for by name, but written by this run and damaged since, is passed
        over for the last good one. Raises `CheckpointRefused`.
        """
        store = self._store or CheckpointStore.containing(path)
        try:
            try:
                payload, manifest = store.load(path, expected_signature=state.signature())
            except CheckpointError as error:
                good = None if asked else store.latest(besides=Path(path).name)
                if good is None:
                    raise
                path = str(good.path)
                payload, manifest = store.load(path, expected_signature=state.signature())
                self._passed_over(path, good.step, str(error))
            scalars = state.restore(payload)
            if scalars["step"] != manifest["step"]:
                raise ValueError(f"of step {scalars['step']}, and {manifest['step']} beside it")
            take(scalars)
        except CheckpointError as error:
            raise CheckpointRefused(str(error)) from None
        except Exception as error:
            # A state that some other program made may be wrong in any way.
            why = str(error) if isinstance(error, SpecError) else f"{type(error).__name__}: {error}"
            raise CheckpointRefused(
                f"the checkpoint {path} does not fit this script: {why.rstrip('.')}. Resume with "
                "the script and the data that wrote it, or start without --resume."
            ) from None

    def _passed_over(self, path: str, step: int, reason: str) -> None:
        if self._mailbox is not None and self._identity is not None:
            self._mailbox.emit(
                CheckpointPassedOver(
                    job_id=self._identity.job_id, generation=0, step=step, path=path, reason=reason
                )
            )

    def _payload(self, state: TrainState, scalars: dict[str, Any]) -> dict[str, Any]:
        """A private copy of the state. Raises `CheckpointError` if it must not or cannot be one."""
        assert self._store is not None
        if bad := state.not_finite():
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            why = f"the weights are not finite numbers, in {', '.join(bad[:3])}{more}"
        else:
            try:
                return state.payload(scalars)
            except Exception as error:  # of the user's own state_dict
                why = f"{type(error).__name__}: {error}"
        raise CheckpointError(self._store.refusal(int(scalars["step"]), why))

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
