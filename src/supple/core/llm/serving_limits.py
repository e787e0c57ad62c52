"""What no measurement of a served model can be: against its data sheet, and against itself.

A request waits for its own tokens: with b requests at a time and r tokens a second the mean time
from one token to the next is at most b / r. A tenth of all gaps are at least the 90th percentile,
so that this is at most ten times the mean (Markov's inequality). Nor is it far below the mean while
most of the time goes to answers, of as many requests as the cache holds: of public runs it is 0.4
to 3 times b / r. Units that were taken for one another are a thousand times apart.
"""

from supple.core.llm.decoding import DecodingRun, in_accelerators
from supple.core.llm.inference import ServingMeasurement, fit_inference
from supple.core.words import in_digits

_PEAKS = 4.0
"""Times the peak of the data sheet, which is of 16 bits: weights of 4 are multiplied so fast."""
_MARKOV = 10.0
"""Times the mean that a 90th percentile can be."""
_FLAT = 0.1
"""Share of the mean that a 90th percentile has at least."""
_ROOM = 4.0
"""Times by which the cache of a request, by data sheets alone, may be smaller than thought."""


def why_impossible(m: ServingMeasurement) -> tuple[str, str] | None:
    """What is impossible of the measurement with its numbers and the rule, and what to do; None
    where nothing is."""
    run = m.run
    peak = run.num_devices * run.device.flops_per_s
    if 2.0 * run.model.num_activated * m.tokens_per_s > _PEAKS * peak:
        return (
            f"{in_digits(m.tokens_per_s)} tokens/s of {in_digits(run.model.num_activated / 1e9)}B "
            f"parameters are {in_digits(2e-12 * run.model.num_activated * m.tokens_per_s)} "
            f"TFLOP/s; the data sheet says {in_digits(peak * 1e-12)} of "
            f"{in_accelerators(run.num_devices)} ({run.device.name}), and nothing does more than "
            f"{_PEAKS:g} times that",
            "Give the tokens of one copy in one second",
        )
    mean_s, itl = run.concurrency / m.tokens_per_s, in_digits(1e3 * m.itl_p90_s)
    told = (
        f"{run.concurrency} at a time and {in_digits(m.tokens_per_s)} tokens/s are a token every "
        f"{in_digits(1e3 * mean_s)} ms of a request"
    )
    units = "Give itl_p90_ms in milliseconds, and the tokens per second of the whole copy"
    gaps = run.output_tokens - 1.0  # a request's first token comes after none
    if gaps > 0.0 and m.itl_p90_s > _MARKOV * mean_s * run.output_tokens / gaps:
        return (
            f"itl_p90_ms is {itl}, and {told}: a tenth of the gaps cannot be longer than "
            f"{_MARKOV:g} times the mean",
            units,
        )
    if m.itl_p90_s < _FLAT * mean_s * _of_answers(run):
        return (
            f"itl_p90_ms is {itl}, and {told}: nine of ten gaps are not that far below the mean",
            f"{units}, while that many requests are always there",
        )
    return None


def _of_answers(run: DecodingRun) -> float:
    """Share of b / r that goes by between the tokens of an answer, at least: requests that the
    cache does not hold wait, and no token of a prompt takes longer than one of an answer."""
    (left, taken) = fit_inference([]).cache_room([run])[0]
    held = min(1.0, max(1.0, _ROOM * left / taken) / run.concurrency)
    asked = run.workload.prompt_tokens + run.output_tokens
    return held * run.output_tokens / asked
