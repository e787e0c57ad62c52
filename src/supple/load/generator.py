"""An open-loop load generator: requests are sent on schedule, independent of earlier answers.

A closed loop waits for an answer before it sends the next request. A service that stalls then gets
fewer requests, and its worst latencies are missing from the results (coordinated omission). Here
latency counts from the *scheduled* time, the requests in flight are not limited, refusals, errors
and timeouts miss the SLO, and the lag of the generator itself is reported too.

aiohttp, not httpx: Ray installs it already, and it takes a fraction of the processor time per
request, which on one machine competes with the measured service.
"""

import asyncio
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import aiohttp
import numpy as np

from supple.core.service.spec import Slo
from supple.core.spec import SpecError
from supple.inputs.arrivals import read_trace

Times = np.ndarray[Any, np.dtype[np.float64]]

TIMED_OUT: Final = -1
BROKEN: Final = -2
"""Outcomes besides HTTP statuses: no answer in time; connection refused or broken."""
REFUSALS: Final = (429, 503)
_MOST_REQUESTS: Final = 50_000_000
_QUANTILES: Final = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99, "p999_s": 0.999, "max_s": 1.0}


def poisson(*, rate_per_s: float, duration_s: float, seed: int) -> Times:
    """Return the scheduled times of a Poisson process, sorted, in seconds from the start."""
    if rate_per_s * duration_s > _MOST_REQUESTS:
        raise SpecError(
            f"--rate {rate_per_s:g} for {duration_s:g} s is {rate_per_s * duration_s:.3g} "
            f"requests; at most {_MOST_REQUESTS:.3g} are sent in one run. Lower one of the two."
        )
    random = np.random.default_rng(seed)
    count = random.poisson(rate_per_s * duration_s)
    return np.sort(random.uniform(0.0, duration_s, count))


def replay(path: Path, *, speed: float, duration_s: float | None = None) -> Times:
    """Return the scheduled times of a trace, `speed` times as fast, up to `duration_s` seconds of
    the run. Raises `SpecError`."""
    due = read_trace(path) / speed
    return due if duration_s is None else due[due <= duration_s]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The request that the generator repeats."""

    url: str
    method: str = "GET"
    body: bytes = b""
    headers: Mapping[str, str] | None = None


async def find_target(url: str, *, body: bytes | None, token: str | None) -> Target:
    """Choose the request for `url`: POST `body` if given; one row of zeros for the declared inputs
    of a model of the Open Inference Protocol; GET for any other URL. Raises `SpecError`."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    model_url = url.rstrip("/").removesuffix("/infer")
    is_model = model_url.rpartition("/")[0].endswith(("/v2/models", "/versions"))
    if is_model:
        url = f"{model_url}/infer"
    if body is not None:
        headers["Content-Type"] = "application/json"
        return Target(url=url, method="POST", body=body, headers=headers)
    if not is_model:
        return Target(url=url, headers=headers)
    try:
        async with aiohttp.ClientSession() as session, session.get(model_url, headers=headers) as r:
            metadata = await r.json(content_type=None)
            inputs = [_zeros(tensor) for tensor in metadata["inputs"]]
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"{model_url} returns no inputs of the model ({type(error).__name__}: {error}). Check "
            "the URL, or give a request with --body FILE."
        ) from None
    if not inputs:
        raise SpecError(f"the model at {model_url} declares no inputs. Give a request with --body.")
    headers["Content-Type"] = "application/json"
    content = json.dumps({"inputs": inputs}).encode()
    return Target(url=url, method="POST", body=content, headers=headers)


def _zeros(tensor: Mapping[str, Any]) -> dict[str, Any]:
    shape = [max(1, int(length)) for length in tensor["shape"]]
    value: Any = {"BYTES": "", "BOOL": False}.get(tensor["datatype"], 0)
    data = [value] * math.prod(shape)
    return {"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": data}


