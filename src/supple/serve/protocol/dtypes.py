"""Element types of the protocol and their numpy dtypes.

numpy has no bfloat16: `ml_dtypes` adds the dtype, which converts, compares and lists like a float.
"""

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BF16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)
FP32: Final[np.dtype[Any]] = np.dtype(np.float32)

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": BF16,
    "FP32": FP32,
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""The protocol's names of element types; BYTES is an object array of `bytes`."""

DATATYPES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPES.items()}


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether elements may be fractions, NaN or infinite. The numpy kind of bfloat16 is `V`."""
    return dtype.kind == "f" or dtype == BF16


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in this machine's byte order."""
    return dtype.newbyteorder("=")
