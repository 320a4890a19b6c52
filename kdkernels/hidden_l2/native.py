"""The C++ kernels of hidden_l2: csrc/hidden_l2.inc."""

import torch
from torch import Tensor

from kdkernels.hidden_l2 import eager
from kdkernels.native import DTYPE_CODES, extension, new_gradient


def hidden_l2(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: list[float],
    weight_tensor: Tensor | None,
    reduction: str,
    want_gradient: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The raw op: its schema is in op.py."""
    assert extension is not None
    if weight_tensor is not None:
        weights = weight_tensor.tolist()
    gradients = [  # empty_like keeps the strides of a student without gaps
        new_gradient(s.shape, s.dtype, torch.empty_like(s, device="meta").stride())
        if wanted
        else s.new_empty(0)
        for s, wanted in zip(students, want_gradient, strict=True)
    ]
    no_tensor = (0, 0, ())
    pairs = []
    for student, teacher, weight, gradient, wanted in zip(
        students, teachers, weights, gradients, want_gradient, strict=True
    ):
        pairs.append(
            (
                _strided(student),
                _strided(teacher),
                _strided(gradient) if wanted and gradient.numel() else no_tensor,
                tuple(student.shape),
                weight,
                eager.scale_of(student.shape, reduction),
            )
        )
    loss = torch.empty((), dtype=torch.float32)
    terms = torch.empty(len(pairs), dtype=torch.float32)
    post_scale = torch.empty(len(pairs), dtype=torch.float32)
    extension.hidden_l2(
        {
            "pairs": pairs,
            "loss": loss.data_ptr(),
            "terms": terms.data_ptr(),
            "post_scale": post_scale.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )
    return loss, terms, gradients, post_scale


def _strided(t: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """A tensor as csrc's Strided: address, dtype code, strides."""
    return (t.data_ptr(), DTYPE_CODES[t.dtype], t.stride())


def hidden_l2_give_(gradients: list[Tensor], incoming: Tensor, post_scale: Tensor) -> None:
    """The raw op: its schema is in op.py."""
    assert extension is not None
    arrives = float(incoming)
    given = [
        (gradient.data_ptr(), DTYPE_CODES[gradient.dtype], gradient.numel(), arrives * factor)
        for gradient, factor in zip(gradients, post_scale.tolist(), strict=True)
    ]
    # scaled in the order of their memory: without gaps, whatever the memory format
    assert all(torch.ops.aten.is_non_overlapping_and_dense(g) for g in gradients)
    extension.hidden_l2_give({"gradients": given, "threads": torch.get_num_threads()})
