"""The executor: the deadline queue with a real loop, a real thread and real models."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from supple.core.service.latency import LatencyProfile
from supple.serve.executor import Executor
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.pace import Pace
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.refusal import Refused

HOUR_S = 3600.0


class Gated:
    """Answers with what it got, once the gate is open; keeps the order."""

    inputs = {"x": "float32[-1]"}  # noqa: RUF012

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def predict(self, batch: Any) -> Any:
        self.entered.set()
        self.gate.wait()
        self.batches.append([float(value) for value in batch[:, 0]])
        return batch


def rows(value: float, *, length: int = 1, count: int = 1) -> dict[str, Array]:
    return {"x": np.full((count, length), value, np.float32)}


def with_executor(
    work: Callable[[Executor, Gated], Coroutine[Any, Any, None]],
    *,
    max_batch: int = 1,
    **settings: Any,
) -> None:
    """Run `work` while one request, of value 0, keeps the model busy."""

    async def go() -> None:
        user = Gated(max_batch)
        executor = Executor(ServedModel(user, name="m"), timeout_s=60.0, **settings)
        first = asyncio.ensure_future(executor.submit(rows(0.0), 1))
        await asyncio.to_thread(user.entered.wait)
        try:
            await work(executor, user)
        finally:
            user.gate.set()
            await first
            executor.close()

    asyncio.run(go())


async def waiting(executor: Executor, *submissions: Coroutine[Any, Any, Any]) -> list[Any]:
    """The submissions as tasks, once all of them wait."""
    tasks = [asyncio.ensure_future(submission) for submission in submissions]
    while executor.num_waiting < len(tasks):
        await asyncio.sleep(0)
    return tasks


def test_requests_are_answered_by_priority_then_by_deadline() -> None:
    async def work(executor: Executor, user: Gated) -> None:
        tasks = await waiting(
            executor,
            executor.submit(rows(1), 1, within_s=HOUR_S),
            executor.submit(rows(2), 1, within_s=HOUR_S / 2),
            executor.submit(rows(3), 1, within_s=2 * HOUR_S, priority=1),
        )
        user.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [float(answer["output"][0, 0]) for answer in answers] == [1.0, 2.0, 3.0]
        assert user.batches == [[0.0], [3.0], [2.0], [1.0]]

    with_executor(work)


def test_who_cannot_be_answered_within_the_promise_is_refused_while_the_model_works() -> None:
    async def work(executor: Executor, user: Gated) -> None:
        with pytest.raises(Refused, match="the answer would take") as refused:
            await executor.submit(rows(1), 1)
        assert refused.value.status == 429
        assert refused.value.retry_after_s is not None
        assert HOUR_S / 2 < refused.value.retry_after_s <= HOUR_S  # the batch that runs
        (patient,) = await waiting(executor, executor.submit(rows(2), 1, within_s=5 * HOUR_S))
        user.gate.set()
        await patient
        assert user.batches == [[0.0], [2.0]]

    slow = LatencyProfile.constant(HOUR_S, startup_s=0.0)
    with_executor(work, within_s=HOUR_S / 2, profile=slow)


def test_a_tenth_of_the_promise_is_kept_for_reading_and_writing_the_request() -> None:
    """The model has the answer in two hours: one for the batch that runs, one for its own."""

    async def work(executor: Executor, user: Gated) -> None:
        hurried = asyncio.ensure_future(executor.submit(rows(1), 1, within_s=2.1 * HOUR_S))
        await asyncio.sleep(0)
        assert executor.num_waiting == 0
        with pytest.raises(Refused, match="the answer would take 7200s"):
            await hurried
        (patient,) = await waiting(executor, executor.submit(rows(2), 1, within_s=2.3 * HOUR_S))
        user.gate.set()
        await patient
        assert user.batches == [[0.0], [2.0]]

    with_executor(work, profile=LatencyProfile.constant(HOUR_S, startup_s=0.0))


def test_requests_of_different_shapes_share_no_batch() -> None:
    async def work(executor: Executor, user: Gated) -> None:
        tasks = await waiting(
            executor, *(executor.submit(rows(i, length=1 + i % 2), 1) for i in range(1, 7))
        )
        user.gate.set()
        for number, answer in enumerate(await asyncio.gather(*tasks), 1):
            assert answer["output"].tolist() == [[float(number)] * (1 + number % 2)]
        assert sorted(map(len, user.batches)) == [1, 3, 3]

    with_executor(work, max_batch=8)


def test_everybody_gets_the_rows_that_belong_to_him() -> None:
    async def work(executor: Executor, user: Gated) -> None:
        tasks = await waiting(
            executor, *(executor.submit(rows(i, count=1 + i % 3), 1 + i % 3) for i in range(40))
        )
        user.gate.set()
        for number, answer in enumerate(await asyncio.gather(*tasks)):
            assert answer["output"].tolist() == [[float(number)]] * (1 + number % 3)
        assert max(map(len, user.batches)) <= 8

    with_executor(work, max_batch=8)


def test_a_request_that_leaves_while_it_waits_frees_its_place() -> None:
    async def work(executor: Executor, user: Gated) -> None:
        (leaves,) = await waiting(executor, executor.submit(rows(1), 1))
        with pytest.raises(Refused, match="1 requests wait, the most"):
            await executor.submit(rows(2), 1)
        leaves.cancel()
        await asyncio.wait([leaves])
        assert leaves.cancelled()
        assert executor.num_waiting == 0
        (stays,) = await waiting(executor, executor.submit(rows(3), 1))
        user.gate.set()
        await stays
        assert user.batches == [[0.0], [3.0]]

    with_executor(work, max_waiting=1)


def affine_s(batch_rows: int) -> float:
    return 0.010 + 0.002 * batch_rows


def test_the_pace_finds_what_batches_cost_of_those_that_ran() -> None:
    pace = Pace()
    for _ in range(20):
        for batch_rows in (1, 4, 16):
            pace.record(batch_rows, affine_s(batch_rows))
    assert pace.profile().seconds(8) == pytest.approx(affine_s(8), rel=0.02)
    assert pace.profile().largest_batch == 16


def test_the_pace_follows_a_model_that_gets_slower_and_faster_again() -> None:
    pace = Pace()
    for slowness in (1.0, 3.0, 1.0):
        for _ in range(64):
            for batch_rows in (1, 4, 16):
                pace.record(batch_rows, slowness * affine_s(batch_rows))
        assert pace.profile().seconds(4) == pytest.approx(slowness * affine_s(4), rel=0.05)


def test_the_first_call_of_a_size_does_not_spoil_the_pace() -> None:
    pace = Pace()
    pace.record(1, 5.0)
    for batch_rows in (1, 4, 16):
        pace.record(batch_rows, 5.0)
        for _ in range(20):
            pace.record(batch_rows, affine_s(batch_rows))
    assert pace.profile().tail_s(16) == pytest.approx(affine_s(16), rel=0.1)


def test_a_model_that_never_ran_refuses_nobody_and_a_stored_profile_is_believed() -> None:
    assert Pace().profile().seconds(64) < 1e-3
    known = LatencyProfile.constant(2.0, startup_s=0.0)
    assert Pace(known.points).profile().seconds(1) == pytest.approx(2.0)


class Somewhere:
    """Answers with what it got, and says in which thread; sleeps as long as it is told."""

    inputs = {"x": "float32[1]"}  # noqa: RUF012

    def __init__(self) -> None:
        self.in_loop: list[bool] = []
        self.sleep_s = 0.0

    def predict(self, batch: Any) -> Any:
        self.in_loop.append(threading.current_thread() is threading.main_thread())
        if self.sleep_s:
            time.sleep(self.sleep_s)
        return batch


def test_calls_faster_than_a_hand_over_are_made_in_the_loop_until_one_is_slow() -> None:
    async def go() -> None:
        user = Somewhere()
        executor = Executor(ServedModel(user, name="m"), timeout_s=60.0, inline_s=0.002)
        for turn in range(10_000):
            answer = await executor.submit(rows(turn), 1)
            assert answer["output"][0, 0] == turn
            if user.in_loop[-1]:
                break
        assert user.in_loop[-1] and sum(user.in_loop) == 1 and len(user.in_loop) > 10
        user.sleep_s = 0.05
        await executor.submit(rows(1.0), 1)
        user.sleep_s = 0.0
        burst = [executor.submit(rows(value), 1, within_s=HOUR_S) for value in range(10)]
        answers = await asyncio.gather(*burst)
        assert [answer["output"][0, 0] for answer in answers] == list(range(10))
        assert not any(user.in_loop[-2:]), "after a slow call the thread has it again"
        executor.close()

    asyncio.run(go())


def test_a_fault_of_a_fast_model_is_the_answer_and_the_next_request_is_served() -> None:
    async def go() -> None:
        user = Somewhere()
        executor = Executor(ServedModel(user, name="m"), timeout_s=60.0, inline_s=HOUR_S)
        for _ in range(20):
            await executor.submit(rows(1.0), 1)
        assert user.in_loop[-1]
        executor.model = ServedModel(Fails(), name="m")
        with pytest.raises(ModelFault, match="no answer"):
            await executor.submit(rows(1.0), 1)
        executor.model = ServedModel(user, name="m")
        assert (await executor.submit(rows(3.0), 1))["output"][0, 0] == 3.0
        assert executor.num_waiting == 0
        executor.close()

    asyncio.run(go())


class Fails:
    inputs = {"x": "float32[1]"}  # noqa: RUF012

    def predict(self, batch: Any) -> Any:
        raise ValueError("no answer")
