"""Split a model's answer to a batch into the outputs of each request, and validate them.

The rows of each request are validated separately, so that an error concerns one request only. Rows
of different lengths are a list with one tensor for each row, without padding.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, final

import numpy as np

from supple.serve.models.faults import ModelFault
from supple.serve.models.tensor_spec import TensorSpec
from supple.serve.protocol.dtypes import BF16, DATATYPES, Array, is_float, native

Outputs = dict[str, Array]
_NUMBERS: Final = frozenset({bool, int, float})
_TEXT: Final = frozenset({str, bytes})


@final
class AnswerCheck:
    """Validates answers against the declared outputs; without a declaration, only that the protocol
    can carry them."""

    def __init__(self, specs: Sequence[TensorSpec], *, allow_nan: bool) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.allow_nan = allow_nan
        self._free = {spec.name for spec in specs if -1 in spec.shape}
        self.shares = not self._free
        """Whether the length of each answer row is independent of the other rows."""

    def split(self, answer: Any, rows: Sequence[int]) -> list[Outputs | ModelFault]:
        """Return the outputs of each request, or its `ModelFault`. Raises `ModelFault` for an error
        in the whole answer."""
        named = self._named(answer)
        self.shares = all(isinstance(named[name], list) for name in self._free)
        if not self.shares and len(rows) > 1:
            raise ModelFault(
                "an output is declared with a -1 and was returned as one tensor for several "
                "requests: return a list with a tensor for each row"
            )
        found: list[Outputs | ModelFault] = [{} for _ in rows]
        for name, value in named.items():
            for index, part in enumerate(self._parts(name, value, rows)):
                outputs = found[index]
                if isinstance(part, ModelFault):
                    found[index] = part
                elif not isinstance(outputs, ModelFault):
                    outputs[name] = part
        return found

    def part(self, answer: Any) -> Outputs:
        """Validate one part of a stream against the declared outputs; it may have any number of
        rows. Raises `ModelFault`."""
        found: Outputs = {}
        for name, value in self._named(answer, "stream() yielded").items():
            array = _tensor(name, value)
            self._refuse_other(name, array)
            self._refuse_values(name, array)
            found[name] = array
        return found

    def _named(self, answer: Any, returned: str = "predict() returned") -> dict[str, Any]:
        if isinstance(answer, Mapping):
            named = {str(name): _listed(value) for name, value in answer.items()}
        else:
            single = next(iter(self._specs)) if len(self._specs) == 1 else "output"
            named = {single: _listed(answer)}
        if self._specs and named.keys() != self._specs.keys():
            raise ModelFault(
                f"{returned} {', '.join(named) or 'nothing'}; the class declares "
                f"{', '.join(self._specs)}"
            )
        if not all(name.isprintable() for name in named):
            raise ModelFault(f"{returned} an output whose name cannot be printed")
        return named

    def _parts(self, name: str, value: Any, rows: Sequence[int]) -> Iterator[Array | ModelFault]:
        batch = sum(rows)
        bounds = tuple(pairwise(accumulate(rows, initial=0)))
        if isinstance(value, list):
            if len(value) != batch:
                raise ModelFault(
                    f"output {name!r} is a list of {len(value)} for a batch of {batch}: it must "
                    "have a tensor for each row"
                )
            for start, end in bounds:
                try:
                    array = _stacked(name, value[start:end])
                    self._refuse_shape(name, array, end - start)
                    self._refuse_values(name, array)
                    yield array
                except ModelFault as fault:
                    yield fault
            return
        array = _tensor(name, value, are_strings_checked=False)
        self._refuse_shape(name, array, batch)
        if array.dtype.kind != "O" and self._is_sent(array):  # valid as a whole: skip the parts
            yield from (array[start:end] for start, end in bounds)
            return
        for start, end in bounds:
            part = array[start:end]
            try:
                if array.dtype.kind == "O":
                    part = _strings(name, part)
                self._refuse_values(name, part)
                yield part
            except ModelFault as fault:
                yield fault

    def _refuse_shape(self, name: str, array: Array, rows: int) -> None:
        if array.shape[:1] != (rows,):
            raise ModelFault(
                f"output {name!r} has shape {list(array.shape)} for a batch of {rows}: its first "
                "dim must be the number of rows"
            )
        self._refuse_other(name, array)

    def _refuse_other(self, name: str, array: Array) -> None:
        spec = self._specs.get(name)
        if spec is not None and not spec.admits(array):
            raise ModelFault(
                f"output {name!r} is {array.dtype}{list(array.shape)}; the class declares {spec}"
            )

    def _is_sent(self, array: Array) -> bool:
        return not is_float(array.dtype) or self.allow_nan or bool(np.isfinite(array).all())

    def _refuse_values(self, name: str, array: Array) -> None:
        if not self._is_sent(array):
            bad = array.size - int(np.isfinite(array).sum())
            raise ModelFault(
                f"output {name!r} has {bad} of {array.size} values that are NaN or infinite. Set "
                "allow_nan = True in the class if that is a valid answer."
            )


def _listed(value: Any) -> Any:
    """Convert a tuple, or a one-dimensional array of objects, to a list."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.ndim == 1:
        return list(value)
    return value


def _stacked(name: str, samples: Sequence[Any]) -> Array:
    """Stack the rows of one request to one tensor. Raises `ModelFault` if they differ in shape."""
    kinds = set(map(type, samples))
    if kinds <= _NUMBERS or kinds <= _TEXT:
        return _tensor(name, samples)
    arrays = [_tensor(name, sample) for sample in samples]
    if len({array.shape for array in arrays}) > 1:
        raise ModelFault(
            f"the rows of output {name!r} differ in shape, and those of one request are sent as "
            "one tensor: send rows whose answers differ in length in separate requests"
        )
    return np.stack(arrays)


def _tensor(name: str, value: Any, *, are_strings_checked: bool = True) -> Array:
    """Convert `value` to an array of a dtype the protocol has. Raises `ModelFault`."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            if value.dtype == torch.bfloat16:
                value = value.view(torch.int16).numpy().view(BF16)
            else:
                value = value.numpy()
        # A numpy text array is as wide as its longest element, so text is stored as objects.
        array = np.asarray(value, dtype=object if _is_text(value) else None)
        if not array.dtype.isnative:
            array = array.astype(native(array.dtype))
    except BaseException as error:
        raise ModelFault(
            f"output {name!r} is a {type(value).__name__}, which cannot be converted to an array: "
            f"{type(error).__name__}",
        ) from None
    if array.dtype.kind in "US":
        array = array.astype(object)
    if array.dtype not in DATATYPES:
        raise ModelFault(
            f"output {name!r} is {array.dtype}, which the protocol cannot carry; return one of "
            f"{', '.join(map(str, DATATYPES))}"
        )
    return _strings(name, array) if are_strings_checked and array.dtype.kind == "O" else array


def _is_text(value: Any) -> bool:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, str | bytes)


def _strings(name: str, array: Array) -> Array:
    """Convert the elements of an object array to bytes. Raises `ModelFault` if one is no string."""
    flat = np.empty(array.size, dtype=object)
    for index, item in enumerate(array.ravel()):
        if not isinstance(item, str | bytes):
            raise ModelFault(
                f"output {name!r} is an array of objects with a {type(item).__name__}; the "
                "protocol carries numbers, strings and bytes"
            )
        try:
            flat[index] = item.encode() if isinstance(item, str) else bytes(item)
        except BaseException:  # not UTF-8, or raised by a subclass of str
            raise ModelFault(f"output {name!r} has a string that is not UTF-8") from None
    return flat.reshape(array.shape)
