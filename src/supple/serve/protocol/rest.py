"""The Open Inference Protocol v2 over HTTP: decode bytes to named numpy arrays, and encode them.

JSON bodies and the binary tensor extension. Every body that violates the protocol or the limits
raises `Refused` with a status and a reason, and no other exception. The first dim of an array is
the batch.
"""

import contextlib
import gc
import math
import struct
from array import array as packed
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, NoReturn, final

import numpy as np
import orjson

from supple.serve.protocol.dtypes import DATATYPES, DTYPES, Array, is_float, native
from supple.serve.protocol.parameters import (
    REST_INPUT,
    REST_OUTPUT,
    REST_REQUEST,
    flag,
    refuse_unsupported,
)
from supple.serve.protocol.refusal import refuse

_JSON_TYPES: Final[Mapping[str, frozenset[type]]] = {
    "b": frozenset({bool}),
    "u": frozenset({bool, int}),
    "i": frozenset({bool, int}),
    "f": frozenset({bool, int, float}),
    "V": frozenset({bool, int, float}),
    "O": frozenset({str}),
}
"""Numpy kind of a tensor to the Python types its JSON data may hold. Bool counts as 0 and 1; the
kind of bfloat16 is V."""

_SHOWN: Final[Mapping[type, str]] = {
    **{bool: "true or false", int: "whole numbers", float: "fractions"},
    **{str: "strings", dict: "objects", type(None): "null"},
}

_LARGE_BYTES: Final = 1024 * 1024
"""JSON size from which the garbage collector is off during parsing: see `_no_collection`."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits of one request; each is checked before memory is allocated."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_tensors: int = 64
    """Inputs, and requested outputs."""
    max_parameters: int = 256
    """Parameters of the request, and of each tensor."""
    max_dims: int = 16
    max_elements: int = 8 * 1024 * 1024
    """Per tensor."""
    max_strings: int = 256 * 1024
    """Per tensor of BYTES. Its elements are created one by one, this many in about 0.1 s."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WantedOutput:
    """An output that a request names; `binary`: as raw bytes after the JSON."""

    name: str
    binary: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """One decoded inference request. `inputs` is never empty; empty `outputs` means all."""

    inputs: Mapping[str, Array]
    request_id: str = ""
    outputs: tuple[WantedOutput, ...] = ()
    binary_output: bool = False
    """Whether outputs are binary if the request names none."""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])


def decode_request(
    body: bytes, *, json_bytes: int | None = None, limits: RequestLimits
) -> InferRequest:
    """Decode the body of an inference request. `json_bytes` is `Inference-Header-Content-Length`,
    the size of the JSON part; raw tensors follow in the order of the inputs. None: all is JSON.

    Raises `Refused`, and no other exception, for a body that is no request within `limits`.
    """
    if json_bytes is not None and not 0 < json_bytes <= len(body):
        refuse(
            f"Inference-Header-Content-Length is {json_bytes}, and the body has {len(body)} bytes"
        )
    document = _parse_json(body if json_bytes is None else body[:json_bytes])
    raw = memoryview(b"" if json_bytes is None else body)[json_bytes or 0 :]
    tensors = document.get("inputs")
    if not isinstance(tensors, list) or not tensors:
        refuse('the body has no "inputs", a list of at least one tensor')
    if len(tensors) > limits.max_tensors:
        refuse(f"{len(tensors)} inputs; at most {limits.max_tensors} are accepted")
    inputs: dict[str, Array] = {}
    for tensor in tensors:
        name, array, raw = _decode_tensor(tensor, raw, limits)
        if name in inputs:
            refuse(f"input {name!r} is given twice")
        inputs[name] = array
    if len(raw):
        refuse(f"{len(raw)} bytes follow the last tensor; no binary_data_size includes them")
    request_id = document.get("id", "")
    if not isinstance(request_id, str) or len(request_id) > 1024:
        refuse('"id" is a string of at most 1024 characters')
    parameters = _parameters(document, "the request", REST_REQUEST, limits)
    return InferRequest(
        inputs=inputs,
        request_id=request_id,
        outputs=_wanted(document.get("outputs"), limits),
        binary_output=flag(parameters, "binary_data_output"),
        parameters=parameters,
    )


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        if len(text) > _LARGE_BYTES:
            with _no_collection():
                document = orjson.loads(text)
        else:
            document = orjson.loads(text)
    except ValueError as error:
        hint = ""
        if b"NaN" in text or b"Infinity" in text:
            hint = "; JSON has no NaN and no infinity, send them as binary data"
        elif "UTF-8" in str(error) or "surrogate" in str(error):
            hint = "; bytes that are not UTF-8 are sent as binary data (binary_data_size)"
        refuse(f"the body is not JSON: {str(error)[:200]}{hint}")
    if not isinstance(document, dict):
        refuse("the body is JSON, but not an object with inputs")
    return document


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the garbage collector in the block, for millions of new lists without cycles: parsing
    16 MiB of `[],` took 2.2 s with it and 0.5 s without."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parameters(
    owner: dict[str, Any], what: str, supported: tuple[str, ...], limits: RequestLimits
) -> dict[str, Any]:
    found = owner.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        refuse(f'"parameters" of {what} is not an object')
    if len(found) > limits.max_parameters:
        refuse(f"{len(found)} parameters of {what}; at most {limits.max_parameters} are accepted")
    refuse_unsupported(found, supported, what)
    return found


