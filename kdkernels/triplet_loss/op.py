"""triplet_loss: schema, autograd, functional and modules."""

import math

import torch
from torch import Tensor, nn

from kdkernels.backends import backends, choose_backend
from kdkernels.checks import (
    REDUCTIONS,
    check_choice,
    check_like,
    check_number,
    check_tensor,
    reject,
)
from kdkernels.native import DTYPE_CODES
from kdkernels.registration import claim_gradients, define, raw, wants_gradient
from kdkernels.triplet_loss import eager, native

NAME = "triplet_loss"


def _fake(anchor, positive, negative, margin, squared, eps, active_at_zero, reduction, *wanted):
    members = (anchor, positive, negative)
    gradients = [
        t.new_empty(t.shape if want else (0,)) for t, want in zip(members, wanted, strict=True)
    ]
    loss = anchor.new_empty(anchor.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, *gradients, anchor.new_empty(3, dtype=torch.float32)


def _give_fake(gradients, incoming, post_scale):
    return None


# loss is (N,) for "none" and 0-d else; each gradient is (N, D) in its member's dtype, (0,) where
# not wanted; post_scale (3,) is what backward multiplies each by. eps and active_at_zero are for
# TripletMarginLoss.
define(
    NAME,
    "(Tensor anchor, Tensor positive, Tensor negative, float margin, bool squared, float eps, "
    "bool active_at_zero, str reduction, bool want_anchor, bool want_positive, bool want_negative) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=native.triplet_loss,
    triton="kdkernels.triplet_loss.triton_kernel:triplet_loss",
)
# give_gradient_ on three gradients at once: three calls from Python would cost a fifth of the op at
# B=1024 D=512
define(
    "triplet_give_",
    "(Tensor(a!)[] gradients, Tensor incoming, Tensor post_scale) -> ()",
    _give_fake,
    native=native.triplet_give_,
    triton="kdkernels.triplet_loss.triton_kernel:triplet_give_",
)


class _TripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, anchor, positive, negative, *options):
        loss, *gradients, post_scale = raw(NAME, backend)(anchor, positive, negative, *options)
        ctx.backend = backend
        ctx.wanted = options[-3:]
        ctx.save_for_backward(*gradients, post_scale)
        return loss

    @staticmethod
    def backward(ctx, incoming):  # pyright: ignore[reportIncompatibleMethodOverride]
        claim_gradients(ctx, NAME)
        *gradients, post_scale = ctx.saved_tensors
        raw("triplet_give_", ctx.backend)(gradients, incoming, post_scale)
        given = [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)]
        return None, *given, *(None,) * 8


def _kernel(
    backend: str,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float,
    squared: bool,
    eps: float,
    active_at_zero: bool,
    reduction: str,
) -> Tensor:
    members = (anchor, positive, negative)
    wanted = tuple(wants_gradient(t) for t in members)
    options = (margin, squared, eps, active_at_zero, reduction, *wanted)
    if any(wanted):
        return _TripletLoss.apply(backend, *members, *options)  # pyright: ignore[reportReturnType]
    return raw(NAME, backend)(*members, *options)[0]