@final
class Outcomes:
    """The outcome of every request, in scheduled order; arrays have shape [requests]."""

    def __init__(self, due_s: Times) -> None:
        self.due_s = due_s
        self.sent_s = np.full(len(due_s), np.nan)
        self.latency_s = np.full(len(due_s), np.nan)
        """Seconds from the scheduled time to the end of the answer; NaN while there is none."""
        self.status = np.zeros(len(due_s), np.int16)
        """HTTP status, `TIMED_OUT`, `BROKEN`, or 0: unknown."""
        self.num_sent = 0
        self.num_ended = 0

    def record(self, index: int, sent_s: float, end_s: float, status: int) -> None:
        """Record the end of one request; times are seconds from the start of the run."""
        self.sent_s[index] = sent_s
        self.latency_s[index] = end_s - self.due_s[index]
        self.status[index] = status
        self.num_ended += 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Results of one load run. Latencies are seconds from the scheduled time."""

    num_requests: int
    """Requests that ended, with any outcome."""
    num_answered: int
    num_refused: int
    num_errors: int
    num_timeouts: int
    num_unknown: int
    """Requests in flight or not sent when the run was interrupted; not counted elsewhere."""
    duration_s: float
    asked_per_s: float
    answered_per_s: float
    slo: str | None
    slo_attainment: float | None
    """Share of `num_requests` that was answered within the SLO's latency."""
    slo_goodput_per_s: float | None
    latency: Mapping[str, float | None]
    """Latencies of the answered requests, by quantile; None without any."""
    refusal: Mapping[str, float | None]
    """Latencies of the refused requests, by quantile; None without any."""
    lag: Mapping[str, float | None]
    """Delays of sending, by quantile. A lag near the SLO's latency makes the run invalid."""
    statuses: Mapping[str, int]
    replica_s: float | None = None
    """Replica-seconds of the service during the run; None if unknown."""


def report(outcomes: Outcomes, slo: Slo | None, *, replica_s: float | None = None) -> LoadReport:
    """Compute the results of a run from its `outcomes`."""
    status = outcomes.status
    ended = status != 0
    answered = (status >= 200) & (status < 300)
    refused = np.isin(status, REFUSALS)
    timeouts = status == TIMED_OUT
    num_ended = int(ended.sum())
    latency_s = outcomes.latency_s
    kept = answered & (latency_s <= slo.within_s) if slo is not None else None
    ends_s = outcomes.due_s[ended] + latency_s[ended]
    duration_s = float(ends_s.max()) if num_ended else 0.0
    over = max(float(outcomes.due_s[ended].max()), 1e-9) if num_ended else math.inf
    names = {TIMED_OUT: "timed out", BROKEN: "broken"}
    return LoadReport(
        num_requests=num_ended,
        num_answered=int(answered.sum()),
        num_refused=int(refused.sum()),
        num_errors=int((ended & ~answered & ~refused & ~timeouts).sum()),
        num_timeouts=int(timeouts.sum()),
        num_unknown=len(status) - num_ended,
        duration_s=duration_s,
        asked_per_s=num_ended / over,
        answered_per_s=int(answered.sum()) / max(duration_s, 1e-9),
        slo=None if slo is None else str(slo),
        slo_attainment=None if kept is None or not num_ended else float(kept.sum()) / num_ended,
        slo_goodput_per_s=None if kept is None else float(kept.sum()) / over,
        latency=_quantiles(latency_s[answered]),
        refusal=_quantiles(latency_s[refused]),
        lag=_quantiles((outcomes.sent_s - outcomes.due_s)[ended]),
        statuses={
            names.get(code, str(code)): count
            for code, count in sorted(Counter(status[ended].tolist()).items())
        },
        replica_s=replica_s,
    )


def _quantiles(seconds: Times) -> dict[str, float | None]:
    if not len(seconds):
        return dict.fromkeys(_QUANTILES)
    return {
        name: float(np.quantile(seconds, share, method="inverted_cdf"))
        for name, share in _QUANTILES.items()
    }


