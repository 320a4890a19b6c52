"""linear_kd_cross_entropy: schema, autograd, functional and module."""

from typing import Literal, overload

import torch
from torch import Tensor, nn

from kdkernels.backends import choose_backend
from kdkernels.checks import check_labels, check_tensor, reject
from kdkernels.kd_cross_entropy.op import check_label_range, check_row_options
from kdkernels.linear_kd_cross_entropy import eager, native
from kdkernels.linear_kd_cross_entropy.arguments import (
    NAME,
    SparseTeacher,
    Teacher,
    check_bins,
    check_head,
    check_margin,
    check_scale,
    check_sparse,
    check_teacher,
    is_sparse,
    is_straight_through,
)
from kdkernels.linear_kd_cross_entropy.eager import KDTerms
from kdkernels.linear_kd_cross_entropy.margins import Margin
from kdkernels.linear_kd_cross_entropy.sampling import NO_CLASS, check_classes, renumber
from kdkernels.registration import claim_gradients, define, give_gradient, raw, wants_gradient


def _shapes(features: Tensor, weight: Tensor, want: tuple[bool, ...]) -> list[Tensor]:
    shapes = (tuple(features.shape), tuple(weight.shape), (weight.shape[0],))
    return [
        features.new_empty(shape if wanted else (0,), dtype=torch.float32)
        for shape, wanted in zip(shapes, want, strict=True)
    ]


def _fake(features, weight, *arguments):
    *_, reduction, want_features, want_weight, want_bias, want_terms = arguments
    new, rows = features.new_empty, features.shape[0]
    gradients = _shapes(features, weight, (want_features, want_weight, want_bias))
    loss = new((rows,) if reduction == "none" else (), dtype=torch.float32)
    return loss, new((5 if want_terms else 0,), dtype=torch.float32), *gradients


def _gradient_fake(features, weight, *arguments):
    *_, want_features, want_weight, want_bias, _ = arguments
    return tuple(_shapes(features, weight, (want_features, want_weight, want_bias)))


# loss is (N,) for "none" and 0-d else; terms (5,), (0,) where not wanted; the gradients of
# features, weight and bias are float32 and (0,) where not wanted. teacher: logits, or None and a
# head or the indices and log_probs of a sparse one. m2, m3: (N,) float32.
_CALL = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor? teacher, Tensor? teacher_features, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? indices, Tensor? log_probs, "
    "Tensor? target, Tensor? m2, Tensor? m3, bool normalize, float scale, float teacher_scale, "
    "bool straight_through, float temperature, float alpha, int ignore_index, "
    "float label_smoothing, str reduction, bool want_features, bool want_weight, bool want_bias"
)
TENSORS = 12  # of the call, which come first
define(
    NAME,
    f"({_CALL}, bool want_terms) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=native.forward,
    triton="kdkernels.linear_kd_cross_entropy.triton_kernel:forward",
)
define(
    f"{NAME}_gradient",
    f"({_CALL}, Tensor incoming) -> (Tensor, Tensor, Tensor)",
    _gradient_fake,
    native=native.backward,
    triton="kdkernels.linear_kd_cross_entropy.triton_kernel:backward",
)


class _LinearKDCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, want, want_terms, *call):
        is_none = call[-1] == "none"
        # with a weight per row still to come, no gradient can be formed yet
        wanted = (False,) * 3 if is_none else want
        loss, terms, *gradients = raw(NAME, backend)(*call, *wanted, want_terms)
        ctx.backend, ctx.want, ctx.is_none = backend, want, is_none
        ctx.dtypes = [None if t is None else t.dtype for t in call[:3]]
        if is_none:
            ctx.save_for_backward(*call[:TENSORS])
            ctx.options = call[TENSORS:]
        else:
            ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, incoming, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        claim_gradients(ctx, NAME)
        if ctx.is_none:
            form = raw(f"{NAME}_gradient", ctx.backend)
            given = form(*ctx.saved_tensors, *ctx.options, *ctx.want, incoming)
        else:
            one = torch.ones((), dtype=torch.float32, device=incoming.device)
            given = [
                give_gradient(gradient, incoming, one, ctx.backend) if wanted else gradient
                for gradient, wanted in zip(ctx.saved_tensors, ctx.want, strict=True)
            ]
        found = (
            gradient.to(dtype) if wanted else None
            for gradient, dtype, wanted in zip(given, ctx.dtypes, ctx.want, strict=True)
        )
        return None, None, None, *found, *(None,) * 18


