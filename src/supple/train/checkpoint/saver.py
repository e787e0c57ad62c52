"""`Saver`: saves and restores a running job's checkpoints; rank 0 saves, in a background thread.

Weights that are not finite are not saved: the last good checkpoint stays the last.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from supple.core.spec import Change, SpecError
from supple.core.types import CheckpointFailed, CheckpointPassedOver, CheckpointSaved
from supple.train.checkpoint.store import (
    CheckpointError,
    CheckpointRefused,
    CheckpointStore,
    DiskFullError,
)
from supple.train.generation.mailbox import Mailbox
from supple.train.generation.member import Identity
from supple.train.state.train_state import TrainState


@final
class Saver:
    """Saves and restores durable checkpoints of one job; without a store, `due` is never true."""

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
        """(step, payload, meta): a copy of the state at which the script left its loop."""

    def due(self) -> bool:
        """Return whether a periodic save is due; if it is, the next interval starts now."""
        if self._store is None or self._now() - self._last < self._every_s:
            return False
        self._last = self._now()
        return True

    def save_async(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Copy the state now and write it in the background; the outcome is emitted as an event."""
        step = int(scalars["step"])
        try:
            payload = self._payload(state, scalars)
        except CheckpointError as error:
            self._emit(step, generation, "", str(error))
            return
        self._write_in_background(step, payload, _meta(state, scalars, generation), generation)

    def save_on_leave(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Copy the state at once and write it in the background: the script has left its loop and
        may change the weights. From now on `save_now` saves this copy."""
        if self._store is None:
            return
        step, meta = int(scalars["step"]), _meta(state, scalars, generation)
        try:
            self._left = step, self._payload(state, scalars), meta
        except CheckpointError as error:
            self._emit(step, generation, "", str(error))
            return
        self._store.wait()
        if step != self._saved_step:
            self._write_in_background(step, self._left[1], meta, generation)

    def wait(self) -> None:
        """Wait until nothing is being written and the outcome was emitted."""
        if self._store is not None:
            self._store.wait()

    def save_final(self, state: TrainState, scalars: dict[str, Any], generation: int) -> None:
        """Save the finished run, after any write in progress. The outcome is emitted as an event,
        not raised: a run that cannot be saved has still been trained."""
        if self._store is None:
            return
        try:
            path, error, is_full = self.save_now(state, scalars, generation), "", False
        except CheckpointError as problem:
            path, error, is_full = "", str(problem), isinstance(problem, DiskFullError)
        if path is not None:
            self._emit(int(scalars["step"]), generation, path, error, is_full)

    def save_now(self, state: TrainState, scalars: dict[str, Any], generation: int) -> str | None:
        """Save before returning; return the path, or None if this step was saved and reported
        before. Raises `CheckpointError`."""
        assert self._store is not None, "our bug: a save was requested without a run folder"
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

    def _write_in_background(
        self, step: int, payload: Mapping[str, Any], meta: Mapping[str, Any], generation: int
    ) -> None:
        assert self._store is not None

        def on_done(path: str, error: str) -> None:
            if path:
                self._saved_step = step
            self._emit(step, generation, path, error)

        self._store.save_async(step, payload, meta, on_done)

    def restore(
        self,
        path: str,
        state: TrainState,
        take: Callable[[dict[str, Any], set[Change]], None],
        check: Callable[[dict[str, Any]], set[Change]],
        *,
        is_named: bool,
    ) -> None:
        """Restore `state` from the checkpoint at `path`, and pass the job's scalars to `take`, with
        what `check(scalars)` returned before anything was changed: the changes since.

        If it is damaged and the user did not name it (`is_named`), the last good checkpoint is used
        instead. Raises `CheckpointRefused`.
        """
        store = self._store or CheckpointStore.containing(path)
        try:
            try:
                payload, manifest = store.load(path, expected_signature=state.signature())
            except CheckpointError as error:
                good = None if is_named else store.latest(besides=Path(path).name)
                if good is None:
                    raise
                path = str(good.path)
                payload, manifest = store.load(path, expected_signature=state.signature())
                self._report_skipped(path, good.step, str(error))
            changes = check(payload["description"]["scalars"])
            scalars = state.restore(payload, with_optimizer="optimizer" not in changes)
            if scalars["step"] != manifest["step"]:
                raise ValueError(f"of step {scalars['step']}, and {manifest['step']} beside it")
            take(scalars, changes)
        except CheckpointError as error:
            raise CheckpointRefused(str(error)) from None
        except Exception as error:
            # A state written by another program may be wrong in any way.
            why = str(error) if isinstance(error, SpecError) else f"{type(error).__name__}: {error}"
            raise CheckpointRefused(
                f"the checkpoint {path} does not fit this script: {why.rstrip('.')}. Resume with "
                "the script and the data that wrote it, or start without --resume."
            ) from None

    def _report_skipped(self, path: str, step: int, reason: str) -> None:
        if self._mailbox is not None and self._identity is not None:
            self._mailbox.emit(
                CheckpointPassedOver(
                    job_id=self._identity.job_id, generation=0, step=step, path=path, reason=reason
                )
            )

    def _payload(self, state: TrainState, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return a private copy of the state. Raises `CheckpointError` if it must not be saved."""
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

    def _emit(
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
