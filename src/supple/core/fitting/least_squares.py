"""How a fit's values move with its parameters: forward differences, all parameters in one call.

The parameters of Supple's fits are logarithms, so one step suits them all, and the forms take many
sets of parameters at once, so a derivative costs one evaluation.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

_Vector = npt.NDArray[np.float64]

_NUDGE = 1e-6
"""Step of the differences, in logarithms."""


def forward_slope(evaluate: Callable[[_Vector], _Vector], x: _Vector) -> tuple[_Vector, _Vector]:
    """The values at `x`, and their derivatives as (values, parameters). `evaluate` takes sets of
    parameters as rows and gives one row of values for each."""
    around = x + _NUDGE * np.vstack([np.zeros(len(x)), np.eye(len(x))])
    found = evaluate(around)
    return found[0], (found[1:] - found[0]).T / _NUDGE
