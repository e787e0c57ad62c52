"""When and how a running job saves: rank 0, between two steps, written by a thread behind it.

Weights that are not finite numbers are not saved: the last good checkpoint stays the last.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from supple.core.spec import SpecError
from supple.core.types import CheckpointFailed, CheckpointPassedOver, CheckpointSaved
from supple.train.checkpoint.store import (
    CheckpointError,
    CheckpointRefused,
    CheckpointStore,
    DiskFullError,
)
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Identity
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
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._store = store
        self._every_s = every_s
        self._identity = identity
        self._mailbox = mailbox
        self._last = now()
        self._saved_step = -1
        self._left: tuple[int, Mapping[str, Any], Mapping[str, Any]] | None = None
        """(step, payload, meta): a copy of what the job held when its script left the loop."""

    def due(self) -> bool:
        """Has the time come again? Asking starts the next interval."""
        if self._store is None or self._now() - self._last < self._every_s:
            return False
        self._last = self._now()
        return True

    def behind(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Copy now, write while training goes on; the outcome is told as an event."""
        step = int(scalars["step"])
        try:
            payload = self._payload(state, scalars)
        except CheckpointError as error:
            self._tell(step, generation, "", str(error))
            return
        self._write_behind(step, payload, _meta(state, scalars, generation), generation)

    def leave(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """The script has left its loop, and may change the weights now: copy them at once, and
        write behind it. From now on this copy is what `now` saves."""
        if self._store is None:
            return
        step, meta = int(scalars["step"]), _meta(state, scalars, generation)
        try:
            self._left = step, self._payload(state, scalars), meta
        except CheckpointError as error:
            self._tell(step, generation, "", str(error))
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
            path, error, is_full = self.now(state, scalars, generation), "", False
        except CheckpointError as problem:
            path, error, is_full = "", str(problem), isinstance(problem, DiskFullError)
        if path is not None:
            self._tell(int(scalars["step"]), generation, path, error, is_full)

    def now(self, state: TrainState, scalars: dict[str, Any], generation: int) -> str | None:
        """Write before returning; the path. None: this step was saved, and told, before. Raises
        `CheckpointError`."""
        assert self._store is not None, "our bug: a job without a run folder was told to save"
        self._store.wait()
        step = int(scalars["step"]) if self._left is None else self._left[0]
        if step == self._saved_step:
            return None
        if self._left is None:
            payload = self._payload(state, scalars)
            meta = _meta(state, scalars, generation)
        else:
            _, payload, meta = self._left
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


def _meta(state: TrainState, scalars: dict[str, Any], generation: int) -> dict[str, Any]:
    return {
        "step": scalars["step"],
        "generation": generation,
        "signature": state.signature(),
    }
