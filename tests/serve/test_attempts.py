"""A request over which replicas died is told from its neighbours."""

import asyncio
import math
import threading
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from supple.core.service.latency import LatencyProfile
from supple.serve import executor as executors
from supple.serve.attempts import Attempts, parse_serial
from supple.serve.executor import Executor
from supple.serve.models.model import ServedModel
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.refusal import Refused

LIMIT_S = 60.0


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "attempts"


def test_what_was_computed_when_its_replica_died_is_known_to_the_others(table: Path) -> None:
    dying, other = Attempts(table), Attempts(table)
    for serial in (1, 2, 3):
        dying.begin(serial)
    dying.end(2)
    dying.pause(3)
    assert [other.deaths(serial) for serial in (1, 2, 3, 4)] == [1, 0, 0, 0]


def test_a_request_over_which_two_replicas_died_is_refused_and_then_forgotten(table: Path) -> None:
    for _ in range(2):
        replica = Attempts(table)
        replica.refuse_deadly(7)
        replica.begin(7)
    with pytest.raises(Refused, match="2 replicas died while they computed this request") as why:
        Attempts(table).refuse_deadly(7)
    assert why.value.status == 500
    assert Attempts(table).deaths(7) == 0


def test_waiting_at_a_replica_that_dies_is_no_attempt_but_an_earlier_one_stays_known(
    table: Path,
) -> None:
    first, second, third = (Attempts(table) for _ in range(3))
    first.begin(7)
    second.begin(7)  # read there, then it waits while another request kills the replica
    second.pause(7)
    assert third.deaths(7) == 1


def test_a_table_full_of_requests_nobody_asked_again_takes_new_ones(table: Path) -> None:
    attempts = Attempts(table)
    step = 65_536 - 8  # all of these want one place
    for turn in range(1, 40):
        attempts.begin(turn * step)
    attempts.begin(40 * step)
    assert attempts.deaths(40 * step) == 1


STEP = 65_536 - 8
"""Numbers so far apart want one place."""


def test_the_table_is_its_owners_alone_and_leaves_no_file_open(table: Path) -> None:
    before = psutil.Process().num_fds()
    attempts = Attempts(table)
    assert psutil.Process().num_fds() - before <= 1, "what the map itself holds"
    assert table.stat().st_mode & 0o777 == 0o600
    del attempts


def test_every_number_has_its_place(table: Path) -> None:
    attempts = Attempts(table)
    numbers = [*range(STEP - 20, STEP + 40), 2**64 - 1]
    for number in numbers:
        attempts.begin(number)
    assert {attempts.deaths(number) for number in numbers} == {1}


def test_a_request_is_found_though_one_that_wanted_its_place_has_ended(table: Path) -> None:
    attempts = Attempts(table)
    attempts.begin(5)
    attempts.begin(5 + STEP)
    attempts.end(5)
    assert attempts.deaths(5 + STEP) == 1


def test_places_are_free_again_when_their_requests_have_ended(table: Path) -> None:
    attempts = Attempts(table)
    for turn in range(1, 40):
        attempts.begin(turn * STEP)
        attempts.end(turn * STEP)
    eight = [turn * STEP for turn in range(1, 9)]
    for serial in eight:
        attempts.begin(serial)
    assert {attempts.deaths(serial) for serial in eight} == {1}


def test_a_request_for_which_there_is_no_place_does_nothing_to_those_that_are_noted(
    table: Path,
) -> None:
    attempts = Attempts(table)
    eight = [turn * STEP for turn in range(1, 9)]
    for serial in eight:
        attempts.begin(serial)
    ninth = 9 * STEP
    assert attempts.deaths(ninth) == 0
    attempts.pause(ninth)
    attempts.end(ninth)
    assert {attempts.deaths(serial) for serial in eight} == {1}


def test_a_serial_number_is_the_first_half_of_its_uuid() -> None:
    assert parse_serial(b"ffffffff-ffff-ffff-0000-000000000000") == 2**64 - 1


@pytest.mark.parametrize("told", [b"", b"-", b"none", b"\xff\xff", b"0" * 36])
def test_a_header_that_is_no_serial_number_is_none(told: bytes) -> None:
    assert parse_serial(told) is None
    assert parse_serial(str(uuid.uuid4()).encode())


class Hangs:
    """Notes its batches; hangs on the value 13, and holds the value 0 until the gate opens."""

    inputs = {"x": "float32[1]"}  # noqa: RUF012
    max_batch = 8

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.end = threading.Event()
        self.threads: set[threading.Thread] = set()

    def predict(self, batch: Any) -> Any:
        values = [float(value) for value in batch[:, 0]]
        self.batches.append(values)
        self.threads.add(threading.current_thread())
        self.entered.set()
        if 0.0 in values:
            self.gate.wait(LIMIT_S)
        if 13.0 in values:
            self.end.wait(LIMIT_S)
        return batch


def with_hanging(
    table: Path,
    work: Callable[[Executor, Hangs, asyncio.Event], Coroutine[Any, Any, None]],
    timeout_s: float = LIMIT_S,
    **settings: Any,
) -> None:
    """Run `work` with an executor and an event for that it has given up."""

    async def go() -> None:
        user, given_up = Hangs(), asyncio.Event()
        executor = Executor(
            ServedModel(user, name="m"),
            timeout_s=timeout_s,
            attempts=Attempts(table),
            on_stuck=given_up.set,
            **settings,
        )
        try:
            await work(executor, user, given_up)
        finally:
            user.gate.set()
            user.end.set()
            executor.close()

    asyncio.run(go())