def _decode_tensor(
    tensor: object, raw: memoryview, limits: RequestLimits
) -> tuple[str, Array, memoryview]:
    if not isinstance(tensor, dict):
        refuse("an input is not an object with name, shape, datatype and data")
    name = tensor.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= 256:
        refuse('an input has no "name" of 1 to 256 characters')
    shape = checked_shape(name, tensor.get("shape"), limits)
    dtype = checked_dtype(name, tensor.get("datatype"))
    refuse_many_strings(name, dtype, shape, limits)
    parameters = _parameters(tensor, f"input {name[:40]!r}", REST_INPUT, limits)
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in tensor:
            refuse(f'input {name!r} has neither "data" nor parameters.binary_data_size')
        return name, _from_json(name, tensor["data"], dtype, shape, limits), raw
    if "data" in tensor:
        refuse(f"input {name!r} has both data and binary_data_size; send one")
    if type(size) is not int or not 0 <= size <= len(raw):
        shown = size if isinstance(size, int | float) else "no number"
        refuse(f"input {name!r}: binary_data_size is {shown}, {len(raw)} bytes are left")
    return name, from_bytes(name, raw[:size], tensor["datatype"], shape), raw[size:]


def checked_shape(name: str, shape: object, limits: RequestLimits) -> tuple[int, ...]:
    """Return `shape` as a tuple of whole numbers from 0. Raises `Refused`, also if the product of
    the nonzero lengths is too large: numpy multiplies those too."""
    if not isinstance(shape, list | tuple) or not 0 < len(shape) <= limits.max_dims:
        refuse(f'input {name!r}: "shape" is a list of 1 to {limits.max_dims} whole numbers')
    for length in shape:
        if type(length) is not int or not 0 <= length <= limits.max_elements:
            refuse(f"input {name!r}: a shape holds whole numbers from 0 to {limits.max_elements}")
    count = math.prod(max(1, length) for length in shape)
    if count > limits.max_elements:
        refuse(
            f"input {name!r}: shape {list(shape)} is {count} elements; at most "
            f"{limits.max_elements} are accepted"
        )
    return tuple(shape)


def refuse_many_strings(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], limits: RequestLimits
) -> None:
    """Raise `Refused` (413) for a BYTES tensor of more than `max_strings` elements."""
    if dtype.kind == "O" and (count := math.prod(shape)) > limits.max_strings:
        refuse(
            f"input {name!r}: {count} elements of BYTES; at most {limits.max_strings} are accepted",
            413,
        )