async def run(
    target: Target,
    due_s: Times,
    *,
    timeout_s: float,
    stop: asyncio.Event | None = None,
    on_second: Callable[[float, Outcomes], None] | None = None,
) -> Outcomes:
    """Send a request at each time in `due_s`; return when all have ended or `stop` is set.

    Long: its tasks share the session, the clock and the outcomes.
    """
    loop = asyncio.get_running_loop()
    outcomes = Outcomes(due_s)
    stop = stop or asyncio.Event()
    flying: set[asyncio.Task[None]] = set()
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start_s = loop.time()

        async def send(index: int) -> None:
            sent_s = loop.time() - start_s
            try:
                async with session.request(
                    target.method, target.url, data=target.body or None, headers=target.headers
                ) as response:
                    await response.read()
                    status = response.status
            except TimeoutError:
                status = TIMED_OUT
            except (aiohttp.ClientError, OSError):
                status = BROKEN
            outcomes.record(index, sent_s, loop.time() - start_s, status)

        async def all_sent() -> None:
            for index, due in enumerate(due_s):
                wait_s = start_s + due - loop.time()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                task = asyncio.create_task(send(index))
                outcomes.num_sent += 1
                flying.add(task)
                task.add_done_callback(flying.discard)
            while flying:
                await asyncio.wait(flying)

        sending = asyncio.create_task(all_sent())
        stopping = asyncio.create_task(stop.wait())
        try:
            pending: set[asyncio.Task[Any]] = {sending, stopping}
            while len(pending) == 2:
                _, pending = await asyncio.wait(
                    pending, timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                )
                if on_second is not None:
                    on_second(loop.time() - start_s, outcomes)
            if sending.done():
                sending.result()
        finally:
            left = [sending, stopping, *flying]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
    return outcomes


def run_until_interrupted(
    url: str,
    due_s: Times,
    *,
    body: bytes | None,
    token: str | None,
    timeout_s: float,
    on_second: Callable[[float, Outcomes], None],
) -> Outcomes:
    """Call `run` in a new event loop; Ctrl-C ends it early with the outcomes so far."""

    async def go() -> Outcomes:
        stop = asyncio.Event()
        with suppress(NotImplementedError, ValueError, RuntimeError):  # only in the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
        target = await find_target(url, body=body, token=token)
        return await run(target, due_s, timeout_s=timeout_s, stop=stop, on_second=on_second)

    return asyncio.run(go())


def lines(found: LoadReport) -> Sequence[str]:
    """Format the results as lines of text."""
    count = found.num_requests
    text = [
        f"requests   {count} in {found.duration_s:.1f} s, {found.asked_per_s:.1f} a second",
        f"answered   {found.num_answered}, {found.answered_per_s:.1f} a second",
        f"refused    {found.num_refused}   errors {found.num_errors}   timeouts "
        f"{found.num_timeouts}",
    ]
    if found.num_unknown:
        text.append(f"unknown    {found.num_unknown}: not sent or in flight at the interrupt")
    other = {name: n for name, n in found.statuses.items() if not name.startswith("2")}
    if other:
        text.append("           " + ", ".join(f"{name}: {n}" for name, n in other.items()))
    text.append("latency    " + _row(found.latency, found.num_answered))
    if found.num_refused:
        text.append("refusals   " + _row(found.refusal, found.num_refused))
    text.append("lag        " + _row(found.lag, count) + "   of the generator")
    if found.slo_attainment is not None:
        text.append(
            f"{found.slo}   attained by {found.slo_attainment:.2%} of all, "
            f"{found.slo_goodput_per_s:.1f} a second"
        )
    if found.replica_s is not None:
        text.append(f"replicas   {found.replica_s:.1f} replica-seconds")
    return text


def _row(quantiles: Mapping[str, float | None], count: int) -> str:
    cells: list[str] = []
    for name, share in _QUANTILES.items():
        seconds = quantiles[name]
        label = {"p999_s": "p99.9"}.get(name, name.removesuffix("_s"))
        value = "-" if seconds is None else f"{seconds * 1e3:.1f}ms"
        # "~" marks a quantile as uncertain: fewer than a hundred samples lie beyond it.
        few = share < 1.0 and count * (1.0 - share) < 100
        cells.append(f"{label} {'~' if few and seconds is not None else ''}{value}")
    return "  ".join(cells)
