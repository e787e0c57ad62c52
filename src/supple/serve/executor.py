"""One model, one call at a time: requests wait in a deadline queue, each gets its rows of a batch's
answer.

Who is answered when and who is refused is `core.queue`'s to say; this file brings it the clock, the
requests and what batches really take. Calls are made in a thread, and in the event loop where they
are faster than the way there. A fault in a batch of several is looked for in each alone, so that
one bad request does not fail its neighbours. A request over which a replica died before is computed
in no company, so that it takes nobody along.

A `predict` that does not return is given up after `timeout_s`, and with it the process, for its
thread cannot be ended: the executor is `stuck`. Requests that the ingress sends again when their
replica dies are left to it, and find another replica. The one that hangs alone is answered.
"""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, final

from supple.core.service.latency import LatencyProfile
from supple.core.service.queue import (
    DEFAULT_PRIORITY,
    DeadlineQueue,
    Refusal,
    Ticket,
    deadline_at,
)
from supple.core.service.spec import MAX_WAITING
from supple.serve.attempts import Attempts
from supple.serve.batch import Answer, run_batch
from supple.serve.models.answers import Outputs
from supple.serve.models.faults import FAILED, ModelFault, places
from supple.serve.models.model import ServedModel
from supple.serve.pace import Pace
from supple.serve.protocol.rest import Array, Refused

_RETRY_AFTER_S: Final = 1.0
INLINE_S: Final = 5e-5
"""A call faster than this is made in the event loop: to hand it to a thread costs more. The loop
cannot give up on it, so that one which hangs all the same is found by Ray's health check."""
_MOSTLY: Final = 0.7
"""Share of the last ten calls or so that must have been so fast."""
_MUCH_SLOWER: Final = 20.0
"""One call so many times slower goes back to the thread at once."""
_SUSPECT_S: Final = 5.0
_SUSPECT_TIMES: Final = 100.0
"""A request that was lost with its replica may take so many times the usual, and at least so
long, when it is computed alone."""


@final
@dataclass(slots=True, eq=False)
class _Call:
    inputs: Mapping[str, Array]
    rows: int
    answer: asyncio.Future[Outputs]
    serial: int | None = None
    """By which the ingress sends it again if this process ends."""
    suspect: bool = False
    """A replica died over it before."""


