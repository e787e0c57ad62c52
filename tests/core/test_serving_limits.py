"""Measurements that cannot be, by a data sheet or by themselves, and those that can."""

from dataclasses import replace

import pytest

from supple.core.layouts.model import DEVICES
from supple.core.llm.decoding import Decoder, DecodingRun, Workload
from supple.core.llm.inference import ServingMeasurement
from supple.core.llm.serving_limits import why_impossible

PLAIN = DecodingRun(
    model=Decoder(family="a", num_parameters=8e9, num_activated=8e9),
    device=DEVICES["h100"],
    num_devices=1,
    concurrency=64,
    workload=Workload(name="chat", prompt_tokens=500),
    output_tokens=300,
)


def told(tokens_per_s: float, itl_ms: float, run: DecodingRun = PLAIN) -> str:
    found = why_impossible(
        ServingMeasurement(run=run, tokens_per_s=tokens_per_s, itl_p90_s=1e-3 * itl_ms)
    )
    return "" if found is None else ". ".join(found)


def test_more_tokens_than_four_times_the_peak_multiplies_are_impossible() -> None:
    assert "57,600 TFLOP/s; the data sheet states 989 for 1 accelerator (h100)" in told(3.6e6, 20)
    assert told(2.4e5, 0.3) == ""
    assert told(2.5e5, 0.3)


def test_seconds_given_for_milliseconds_are_impossible() -> None:
    said = told(3600, 0.020)
    assert "64 at a time and 3,600 tokens/s are a token every 17.8 ms of a request" in said
    assert "Give itl_p90_ms in milliseconds" in said
    assert told(3600, 20) == ""


def test_a_tenth_of_the_gaps_cannot_be_more_than_ten_times_the_mean() -> None:
    one = replace(PLAIN, concurrency=1)
    assert "cannot be longer than 10 times the mean" in told(140, 100, one)
    assert told(140, 71, one) == ""


def test_gaps_are_one_fewer_than_the_tokens_of_an_answer() -> None:
    """Of two tokens one waits, and the tokens per second count both; of one token none waits."""
    assert told(140, 100, replace(PLAIN, concurrency=1, output_tokens=2)) == ""
    assert told(140, 9e5, replace(PLAIN, concurrency=1, output_tokens=1)) == ""


@pytest.mark.parametrize("share", [0.44, 3.04])
def test_what_was_seen_of_public_runs_is_possible(share: float) -> None:
    """The least and the most of what the percentile is of requests over tokens per second."""
    assert told(3600, share * 64e3 / 3600) == ""


def test_requests_that_wait_for_the_cache_say_nothing_of_the_gaps() -> None:
    large = replace(PLAIN.model, num_parameters=70e9, num_activated=70e9)
    crowded = replace(PLAIN, model=large, num_devices=2, concurrency=4096)
    assert told(900, 25, crowded) == ""
    assert told(900, 25, replace(crowded, num_devices=8))


def test_prompts_that_take_most_of_the_time_say_nothing_of_the_gaps() -> None:
    """64 prompts of 0.16 s, then 50 steps of 20 ms."""
    long = replace(PLAIN, workload=replace(PLAIN.workload, prompt_tokens=5000), output_tokens=50)
    assert told(64 * 50 / 11.2, 20, long) == ""
