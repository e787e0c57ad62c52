"""Parameters of requests and tensors: each is supported, or refused by name.

A parameter that was ignored would return another answer than the client wants: all values instead
of the three best classes, or one sequence's state for another's.
"""

from collections.abc import Mapping
from typing import Any, Final

from supple.serve.protocol.refusal import refuse

EMPTY_FINAL: Final = "triton_enable_empty_final_response"
"""Request parameter of gRPC streams: an empty message after the last part of an answer."""
REST_REQUEST: Final = ("binary_data_output", "priority", "timeout")
STREAM_REQUEST: Final = ("binary_data_output",)
"""Streams have no queue, so no priority and no deadline in it."""
REST_INPUT: Final = ("binary_data_size",)
REST_OUTPUT: Final = ("binary_data",)
GRPC_REQUEST: Final = ("priority", "timeout")
GRPC_TENSOR: Final = ()

_WHY: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("sequence_id", "sequence_start", "sequence_end"),
        "replicas keep no state between requests, send each without a sequence",
    ),
    "classification": "outputs are returned whole, choose the classes in the client or in the "
    "model (class_count)",
    **dict.fromkeys(
        ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"),
        "tensors are sent in the request, as binary data",
    ),
}
"""Known extensions of other servers, and the reason or the alternative."""


def refuse_unsupported(
    parameters: Mapping[str, Any], supported: tuple[str, ...], owner: str
) -> None:
    """Raise `Refused` (400) for a parameter of `owner` that is not in `supported`. A zero, false or
    empty value of an extension in `_WHY` means that it is not used."""
    for name, value in parameters.items():
        if name in supported or (name in _WHY and not value):
            continue
        why = _WHY.get(name)
        if why is None:
            why = f"{owner} takes {', '.join(supported) or 'no parameters'}"
        refuse(f"the parameter {name[:80]!r} of {owner} is not supported: {why}")


def flag(parameters: Mapping[str, Any], name: str) -> bool:
    """Return a parameter that is true or false; without it, false. Raises `Refused`."""
    value = parameters.get(name, False)
    if type(value) is not bool:
        refuse(f"the parameter {name} is true or false")
    return value
