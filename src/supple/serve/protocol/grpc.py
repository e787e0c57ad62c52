"""The Open Inference Protocol v2 over gRPC: decode requests from wire bytes, encode responses.

The message classes are built from a table in a separate descriptor pool, so that another copy of
the protocol in the same process does not conflict with this one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from supple.serve.protocol.dtypes import DTYPES, Array
from supple.serve.protocol.grpc_messages import TRITON_ENUMS, TRITON_MESSAGES
from supple.serve.protocol.parameters import GRPC_REQUEST, GRPC_TENSOR, refuse_unsupported
from supple.serve.protocol.refusal import refuse
from supple.serve.protocol.rest import (
    InferRequest,
    RequestLimits,
    WantedOutput,
    checked_dtype,
    checked_shape,
    chosen,
    datatype_of,
    from_bytes,
    refuse_many_strings,
    refuse_repeats,
    to_bytes,
)

SERVICE: Final = "inference.GRPCInferenceService"
METHODS: Final = (
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata"),
    *("ModelConfig", "ModelStatistics", "RepositoryIndex", "ModelInfer"),
)
STREAM: Final = "ModelStreamInfer"
"""The method whose requests are ModelInferRequest messages, and whose responses are too."""

_CONTENTS: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

# Message name to fields as "number name type"; * is repeated, % a map from string, | in a oneof.
_MESSAGES: Final[Mapping[str, Sequence[str]]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("1 live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("1 ready bool",),
    "ModelReadyRequest": ("1 name string", "2 version string"),
    "ModelReadyResponse": ("1 ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("1 name string", "2 version string", "3 extensions *string"),
    "ModelMetadataRequest": ("1 name string", "2 version string"),
    "TensorMetadata": ("1 name string", "2 datatype string", "3 shape *int64"),
    "ModelMetadataResponse": (
        *("1 name string", "2 versions *string", "3 platform string"),
        *("4 inputs *TensorMetadata", "5 outputs *TensorMetadata"),
    ),
    "InferParameter": (
        *("1 bool_param |bool", "2 int64_param |int64", "3 string_param |string"),
        *("4 double_param |double", "5 uint64_param |uint64"),
    ),
    "InferTensorContents": (
        *("1 bool_contents *bool", "2 int_contents *int32", "3 int64_contents *int64"),
        *("4 uint_contents *uint32", "5 uint64_contents *uint64", "6 fp32_contents *float"),
        *("7 fp64_contents *double", "8 bytes_contents *bytes"),
    ),
    "InferInputTensor": (
        *("1 name string", "2 datatype string", "3 shape *int64"),
        *("4 parameters %InferParameter", "5 contents InferTensorContents"),
    ),
    "InferRequestedOutputTensor": ("1 name string", "2 parameters %InferParameter"),
    "ModelInferRequest": (
        *("1 model_name string", "2 model_version string", "3 id string"),
        *("4 parameters %InferParameter", "5 inputs *InferInputTensor"),
        *("6 outputs *InferRequestedOutputTensor", "7 raw_input_contents *bytes"),
    ),
    "InferOutputTensor": (
        *("1 name string", "2 datatype string", "3 shape *int64"),
        *("4 parameters %InferParameter", "5 contents InferTensorContents"),
    ),
    "ModelInferResponse": (
        *("1 model_name string", "2 model_version string", "3 id string"),
        *("4 parameters %InferParameter", "5 outputs *InferOutputTensor"),
        "6 raw_output_contents *bytes",
    ),
    "ModelStreamInferResponse": ("1 error_message string", "2 infer_response ModelInferResponse"),
    **TRITON_MESSAGES,
}

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    "bool": _Field.TYPE_BOOL,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
    "float": _Field.TYPE_FLOAT,
    "double": _Field.TYPE_DOUBLE,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="supple/open_inference.proto", package="inference", syntax="proto3"
    )
    for name, values in TRITON_ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        for text in fields:
            number, field_name, kind = text.split()
            _add_field(described, int(number), field_name, kind)
    return file


def _add_field(owner: descriptor_pb2.DescriptorProto, number: int, name: str, kind: str) -> None:
    field = owner.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    mark, bare = (kind[0], kind[1:]) if kind[0] in "*%|" else ("", kind)
    if mark in ("*", "%"):
        field.label = _Field.LABEL_REPEATED
    if mark == "|":
        if not owner.oneof_decl:
            owner.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    if mark == "%":
        entry = owner.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, 1, "key", "string")
        _add_field(entry, 2, "value", bare)
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".inference.{owner.name}.{entry.name}"
    elif bare in _SCALARS:
        field.type = _SCALARS[bare]
    elif bare in TRITON_ENUMS:
        field.type = _Field.TYPE_ENUM
        field.type_name = f".inference.{bare}"
    else:
        field.type = _Field.TYPE_MESSAGE
        field.type_name = f".inference.{bare}"


def _classes() -> Mapping[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())  # type: ignore[attr-defined]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))
        for name in _MESSAGES
    }


MESSAGES: Final[Mapping[str, Any]] = _classes()
"""The protocol's message classes by name."""