@final
class Executor:
    """Runs a model for concurrent requests. Make and use it inside one event loop."""

    def __init__(
        self,
        model: ServedModel,
        *,
        timeout_s: float,
        within_s: float = math.inf,
        max_waiting: int = MAX_WAITING,
        profile: LatencyProfile | None = None,
        on_batch: Callable[[int, float], None] | None = None,
        inline_s: float = INLINE_S,
        attempts: Attempts | None = None,
        on_stuck: Callable[[], object] | None = None,
    ) -> None:
        """`within_s` is the promise: who cannot be answered within it is refused. `profile` is what
        is known of the model's time; it is learnt from the batches anyway. `on_batch` is told the
        rows and seconds of every batch that ran. Calls that have long been faster than `inline_s`
        are made in the event loop. `attempts` is where is noted what is computed. `on_stuck` is
        called once, after whoever is not sent again was answered: it ends the process."""
        self.model = model
        """Runs the batches; another may take its place at any time, between two of them."""
        self.on_batch = on_batch
        self.stuck: str | None = None
        """Why no further request can be answered here; None while all is well."""
        self._timeout_s = timeout_s
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        self._pace = Pace(() if profile is None else profile.points)
        self._queue = DeadlineQueue(
            self._pace.profile(), max_batch_size=model.max_batch, max_waiting=max_waiting
        )
        self._numbers = count()
        self._calls: dict[int, _Call] = {}
        """Those that wait, by number."""
        self._running: Sequence[_Call] = ()
        self._began_s = 0.0
        self._fast = 0.0
        """Share of calls that took less than `inline_s`, the last ones counting most."""
        self._inline_s = inline_s
        self._attempts = attempts
        self._on_stuck = on_stuck
        self._batches: queue.SimpleQueue[Sequence[_Call] | None] = queue.SimpleQueue()
        self._watch: asyncio.TimerHandle | None = None
        threading.Thread(target=self._work, name="predict", daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._queue)

    @property
    def profile(self) -> LatencyProfile:
        """What batches take at present, waking the thread and the event loop included."""
        return self._pace.profile()

    async def submit(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        *,
        priority: int = DEFAULT_PRIORITY,
        within_s: float | None = None,
        serial: int | None = None,
    ) -> Outputs:
        """The outputs for one checked request, which allows `within_s` seconds, or what is promised
        to all. `serial` is the number of one that is sent again if this process ends. Raises
        `ModelFault`, or `Refused` (429, 503, 504)."""
        if self.stuck is not None and serial is None:
            raise Refused(self.stuck, 503, _RETRY_AFTER_S)
        suspect = bool(self._attempts and serial and self._attempts.deaths(serial))
        if self._fast >= _MOSTLY and not self._running and not self._calls and not suspect:
            return self._at_once(inputs, rows, serial)
        now = self._loop.time()
        allowed_s = self._within_s if within_s is None else within_s
        call = _Call(inputs, rows, self._loop.create_future(), serial, suspect)
        number = next(self._numbers)
        ticket = Ticket(
            number=number,
            deadline_s=deadline_at(now, allowed_s),
            rows=rows,
            priority=priority,
            kind=serial if suspect else _kind(inputs) if self.model.shares else number,
        )
        self._calls[ticket.number] = call
        self._refuse(self._queue.offer(ticket, now))
        if not self._running:
            self._launch()
        try:
            return await call.answer
        except asyncio.CancelledError:
            self._queue.cancel(ticket.number)
            raise
        finally:
            self._calls.pop(ticket.number, None)

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._batches.put(None)

    def _at_once(self, inputs: Mapping[str, Array], rows: int, serial: int | None) -> Outputs:
        """The answer to a request that nobody is before, computed in the event loop."""
        if self._attempts is not None and serial is not None:
            self._attempts.begin(serial)
        ((result,), took_s, _) = self._run([inputs])
        if self._attempts is not None and serial is not None:
            self._attempts.end(serial)
        self._account(rows, took_s, took_s)
        if self.on_batch is not None:
            self.on_batch(rows, took_s)
        if isinstance(result, Exception):
            raise result
        return result

    def _launch(self) -> None:
        self._began_s = self._loop.time()
        turn = self._queue.take(self._began_s)
        self._refuse(turn.refused)
        self._running = [self._calls.pop(ticket.number) for ticket in turn.batch]
        if self._running:
            self._note(Attempts.begin, self._running)
            limit_s = self._limit_s(self._running)
            self._watch = self._loop.call_later(limit_s, self._give_up, limit_s)
            self._batches.put(self._running)

    def _refuse(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            call = self._calls.pop(refusal.number)
            self._fail(call, Refused(refusal.reason, 429, refusal.retry_after_s))

    def _limit_s(self, batch: Sequence[_Call]) -> float:
        """How long the batch may take. Others wait behind a suspect that hangs: it gets many times
        what such batches take, where that is known."""
        if not batch[0].suspect or not self._pace.is_known:
            return self._timeout_s
        usual_s = self.profile.tail_s(batch[0].rows)
        return min(self._timeout_s, max(_SUSPECT_S, _SUSPECT_TIMES * usual_s))

    def _give_up(self, limit_s: float) -> None:
        rows = sum(call.rows for call in self._running)
        hung = f"predict() has not returned for {limit_s:g} s on a batch of {rows}"
        self.stuck = f"{hung}; this replica is replaced"
        alone = len(self._running) == 1
        for call in self._running:
            # In a batch, one request hangs: another replica computes each alone and finds which.
            if alone or call.serial is None:
                before = ", after it was lost with a replica before" if call.suspect else ""
                self._fail(call, Refused(f"{hung}, the longest it may take{before}", 504))
                self._note(Attempts.end, [call])
        for number, call in list(self._calls.items()):
            if call.serial is None:
                self._fail(call, Refused(self.stuck, 503, _RETRY_AFTER_S))
                self._queue.cancel(number)
        if self._on_stuck is not None:
            self._on_stuck()

    def _fail(self, call: _Call, why: Exception) -> None:
        if not call.answer.done():
            call.answer.set_exception(why)

    def _note(self, what: Callable[[Attempts, int], None], calls: Iterable[_Call]) -> None:
        if self._attempts is not None:
            for call in calls:
                if call.serial is not None:
                    what(self._attempts, call.serial)

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            results, took_s, at_once = self._run([call.inputs for call in batch])
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, results, took_s, at_once)
            except RuntimeError:  # the loop is closed: nobody waits for an answer
                return

    def _run(self, requests: Sequence[Mapping[str, Array]]) -> tuple[list[Answer], float, bool]:
        """The answers, how long the model took for them, and whether in one call."""
        results: list[Answer] = []
        at_once = True
        began_s = time.perf_counter()
        try:
            results, at_once = run_batch(self.model, requests, within_s=self._timeout_s / 2)
        except BaseException as error:
            where = f"unexpected {places(error)}"
            results = [ModelFault(FAILED, where=where) for _ in requests]
        return results, time.perf_counter() - began_s, at_once

    def _finish(
        self, batch: Sequence[_Call], results: Sequence[Answer], took_s: float, at_once: bool
    ) -> None:
        """The thread has run a batch."""
        if self._watch is not None:
            self._watch.cancel()
        self._note(Attempts.end, batch)
        rows = sum(call.rows for call in batch)
        if at_once:  # what a failed batch takes in parts is not what a batch takes
            self._account(rows, took_s, self._loop.time() - self._began_s)
        self._queue.done()
        self._launch()  # first, so that the thread works while the answers are written
        if self.on_batch is not None and at_once:
            self.on_batch(rows, took_s)
        for call, result in zip(batch, results, strict=True):
            if call.answer.done():
                continue
            if isinstance(result, Exception):
                call.answer.set_exception(result)
            else:
                call.answer.set_result(result)

    def _account(self, rows: int, took_s: float, whole_s: float) -> None:
        """A batch took the model `took_s`, and with the way to its thread and back `whole_s`."""
        self._fast = 0.9 * self._fast + 0.1 * (took_s < self._inline_s)
        if took_s > _MUCH_SLOWER * self._inline_s:
            self._fast = 0.0
        if self._pace.record(rows, whole_s):
            self._queue.renew(self._pace.profile())


def _kind(inputs: Mapping[str, Array]) -> Hashable:
    """Requests of one kind may share a batch."""
    return tuple((name, a.dtype, a.shape[1:]) for name, a in sorted(inputs.items()))
