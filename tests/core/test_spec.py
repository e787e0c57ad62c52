"""What a user writes is parsed exactly, and nonsense is refused in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supple.core.spec import (
    Limits,
    Objective,
    SpecError,
    TrainSpec,
    duration_option,
    parse_batch,
    parse_count,
    parse_duration,
    parse_limits,
    parse_money,
    parse_name,
    parse_objective,
    parse_rule,
    parse_schedule,
    parse_workers,
)


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, 4)), ("1:8", (1, 8)), ("65536", (65536, 65536))]
)
def test_workers_are_one_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert parse_workers(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8:2", "MIN 8 is above MAX 2.*2:8"),
        ("0", "between 1 and 65536"),
        ("-3", "between 1 and 65536"),
        ("70000", "between 1 and 65536"),
        ("two", "not a whole number"),
        ("1:", "not a whole number"),
        ("2.5", "not a whole number"),
    ],
)
def test_nonsense_workers_are_refused_with_the_rule(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_workers(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("1h30m", 5400), ("7.5s", 7.5)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text, what="--deadline") == seconds


@pytest.mark.parametrize("text", ["0", "-5s", "soon", "inf", "nan", "", "5x", "1e400"])
def test_nonsense_times_are_refused_by_name(text: str) -> None:
    with pytest.raises(SpecError, match="--deadline is"):
        parse_duration(text, what="--deadline")


@given(st.floats(min_value=0.001, max_value=1e6, allow_nan=False))
def test_seconds_that_supple_writes_are_seconds_that_it_reads(seconds: float) -> None:
    assert parse_duration(duration_option(seconds), what="x") == pytest.approx(seconds, rel=1e-3)
    assert duration_option(90.0) == "90s" and duration_option(90.5) == "90.5s"


@pytest.mark.parametrize("text", ["2", " 7.5 ", "1e3"])
def test_a_time_without_a_unit_is_refused_with_what_it_may_mean(text: str) -> None:
    number = text.strip()
    with pytest.raises(SpecError, match=rf"--deadline is {number}, .*unit: {number}h\? {number}m"):
        parse_duration(text, what="--deadline")
    with pytest.raises(SpecError, match="--schedule 5:2: time is 5, a number without a unit"):
        parse_schedule("5:2", minimum=1, maximum=4)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "free"])
def test_nonsense_prices_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="--price is"):
        parse_money(text, what="--price")


def test_times_and_money_beyond_all_reason_are_typing_errors() -> None:
    with pytest.raises(SpecError, match="--deadline is 1e300: that is more than 100,000 days"):
        parse_duration("1e300", what="--deadline")
    assert parse_duration("100000d", what="--deadline") == 8.64e9
    with pytest.raises(SpecError, match="--price is 1e300: it must be at most 1,000,000,000,000"):
        parse_money("1e300", what="--price")


def test_a_schedule_is_times_and_counts_in_order() -> None:
    assert parse_schedule("0s:2,20s:4,1m:1", minimum=1, maximum=4) == ((0, 2), (20, 4), (60, 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("20s", "has no count"),
        ("20s:9", r"9 workers.*outside --workers 1:4"),
        ("20s:2,10s:3", "does not come after"),
        ("x:2", "not a time"),
        ("5s:0", "between 1"),
    ],
)
def test_nonsense_schedules_are_refused(text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse_schedule(text, minimum=1, maximum=4)


def test_names_of_modes_and_rules_are_listed_when_misspelt() -> None:
    assert parse_batch("adaptive") == "adaptive"
    assert parse_rule("sqrt") == "sqrt"
    with pytest.raises(SpecError, match="fixed or adaptive"):
        parse_batch("auto")
    with pytest.raises(SpecError, match="linear, sqrt"):
        parse_rule("cubic")
    assert parse_count("3", what="x") == 3


KINDS = ("a100", "a100-80", "h100", "b200")


@pytest.mark.parametrize(
    ("text", "meant"), [("H100", "h100"), (" a100-80 ", "a100-80"), ("A100", "a100")]
)
def test_a_name_is_found_in_capitals_too(text: str, meant: str) -> None:
    assert parse_name(text, KINDS, what="--accelerator") == meant


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("H100-80", " Do you mean h100?"),
        ("h1OO", " Do you mean h100?"),
        ("A1", " Do you mean a100 or a100-80?"),
        ("tpu", ""),
        ("", ""),
    ],
)
def test_an_unknown_name_is_told_all_names_and_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(SpecError) as told:
        parse_name(text, KINDS, what="--accelerator")
    known = "Known: a100, a100-80, h100, b200."
    assert str(told.value) == f"--accelerator {text}: unknown. {known}{hint}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "../x"}, "not usable as a folder"),
        ({"name": "a", "batch": "Adaptive"}, "one of fixed, adaptive"),
        ({"name": "a", "lr_rule": "squared"}, "one of auto, linear, sqrt"),
        ({"name": "a", "on_non_finite": "ignore"}, "one of stop, skip"),
        ({"name": "a", "min_workers": 3, "max_workers": 2}, "above MAX"),
        ({"name": "a", "reproducible": True, "max_workers": 9}, "--logical-shards"),
        ({"name": "a", "reproducible": True, "batch": "adaptive"}, "choose one"),
        ({"name": "a", "max_steps": 0}, "--max-steps is 0"),
        ({"name": "a", "port": 70_000}, "65535"),
        ({"name": "a", "cpus_per_worker": 0.0}, "--cpus-per-worker"),
        ({"name": "a", "max_failures": -1}, "--max-failures"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        TrainSpec(script="x.py", **fields)  # type: ignore[arg-type]


def test_what_a_plan_is_asked_is_read_from_what_a_person_writes() -> None:
    limits = parse_limits("16", "2.50", "adaptive")
    assert (limits.max_workers, limits.price_per_hour, limits.batch) == (16, 2.5, "adaptive")
    assert parse_limits(None, None, "fixed") == Limits()
    assert parse_objective("2h", None) == Objective(deadline_s=7200.0)
    assert parse_objective(None, "50").budget == 50.0
    with pytest.raises(SpecError, match="choose the one that binds"):
        parse_objective("2h", "50")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_workers": 0}, "0 as the least workers: it must be a whole number"),
        ({"max_workers": 0}, "0 as the most workers: it must be a whole number"),
        ({"max_workers": 2.5}, "2.5 as the most workers: it must be a whole number"),
        ({"batch": "Adaptive"}, "batch='Adaptive' was given: it must be one of fixed, adaptive"),
        ({"price_per_hour": "2.50"}, "a price per hour of 2.50: it must be positive"),
        ({"price_per_hour": -1.0}, "a price per hour of -1.0: it must be positive"),
        ({"price_per_hour": 0.0}, "positive"),
        ({"price_per_hour": float("nan")}, "positive and finite"),
    ],
)
def test_limits_that_cannot_be_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Limits(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"deadline_s": 0.0}, "a deadline of 0.0"),
        ({"budget": float("inf")}, "a budget of inf"),
        ({"deadline_s": 3600.0, "budget": 5.0}, "3600 s and a budget of 5 were both"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(fields: dict[str, float], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Objective(**fields)
