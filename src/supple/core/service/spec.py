"""Specification of a service: latency promise, limits, address; validated in the constructor.

`parse_*` turn command-line text into numbers and raise `SpecError`, whose text gives the request,
the numbers, the rule that broke and what to do.
"""

import ipaddress
import math
import re
from dataclasses import dataclass, field
from typing import final

from supple.core.service.latency import LatencyProfile
from supple.core.spec import SpecError, check_duration, check_name, parse_duration
from supple.core.types import ParallelLayout

MAX_REPLICAS = 65_536
"""Largest allowed count: a larger one is a typing error."""
MAX_BATCH = 65_536
"""Largest allowed batch size of a prediction."""
MAX_WAITING = 10_000
"""Default for the number of requests that may wait in one replica."""

_SMALL_UNIT_S = {"ms": 1e-3, "us": 1e-6}
_SLO = re.compile(r"p(\d+(?:\.\d+)?)=(.+)")
_HOST = re.compile(r"[A-Za-z0-9.:%_-]{1,253}|\[[0-9A-Fa-f.:%]{2,80}\]")
_ORIGIN = re.compile(r"\*|https?://(?:[a-z0-9.-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?")
_LOOPBACK_NAMES = frozenset({"localhost"})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """A latency promise: `share` of the requests is answered within `within_s` seconds."""

    share: float
    within_s: float

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise SpecError(
                f"--slo promises {self.share:.6g} of all requests: the share must be above 0 and "
                "below 1. Write p99=100ms or p99.9=2s."
            )
        if not 0.0 < self.within_s < math.inf:
            raise SpecError(
                f"--slo gives {self.within_s:g} s: the time must be positive and finite."
            )

    def __str__(self) -> str:
        return f"p{self.share * 100:.6g}={latency_text(self.within_s)}"


def latency_text(seconds: float) -> str:
    """Format seconds: `"100ms"`, `"2s"`."""
    return f"{seconds * 1e3:.4g}ms" if seconds < 1.0 else f"{seconds:.4g}s"


def parse_latency(text: str, *, what: str) -> float:
    """Parse `"100ms"`, `"250us"`, `"2s"` or `"1m30s"` as positive finite seconds. A number without
    a unit is refused, since it could be milliseconds."""
    stripped = text.strip()
    if _is_bare_number(stripped):
        raise SpecError(
            f"{what} is {stripped}, a number without a unit: write {stripped}ms or {stripped}s."
        )
    for unit, factor in _SMALL_UNIT_S.items():
        number = stripped.removesuffix(unit)
        if number != stripped and re.fullmatch(r"\d+(?:\.\d+)?", number):
            return check_duration(float(number) * factor, text, what=what)
    return parse_duration(stripped, what=what, such_as="250us, 30ms or 2s")


def _is_bare_number(text: str) -> bool:
    """Whether the text is a positive finite number without a unit."""
    try:
        return 0.0 < float(text) < math.inf
    except ValueError:
        return False


def parse_slo(text: str) -> Slo:
    """Parse `"p99=100ms"` as a latency promise."""
    matched = _SLO.fullmatch(text.strip())
    if matched is None:
        raise SpecError(
            f"--slo {text}: not a promise. Write pSHARE=TIME, as in p99=100ms or p99.9=2s."
        )
    percent = float(matched[1])
    if not 0.0 < percent < 100.0:
        raise SpecError(
            f"--slo {text}: p{percent:g} is no percentile a service can promise; it must be above "
            "0 and below 100, as in p99=100ms."
        )
    within_s = parse_latency(matched[2], what=f"--slo {text}: the time")
    return Slo(share=round(percent / 100.0, 12), within_s=within_s)


def parse_replicas(text: str) -> tuple[int, int]:
    """Parse `"0:20"` or `"4"` as (min, max); only MIN may be 0."""
    low, colon, high = text.partition(":")
    counts: list[int] = []
    for part, which in ((low, "MIN"), (high if colon else low, "MAX")):
        try:
            counts.append(int(part))
        except ValueError:
            raise SpecError(
                f"--replicas {text}: {which} is {part!r}, not a whole number. Write MIN:MAX, as in "
                "1:20, or one number."
            ) from None
    minimum, maximum = counts
    check_replicas(minimum, maximum, what=f"--replicas {text}")
    return minimum, maximum


def check_replicas(minimum: int, maximum: int, *, what: str) -> None:
    """Raise `SpecError` unless 0 <= minimum <= maximum, 1 <= maximum <= `MAX_REPLICAS`."""
    if minimum < 0 or not 1 <= maximum <= MAX_REPLICAS:
        raise SpecError(
            f"{what}: MIN {minimum} must be at least 0 and MAX {maximum} between 1 and "
            f"{MAX_REPLICAS}."
        )
    if minimum > maximum:
        raise SpecError(
            f"{what}: MIN {minimum} is above MAX {maximum}. Write the smaller first: "
            f"--replicas {maximum}:{minimum}."
        )


