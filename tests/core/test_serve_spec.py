"""What a service may be asked to be, and what is refused with which words."""

import re

import pytest

from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.spec import (
    ServeSpec,
    Slo,
    is_loopback,
    parse_latency,
    parse_replicas,
    parse_slo,
    refuse_impossible,
)
from supple.core.spec import SpecError

SLO = Slo(share=0.99, within_s=0.1)


@pytest.mark.parametrize(
    ("text", "share", "within_s"),
    [("p99=100ms", 0.99, 0.1), ("p99.9=2s", 0.999, 2.0), ("p50=250us", 0.5, 0.00025)],
)
def test_a_promise_is_read_as_a_share_and_seconds(text: str, share: float, within_s: float) -> None:
    assert parse_slo(text) == Slo(share=share, within_s=within_s)


@pytest.mark.parametrize("text", ["p99=100ms", "p99.9=2s", "p95=1.5s"])
def test_a_promise_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_slo(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100ms", "not a promise"),
        ("p100=1s", "no percentile"),
        ("p0=1s", "no percentile"),
        ("p99=soon", "not a time"),
        ("p99=0s", "positive and finite"),
        ("p99=-1s", "not a time"),
        ("p99=infs", "not a time"),
        ("", "not a promise"),
    ],
)
def test_nonsense_is_no_promise(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_slo(text)


def test_latencies_may_be_short_or_long() -> None:
    assert parse_latency("1m30s", what="--x") == 90.0
    assert parse_latency("20ms", what="--x") == pytest.approx(0.02)


@pytest.mark.parametrize("text", ["30", "0.5", "1e3", " 2 "])
def test_a_latency_without_a_unit_is_refused_with_both_it_may_mean(text: str) -> None:
    number = text.strip()
    with pytest.raises(SpecError, match=f"--itl is {number}, .*: write {number}ms or {number}s"):
        parse_latency(text, what="--itl")
    with pytest.raises(SpecError, match=f"write {number}ms or {number}s"):
        parse_slo(f"p99={text}")


@pytest.mark.parametrize("text", ["1ns", "fast", "30 msec", ""])
def test_what_is_no_latency_is_told_units_a_latency_has(text: str) -> None:
    with pytest.raises(SpecError, match=r"not a time\. Write 250us, 30ms or 2s"):
        parse_latency(text, what="--itl")


def test_replicas_may_start_at_zero() -> None:
    assert parse_replicas("0:20") == (0, 20)
    assert parse_replicas("4") == (4, 4)


@pytest.mark.parametrize("text", ["", "a:3", "5:2", "-1:3", "0", "1:99999999", "1.5", "1:"])
def test_impossible_replica_counts_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"--replicas {text}")):
        parse_replicas(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../x"}, "not usable as a folder"),
        ({"target": " "}, "no model was named"),
        ({"min_replicas": 5, "max_replicas": 2}, "above MAX"),
        ({"port": 70_000}, "--port is 70000"),
        ({"grpc_port": -1}, "--grpc-port is -1"),
        ({"port": 9000, "grpc_port": 9000}, "one port serves one protocol"),
        ({"max_body_bytes": 0}, "--max-body"),
        ({"cors_origins": ("https://a.example/path",)}, "--cors 'https://a.example/path'"),
        ({"cors_origins": ("https://a.example", "a.example")}, "--cors 'a.example'"),
        ({"cors_origins": ("",)}, "--cors ''"),
        ({"max_waiting": 0}, "--max-waiting"),
        ({"cpus_per_replica": 0.0}, "--cpus-per-replica"),
        ({"gpus_per_replica": -1.0}, "--gpus-per-replica"),
        ({"idle_s": 0.0}, "--idle"),
        ({"token": "short"}, "8 to 4096"),
        ({"host": "0.0.0.0"}, "--token"),
        ({"price_per_hour": -2.0}, "--price"),
        ({"budget_per_hour": 5.0}, "Give --price"),
        ({"price_per_hour": 2.0, "budget_per_hour": 1.0}, "Raise the budget"),
    ],
)
def test_a_service_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        ServeSpec(**{"name": "digits", "target": "app.py:Model", "slo": SLO, **change})  # type: ignore[arg-type]


def test_an_open_host_needs_a_token_or_a_word_for_it() -> None:
    for more in ({"token": "a-long-secret"}, {"insecure": True}):
        spec = ServeSpec(name="a", target="app.py:Model", slo=SLO, host="0.0.0.0", **more)  # type: ignore[arg-type]
        assert spec.host == "0.0.0.0"


def test_loopback_is_known_in_every_spelling() -> None:
    assert all(
        is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost")
    )
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "example.org", "10.0.0.1"))


def test_a_promise_faster_than_one_prediction_is_refused_with_both_times() -> None:
    slow = LatencyProfile(
        points=(LatencyPoint(batch_size=1, p50_s=0.15, p99_s=0.2),), startup_s=1.0
    )
    with pytest.raises(SpecError, match=r"takes 200ms .* longer than the 100ms promised"):
        refuse_impossible(SLO, slow)
    refuse_impossible(SLO, LatencyProfile.constant(0.1, startup_s=1.0))


@pytest.mark.parametrize(
    "origin", ["*", "https://app.example.com", "http://localhost:3000", "http://[::1]:80"]
)
def test_the_origin_of_a_web_page_has_no_path(origin: str) -> None:
    spec = ServeSpec(name="digits", target="app.py:Model", slo=SLO, cors_origins=(origin,))
    assert spec.cors_origins == (origin,)
