"""The right value of an output, with a bound of the rounding error of its arithmetic.

The bounds are forward error bounds of the usual model (Higham, "Accuracy and Stability of Numerical
Algorithms", 2.2 and 3.1): an operation returns its result times 1 + d with |d| <= u, or loses
TINY where it underflows; a sum of n terms in any order has an error of at most n u times
the sum of their sizes.
u is 2^-24 for a call in float32 and 2^-53 for one in float64. Constants count the operations
of native or of eager, whichever has more; none is fitted.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

TINY = 2.0**-126  # kernels flush smaller float32 numbers to zero, inputs and results alike
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, **UNIT}
LARGEST = {dtype: float(torch.finfo(dtype).max) for dtype in ROUNDING}
Array = np.ndarray


@dataclass(frozen=True)
class Claim:
    """`value` of the output of that name, and `bound` on its absolute error before it is rounded to
    its dtype.

    decided_at: the unit roundoff of a selection above which the value depends on rounding; an
    element is judged where the backend selects in a finer arithmetic. is_judged: False where the
    right value is not defined. largest: the bound of the gradient from which the power of
    two of a stored float16 gradient is chosen; None is the largest value. roundings: of a 16-bit
    gradient; 2 where it is stored before the incoming gradient is known (docs/ops.md).
    """

    name: str
    value: Array
    bound: Array | float
    decided_at: Array | float = np.inf
    is_judged: Array | bool = True
    largest: Array | float | None = None
    roundings: int = 2
    tolerances: dict[torch.dtype, Array] = field(default_factory=dict)  # computed once per dtype


def total(values: Array, bounds: Array, u: float) -> tuple[Array, Array]:
    """The sum of numbers with error bounds, and the bound of its error."""
    finite = np.where(np.isfinite(values), np.abs(values), 0.0)
    bound = np.where(np.isfinite(values), bounds, 0.0).sum() + (len(values) + 2) * u * finite.sum()
    return values.sum(), bound


def per_row(incoming: Array, divisor: float, rows: int) -> Array:
    """The factor of each row's gradient."""
    return np.broadcast_to(incoming / divisor, (rows,))
