"""Detect impossible measurements of a served model, by its data sheet and by consistency.

With b concurrent requests and r tokens a second the mean time between two tokens of a request is at
most b / r. A tenth of all gaps are at least the 90th percentile, so that this is at most ten times
the mean (Markov's inequality). It is not far below the mean either if most of the time is spent on
answers of all b requests: in public runs it is 0.4 to 3 times b / r. Wrong units are wrong by a
factor of a thousand.
"""

from supple.core.llm.decoding import DecodingRun, in_accelerators
from supple.core.llm.inference import ServingMeasurement, fit_inference
from supple.core.words import in_digits

_PEAKS = 4.0
"""Largest possible speed over the data sheet's 16-bit peak: 4-bit weights are that much faster."""
_MARKOV = 10.0
"""Largest possible 90th percentile over the mean."""
_FLAT = 0.1
"""Smallest plausible 90th percentile over the mean."""
_ROOM = 4.0
"""Factor by which the prior may overestimate the cache of a request."""


def why_impossible(m: ServingMeasurement) -> tuple[str, str] | None:
    """Return the contradiction of an impossible measurement, with its numbers and the rule, and the
    advice; None for a possible one."""
    run = m.run
    peak = run.num_devices * run.device.flops_per_s
    if 2.0 * run.model.num_activated * m.tokens_per_s > _PEAKS * peak:
        return (
            f"{in_digits(m.tokens_per_s)} tokens/s of {in_digits(run.model.num_activated / 1e9)}B "
            f"parameters are {in_digits(2e-12 * run.model.num_activated * m.tokens_per_s)} "
            f"TFLOP/s; the data sheet states {in_digits(peak * 1e-12)} for "
            f"{in_accelerators(run.num_devices)} ({run.device.name}), and no device does more "
            f"than {_PEAKS:g} times that",
            "Give the tokens of one copy in one second",
        )
    mean_s, itl = run.concurrency / m.tokens_per_s, in_digits(1e3 * m.itl_p90_s)
    load = (
        f"{run.concurrency} at a time and {in_digits(m.tokens_per_s)} tokens/s are a token every "
        f"{in_digits(1e3 * mean_s)} ms of a request"
    )
    units = "Give itl_p90_ms in milliseconds, and the tokens per second of the whole copy"
    gaps = run.output_tokens - 1.0  # a request's first token comes after none
    if gaps > 0.0 and m.itl_p90_s > _MARKOV * mean_s * run.output_tokens / gaps:
        return (
            f"itl_p90_ms is {itl}, and {load}: a tenth of the gaps cannot be longer than "
            f"{_MARKOV:g} times the mean",
            units,
        )
    if m.itl_p90_s < _FLAT * mean_s * _of_answers(run):
        return (
            f"itl_p90_ms is {itl}, and {load}: nine of ten gaps are not that far below the mean",
            f"{units}, while that many requests are always present",
        )
    return None


def _of_answers(run: DecodingRun) -> float:
    """Lower bound of the share of b / r that is spent between the tokens of an answer: requests
    beyond the cache wait, and a prompt token takes at most as long as an answer token."""
    (left, taken) = fit_inference([]).cache_room([run])[0]
    held = min(1.0, max(1.0, _ROOM * left / taken) / run.concurrency)
    return held * run.output_tokens / (run.workload.prompt_tokens + run.output_tokens)
