"""The executor of one replica: requests wait in a deadline queue and are computed in batches.

`core.service.queue` decides the order and the refusals; this file supplies the clock, the requests
and the measured batch times. The model runs one call at a time, in a thread; very fast calls run in
the event loop, because the switch to the thread would take longer. If a batch fails, its requests
are tried separately, so that a bad request does not fail the others. A request during which a
replica died before (a suspect) is computed alone.

A `predict` that does not return within `timeout_s` makes the executor `stuck`. Its thread cannot be
ended, so the process must end. Requests that the ingress resends are left without an answer here,
and go to another replica. A request that hangs alone in its batch gets an error.
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
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.refusal import Refused

_RETRY_AFTER_S: Final = 1.0
INLINE_S: Final = 5e-5
"""Calls faster than this run in the event loop, where they cannot time out: Ray's health check
finds one that hangs."""
_FAST_SHARE: Final = 0.7
"""Share of recent calls (about the last ten) that must be faster than `INLINE_S`."""
_MUCH_SLOWER: Final = 20.0
"""One call slower than this multiple of `INLINE_S` moves the next calls back to the thread."""
_SUSPECT_S: Final = 5.0
_SUSPECT_TIMES: Final = 100.0
"""Time limit of a suspect: this multiple of the usual batch time, at least `_SUSPECT_S` seconds."""


@final
@dataclass(slots=True, eq=False)
class _Call:
    inputs: Mapping[str, Array]
    rows: int
    answer: asyncio.Future[Outputs]
    arrived_s: float
    serial: int | None = None
    """Serial number of a request that the ingress resends if this process ends."""
    suspect: bool = False
    """A replica died while computing it before."""


@final
class Executor:
    """Runs a model for concurrent requests. Create and use it inside one event loop."""

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
        """`within_s` is the promised latency: a request that would miss it is refused. `profile` is
        the initial latency profile; measured batches replace it. `on_batch` receives the rows and
        seconds of every batch. Once calls take less than `inline_s`, they run in the event loop.
        `attempts` records the requests being computed. `on_stuck` is called once, after the
        requests that are not resent were answered; it should end the process."""
        self.model = model
        """The model that runs the batches; it may be replaced at any time, between two batches."""
        self.on_batch = on_batch
        self.on_computed: Callable[[int, float, float], None] | None = None
        """Receives the number of requests of every batch that was computed at once, the seconds
        that they waited in all, and the seconds of the batch."""
        self.stuck: str | None = None
        """The reason why no more requests can be answered here; None in normal operation."""
        self._timeout_s = timeout_s
        self._within_s = within_s
        self._loop = asyncio.get_running_loop()
        self._pace = Pace(() if profile is None else profile.points)
        self._queue = DeadlineQueue(
            self._pace.profile(), max_batch_size=model.max_batch, max_waiting=max_waiting
        )
        self._numbers = count()
        self._calls: dict[int, _Call] = {}
        """Waiting calls by ticket number."""
        self._running: Sequence[_Call] = ()
        self._began_s = 0.0
        self._fast = 0.0
        """Share of calls that took less than `inline_s`, an exponential average over about ten."""
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
        """The current latency profile of batches, including the switch to the thread and back."""
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
        """Return the outputs for one validated request. `within_s` is its own latency limit, None:
        that of the service. `serial` is its serial number if it is resent when this process ends.
        Raises `ModelFault`, or `Refused` (429, 503, 504)."""
        if self.stuck is not None and serial is None:
            raise Refused(self.stuck, 503, _RETRY_AFTER_S)
        suspect = bool(self._attempts and serial and self._attempts.deaths(serial))
        if self._fast >= _FAST_SHARE and not self._running and not self._calls and not suspect:
            return self._at_once(inputs, rows, serial)
        now = self._loop.time()
        allowed_s = self._within_s if within_s is None else within_s
        call = _Call(inputs, rows, self._loop.create_future(), now, serial, suspect)
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
        """End the thread after its current batch."""
        self._batches.put(None)

    def _at_once(self, inputs: Mapping[str, Array], rows: int, serial: int | None) -> Outputs:
        """Compute one request in the event loop; no other request may be waiting or running."""
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
        if self.on_computed is not None:
            self.on_computed(1, 0.0, took_s)
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
        """Time limit of the batch. Other requests wait behind a suspect that hangs, so its limit is
        shorter, if the usual batch time is known."""
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
            # In a batch it is unknown which request hangs: another replica computes each alone.
            if alone or call.serial is None:
                before = "; a replica died while computing it before" if call.suspect else ""
                self._fail(call, Refused(f"{hung}, the time limit{before}", 504))
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
            except RuntimeError:  # the loop is closed: no request waits for an answer
                return

    def _run(self, requests: Sequence[Mapping[str, Array]]) -> tuple[list[Answer], float, bool]:
        """Return the answers, the seconds the model took, and whether it was called only once."""
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
        """Start the next batch, and set the answers of `batch`, which the thread has run."""
        if self._watch is not None:
            self._watch.cancel()
        self._note(Attempts.end, batch)
        rows = sum(call.rows for call in batch)
        began_s = self._began_s
        if at_once:  # the time of a failed batch, retried in parts, is no batch time
            self._account(rows, took_s, self._loop.time() - self._began_s)
        self._queue.done()
        self._launch()  # first, so that the thread works while the answers are written
        if self.on_batch is not None and at_once:
            self.on_batch(rows, took_s)
        if self.on_computed is not None and at_once:
            waited_s = sum(began_s - call.arrived_s for call in batch)
            self.on_computed(len(batch), waited_s, took_s)
        for call, result in zip(batch, results, strict=True):
            if call.answer.done():
                continue
            if isinstance(result, Exception):
                call.answer.set_exception(result)
            else:
                call.answer.set_result(result)

    def _account(self, rows: int, took_s: float, whole_s: float) -> None:
        """Record the time of a batch: `took_s` in the model, `whole_s` with the thread switches."""
        self._fast = 0.9 * self._fast + 0.1 * (took_s < self._inline_s)
        if took_s > _MUCH_SLOWER * self._inline_s:
            self._fast = 0.0
        if self._pace.record(rows, whole_s):
            self._queue.renew(self._pace.profile())


def _kind(inputs: Mapping[str, Array]) -> Hashable:
    """Key of requests that may share a batch: tensor names, dtypes, and shapes of a row."""
    return tuple((name, a.dtype, a.shape[1:]) for name, a in sorted(inputs.items()))