def parse(method: str, wire: bytes, limits: RequestLimits) -> Any:
    """Return the request message of `method` in the bytes `wire`. Raises `Refused`."""
    _refuse_many_fields(wire, 3 * limits.max_tensors + limits.max_parameters + 8)
    try:
        return MESSAGES[f"{method}Request"].FromString(wire)
    except (message.DecodeError, ValueError):
        refuse(f"the request is not an inference.{method}Request message")


def _refuse_many_fields(wire: bytes, most: int) -> None:
    """Raise `Refused` for a message of more than `most` fields: an empty input takes two bytes on
    the wire, but about a hundred in memory."""
    at = count = 0
    while at < len(wire):
        count += 1
        if count > most:
            refuse(f"the request has more than {most} fields; inputs, outputs and parameters count")
        tag, at = _varint(wire, at)
        if tag & 7 == 0:
            _, at = _varint(wire, at)
        elif tag & 7 == 2:
            length, at = _varint(wire, at)
            at += length
        elif tag & 7 in (1, 5):
            at += 8 if tag & 7 == 1 else 4
        else:
            refuse("the request has a field with a wire type that the protocol does not use")


def _varint(wire: bytes, at: int) -> tuple[int, int]:
    """Return the varint at `at` and its end. protobuf refuses one that is cut off."""
    value = shift = 0
    for byte in wire[at : at + 10]:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if byte < 128:
            return value, at
    return value, len(wire)


def decode_infer(
    parsed: Any, limits: RequestLimits, *, supported: tuple[str, ...] = GRPC_REQUEST
) -> InferRequest:
    """Convert a ModelInferRequest message with the parameters in `supported`. Raises only
    `Refused`."""
    if not 0 < len(parsed.inputs) <= limits.max_tensors:
        refuse(f"{len(parsed.inputs)} inputs; 1 to {limits.max_tensors} are accepted")
    if len(parsed.outputs) > limits.max_tensors:
        refuse(f"{len(parsed.outputs)} outputs; at most {limits.max_tensors} are accepted")
    if len(parsed.parameters) > limits.max_parameters:
        refuse(f"{len(parsed.parameters)} parameters; at most {limits.max_parameters} are accepted")
    parameters = _parameters(parsed)
    refuse_unsupported(parameters, supported, "the request")
    raws = parsed.raw_input_contents
    if raws and len(raws) != len(parsed.inputs):
        refuse(f"{len(raws)} raw_input_contents for {len(parsed.inputs)} inputs")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(parsed.inputs):
        name = tensor.name
        if not 0 < len(name) <= 256 or name in inputs:
            refuse(f"input {name[:80]!r}: names must be unique and have 1 to 256 characters")
        if tensor.parameters:
            refuse_unsupported(_parameters(tensor), GRPC_TENSOR, f"input {name[:40]!r}")
        shape = checked_shape(name, list(tensor.shape[: limits.max_dims + 1]), limits)
        dtype = checked_dtype(name, tensor.datatype)
        refuse_many_strings(name, dtype, shape, limits)
        if raws:
            if tensor.HasField("contents"):
                refuse(f"input {name!r} has both contents and raw_input_contents; send one")
            inputs[name] = from_bytes(name, raws[index], tensor.datatype, shape)
        else:
            inputs[name] = _from_contents(name, tensor, dtype, shape)
    for output in parsed.outputs:
        refuse_unsupported(_parameters(output), GRPC_TENSOR, f"output {output.name[:40]!r}")
    outputs = tuple(WantedOutput(name=o.name, binary=True) for o in parsed.outputs)
    refuse_repeats(outputs)
    return InferRequest(
        inputs=inputs,
        request_id=parsed.id[:1024],
        outputs=outputs,
        parameters=parameters,
    )


def _parameters(owner: Any) -> dict[str, Any]:
    return {
        key: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for key, value in owner.parameters.items()
    }


def _from_contents(name: str, tensor: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        refuse(f"input {name!r}: {tensor.datatype} must be sent in raw_input_contents")
    values = getattr(tensor.contents, field)
    count = math.prod(shape)
    if len(values) != count:
        refuse(
            f"input {name!r}: shape {list(shape)} needs {count} elements, {field} has {len(values)}"
        )
    if dtype.kind == "O":
        array = np.empty(count, dtype=object)
        array[:] = list(values)
        return array.reshape(shape)
    try:
        return np.array(values, dtype=dtype).reshape(shape)
    except OverflowError:
        refuse(f"input {name!r}: {field} has values outside the range of {tensor.datatype}")


def encode_infer(
    request: InferRequest, outputs: Mapping[str, Array], *, model: str, version: str
) -> Any:
    """Return the ModelInferResponse message, with raw tensors."""
    answer = MESSAGES["ModelInferResponse"](
        model_name=model, model_version=version, id=request.request_id
    )
    for wanted, array in chosen(request, outputs):
        answer.outputs.add(name=wanted.name, datatype=datatype_of(array), shape=array.shape)
        answer.raw_output_contents.append(to_bytes(array))
    return answer


assert set(_CONTENTS) <= set(DTYPES)
