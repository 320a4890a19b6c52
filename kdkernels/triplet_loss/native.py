"""The C++ kernels of triplet_loss: csrc/triplet_loss.inc."""

import torch
from torch import Tensor

from kdkernels.native import extension, give_gradient, matrix


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    squared: bool,
    eps: float,
    active_at_zero: bool,
    reduction: str,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op: its schema is in op.py."""
    assert extension is not None
    rows, features = anchor.shape
    per_row = torch.empty(rows, dtype=torch.float32)
    reduced, post_scale = torch.empty((), dtype=torch.float32), torch.empty(3, dtype=torch.float32)
    members = (anchor, positive, negative)
    gradients = [
        t.new_empty(t.shape if want else (0,)) for t, want in zip(members, wanted, strict=True)
    ]
    addresses = [g.data_ptr() if g.numel() else 0 for g in gradients]
    extension.triplet_loss(
        {
            "anchor": matrix(anchor),
            "positive": matrix(positive),
            "negative": matrix(negative),
            "rows": rows,
            "features": features,
            "margin": margin,
            "eps": eps,
            "squared": squared,
            "active_at_zero": active_at_zero,
            "mean": reduction == "mean",
            "loss": per_row.data_ptr(),
            "gradient_anchor": addresses[0],
            "gradient_positive": addresses[1],
            "gradient_negative": addresses[2],
            "reduced": reduced.data_ptr(),
            "post_scale": post_scale.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )
    loss = per_row if reduction == "none" else reduced
    return loss, gradients[0], gradients[1], gradients[2], post_scale


def triplet_give_(gradients: list[Tensor], incoming: Tensor, post_scale: Tensor) -> None:
    """The raw op: its schema is in op.py."""
    arrives = float(incoming) if incoming.dim() == 0 else None
    for gradient, factor in zip(gradients, post_scale.tolist(), strict=True):
        if arrives != 1.0 or factor != 1.0:
            give_gradient(gradient, incoming, factor)
