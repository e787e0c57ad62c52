"""`Controller`: runs one job: events in, `lifecycle.step`, actions out. Decides nothing.

Every event goes to the advisor (`supple.core.job.advisor`: a schedule, the planner, a person) and
to the lifecycle. Requests of the advisor join the same queue as the workers' events.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from supple.control.backend import Backend, Clock, Observer
from supple.control.garbage import rare_collections
from supple.control.socket import ControlServer
from supple.core.job import advisor, lifecycle, stalls
from supple.core.job.advisor import AdvisorState
from supple.core.job.lifecycle import JobState, Phase
from supple.core.planning.measured import ScriptMeasurements
from supple.core.spec import SpecError, TrainSpec, parse_count
from supple.core.types import (
    Action,
    Decision,
    Event,
    FailJob,
    FinishJob,
    Heartbeat,
    JobId,
    NodeReported,
    PreemptionNoticed,
    Progress,
    ProgressMade,
    ResizeAsked,
    StopRequested,
    Ticked,
    WorkerId,
)

_TICK_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    status: Literal["finished", "stopped", "failed"]
    reason: str
    detail: str = ""
    """The user's traceback, if the script raised."""
    checkpoint: str | None = None
    """The newest durable checkpoint."""
    saved: bool = True
    """Whether `checkpoint` holds the newest train state."""


@final
class Controller:
    """Runs one job to its end."""

    def __init__(
        self,
        spec: TrainSpec,
        backend: Backend,
        *,
        clock: Clock,
        observers: Iterable[Observer],
        known: ScriptMeasurements | None = None,
    ) -> None:
        """`known`: measurements of the script by `supple plan`."""
        self._spec = spec
        self._job_id = JobId(spec.name)
        self._backend = backend
        self._clock = clock
        self._observers = tuple(observers)
        self._known = known
        self._advice: AdvisorState | None = None
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._state: JobState | None = None
        self._outcome: Outcome | None = None
        self._progress: Progress | None = None

    # -- called from outside -------------------------------------------------------------------

    def request_stop(self, reason: str) -> None:
        """Drain, save and end the job; a second call ends it at once."""
        self._put(StopRequested(job_id=self._job_id, generation=0, reason=reason))

    def progressed(self, progress: Progress) -> None:
        """Record progress that rank 0 published."""
        self._progress = progress
        for observer in self._observers:
            observer.progressed(progress)
        self._put(
            ProgressMade(job_id=self._job_id, generation=progress.generation, progress=progress)
        )

    def printed(self, line: str) -> None:
        for observer in self._observers:
            observer.printed(line)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request from another terminal. Raises `SpecError` to refuse it."""
        match request.get("ask"):
            case "resize":
                count = parse_count(str(request["num_workers"]), what="the number of workers")
                self._spec.check_count(count)
                self._put(
                    ResizeAsked(
                        job_id=self._job_id,
                        generation=0,
                        num_workers=count,
                        reason="requested by `supple resize`",
                    )
                )
                return {"accepted": count}
            case "preempt":
                return self._preempt(request)
            case "stop":
                self.request_stop("requested by `supple stop`")
                return {"accepted": "stop"}
            case "status":
                return self._status()
            case other:
                raise SpecError(f"unknown request {other!r}")

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """Run the job until it finishes, is stopped or fails; return how it ended."""
        with rare_collections():
            return await self._run()

    async def _run(self) -> Outcome:
        control = ControlServer(self._spec.name, self.answer)
        await control.start()
        background = [
            asyncio.ensure_future(self._forward_events()),
            asyncio.ensure_future(self._tick()),
        ]
        try:
            now = self._clock.now()
            self._advice, initial, why = advisor.start(self._spec, now, self._known)
            state, actions = lifecycle.start(
                self._spec,
                self._job_id,
                now,
                restore=self._spec.resume,
                initial=initial,
                reason=why,
            )
            await self._perform(state, actions)
            while self._outcome is None:
                event = await self._next_event(background)
                self._show(event)
                now = self._clock.now()
                self._advice, requests = advisor.advise(self._advice, event, now)
                for request in requests:
                    self._put(request)
                state, actions = lifecycle.step(state, event, now)
                await self._perform(state, actions)
            return self._outcome
        finally:
            for task in background:
                task.cancel()
            await control.stop()
            await self._backend.close()

    async def _perform(self, state: JobState, actions: Iterable[Action]) -> None:
        self._state = state
        for action in actions:
            match action:
                case Decision():
                    for observer in self._observers:
                        observer.decided(action)
                case FinishJob():
                    self._outcome = Outcome(
                        status="stopped" if action.stopped else "finished",
                        reason=action.reason,
                        checkpoint=state.restore,
                        saved=action.saved,
                    )
                case FailJob():
                    self._outcome = Outcome(
                        status="failed",
                        reason=action.reason,
                        detail=action.detail,
                        checkpoint=state.restore,
                        saved=action.saved,
                    )
                case _:
                    for observer in self._observers:
                        observer.acted(action)
                    await self._backend.execute(action)

    def _show(self, event: Event) -> None:
        match event:
            case Heartbeat() | Ticked() | ProgressMade():
                return
            case NodeReported():
                for one in event.events:
                    self._show(one)
            case _:
                for observer in self._observers:
                    observer.happened(event)

    async def _next_event(self, background: Sequence[asyncio.Future[None]]) -> Event:
        """Return the next event. Raises the error of a background task that has ended."""
        if self._queue.empty():
            getting = asyncio.ensure_future(self._queue.get())
            await asyncio.wait([getting, *background], return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                return getting.result()
            getting.cancel()
        for task in background:
            if task.done():
                task.result()
        return await self._queue.get()

    async def _forward_events(self) -> None:
        async for event in self._backend.events():
            self._put(event)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._put(Ticked(job_id=self._job_id, generation=0))

    def _put(self, event: Event) -> None:
        self._queue.put_nowait(event)

    def _preempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        named = {str(name) for name in request["workers"]}
        state = self._state
        known = {str(worker_id) for worker_id in state.workers} if state else set[str]()
        if not named <= known:
            raise SpecError(
                f"{', '.join(sorted(named - known))}: no such worker. The job has "
                f"{', '.join(sorted(known)) or 'none yet'}."
            )
        self._put(
            PreemptionNoticed(
                job_id=self._job_id,
                generation=0,
                worker_ids=tuple(WorkerId(name) for name in sorted(named)),
                deadline=self._clock.now() + float(request.get("notice_s", 30.0)),
            )
        )
        return {"accepted": sorted(named)}

    def _doing(self) -> dict[str, str]:
        """Return each worker's activity in words, without the workers that step."""
        if self._state is None:
            return {}
        return stalls.activities_in_words(self._state)

    def _status(self) -> dict[str, Any]:
        state, progress = self._state, self._progress
        return {
            "job": self._spec.name,
            "script": self._spec.module or self._spec.script,
            "arguments": list(self._spec.arguments),
            "phase": (state.phase if state else Phase.STARTING).value,
            "generation": state.generation if state else 0,
            "members": [str(worker_id) for worker_id in state.members] if state else [],
            "doing": self._doing(),
            "pids": {str(worker_id): pid for worker_id, pid in self._backend.pids.items()},
            "progress": None
            if progress is None
            else {name: getattr(progress, name) for name in Progress.__slots__},
        }