def checked_dtype(name: str, datatype: object) -> np.dtype[Any]:
    """Return the numpy dtype of a protocol `datatype`. Raises `Refused`."""
    if not isinstance(datatype, str) or datatype not in DTYPES:
        shown = repr(datatype[:40]) if isinstance(datatype, str) else "no string and"
        refuse(f"input {name!r}: datatype {shown} is none of {', '.join(DTYPES)}")
    return DTYPES[datatype]


def _from_json(
    name: str, data: object, dtype: np.dtype[Any], shape: tuple[int, ...], limits: RequestLimits
) -> Array:
    """Decode `data`, a flat or nested list. Element types are checked before an array is created:
    numpy makes an array of strings as wide as the longest one."""
    if not isinstance(data, list):
        refuse(f'input {name!r}: "data" is a list')
    if is_float(dtype) and len(data) == math.prod(shape):
        try:  # fast path: packs a flat list of numbers, 8 bytes each, and raises for anything else
            return _floats(name, np.frombuffer(packed("d", data)), dtype, shape)
        except TypeError:
            pass  # nested, or wrong
    values, kinds = _flat(name, data, limits.max_dims)
    if not kinds <= _JSON_TYPES[dtype.kind]:
        wrong = next(iter(kinds - _JSON_TYPES[dtype.kind]))
        if dtype.kind == "O":
            refuse(f"input {name!r}: BYTES data holds strings, not {_SHOWN[wrong]}")
        refuse(f"input {name!r}: data holds {_SHOWN[wrong]} and does not fit in {DATATYPES[dtype]}")
    if len(values) != math.prod(shape):
        _refuse_count(name, shape, len(values))
    if dtype.kind == "O":
        return _objects(name, [value.encode() for value in values], shape)
    if not is_float(dtype):
        try:
            return np.array(values, dtype=dtype).reshape(shape)
        except OverflowError:
            refuse(f"input {name!r}: data does not fit in {DATATYPES[dtype]}")
    return _floats(name, np.array(values, dtype=np.float64), dtype, shape)


