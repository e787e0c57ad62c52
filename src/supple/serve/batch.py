"""Several requests in one call of the model, each with an answer of its own.

If the call fails, halves of the batch are tried, and their halves: the one request that is at fault
is alone in the end, after twice the logarithm of the batch in calls, and the others are answered.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from supple.serve.models.answers import Outputs
from supple.serve.models.faults import FAILED, ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.rest import Array, Refused

_RETRY_AFTER_S: Final = 1.0

Answer = Outputs | ModelFault | Refused


def run_batch(
    model: ServedModel, requests: Sequence[Mapping[str, Array]], *, within_s: float = math.inf
) -> tuple[list[Answer], bool]:
    """The answer to each request, and whether one call gave them all. The requests must be of one
    kind: same names, types, and shapes of a row.

    A fault is about its own request alone. No part of a failed batch is begun after `within_s`:
    its requests are `Refused` (503). Those of a model that is not `retry_safe` are computed once.
    """
    answers = _attempt(model, requests)
    if not isinstance(answers, ModelFault):
        return answers, True
    if len(requests) == 1:
        return [answers], True
    if not model.retry_safe:
        told = f"{FAILED}, or on another one in its batch; it may not be computed twice"
        return [ModelFault(told, where=answers.where) for _ in requests], True
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
    """The answers to requests whose batch failed."""
    middle = len(requests) // 2
    answers: list[Answer] = []
    for half in (requests[:middle], requests[middle:]):
        if time.monotonic() >= end_s:
            told = "another request of its batch failed, and there was no time left for this one"
            answers += [Refused(told, 503, _RETRY_AFTER_S) for _ in half]
            continue
        found = _attempt(model, half)
        if not isinstance(found, ModelFault):
            answers += found
        elif len(half) == 1:
            answers.append(found)
        else:
            answers += _halves(model, half, end_s)
    return answers