@overload
def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = ...,
    teacher: Teacher | None = ...,
    classes: Tensor | None = ...,
    normalize: bool = ...,
    scale: float = ...,
    teacher_scale: float | None = ...,
    margin: Margin | None = ...,
    margin_grad: str = ...,
    temperature: float = ...,
    alpha: float = ...,
    tau_squared: bool = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_terms: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = ...,
    teacher: Teacher | None = ...,
    classes: Tensor | None = ...,
    normalize: bool = ...,
    scale: float = ...,
    teacher_scale: float | None = ...,
    margin: Margin | None = ...,
    margin_grad: str = ...,
    temperature: float = ...,
    alpha: float = ...,
    tau_squared: bool = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_terms: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, KDTerms]: ...
@overload
def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = ...,
    teacher: Teacher | None = ...,
    classes: Tensor | None = ...,
    normalize: bool = ...,
    scale: float = ...,
    teacher_scale: float | None = ...,
    margin: Margin | None = ...,
    margin_grad: str = ...,
    temperature: float = ...,
    alpha: float = ...,
    tau_squared: bool = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_terms: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, KDTerms]: ...
def linear_kd_cross_entropy(
    features: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    teacher: Teacher | None = None,
    classes: Tensor | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    teacher_scale: float | None = None,
    margin: Margin | None = None,
    margin_grad: str = "exact",
    temperature: float = 3.0,
    alpha: float = 1.0,
    tau_squared: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KDTerms]:
    """kd_cross_entropy on the logits of a classifier, without storing them.

        s = features weight^T (+ bias),     or  s_nc = scale cos(features_n, weight_c) if normalize
        loss_n = H(softmax(s'_n), y_n) + alpha * H(softmax(s_n / tau), softmax(t_n / tau))

    with H(p, q) = -sum_c q_c log p_c. s' is s but for the label's logit, which a margin makes
    scale (cos(theta + m2) - m3) (see margins.py); without a margin s' = s. Of the rows' options
    (temperature, alpha, tau_squared, ignore_index, label_smoothing, reduction, return_terms) see
    kd_cross_entropy. hits counts labels with the first largest logit of s, without the margin.

    features: (N, D). weight: (C, D). bias: (C,), not with normalize. float32, bfloat16 or float16,
    each its own dtype and strides (float64 runs on eager). target: (N,) int32 or int64, None for
    the soft term alone. teacher: (features, weight) or (features, weight, bias) of the teacher,
    (N, E), (C, E) and (C,), normalized where the student is and scaled by teacher_scale (None: by
    scale); or (N, C) logits, taken as they are; or a SparseTeacher; or None.

    SparseTeacher(indices, log_probs), or the plain pair (integers distinguish it from a head), both
    (N, k): the k classes of each row that the teacher finds likeliest and the natural logarithms of
    their softmax(t / tau), at this call's temperature. All other classes are one bin, so that what
    the teacher left out keeps its probability, and no (N, C) teacher is made:

        soft_n = -sum_j p_nj log q_nj - p_n log(sum_(c not in j) q_nc),    p_n = 1 - sum_j p_nj

    with q = softmax(s / tau), as TRL's loss_top_k with loss_add_tail has its bins. -inf is
    probability 0; p_n below 2^-20 (float32 resolves 1e-7 of a sum of 1) and a teacher that names
    all C classes have no tail; the terms' entropy is that of the k + 1 bins. 16-bit log_probs
    resolve the tail to about 2^-8.

    classes: (S,) int32 or int64, rising, each once: the softmax, the teacher's too, goes over these
    alone, as in PartialFC (arXiv 2010.05222, 2203.15565); sample_classes draws them. Labels must be
    among them. weight, bias and teacher keep their C classes: S rows of a weight (S columns of
    logits) are copied, the others are not read, and have gradient 0. Not with a sparse teacher,
    whose probabilities are of all classes.

    scale and teacher_scale: from 1e-6 to 1e6, with normalize alone.

    margin: ArcFace(m), CosFace(m) or CombinedMargin(m2, m3), for normalize=True and a target; each
    m a float (an angle of at most pi, m3 of at most 1e6, either sign) or an (N,) tensor, without
    gradient. Beyond theta + m2 = pi the label's cosine goes on as cos(theta) - m2 sin(m2).
    margin_grad="exact" is the derivative of this; "straight_through" takes that of the margin as 1,
    as InsightFace trains.

    Returns a float32 scalar ("mean" over the rows that count, "sum") or (N,) ("none"); with
    return_terms also KDTerms.

    Gradients flow to features, weight and bias, each in its own dtype, and through both norms of a
    normalized head; none to the teacher. A row of zeros has cosine 0 and gradient 0; any other size
    of a row leaves its cosines as they are. (On a GPU a row of the weight with a norm below 1e-29
    counts as zeros, and digits are lost above 1e36.) A tensor that
    needs no gradient costs none: a frozen weight no product. The weight's gradient is summed in
    float32. Gradients are formed in forward and given away in backward, so a second backward or a
    double backward raises (use backend="eager" for either); with reduction="none" they are formed
    in backward, from logits that are computed again, since each row's weight arrives there.

    Memory beyond inputs and gradients: float32 logits of a chunk of rows for each network (see
    docs/ops.md). Under autocast features and weight are taken as they are given.

    A label out of range or not among classes, and indices out of range or twice in a row, raise on
    the CPU and under kdkernels.validate(True); elsewhere they make the row's loss and gradient NaN,
    without waiting for the device. (classes out of range stop the device there, as in torch.)

    Raises ValueError where shapes, dtypes, devices, options or (on the CPU) the values of labels,
    indices, log_probs or classes are wrong.
    """
    tensors = check_head("", features, weight, bias)
    rows, every = features.shape[0], weight.shape[0]
    scale = check_scale("scale", scale, normalize)
    straight_through = is_straight_through(margin_grad)
    logits: Tensor | None = None
    head: tuple[Tensor | None, ...] = (None, None, None)
    sparse: SparseTeacher | None = None
    if isinstance(teacher, Tensor):
        logits = check_tensor(NAME, "teacher", teacher).detach()
        if logits.shape != (rows, every) or logits.device != features.device:
            raise reject(
                NAME,
                f"teacher must be logits of shape ({rows}, {every}) on {features.device}, "
                f"got {tuple(logits.shape)} on {logits.device}",
            )
        tensors.append(logits)
        if teacher_scale is not None:
            raise reject(
                NAME, "teacher_scale is for a teacher (features, weight): logits are taken as given"
            )
    elif is_sparse(teacher):
        sparse = check_sparse(teacher, features, every, tensors)
        if teacher_scale is not None or classes is not None:
            raise reject(
                NAME,
                "teacher_scale and classes are not for a sparse teacher: its probabilities are "
                "taken as given, and are of all classes",
            )
    elif teacher is not None:
        head = check_teacher(teacher, features, weight, tensors)
    elif target is None:
        raise reject(NAME, "teacher and target are both None: there is nothing to compare with")
    if normalize and (bias is not None or head[2] is not None):
        raise reject(NAME, "bias and normalize=True do not go together: cosines have no offset")
    if teacher_scale is None:
        teacher_scale = scale
    teacher_scale = check_scale("teacher_scale", teacher_scale, normalize)
    if target is not None:
        check_labels(NAME, "target", target, rows, features.device)
    m2, m3 = check_margin(margin, features, normalize and target is not None)
    temperature, alpha, label_smoothing = check_row_options(
        temperature, alpha, label_smoothing, ignore_index, reduction, NAME
    )
    backend = choose_backend(NAME, backend, tensors)
    if target is not None:
        check_label_range(target, every, ignore_index, NAME)
    if alpha == 0.0:  # a term whose factor is 0 is not computed
        logits, head, sparse = None, (None, None, None), None
    if sparse is not None:
        check_bins(sparse, target, every, ignore_index)
    if classes is not None:
        chosen = check_classes(classes, every, features.device)
        weight = weight.index_select(0, chosen)
        bias = None if bias is None else bias.index_select(0, chosen)
        logits = None if logits is None else logits.index_select(1, chosen)
        kept, *of_classes = head
        head = (kept, *(None if t is None else t.index_select(0, chosen) for t in of_classes))
        if target is not None:
            target, ignore_index = renumber(target, chosen, ignore_index), NO_CLASS
    soft = logits if logits is not None else tuple(t for t in head if t is not None) or sparse
    if backend == "eager" or (soft is None and target is None):  # nothing for a kernel to do
        loss, terms = eager.linear_kd_cross_entropy(
            features,
            weight,
            bias,
            target,
            None if sparse is not None else soft,
            sparse,
            normalize=normalize,
            scale=scale,
            teacher_scale=teacher_scale,
            m2=m2,
            m3=m3,
            straight_through=straight_through,
            temperature=temperature,
            alpha=alpha,
            tau_squared=tau_squared,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        return (loss, terms) if return_terms else loss

    factor = alpha * temperature**2 if tau_squared else alpha
    call = (
        *(features, weight, bias, logits, *head, *(sparse or (None, None)), target, m2, m3),
        *(normalize, scale, teacher_scale),
        *(straight_through, temperature, factor, ignore_index, label_smoothing, reduction),
    )
    want = tuple(t is not None and wants_gradient(t) for t in (features, weight, bias))
    if any(want):
        loss, terms = _LinearKDCrossEntropy.apply(backend, want, return_terms, *call)
    else:
        loss, terms, *_ = raw(NAME, backend)(*call, *want, return_terms)
    return (loss, KDTerms(*terms.unbind())) if return_terms else loss


class LinearKDCrossEntropyLoss(nn.Module):
    """linear_kd_cross_entropy as a module: `loss(features, weight, target, bias=, teacher=,
    classes=)`; arguments and errors as there.

    Replaces a linear layer, or normalized features and weights, and KDCrossEntropyLoss on its
    logits; the weight stays where it is. A margin whose m is a tensor goes to the call, and takes
    the place of the module's own. Differences from the pair: those of KDCrossEntropyLoss, and
    logits of 16-bit features and weights are float32.
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        scale: float = 1.0,
        teacher_scale: float | None = None,
        margin: Margin | None = None,
        margin_grad: str = "exact",
        temperature: float = 3.0,
        alpha: float = 1.0,
        tau_squared: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        return_terms: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.scale = check_scale("scale", scale, normalize)
        if teacher_scale is not None:
            teacher_scale = check_scale("teacher_scale", teacher_scale, normalize)
        self.teacher_scale = teacher_scale
        self.margin = margin
        is_straight_through(margin_grad)
        self.margin_grad = margin_grad
        self.temperature, self.alpha, self.label_smoothing = check_row_options(
            temperature, alpha, label_smoothing, ignore_index, reduction, NAME
        )
        self.tau_squared = tau_squared
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.return_terms = return_terms
        self.backend = backend

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        target: Tensor | None,
        *,
        bias: Tensor | None = None,
        teacher: Teacher | None = None,
        classes: Tensor | None = None,
        margin: Margin | None = None,
    ) -> Tensor | tuple[Tensor, KDTerms]:
        return linear_kd_cross_entropy(
            features,
            weight,
            target,
            bias=bias,
            teacher=teacher,
            classes=classes,
            normalize=self.normalize,
            scale=self.scale,
            teacher_scale=self.teacher_scale,
            margin=self.margin if margin is None else margin,
            margin_grad=self.margin_grad,
            temperature=self.temperature,
            alpha=self.alpha,
            tau_squared=self.tau_squared,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            return_terms=self.return_terms,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"normalize={self.normalize}, scale={self.scale}, margin={self.margin}, "
            f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}"
        )