def _floats(name: str, wide: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        refuse(f"input {name!r}: data is outside the range of {DATATYPES[dtype]}")
    return narrow.reshape(shape)


def _flat(name: str, data: list[Any], max_dims: int) -> tuple[list[Any], set[type]]:
    """Flatten nested lists: their elements, and the element types. Raises `Refused` if ragged."""
    for _ in range(max_dims):
        kinds = set(map(type, data))
        if list not in kinds:
            return data, kinds
        if len(kinds) > 1 or len(set(map(len, data))) > 1:
            refuse(f"input {name!r}: data is ragged: its lists differ in length or depth")
        data = list(chain.from_iterable(data))
    refuse(f"input {name!r}: data is nested deeper than {max_dims} lists")


def _objects(name: str, items: Sequence[bytes], shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    if len(items) != count:
        _refuse_count(name, shape, len(items))
    array = np.empty(count, dtype=object)
    array[:] = items
    return array.reshape(shape)


def from_bytes(name: str, raw: memoryview | bytes, datatype: str, shape: tuple[int, ...]) -> Array:
    """Decode a raw tensor: little-endian elements; BYTES elements follow their length, a
    little-endian uint32. The array may share memory with `raw`. Raises `Refused`."""
    if datatype == "BYTES":
        return _objects(name, _split_strings(name, bytes(raw), math.prod(shape)), shape)
    width = DTYPES[datatype].itemsize
    count = math.prod(shape)
    if len(raw) != count * width:
        refuse(
            f"input {name!r}: shape {list(shape)} of {datatype} is {count * width} bytes, "
            f"{len(raw)} came"
        )
    if datatype == "BOOL":
        return (np.frombuffer(raw, dtype=np.uint8) != 0).reshape(shape)
    little = DTYPES[datatype].newbyteorder("<")
    return np.frombuffer(raw, dtype=little).reshape(shape)


def _refuse_count(name: str, shape: tuple[int, ...], have: int) -> NoReturn:
    need = math.prod(shape)
    refuse(f"input {name!r}: shape {list(shape)} needs {need} elements, data has {have}")


def _split_strings(name: str, raw: bytes, count: int) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(found) == count:
            refuse(f"input {name!r}: BYTES data continues after the {count} elements of its shape")
        if at + 4 > len(raw):
            refuse(f"input {name!r}: BYTES data ends inside a length")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if length > len(raw) - at:
            refuse(f"input {name!r}: BYTES data ends inside an element of {length} bytes")
        found.append(raw[at : at + length])
        at += length
    return found


def _wanted(outputs: object, limits: RequestLimits) -> tuple[WantedOutput, ...]:
    if outputs is None:
        return ()
    if not isinstance(outputs, list) or len(outputs) > limits.max_tensors:
        refuse(f'"outputs" is a list of at most {limits.max_tensors}')
    found: list[WantedOutput] = []
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            refuse('an output has no "name"')
        parameters = _parameters(output, f"output {name[:40]!r}", REST_OUTPUT, limits)
        found.append(WantedOutput(name=name, binary=flag(parameters, "binary_data")))
    refuse_repeats(found)
    return tuple(found)


def refuse_repeats(outputs: Sequence[WantedOutput]) -> None:
    """Raise `Refused` if an output is requested twice: it would multiply the response."""
    if len({output.name for output in outputs}) != len(outputs):
        refuse("an output is requested twice")


def chosen(request: InferRequest, outputs: Mapping[str, Array]) -> list[tuple[WantedOutput, Array]]:
    """Return the requested outputs in the requested order. Raises `Refused` if one is missing."""
    if not request.outputs:
        return [
            (WantedOutput(name=name, binary=request.binary_output), array)
            for name, array in outputs.items()
        ]
    found: list[tuple[WantedOutput, Array]] = []
    for wanted in request.outputs:
        if wanted.name not in outputs:
            refuse(f"no output {wanted.name[:40]!r}; the model has {', '.join(outputs)}")
        found.append((wanted, outputs[wanted.name]))
    return found


def encode_response(
    request: InferRequest, outputs: Mapping[str, Array], *, model: str, version: str
) -> tuple[bytes, int | None]:
    """Return the body of the response, and the size of its JSON part (None: all is JSON)."""
    tensors: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for wanted, array in chosen(request, outputs):
        described: dict[str, Any] = {
            "name": wanted.name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if wanted.binary:
            raw = to_bytes(array)
            described["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        elif array.dtype.kind == "O":
            described["data"] = _texts(wanted.name, array)
        else:
            if is_float(array.dtype) and not np.isfinite(array).all():
                _refuse_in_json(wanted.name, "values that are NaN or infinite")
            described["data"] = array.ravel().tolist()
        tensors.append(described)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": tensors}
    if request.request_id:
        document["id"] = request.request_id
    head = orjson.dumps(document)
    return (head, None) if not tail else (b"".join([head, *tail]), len(head))


def _texts(name: str, array: Array) -> list[str]:
    try:
        return [item.decode() for item in array.ravel()]
    except UnicodeDecodeError:
        _refuse_in_json(name, "bytes that are not UTF-8")


def _refuse_in_json(name: str, what: str) -> NoReturn:
    refuse(f"output {name!r} has {what}, which JSON cannot encode: set binary_data", 406)


def datatype_of(array: Array) -> str:
    """Return the protocol datatype of an output. Raises `Refused` (500) if there is none."""
    name = DATATYPES.get(native(array.dtype))
    if name is None:
        refuse(f"the model returned {array.dtype}, which the protocol cannot carry", 500)
    return name


def to_bytes(array: Array) -> bytes:
    """Encode a tensor as raw bytes, the inverse of `from_bytes`."""
    if array.dtype.kind == "O":
        return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
