"""batch_triplet_loss: schema, autograd, functional and module.

Forward on native: centre the embeddings, Gram matrix G, mine. Mining turns row a of G into W_a, the
derivative of anchor a's loss by its squared distances (times what makes it act on x_a - x_j). The
gradient of row i is then, with S = W + W^T, sum_j S_ij (x_i - x_j). With reduction "none" anchors
have different incoming gradients, so W is kept and the gradient is formed in backward; otherwise it
is formed in forward like everywhere in this package. The Triton backend (triton_batch.py) keeps the
mined pairs of "hard" instead of W, and mines again in the backward of the other minings.
"""

import math

import torch
from torch import Tensor, nn

from kdkernels import library as lib
from kdkernels.triplet import eager

NAME = "batch_triplet_loss"
MININGS = ("hard", "semihard", "all")  # in the order of csrc's enum
REDUCTIONS = ("mean", "nonzero", "sum", "none")


def _pad(size: int) -> int:
    """csrc's pad_up: with whole blocks of 16 the GEMM gives the same bits at any number of
    threads."""
    return (size + 15) // 16 * 16


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _kept_shapes(rows: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (_pad(rows), _pad(rows)), (rows, (rows + 63) // 64)


def _fake(embeddings, labels, margin, mining, squared, reduction, want_gradient):
    rows = embeddings.shape[0]
    new = embeddings.new_empty
    is_none = reduction == "none"
    matrix, words = _kept_shapes(rows)
    return (
        new((rows,) if is_none else (), dtype=torch.float32),
        new(embeddings.shape if want_gradient and not is_none else (0,)),
        new(matrix if want_gradient and is_none else (0,), dtype=torch.float32),
        new(words if want_gradient and is_none else (0,), dtype=torch.int64),
        new((), dtype=torch.float32),
    )


def _triton_fake(embeddings, labels, margin, mining, squared, reduction, want_gradient):
    rows = embeddings.shape[0]
    new = embeddings.new_empty
    is_none = reduction == "none"
    kept = (2, rows) if want_gradient and is_none and mining == "hard" else (0,)
    return (
        new((rows,) if is_none else (), dtype=torch.float32),
        new(embeddings.shape if want_gradient and not is_none else (0,)),
        new(kept, dtype=torch.int32),
        new(kept, dtype=torch.float32),
        new((), dtype=torch.float32),
    )


def _gradient_fake(embeddings, labels, kept, kept_too, margin, mining, squared, incoming):
    return embeddings.new_empty(embeddings.shape)


class _Centred:
    """Embeddings as the kernels read them: float32 rows in whole blocks, and the same minus their
    mean."""

    def __init__(self, embeddings: Tensor) -> None:
        assert lib.native is not None
        self.rows, features = embeddings.shape
        self.features = _pad(features)
        is_float = embeddings.dtype == torch.float32
        direct = is_float and embeddings.stride(1) == 1 and features == self.features
        self.values = embeddings if direct else _floats(self.rows, self.features)
        self.centred = _floats(_pad(self.rows), self.features)
        self.norms = _floats(_pad(self.rows))
        shift = _floats(self.features)
        self.is_finite = lib.native.batch_triplet_centre(
            lib.matrix(embeddings),
            self.rows,
            features,
            0 if direct else self.values.data_ptr(),
            shift.data_ptr(),
            self.centred.data_ptr(),
            self.norms.data_ptr(),
            torch.get_num_threads(),
        )

    @property
    def address(self) -> tuple[int, int, int, int]:
        return self.values.data_ptr(), self.values.stride(0), self.rows, self.features


def _form_gradient(
    x: _Centred,
    coefficients: Tensor,
    sums: Tensor,
    close: Tensor,
    weights: Tensor | None,
    factor: float,
) -> Tensor:
    """sum_j S_ij (x_i - x_j) in float32, S = weights W + (weights W)^T written into `sums`:
    padded."""
    assert lib.native is not None
    gradient = _floats(_pad(x.rows), x.features)
    needs_product = lib.native.batch_triplet_spread(
        *x.address,
        x.centred.data_ptr(),
        coefficients.data_ptr(),
        sums.data_ptr(),
        close.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        factor,
        x.is_finite,
        gradient.data_ptr(),
        torch.get_num_threads(),
    )
    if needs_product:
        gradient.addmm_(sums, x.centred, alpha=-1)
    return gradient


def _narrow(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient without its padding, contiguous."""
    if gradient.shape == like.shape:
        return gradient
    return gradient[: like.shape[0], : like.shape[1]].clone(memory_format=torch.contiguous_format)


def _power_for_half(gradient: Tensor) -> float:
    """The power of two that brings the largest component near the end of float16's range, for small
    ones would be flushed to zero; a power costs no rounding."""
    largest = float(gradient.abs().max()) if gradient.numel() else 0.0
    if not math.isfinite(largest) or largest == 0.0:
        return 1.0
    return 2.0 ** max(-100, min(100, 15 - math.frexp(largest)[1]))


def _cpu(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    reduction: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert lib.native is not None
    rows, is_none = embeddings.shape[0], reduction == "none"
    per_anchor, post_scale = _floats(rows), _floats().fill_(1.0)
    gradient, kept = torch.empty((0,), dtype=embeddings.dtype), _floats(0)
    matrix_shape, words = _kept_shapes(rows)
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
        x = _Centred(embeddings)
        gram = _floats(*matrix_shape)
        torch.mm(x.centred, x.centred.t(), out=gram)
        total, triplets, active = lib.native.batch_triplet_mine(
            *x.address,
            x.norms.data_ptr(),
            gram.data_ptr(),
            close.data_ptr() if want_gradient else 0,
            labels.data_ptr(),
            labels.dtype == torch.int64,
            labels.stride(0),
            MININGS.index(mining),
            squared,
            want_gradient,
            margin,
            per_anchor.data_ptr(),
            torch.get_num_threads(),
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


def _gradient_cpu(
    embeddings: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    close: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    incoming: Tensor,
) -> Tensor:
    if embeddings.shape[0] == 0:
        return torch.empty(embeddings.shape, dtype=embeddings.dtype)
    with torch.autocast("cpu", enabled=False):
        weights = incoming.to(torch.float32).contiguous()
        sums = torch.empty_like(coefficients)
        gradient = _form_gradient(_Centred(embeddings), coefficients, sums, close, weights, 1.0)
        return _narrow(gradient, embeddings).to(embeddings.dtype)


# loss is (N,) for "none" and 0-d else. With want_gradient: gradient (N, D) in the embeddings' dtype
# and post_scale, what backward multiplies it by; for "none" instead the two tensors that backward
# forms it from. native: coefficients W and close, a bit for each pair too close for the Gram form;
# triton, for "hard": partners and slopes (2, N), each anchor's positive and negative (-1: none) and
# what their differences are multiplied by. What is not there is (0,).
_SIGNATURE = (
    "(Tensor embeddings, Tensor labels, float margin, str mining, bool squared, str reduction, "
    "bool want_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_MODULE = "kdkernels.triplet.triton_batch"
lib.define(NAME, _SIGNATURE, _fake, native=_cpu, triton=None)
lib.define(NAME, _SIGNATURE, _triton_fake, native=None, triton=f"{_MODULE}:{NAME}")
lib.define(
    "batch_triplet_gradient",
    "(Tensor embeddings, Tensor labels, Tensor kept, Tensor kept_too, float margin, str mining, "
    "bool squared, Tensor incoming) -> Tensor",
    _gradient_fake,
    native=_gradient_cpu,
    triton=f"{_MODULE}:batch_triplet_gradient",
)


class _BatchTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, embeddings, labels, margin, mining, squared, reduction):
        loss, gradient, *kept, post_scale = lib.raw(NAME, backend)(
            embeddings, labels, margin, mining, squared, reduction, True
        )
        ctx.backend, ctx.options = backend, (margin, mining, squared)
        ctx.is_none = reduction == "none"
        if ctx.is_none:
            ctx.save_for_backward(embeddings, labels, *kept)
        else:
            ctx.save_for_backward(gradient, post_scale)
        return loss

    @staticmethod
    def backward(ctx, incoming):  # pyright: ignore[reportIncompatibleMethodOverride]
        lib.claim_gradients(ctx, NAME)
        if ctx.is_none:
            form = lib.raw("batch_triplet_gradient", ctx.backend)
            given = form(*ctx.saved_tensors, *ctx.options, incoming)
        else:
            gradient, post_scale = ctx.saved_tensors
            given = lib.give_gradient(gradient, incoming, post_scale, ctx.backend)
        return None, given, *(None,) * 5


def batch_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.4,
    mining: str = "hard",
    squared: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Hinge loss of triplets mined in the batch.

        loss = sum over mined (a, p, n) of [d(a, p) - d(a, n) + margin]_+ / divisor

    with d(x, y) = ||x - y||^2, or ||x - y|| if not `squared`, label[p] = label[a] != label[n] and
    p != a. Eq. (8) of "Model Distillation with Knowledge Transfer" (arXiv 1709.02929), where the
    features are L2-normalised before; nothing is normalised here. mining:

        "hard"      every anchor that has both takes its farthest positive and its nearest negative
                    (arXiv 1703.07737)
        "semihard"  every ordered pair (a, p) takes the nearest negative with d(a, n) > d(a, p)
                    strictly (arXiv 1503.03832, without an upper limit); a pair without one is none
        "all"       every (a, p, n)

    Ties go to the lowest index. Which triplets are mined and which hinges are positive is decided
    by distances in double precision: as eager decides in float64.

    embeddings: (N, D), float32, bfloat16 or float16, any strides (float64 runs on eager). labels:
    (N,) int32 or int64. Returns float32: a scalar, the sum over the triplets divided by their
    number ("mean"), by the number of those with a positive hinge ("nonzero") or by nothing
    ("sum"), 0 if there is none; or (N,), the sum over each anchor's triplets ("none").

    The gradient flows to all three members, in the embeddings' dtype. It is 0 for a hinge of
    exactly 0, and for a distance of 0 that is not squared. A second or a double backward raises an
    error (use backend="eager" for either). An anchor that has triplets and meets a NaN distance has
    loss NaN, and "nonzero" counts its hinges. A negative at an infinite distance makes a triplet
    with hinge 0; its gradient is 0 from kernels, NaN from eager, which multiplies 0 by inf.

    Memory: native holds one (N, N) float32 matrix, in the backward of "none" another; triton O(N D)
    for "hard" above 2048 rows, and two matrices of at most 64 MB for the others. Never (N, N, N).

    Raises ValueError where shapes, dtypes, devices or options are wrong.
    """
    lib.check_tensor(NAME, "embeddings", embeddings, dims=2)
    if embeddings.shape[1] == 0:
        raise lib.reject(
            NAME, f"embeddings must have at least one feature, got shape {tuple(embeddings.shape)}"
        )
    lib.check_labels(NAME, "labels", labels, embeddings.shape[0], embeddings.device)
    margin = lib.check_number(NAME, "margin", margin)
    lib.check_choice(NAME, "mining", mining, MININGS)
    lib.check_choice(NAME, "reduction", reduction, REDUCTIONS)
    backend = lib.choose_backend(NAME, backend, (embeddings,))
    if backend == "eager":
        return eager.batch_triplet_loss(
            embeddings,
            labels,
            margin=margin,
            mining=mining,
            squared=squared,
            reduction=reduction,
        )
    options = (margin, mining, squared, reduction)
    if lib.wants_gradient(embeddings):
        loss = _BatchTripletLoss.apply(backend, embeddings, labels, *options)
        return loss  # pyright: ignore[reportReturnType]
    return lib.raw(NAME, backend)(embeddings, labels, *options, False)[0]


class BatchTripletLoss(nn.Module):
    """batch_triplet_loss as a module: `loss(embeddings, labels)`; arguments and errors as there.

    torch has no such loss. It replaces a miner on an (N, N) distance matrix followed by
    torch.nn.TripletMarginLoss; differences: squared distances unless squared=False, no eps, margin
    0.4.
    """

    def __init__(
        self,
        *,
        margin: float = 0.4,
        mining: str = "hard",
        squared: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.margin = lib.check_number(NAME, "margin", margin)
        self.mining = lib.check_choice(NAME, "mining", mining, MININGS)
        self.squared = squared
        self.reduction = lib.check_choice(NAME, "reduction", reduction, REDUCTIONS)
        self.backend = backend

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return batch_triplet_loss(
            embeddings,
            labels,
            margin=self.margin,
            mining=self.mining,
            squared=self.squared,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin}, mining={self.mining!r}, squared={self.squared}, "
            f"reduction={self.reduction!r}"
        )
