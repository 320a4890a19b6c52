"""The C++ kernels of batch_triplet_loss (csrc/batch_triplet_*) and the products between them.

Forward: center the embeddings, Gram matrix G, mine. Mining turns row a of G into W_a, the
derivative of anchor a's loss by its squared distances (times what makes it act on x_a - x_j). The
gradient of row i is then, with S = W + W^T, sum_j S_ij (x_i - x_j). For reduction "none" W is saved
until backward.
"""

import math

import torch
from torch import Tensor

from kdkernels.batch_triplet_loss import eager
from kdkernels.native import extension, matrix


def _pad(size: int) -> int:
    """csrc's pad_up: whole blocks of 16, for bitwise identical results at any number of threads
    where MKL gives them (docs/ops.md, "Bits")."""
    return (size + 15) // 16 * 16


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def kept_shapes(rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the two tensors that backward forms the gradient from: W, and the close pairs."""
    return (_pad(rows), _pad(rows)), (rows, (rows + 63) // 64)


class _Centered:
    """Embeddings as the kernels read them: float32 rows in whole blocks, and the same minus their
    mean."""

    def __init__(self, embeddings: Tensor) -> None:
        assert extension is not None
        self.rows, features = embeddings.shape
        self.features = _pad(features)
        is_float = embeddings.dtype == torch.float32
        direct = is_float and embeddings.stride(1) == 1 and features == self.features
        self.values = embeddings if direct else _floats(self.rows, self.features)
        self.centered = _floats(_pad(self.rows), self.features)
        self.norms = _floats(_pad(self.rows))
        shift = _floats(self.features)
        self.is_finite = extension.batch_triplet_center(
            {
                "embeddings": matrix(embeddings),
                "rows": self.rows,
                "features": features,
                "staged": 0 if direct else self.values.data_ptr(),
                "shift": shift.data_ptr(),
                "centered": self.centered.data_ptr(),
                "norms": self.norms.data_ptr(),
                "threads": torch.get_num_threads(),
            }
        )

    @property
    def arguments(self) -> dict[str, int]:
        """The rows as arguments of the extension."""
        return {
            "embeddings": self.values.data_ptr(),
            "stride": self.values.stride(0),
            "rows": self.rows,
            "features": self.features,
        }


def _form_gradient(
    x: _Centered,
    coefficients: Tensor,
    sums: Tensor,
    close: Tensor,
    weights: Tensor | None,
    factor: float,
) -> Tensor:
    """sum_j S_ij (x_i - x_j) in float32, S = weights W + (weights W)^T written into `sums`:
    padded."""
    assert extension is not None
    gradient = _floats(_pad(x.rows), x.features)
    needs_product = extension.batch_triplet_spread(
        {
            **x.arguments,
            "centered": x.centered.data_ptr(),
            "coefficients": coefficients.data_ptr(),
            "sums": sums.data_ptr(),
            "close": close.data_ptr(),
            "weights": 0 if weights is None else weights.data_ptr(),
            "factor": factor,
            "finite": x.is_finite,
            "gradient": gradient.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )
    if needs_product:
        gradient.addmm_(sums, x.centered, alpha=-1)
    return gradient


def _narrow(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient without its padding, contiguous."""
    if gradient.shape == like.shape:
        return gradient
    return gradient[: like.shape[0], : like.shape[1]].clone(memory_format=torch.contiguous_format)


def _power_for_half(gradient: Tensor) -> float:
    """The power of two that brings the largest component near the end of float16's range, for small
    ones would be flushed to zero; a power costs no rounding."""
    if gradient.numel() == 0:
        return 1.0
    # what is infinite or NaN stays so at any power
    largest = float(gradient.abs().nan_to_num(0.0, 0.0).max())
    if largest == 0.0:
        return 1.0
    return 2.0 ** max(-100, min(100, 15 - math.frexp(largest)[1]))


def batch_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    reduction: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The raw op: its schema is in op.py."""
    assert extension is not None
    rows, is_none = embeddings.shape[0], reduction == "none"
    per_anchor, post_scale = _floats(rows), _floats().fill_(1.0)
    gradient, kept = torch.empty((0,), dtype=embeddings.dtype), _floats(0)
    matrix_shape, words = kept_shapes(rows)
    close = torch.empty(words if want_gradient else (0,), dtype=torch.int64)
    kept_close = close if want_gradient and is_none else torch.empty((0,), dtype=torch.int64)
    if rows == 0:
        loss = per_anchor if is_none else _floats().zero_()
        if want_gradient and is_none:
            kept = _floats(*matrix_shape)
        elif want_gradient:
            gradient = torch.empty(embeddings.shape, dtype=embeddings.dtype)
        return loss, gradient, kept, kept_close, post_scale

    # Autocast would run the GEMMs in bfloat16.
    with torch.autocast("cpu", enabled=False):
        x = _Centered(embeddings)
        gram = _floats(*matrix_shape)
        torch.mm(x.centered, x.centered.t(), out=gram)
        total, triplets, active = extension.batch_triplet_mine(
            {
                **x.arguments,
                "norms": x.norms.data_ptr(),
                "gram": gram.data_ptr(),
                "close": close.data_ptr() if want_gradient else 0,
                "labels": labels.data_ptr(),
                "labels_are_int64": labels.dtype == torch.int64,
                "label_stride": labels.stride(0),
                "mining": eager.MININGS.index(mining),
                "squared": squared,
                "want_gradient": want_gradient,
                "margin": margin,
                "loss": per_anchor.data_ptr(),
                "threads": torch.get_num_threads(),
            }
        )
        divisor = max(1, {"mean": triplets, "nonzero": active}.get(reduction, 1))
        # by way of float64: a loss beyond float32 is inf, not an error
        total_loss = torch.tensor(total / divisor, dtype=torch.float64).to(torch.float32)
        loss = per_anchor if is_none else total_loss
        if want_gradient and is_none:
            kept = gram
        elif want_gradient:
            gradient = _narrow(_form_gradient(x, gram, gram, close, None, 1 / divisor), embeddings)
            if embeddings.dtype == torch.float16:
                power = _power_for_half(gradient)
                gradient.mul_(power)
                post_scale.fill_(1 / power)
            gradient = gradient.to(embeddings.dtype)
    return loss, gradient, kept, kept_close, post_scale


def batch_triplet_gradient(
    embeddings: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    close: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    incoming: Tensor,
) -> Tensor:
    """The raw op: its schema is in op.py."""
    if embeddings.shape[0] == 0:
        return torch.empty(embeddings.shape, dtype=embeddings.dtype)
    with torch.autocast("cpu", enabled=False):
        weights = incoming.to(torch.float32).contiguous()
        sums = torch.empty_like(coefficients)
        gradient = _form_gradient(_Centered(embeddings), coefficients, sums, close, weights, 1.0)
        return _narrow(gradient, embeddings).to(embeddings.dtype)
