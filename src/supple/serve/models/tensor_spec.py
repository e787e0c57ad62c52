"""Declared dtype and shape of one row of an input or output: `"float32[3, -1]"`."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from supple.core.spec import SpecError
from supple.serve.protocol.dtypes import BF16, DATATYPES, DTYPES, FP32, Array

_SPEC = re.compile(r"([a-z]+[0-9]*)\[([-0-9, ]*)\]")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Dtype and shape of one row of an input or output, without the batch dim; -1: any length."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def datatype(self) -> str:
        """The protocol's name for `dtype`."""
        return DATATYPES[self.dtype]

    def admits(self, array: Array) -> bool:
        """Whether the rows of `array` have this dtype and shape."""
        return array.dtype == self.dtype and self._fits(array.shape[1:])

    def accepts(self, array: Array) -> bool:
        """Whether a request may hold `array`: BF16 is accepted for FP32 too, which holds all of its
        values."""
        dtype = FP32 if array.dtype == BF16 != self.dtype else array.dtype
        return dtype == self.dtype and self._fits(array.shape[1:])

    def _fits(self, row: tuple[int, ...]) -> bool:
        return len(row) == len(self.shape) and all(
            want in (-1, have) for want, have in zip(self.shape, row, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.datatype}[n, {', '.join(map(str, self.shape))}]".replace(", ]", "]")


def parse_tensor(text: str, *, what: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Parse `"float32[3, -1]"` as (dtype, shape); `"bytes[]"` is a string. Raises `SpecError`."""
    match = _SPEC.fullmatch(text.strip())
    lengths = [part.strip() for part in match[2].split(",")] if match and match[2].strip() else []
    try:
        assert match is not None
        dtype = np.dtype(object) if match[1] == "bytes" else np.dtype(match[1])
        shape = tuple(int(length) for length in lengths)
        if dtype not in DATATYPES or any(length == 0 or length < -1 for length in shape):
            raise ValueError(text)
    except (AssertionError, TypeError, ValueError):
        names = ", ".join("bytes" if d.kind == "O" else str(d) for d in DTYPES.values())
        raise SpecError(
            f"{what} is {text!r}. Write a dtype and the shape of one row, as float32[64] or "
            f"float32[3, -1], -1 for any length; dtypes are {names}."
        ) from None
    return dtype, shape


def specs(user: Any, which: str, what: str) -> Iterator[TensorSpec]:
    """Parse the declared `inputs` or `outputs` (`which`) of `user`. Raises `SpecError`."""
    declared = getattr(user, which, None) or {}
    if not isinstance(declared, Mapping):
        raise SpecError(f'{which} of {what} must be a dict: {which} = {{"x": "float32[64]"}}.')
    for name, text in declared.items():
        dtype, shape = parse_tensor(str(text), what=f"{which}[{name!r}] of {what}")
        yield TensorSpec(name=str(name), dtype=dtype, shape=shape)