def rows(value: float) -> dict[str, Array]:
    return {"x": np.full((1, 1), value, np.float32)}


def asked(executor: Executor, *serials: int) -> "list[asyncio.Task[Any]]":
    """A request of each number, with its number as its value."""
    return [
        asyncio.ensure_future(executor.submit(rows(serial), 1, serial=serial)) for serial in serials
    ]


def test_a_suspect_is_computed_in_no_company(table: Path) -> None:
    dead = Attempts(table)
    dead.begin(3)

    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        first = asyncio.ensure_future(executor.submit(rows(0.0), 1))
        await asyncio.to_thread(user.entered.wait)
        tasks = asked(executor, 1, 2, 3, 4)
        while executor.num_waiting < 4:
            await asyncio.sleep(0)
        user.gate.set()
        await asyncio.gather(first, *tasks)
        assert sorted(map(sorted, user.batches)) == [[0.0], [1.0, 2.0, 4.0], [3.0]]
        assert Attempts(table).deaths(3) == 0

    with_hanging(table, work)


def test_a_request_that_hangs_alone_gets_504_and_those_behind_it_are_left_to_the_ingress(
    table: Path,
) -> None:
    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        (hung,) = asked(executor, 13)
        await asyncio.to_thread(user.entered.wait)
        (behind,) = asked(executor, 5)
        once = asyncio.ensure_future(executor.submit(rows(6.0), 1))
        await given_up.wait()
        with pytest.raises(Refused, match=r"has not returned for 0.05 s on a batch of 1,") as why:
            await hung
        assert why.value.status == 504
        with pytest.raises(Refused, match="this replica is replaced") as why:
            await once
        assert why.value.status == 503, "nobody sends it again"
        (late,) = asked(executor, 7)
        await asyncio.sleep(0)
        assert not behind.done() and not late.done()
        assert [Attempts(table).deaths(serial) for serial in (13, 5, 7)] == [0, 0, 0]

    with_hanging(table, work, timeout_s=0.05)


def test_of_a_batch_that_hangs_nobody_is_answered_and_all_are_suspects(table: Path) -> None:
    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        (first,) = asked(executor, 1)
        await asyncio.to_thread(user.entered.wait)
        await first
        user.entered.clear()
        batch = [rows(13.0), rows(2.0)]
        blocker = asyncio.ensure_future(executor.submit(rows(0.0), 1, serial=9))
        await asyncio.to_thread(user.entered.wait)
        tasks = [
            asyncio.ensure_future(executor.submit(inputs, 1, serial=20 + index))
            for index, inputs in enumerate(batch)
        ]
        while executor.num_waiting < 2:
            await asyncio.sleep(0)
        user.gate.set()
        await blocker
        await given_up.wait()
        assert not any(task.done() for task in tasks)
        assert [Attempts(table).deaths(20 + index) for index in range(2)] == [1, 1]

    with_hanging(table, work, timeout_s=2.0)


def test_a_suspect_is_never_computed_in_the_event_loop(table: Path) -> None:
    Attempts(table).begin(3)

    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        executor._fast = 1.0
        await asyncio.gather(*asked(executor, 1))
        assert user.threads == {threading.current_thread()}
        executor._fast = 1.0
        await asyncio.gather(*asked(executor, 3))
        assert user.batches == [[1.0], [3.0]] and len(user.threads) == 2
        executor._fast = 1.0
        await executor.submit(rows(4.0), 1)
        assert user.batches[-1] == [4.0] and len(user.threads) == 2, "without a number too"

    with_hanging(table, work, inline_s=math.inf)


def test_a_suspect_that_hangs_is_given_up_by_the_pace_of_the_others(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Attempts(table).begin(13)
    monkeypatch.setattr(executors, "_SUSPECT_S", 0.05)

    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        (hung,) = asked(executor, 13)
        with pytest.raises(Refused, match=r"for 0.05 s .* a replica died while computing") as why:
            await hung
        assert why.value.status == 504 and given_up.is_set()

    with_hanging(table, work, profile=LatencyProfile.constant(1e-6, startup_s=0.0))


@pytest.mark.parametrize("is_suspect", [True, False])
def test_who_is_no_suspect_or_whose_usual_time_is_not_known_may_take_all_of_the_time(
    table: Path, monkeypatch: pytest.MonkeyPatch, is_suspect: bool
) -> None:
    if is_suspect:
        Attempts(table).begin(13)
    monkeypatch.setattr(executors, "_SUSPECT_S", 0.01)

    async def work(executor: Executor, user: Hangs, given_up: asyncio.Event) -> None:
        (hung,) = asked(executor, 13)
        with pytest.raises(Refused, match=r"has not returned for 0.05 s on a batch of 1"):
            await hung

    known = {"profile": LatencyProfile.constant(1e-6, startup_s=0.0)}
    with_hanging(table, work, timeout_s=0.05, **({} if is_suspect else known))
