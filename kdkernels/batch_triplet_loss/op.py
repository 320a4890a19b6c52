"""batch_triplet_loss: schema, autograd, functional and module.

With reduction "none" anchors have different incoming gradients, so the gradient is formed in
backward, from what native.py and triton_kernel.py keep for it; otherwise it is formed in forward
like everywhere in this package.
"""

import torch
from torch import Tensor, nn

from kdkernels.backends import choose_backend
from kdkernels.batch_triplet_loss import eager, native
from kdkernels.checks import check_choice, check_labels, check_number, check_tensor, reject
from kdkernels.registration import claim_gradients, define, give_gradient, raw, wants_gradient

NAME = "batch_triplet_loss"


def _fake(embeddings, labels, margin, mining, squared, reduction, want_gradient):
    rows = embeddings.shape[0]
    new = embeddings.new_empty
    is_none = reduction == "none"
    matrix, words = native.kept_shapes(rows)
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


# loss is (N,) for "none" and 0-d else. With want_gradient: gradient (N, D) in the embeddings' dtype
# and post_scale, what backward multiplies it by; for "none" instead the two tensors that backward
# forms it from. native: coefficients W and close, a bit for each pair too close for the Gram form;
# triton, for "hard": partners and slopes (2, N), each anchor's positive and negative (-1: none) and
# what their differences are multiplied by. What is not there is (0,).
_SIGNATURE = (
    "(Tensor embeddings, Tensor labels, float margin, str mining, bool squared, str reduction, "
    "bool want_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_MODULE = "kdkernels.batch_triplet_loss.triton_kernel"
define(NAME, _SIGNATURE, _fake, native=native.batch_triplet_loss, triton=None)
define(NAME, _SIGNATURE, _triton_fake, native=None, triton=f"{_MODULE}:{NAME}")
define(
    "batch_triplet_gradient",
    "(Tensor embeddings, Tensor labels, Tensor kept, Tensor kept_too, float margin, str mining, "
    "bool squared, Tensor incoming) -> Tensor",
    _gradient_fake,
    native=native.batch_triplet_gradient,
    triton=f"{_MODULE}:batch_triplet_gradient",
)


class _BatchTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, embeddings, labels, margin, mining, squared, reduction):
        loss, gradient, *kept, post_scale = raw(NAME, backend)(
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
        claim_gradients(ctx, NAME)
        if ctx.is_none:
            form = raw("batch_triplet_gradient", ctx.backend)
            given = form(*ctx.saved_tensors, *ctx.options, incoming)
        else:
            gradient, post_scale = ctx.saved_tensors
            given = give_gradient(gradient, incoming, post_scale, ctx.backend)
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
    features are L2-normalized before; nothing is normalized here. mining:

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
    exactly 0, and for a distance of 0 that is not squared. (Squares are float32: a distance loses
    digits below 1e-19 and may count as 0 below 1e-22; native measures down to 1e-30.) A second or a
    double backward raises an error (use backend="eager" for either). Except with "none" a 16-bit
    gradient is rounded when it is stored and again where the incoming gradient is no power of two:
    it is within 1.5 units of the last place (docs/ops.md). An anchor that has triplets and meets a
    NaN distance has loss NaN, and "nonzero" counts its hinges. A negative at an infinite distance
    makes a triplet with hinge 0; its gradient is 0 from kernels, NaN from eager, which multiplies 0
    by inf.

    Memory: native holds one (N, N) float32 matrix, in the backward of "none" another; triton O(N D)
    for "hard" above 2048 rows, and two matrices of at most 64 MB for the others. Never (N, N, N).

    Raises ValueError where shapes, dtypes, devices or options are wrong.
    """
    check_tensor(NAME, "embeddings", embeddings, dims=2)
    if embeddings.shape[1] == 0:
        raise reject(
            NAME, f"embeddings must have at least one feature, got shape {tuple(embeddings.shape)}"
        )
    check_labels(NAME, "labels", labels, embeddings.shape[0], embeddings.device)
    margin = check_number(NAME, "margin", margin)
    check_choice(NAME, "mining", mining, eager.MININGS)
    check_choice(NAME, "reduction", reduction, eager.REDUCTIONS)
    backend = choose_backend(NAME, backend, (embeddings,))
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
    if wants_gradient(embeddings):
        return _BatchTripletLoss.apply(backend, embeddings, labels, *options)  # pyright: ignore[reportReturnType]
    return raw(NAME, backend)(embeddings, labels, *options, False)[0]


class BatchTripletLoss(nn.Module):
    """batch_triplet_loss as a module: `loss(embeddings, labels)`; arguments and errors as there.

    torch has no such loss. It replaces a miner on an (N, N) distance matrix followed by
    torch.nn.TripletMarginLoss; differences: squared distances unless squared=False, no eps, margin
    0.4.

    A batch without a triplet, for instance one image per identity, has loss 0 and gradient 0, not
    NaN and not an error: draw batches with at least two images of each of several identities.
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
        self.margin = check_number(NAME, "margin", margin)
        self.mining = check_choice(NAME, "mining", mining, eager.MININGS)
        self.squared = squared
        self.reduction = check_choice(NAME, "reduction", reduction, eager.REDUCTIONS)
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