def triplet_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.4,
    squared: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Hinge loss of given triplets.

        loss_n = [d(a_n, p_n) - d(a_n, n_n) + margin]_+,   d(x, y) = ||x - y||^2

    Eq. (8) of "Model Distillation with Knowledge Transfer" (arXiv 1709.02929), where the features
    are L2-normalized before and margin is 0.4; nothing is normalized here. squared=False takes d =
    ||x - y||.

    anchor, positive, negative: (N, D), float32, bfloat16 or float16, each its own dtype and strides
    (float64 runs on eager). Returns a float32 scalar ("mean" over the N triplets, 0 of none; "sum")
    or (N,) ("none").

    The gradient flows to all three, in their dtypes. It is 0 for a hinge of exactly 0, and for a
    distance of 0 that is not squared. (Squares are summed in float32: a distance loses digits below
    1e-19 and may count as 0 below 1e-22; native measures down to 1e-30.) It is formed in forward
    and given away in backward, so a second or a double backward raises an error (use
    backend="eager" for either). A 16-bit gradient is rounded when it is stored and again where the
    incoming gradient is no power of two: it is within 1.5 units of the last place (docs/ops.md). A
    NaN in a row makes its loss and gradients NaN.

    Raises ValueError where shapes, dtypes, devices or options are wrong.
    """
    check_tensor(NAME, "anchor", anchor, dims=2)
    if anchor.shape[1] == 0:
        raise reject(
            NAME, f"anchor must have at least one feature, got shape {tuple(anchor.shape)}"
        )
    check_like(NAME, "positive", positive, anchor, "anchor")
    check_like(NAME, "negative", negative, anchor, "anchor")
    margin = check_number(NAME, "margin", margin)
    check_choice(NAME, "reduction", reduction, REDUCTIONS)
    backend = choose_backend(NAME, backend, (anchor, positive, negative))
    if backend == "eager":
        return eager.triplet_loss(
            anchor, positive, negative, margin=margin, squared=squared, reduction=reduction
        )
    return _kernel(backend, anchor, positive, negative, margin, squared, 0.0, False, reduction)


class TripletLoss(nn.Module):
    """triplet_loss as a module: `loss(anchor, positive, negative)`; arguments and errors as there.

    Replaces F.relu((a - p).pow(2).sum(1) - (a - n).pow(2).sum(1) + margin).mean(). Differences:
    float32 loss for 16-bit features; no rows give 0, not NaN; one backward a forward. For
    torch.nn.TripletMarginLoss see TripletMarginLoss.
    """

    def __init__(
        self,
        *,
        margin: float = 0.4,
        squared: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.margin = check_number(NAME, "margin", margin)
        self.squared = squared
        self.reduction = check_choice(NAME, "reduction", reduction, REDUCTIONS)
        self.backend = backend

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return triplet_loss(
            anchor,
            positive,
            negative,
            margin=self.margin,
            squared=self.squared,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin}, squared={self.squared}, reduction={self.reduction!r}"


class TripletMarginLoss(nn.TripletMarginLoss):
    """torch.nn.TripletMarginLoss with its forward and backward in one kernel where that covers the
    call.

    Constructor, defaults, positional call, results and their dtype are torch's: plain distances,
    eps inside the difference, torch's gradient at a hinge of exactly 0. The kernel covers p = 2
    without swap on (N, D) inputs of one shape and one dtype, float32 or 16-bit;
    everything else runs torch's own code. Differences: 16-bit inputs are computed in float32 and
    rounded once; one backward a forward.
    """

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        if not self._is_covered(anchor, positive, negative):
            return super().forward(anchor, positive, negative)
        members = (anchor, positive, negative)
        backend = choose_backend(NAME, None, members)
        loss = _kernel(backend, *members, self.margin, False, self.eps, True, self.reduction)
        # torch's autocast runs this loss in float32 and returns float32
        is_autocast = torch.is_autocast_enabled(anchor.device.type)
        return loss if is_autocast else loss.to(anchor.dtype)

    def _is_covered(self, *members: Tensor) -> bool:
        options = (
            self.p == 2
            and not self.swap
            and self.reduction in REDUCTIONS
            and math.isfinite(self.margin)
            and math.isfinite(self.eps)
        )
        anchor = members[0]
        return options and all(
            isinstance(t, Tensor)
            and t.layout == torch.strided
            and t.dim() == 2
            and t.numel() > 0
            and t.dtype in DTYPE_CODES
            and (t.shape, t.dtype, t.device) == (anchor.shape, anchor.dtype, anchor.device)
            and backends(NAME, t.device.type)[0] != "eager"
            for t in members
        )