def refuse_impossible(slo: Slo, profile: LatencyProfile) -> None:
    """Raise `SpecError` where a single prediction takes longer than the promise."""
    alone_s = profile.tail_s(1)
    if alone_s > slo.within_s:
        raise SpecError(
            f"--slo {slo}: one prediction of one input takes {latency_text(alone_s)} (p99, "
            f"measured), longer than the {latency_text(slo.within_s)} promised; no number of "
            f"replicas changes that. Promise at least {latency_text(2 * alone_s)}, or make the "
            "model faster."
        )


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a server bound to `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in _LOOPBACK_NAMES


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    """Specification of one elastic service. Times in seconds."""

    name: str
    target: str
    """`path.py:Class`, or the path of a saved program or a checkpoint."""
    slo: Slo
    min_replicas: int = 1
    max_replicas: int = 100
    initial_replicas: int | None = None
    """Replicas at the start; None: `min_replicas`, at least one."""
    host: str = "127.0.0.1"
    port: int = 8000
    """Port of REST and metrics; 0: any free port."""
    grpc_port: int | None = None
    """Port of gRPC; None: no gRPC; 0: any free port."""
    token: str | None = None
    """Bearer token every request must carry."""
    insecure: bool = False
    """Allows a `host` that others can reach without a token."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages a browser lets call the service; `*`: all; empty: none."""
    max_body_bytes: int = 64 * 2**20
    max_waiting: int = MAX_WAITING
    """Requests that may wait in one replica; one more is refused."""
    retry_safe: bool = True
    """Whether a request whose replica died may be sent again."""
    idle_s: float = 300.0
    """Time without a request after which a service with `min_replicas=0` has none."""
    address: str | None = None
    """Address of a Ray cluster; None: this machine alone."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Devices one replica spans."""
    price_per_hour: float | None = None
    """Price of one replica."""
    budget_per_hour: float | None = None
    """Largest cost of the service per hour; requires `price_per_hour`."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.target.strip():
            raise SpecError("no model was named: give FILE.py:CLASS, as in app.py:Model.")
        check_replicas(
            self.min_replicas,
            self.max_replicas,
            what=f"--replicas {self.min_replicas}:{self.max_replicas}",
        )
        self._refuse_initial()
        self._refuse_numbers()
        self._refuse_open_access()
        self._refuse_cost()

    def _refuse_initial(self) -> None:
        least, most = max(1, self.min_replicas), self.max_replicas
        if self.initial_replicas is not None and not least <= self.initial_replicas <= most:
            raise SpecError(
                f"--initial is {self.initial_replicas}: it must be between {least} and {most}, the "
                f"range of --replicas {self.min_replicas}:{self.max_replicas}."
            )

    def _refuse_numbers(self) -> None:
        for what, value, least, most in (
            ("--port", self.port, 0, 65_535),
            ("--grpc-port", self.grpc_port or 0, 0, 65_535),
            ("--max-body", self.max_body_bytes, 1, 2**40),
            ("--max-waiting", self.max_waiting, 1, 2**31),
            ("--gpus-per-replica", self.gpus_per_replica, 0, 1024),
        ):
            if not least <= value <= most:
                raise SpecError(f"{what} is {value:g}: it must be between {least} and {most}.")
        if not 0 < self.cpus_per_replica <= 1024:
            raise SpecError(
                f"--cpus-per-replica is {self.cpus_per_replica:g}: give more than 0, at most 1024."
            )
        if not 0 < self.idle_s < math.inf:
            raise SpecError(f"--idle is {self.idle_s:g} s: it must be positive and finite.")
        if self.port and self.port == self.grpc_port:
            raise SpecError(
                f"--port and --grpc-port are both {self.port}: one port serves one protocol. Give "
                "two, or --grpc-port 0 for any free one."
            )

    def _refuse_open_access(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise SpecError(
                f"--host {self.host[:80]!r} is no address: give one such as 127.0.0.1 or 0.0.0.0."
            )
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]{8,4096}", self.token):
            raise SpecError(
                f"the token has {len(self.token)} characters: it needs 8 to 4096 printable ones "
                "without blanks."
            )
        if self.token is None and not self.insecure and not is_loopback(self.host):
            raise SpecError(
                f"--host {self.host} lets other machines send requests, and no token was given. "
                "Give --token, or --insecure if the network itself is trusted."
            )

        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise SpecError(
                    f"--cors {origin[:80]!r} is no origin of web pages: give scheme, host and port "
                    "without a path, as in https://app.example.com, or * for all."
                )

    def _refuse_cost(self) -> None:
        for what, amount in (
            ("--price", self.price_per_hour),
            ("--hourly-budget", self.budget_per_hour),
        ):
            if amount is not None and not 0 < amount < math.inf:
                raise SpecError(f"{what} is {amount:g}: it must be positive and finite.")
        if self.budget_per_hour is None:
            return
        if self.price_per_hour is None:
            raise SpecError(
                f"--hourly-budget is {self.budget_per_hour:g} and the price of a replica is not "
                "known. Give --price."
            )
        least = self.price_per_hour * max(self.min_replicas, 1)
        if least > self.budget_per_hour:
            raise SpecError(
                f"--hourly-budget is {self.budget_per_hour:g}, and {max(self.min_replicas, 1)} "
                f"replicas at {self.price_per_hour:g} cost {least:g}. Raise the budget or lower "
                "MIN."
            )
