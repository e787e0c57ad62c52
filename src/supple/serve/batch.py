"""Run several requests in one call of the model, and isolate the request that makes it fail.

If the call fails, the two halves of the batch are tried, then their halves. A single bad request is
found after about 2 log2(batch size) calls, and the others are answered.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from supple.serve.models.answers import Outputs
from supple.serve.models.faults import FAILED, ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.dtypes import Array
from supple.serve.protocol.refusal import Refused

_RETRY_AFTER_S: Final = 1.0

Answer = Outputs | ModelFault | Refused


def run_batch(
    model: ServedModel, requests: Sequence[Mapping[str, Array]], *, within_s: float = math.inf
) -> tuple[list[Answer], bool]:
    """Return the answer to each request, and whether one call computed all. The requests must have
    the same tensor names, types, and shapes of a row.

    A fault concerns one request only. No part of a failed batch starts after `within_s` seconds:
    its requests are `Refused` (503). A model that is not `retry_safe` computes each request once.
    """
    answers = _attempt(model, requests)
    if not isinstance(answers, ModelFault):
        return answers, True
    if len(requests) == 1:
        return [answers], True
    if not model.retry_safe:
        message = f"{FAILED}, or on another one in its batch; it may not be computed twice"
        return [ModelFault(message, where=answers.where) for _ in requests], True
    return _halves(model, requests, time.monotonic() + within_s), False


def _attempt(
    model: ServedModel, requests: Sequence[Mapping[str, Array]]
) -> list[Answer] | ModelFault:
    rows = [next(iter(request.values())).shape[0] for request in requests]
    joined = requests[0]
    if len(requests) > 1:
        joined = {name: np.concatenate([r[name] for r in requests]) for name in requests[0]}
    try:
        return [*model.answers(joined, rows)]
    except ModelFault as fault:
        return fault


def _halves(
    model: ServedModel, requests: Sequence[Mapping[str, Array]], end_s: float
) -> list[Answer]:
    """Compute the two halves of a failed batch separately."""
    middle = len(requests) // 2
    answers: list[Answer] = []
    for half in (requests[:middle], requests[middle:]):
        if time.monotonic() >= end_s:
            reason = "another request of its batch failed, and there was no time left for this one"
            answers += [Refused(reason, 503, _RETRY_AFTER_S) for _ in half]
            continue
        found = _attempt(model, half)
        if not isinstance(found, ModelFault):
            answers += found
        elif len(half) == 1:
            answers.append(found)
        else:
            answers += _halves(model, half, end_s)
    return answers
