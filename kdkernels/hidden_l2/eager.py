"""The specification of hidden_l2 in plain differentiable PyTorch, and the oracle of its kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

REDUCTIONS = ("batchmean", "mean", "sum")


def scale_of(shape: Sequence[int], reduction: str) -> float:
    """r_i: 1 over the first dimension (1 for a 0-d tensor), 1 over the element count, or 1.

    0 for a pair without elements, so that its term is 0 and not 0 / 0.
    """
    elements = 1
    for size in shape:
        elements *= size
    if elements == 0:
        return 0.0
    if reduction == "batchmean":
        return 1.0 / shape[0] if len(shape) else 1.0
    return 1.0 / elements if reduction == "mean" else 1.0


def hidden_l2(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """sum_i w_i r_i ||S_i - T_i||^2, and the detached r_i ||S_i - T_i||^2: (P,).

    Arguments as checked by op.hidden_l2. Computed in float64 where any tensor is float64.
    """
    wide = any(t.dtype == torch.float64 for t in (*students, *teachers))
    compute = torch.float64 if wide else torch.float32
    terms = []
    for student, teacher, weight in zip(students, teachers, weights, strict=True):
        difference = student.to(compute) - teacher.detach().to(compute)
        # a pair of weight 0 is not computed: a NaN of it reaches neither loss nor gradient
        if isinstance(weight, Tensor):
            difference = difference.masked_fill(weight == 0, 0.0)
        elif weight == 0:
            difference = difference.masked_fill(torch.tensor(True, device=difference.device), 0.0)
        # contiguous: the order of a sum follows the strides
        total = difference.square().contiguous().sum()
        terms.append(total * scale_of(student.shape, reduction))
    each = torch.stack(terms)  # (P,)
    if isinstance(weights, Tensor):
        factors = weights.detach().to(compute)
    else:
        factors = torch.tensor(weights, dtype=compute, device=each.device)
    return (factors * each).sum(), each.detach()
