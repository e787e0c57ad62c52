"""One model, one thread: waiting requests of the same kind become one batch, each gets its rows.

A batch is taken whenever the thread is free: nobody waits for company. A fault in a batch of
several is looked for in each alone, so that one bad request does not fail its neighbours. A
`predict` that does not return is given up after `timeout_s`: its requests are answered, and the
executor says it is `stuck`, for its process must be replaced.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from supple.serve.model import ModelFault, ServedModel
from supple.serve.protocol import Array, Refused

Outputs = dict[str, Array]
_RETRY_AFTER_S = 1.0


@final
@dataclass(slots=True, eq=False)
class _Call:
    inputs: Mapping[str, Array]
    rows: int
    kind: tuple[Any, ...]
    answer: asyncio.Future[Outputs]


@final
class Executor:
    """Runs a model for concurrent requests. Make and use it inside one event loop."""

    def __init__(
        self,
        model: ServedModel,
        *,
        timeout_s: float,
        max_waiting: int = 10_000,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """`on_batch` is told the rows and seconds of every batch that ran."""
        self.model = model
        """Runs the batches; another may take its place at any time, between two of them."""
        self._timeout_s = timeout_s
        self._max_waiting = max_waiting
        self.on_batch = on_batch
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Call] = deque()
        self._running: Sequence[_Call] = ()
        self._batches: queue.SimpleQueue[Sequence[_Call] | None] = queue.SimpleQueue()
        self._watch: asyncio.TimerHandle | None = None
        self.stuck: str | None = None
        """Why no further request can be answered here; None while all is well."""
        threading.Thread(target=self._work, name="predict", daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, inputs: Mapping[str, Array], rows: int) -> Outputs:
        """The outputs for one checked request. Raises `ModelFault`, or `Refused` (429, 503)."""
        if self.stuck is not None:
            raise Refused(self.stuck, 503, _RETRY_AFTER_S)
        if len(self._waiting) >= self._max_waiting:
            raise Refused(
                f"{len(self._waiting)} requests wait already, the most this replica holds",
                429,
                _RETRY_AFTER_S,
            )
        kind = tuple((name, a.dtype, a.shape[1:]) for name, a in sorted(inputs.items()))
        call = _Call(inputs, rows, kind, self._loop.create_future())
        self._waiting.append(call)
        if not self._running:
            self._launch()
        return await call.answer

    def close(self) -> None:
        """End the thread once its batch is done."""
        self._batches.put(None)

    def _launch(self) -> None:
        batch: list[_Call] = []
        rows = 0
        while self._waiting:
            call = self._waiting[0]
            if call.answer.done():  # its client has gone
                self._waiting.popleft()
                continue
            if batch and (call.kind != batch[0].kind or rows + call.rows > self.model.max_batch):
                break
            batch.append(self._waiting.popleft())
            rows += call.rows
        self._running = batch
        if batch:
            self._watch = self._loop.call_later(self._timeout_s, self._give_up)
            self._batches.put(batch)

    def _give_up(self) -> None:
        rows = sum(call.rows for call in self._running)
        self.stuck = (
            f"predict() has not returned for {self._timeout_s:g} s on a batch of {rows}; this "
            "replica is replaced"
        )
        for call in (*self._running, *self._waiting):
            if not call.answer.done():
                call.answer.set_exception(Refused(self.stuck, 503, _RETRY_AFTER_S))
        self._waiting.clear()

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            results: list[Outputs | ModelFault] = []
            began_s = time.perf_counter()
            try:
                results.extend(run_batch(self.model, [call.inputs for call in batch]))
            except BaseException as error:
                results[:] = [ModelFault(f"unexpected {error!r}")] * len(batch)
            took_s = time.perf_counter() - began_s
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, results, took_s)
            except RuntimeError:  # the loop is closed: nobody waits for an answer
                return

    def _finish(
        self, batch: Sequence[_Call], results: Sequence[Outputs | ModelFault], took_s: float
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self.on_batch is not None:
            self.on_batch(sum(call.rows for call in batch), took_s)
        for call, result in zip(batch, results, strict=True):
            if call.answer.done():
                continue
            if isinstance(result, ModelFault):
                call.answer.set_exception(result)
            else:
                call.answer.set_result(result)
        self._launch()


def run_batch(
    model: ServedModel, requests: Sequence[Mapping[str, Array]]
) -> list[Outputs | ModelFault]:
    """The answer to each request, computed in one call of the model, or one by one if that call
    fails. The requests must be of one kind: same names, types, and shapes of a row."""
    if len(requests) == 1:
        try:
            return [model.predict(requests[0])]
        except ModelFault as fault:
            return [fault]
    joined = {name: np.concatenate([r[name] for r in requests]) for name in requests[0]}
    try:
        outputs = model.predict(joined)
    except ModelFault:
        return [run_batch(model, [request])[0] for request in requests]
    answers: list[Outputs | ModelFault] = []
    start = 0
    for request in requests:
        end = start + next(iter(request.values())).shape[0]
        answers.append({name: array[start:end] for name, array in outputs.items()})
        start = end
    return answers
