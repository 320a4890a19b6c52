"""The C++ kernels of kd_cross_entropy: csrc/kd_cross_entropy.inc."""

import torch
from torch import Tensor

from kdkernels.checks import reject
from kdkernels.native import extension, matrix, new_gradient


def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    temperature: float,
    alpha: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    want_gradient: bool,
    want_terms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw op: its schema is in op.py."""
    assert extension is not None
    rows, classes = student.shape
    per_row = torch.empty(rows, dtype=torch.float32)  # whatever the default dtype is
    row_terms = torch.empty(rows, 4, dtype=torch.float32)
    reduced = torch.empty(6, dtype=torch.float32)
    post_scale = torch.empty((), dtype=torch.float32)
    gradient = new_gradient((rows, classes) if want_gradient else (0,), student.dtype)
    bad_row = extension.kd_cross_entropy(
        {
            "student": matrix(student),
            "teacher": matrix(teacher),
            "target": 0 if target is None or rows == 0 else target.data_ptr(),
            "target_is_int64": target is not None and target.dtype == torch.int64,
            "target_stride": 0 if target is None else target.stride(0),
            "rows": rows,
            "classes": classes,
            "temperature": temperature,
            "alpha": alpha,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "loss": per_row.data_ptr(),
            "terms": row_terms.data_ptr(),
            "gradient": gradient.data_ptr() if want_gradient and rows else 0,
            "mean": reduction == "mean",
            "reduced": reduced.data_ptr(),
            "post_scale": post_scale.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )
    if bad_row >= 0:
        assert target is not None
        raise reject(
            "kd_cross_entropy",
            f"target must lie in [0, {classes}) or be ignore_index ({ignore_index}), "
            f"got {int(target[bad_row])} in row {bad_row}",
        )
    loss = per_row if reduction == "none" else reduced[0].clone()
    terms = reduced[1:].clone() if want_terms else torch.empty(0, dtype=torch.float32)
    return loss, terms, gradient, post_scale
