"""The batching of most model servers: first come, first served; a batch is run when it is full or
when its first request has waited for the window; more than `max_waiting` are refused."""

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from supple.serve.executor import Outputs, run_batch
from supple.serve.models.model import ModelFault, ServedModel
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.refusal import Refused

_Waiting = tuple[Mapping[str, Array], int, asyncio.Future[Outputs], float]


class FixedWindow:
    """Takes the place of `supple.serve.executor.Executor` behind the same surface."""

    def __init__(self, model: ServedModel, *, window_s: float, max_waiting: int) -> None:
        self._model = model
        self._window_s = window_s
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run())

    @property
    def stuck(self) -> str | None:
        return None

    async def submit(self, inputs: Mapping[str, Array], rows: int, **_asked: Any) -> Outputs:
        if len(self._waiting) >= self._max_waiting:
            raise Refused(f"{len(self._waiting)} requests wait", 429, 1.0)
        answer: asyncio.Future[Outputs] = self._loop.create_future()
        self._waiting.append((inputs, rows, answer, self._loop.time()))
        self._changed.set()
        return await answer

    async def _full(self) -> None:
        while sum(rows for _, rows, _, _ in self._waiting) < self._model.max_batch:
            self._changed.clear()
            await self._changed.wait()

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            left_s = self._waiting[0][3] + self._window_s - self._loop.time()
            if left_s > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._full(), left_s)
            batch, total = [], 0
            while self._waiting and total + self._waiting[0][1] <= self._model.max_batch:
                batch.append(self._waiting.popleft())
                total += batch[-1][1]
            inputs = [request for request, *_ in batch]
            results = await asyncio.to_thread(run_batch, self._model, inputs)
            for (_, _, answer, _), result in zip(batch, results, strict=True):
                if answer.done():
                    continue
                if isinstance(result, ModelFault):
                    answer.set_exception(result)
                else:
                    answer.set_result(result)
