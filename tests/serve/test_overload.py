"""What the queue and the pace it learns make of too many requests, in virtual time."""

import numpy as np
import pytest

from supple.core.service.queue import DeadlineQueue, Ticket
from supple.serve.pace import Pace

SLO_S, MAX_BATCH, RUN_S = 0.4, 16, 20.0


def batch_s(num_rows: int) -> float:
    return 0.040 + 0.00375 * num_rows


CAPACITY_PER_S = MAX_BATCH / batch_s(MAX_BATCH)


def overloaded(times: float, *, noise: float) -> tuple[float, float]:
    """Requests within the promise over the capacity, and the p99 of the answered over the promise,
    at so many `times` the capacity, batches varying log-normally by `noise`."""
    random = np.random.default_rng(0)
    pace = Pace()

    def took(num_rows: int) -> float:
        return batch_s(num_rows) * float(np.exp(random.normal(0.0, noise)))

    for num_rows in (1, 2, 4, 8, 16):
        for _ in range(4):
            pace.record(num_rows, took(num_rows))
    waiting = DeadlineQueue(pace.profile(), max_batch_size=MAX_BATCH, max_waiting=10_000)
    came = np.sort(random.uniform(0.0, RUN_S, random.poisson(times * CAPACITY_PER_S * RUN_S)))
    latencies: list[float] = []
    running: tuple[Ticket, ...] = ()
    began_s = end_s = 0.0
    number = 0
    while number < len(came) or running:
        if running and (number == len(came) or end_s <= came[number]):
            now = end_s
            latencies += [now - came[ticket.number] for ticket in running]
            if pace.record(len(running), now - began_s):
                waiting.renew(pace.profile())
            running = ()
            waiting.done()
        else:
            now = float(came[number])
            waiting.offer(Ticket(number=number, deadline_s=now + 0.9 * SLO_S), now)
            number += 1
        if not running:
            running = waiting.take(now).batch
            began_s, end_s = now, now + took(len(running))
    kept = sum(latency <= SLO_S for latency in latencies)
    return kept / RUN_S / CAPACITY_PER_S, float(np.quantile(latencies, 0.99)) / SLO_S


@pytest.mark.parametrize("times", [1.2, 3.0])
@pytest.mark.parametrize(("noise", "least"), [(0.02, 0.85), (0.2, 0.9), (0.5, 0.65)])
def test_too_many_requests_leave_the_model_busy_with_those_it_can_answer_in_time(
    times: float, noise: float, least: float
) -> None:
    goodput, p99 = overloaded(times, noise=noise)
    assert goodput >= least
    assert p99 <= 1.0 + 0.2 * (noise > 0.3)
