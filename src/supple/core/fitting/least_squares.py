"""Jacobian by forward differences, in one vectorized call.

The parameters of Supple's fits are logarithms, so one step size is suitable for all of them.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]

_NUDGE = 1e-6
"""Step of the differences, in logarithms."""


def forward_slope(evaluate: Callable[[_Vector], _Vector], x: _Vector) -> tuple[_Vector, _Vector]:
    """Return the values at `x`, (values,), and their Jacobian, (values, parameters). `evaluate`
    maps (sets, parameters) to (sets, values)."""
    around = x + _NUDGE * np.vstack([np.zeros(len(x)), np.eye(len(x))])
    found = evaluate(around)
    return found[0], (found[1:] - found[0]).T / _NUDGE
