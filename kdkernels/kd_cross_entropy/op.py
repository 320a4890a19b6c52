"""kd_cross_entropy: schema, autograd, functional and modules."""

from typing import Literal, overload

import torch
from torch import Tensor, nn

from kdkernels import checks
from kdkernels.backends import backends, choose_backend
from kdkernels.checks import (
    REDUCTIONS,
    check_choice,
    check_labels,
    check_like,
    check_number,
    check_tensor,
    reject,
)
from kdkernels.kd_cross_entropy import eager, native
from kdkernels.kd_cross_entropy.eager import KDTerms
from kdkernels.native import DTYPE_CODES
from kdkernels.registration import claim_gradients, define, give_gradient, raw, wants_gradient

NAME = "kd_cross_entropy"
LARGEST = 1e6  # of alpha, the temperature and its inverse: beyond, float32 statistics overflow


def _fake(
    student,
    teacher,
    target,
    temperature,
    alpha,
    ignore_index,
    label_smoothing,
    reduction,
    want_gradient,
    want_terms,
):
    floats = {"dtype": torch.float32, "device": student.device}
    loss = torch.empty(student.shape[0] if reduction == "none" else (), **floats)
    gradient = torch.empty(
        student.shape if want_gradient else (0,), dtype=student.dtype, device=student.device
    )
    return loss, torch.empty(5 if want_terms else 0, **floats), gradient, torch.empty((), **floats)


# loss is (N,) for "none" and 0-d else; terms is (5,) float32, (0,) where not wanted; gradient is
# (N, C) in the student's dtype, (0,) where not wanted; post_scale is what backward multiplies by.
define(
    NAME,
    "(Tensor student, Tensor? teacher, Tensor? target, float temperature, float alpha, "
    "int ignore_index, float label_smoothing, str reduction, bool want_gradient, bool want_terms) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    native=native.kd_cross_entropy,
    triton="kdkernels.kd_cross_entropy.triton_kernel:kd_cross_entropy",
)


class _KDCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, student, teacher, target, *options):
        loss, terms, gradient, post_scale = raw(NAME, backend)(student, teacher, target, *options)
        ctx.backend = backend
        ctx.save_for_backward(gradient, post_scale)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, incoming, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        claim_gradients(ctx, NAME)
        gradient, post_scale = ctx.saved_tensors
        given = give_gradient(gradient, incoming, post_scale, ctx.backend)
        return None, given, *(None,) * 9


@overload
def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    *,
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
def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    *,
    temperature: float = ...,
    alpha: float = ...,
    tau_squared: bool = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    return_terms: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, KDTerms]: ...
def kd_cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    *,
    temperature: float = 3.0,
    alpha: float = 1.0,
    tau_squared: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, KDTerms]:
    """Cross entropy with the labels plus one with the teacher's softened prediction, in one pass.

        loss_n = H(softmax(s_n), y_n) + alpha * H(softmax(s_n / tau), softmax(t_n / tau)),
        H(p, q) = -sum_c q_c log p_c

    Eq. (2) of "Model Distillation with Knowledge Transfer" (arXiv 1709.02929); tau_squared=True
    multiplies the second term by tau^2 as Hinton et al. 2015 do. It is cross-entropy, not the
    Kullback-Leibler divergence: the gradient is the same, the value larger by the teacher's entropy
    (see return_terms).

    student, teacher: (N, C) logits, float32, bfloat16 or float16, each its own dtype and strides
    (float64 runs on eager). teacher=None leaves plain cross-entropy. target: (N,) int32 or int64;
    rows that hold ignore_index count for nothing in either term; target=None leaves the soft term
    alone. alpha=0 does not compute the soft term: no NaN or infinity of the teacher reaches loss,
    gradient or terms, and without a target the loss is 0 with gradient 0. label_smoothing acts on
    the hard term as in F.cross_entropy. A logit of -inf is probability 0, with 0 log 0 = 0.

    Returns a float32 scalar ("mean" over the rows that count: 0, with gradient 0, if none does;
    "sum") or (N,) ("none"). With return_terms=True also KDTerms: detached device scalars hard,
    soft, entropy, hits, count.

    The gradient flows to `student` only, in its dtype. It is formed in forward; backward scales it
    in place and gives it away, so a second backward or a double backward raises an error (use
    backend="eager" for either). A 16-bit gradient is rounded when it is stored and again where the
    incoming gradient is no power of two: it is within 1.5 units of the last place (docs/ops.md).
    Inputs are never written to. Under autocast logits are taken as they are given.

    A label out of range raises on the CPU and under kdkernels.validate(True); elsewhere it makes
    the row's loss and gradient NaN, without waiting for the device.

    Raises ValueError where shapes, dtypes, devices, options or (on the CPU) the label range are
    wrong.
    """
    check_tensor(NAME, "student", student, dims=2)
    if student.shape[1] == 0:
        raise reject(NAME, f"student must have at least one class, got {tuple(student.shape)}")
    if teacher is None and target is None:
        raise reject(NAME, "teacher and target are both None: there is nothing to compare with")
    if teacher is not None:
        check_like(NAME, "teacher", teacher, student, "student")
    if target is not None:
        check_labels(NAME, "target", target, student.shape[0], student.device)
    temperature, alpha, label_smoothing = check_row_options(
        temperature, alpha, label_smoothing, ignore_index, reduction
    )
    tensors = [student] if teacher is None else [student, teacher]
    backend = choose_backend(NAME, backend, tensors)
    if target is not None and backend != "native":  # which finds it in the same sweep
        check_label_range(target, student.shape[1], ignore_index)
    if alpha == 0.0:  # a term whose factor is 0 is not computed
        teacher = None
    if backend == "eager" or (teacher is None and target is None):  # nothing for a kernel to do
        loss, terms = eager.kd_cross_entropy(
            student,
            teacher,
            target,
            temperature=temperature,
            alpha=alpha,
            tau_squared=tau_squared,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
        return (loss, terms) if return_terms else loss

    weight = alpha * temperature**2 if tau_squared else alpha
    if teacher is None:
        weight = 0.0  # float16's power of two is chosen by the terms that are computed
    options = (temperature, weight, ignore_index, label_smoothing, reduction)
    teacher = None if teacher is None else teacher.detach()
    if wants_gradient(student):
        loss, terms = _KDCrossEntropy.apply(
            backend, student, teacher, target, *options, True, return_terms
        )
    else:
        loss, terms, _, _ = raw(NAME, backend)(
            student, teacher, target, *options, False, return_terms
        )
    return (loss, KDTerms(*terms.unbind())) if return_terms else loss


def check_temperature(temperature: object, op: str = NAME) -> float:
    """A temperature whose square and inverse float32 can hold."""
    value = check_number(op, "temperature", temperature, above=0.0)
    return check_number(op, "temperature", value, at_least=1 / LARGEST, at_most=LARGEST)


def check_row_options(
    temperature: object,
    alpha: object,
    label_smoothing: object,
    ignore_index: object,
    reduction: object,
    op: str = NAME,
) -> tuple[float, float, float]:
    """Temperature, alpha and label smoothing as floats, where all options of a row are right."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise reject(op, f"ignore_index must be an int, got {ignore_index!r}")
    check_choice(op, "reduction", reduction, REDUCTIONS)
    return (
        check_temperature(temperature, op),
        check_number(op, "alpha", alpha, at_least=-LARGEST, at_most=LARGEST),
        check_number(op, "label_smoothing", label_smoothing, at_least=0.0, at_most=1.0),
    )


def check_label_range(target: Tensor, classes: int, ignore_index: int, op: str = NAME) -> None:
    """Raises ValueError where a label is neither a class nor ignore_index.

    On the CPU; elsewhere it would wait for the device, so only under kdkernels.validate(True).
    """
    if not checks.looks_at_values(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise reject(
            op,
            f"target must lie in [0, {classes}) or be ignore_index ({ignore_index}), "
            f"got {int(target[row])} in row {row}",
        )


class KDCrossEntropyLoss(nn.Module):
    """kd_cross_entropy as a module: `loss(student, teacher, target)`; arguments and errors as
    there.

    Replaces the pair nn.CrossEntropyLoss()(s, y) and nn.CrossEntropyLoss()(s / tau, softmax(t /
    tau)) and their sum. Differences: float32 loss for 16-bit logits; a batch without counted rows
    gives 0, not NaN; one backward a forward.
    """

    def __init__(
        self,
        *,
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
        self.temperature, self.alpha, self.label_smoothing = check_row_options(
            temperature, alpha, label_smoothing, ignore_index, reduction
        )
        self.tau_squared = tau_squared
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.return_terms = return_terms
        self.backend = backend

    def forward(
        self, student: Tensor, teacher: Tensor | None, target: Tensor | None
    ) -> Tensor | tuple[Tensor, KDTerms]:
        return kd_cross_entropy(
            student,
            teacher,
            target,
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
            f"temperature={self.temperature}, alpha={self.alpha}, tau_squared={self.tau_squared}, "
            f"reduction={self.reduction!r}"
        )


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Drop-in for torch.nn.CrossEntropyLoss on (N, C) logits and class indices.

    Constructor, defaults, positional call and results are torch's: the loss has the logits' dtype,
    and a "mean" in which no row counts is NaN. What the kernel does not cover (class weights, class
    probabilities as target, (C,) or K-dimensional input, int target types other than int32 and
    int64) runs torch's own code. Two differences: a second backward through the same graph raises,
    and a label out of range is a ValueError.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not self._covers(input, target):
            return super().forward(input, target)
        loss, terms = kd_cross_entropy(
            input,
            None,
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            return_terms=True,
        )
        if self.reduction == "mean":
            loss = loss + torch.where(terms.count == 0, torch.nan, 0.0)
        # torch's own runs in float32 under autocast
        autocast = torch.is_autocast_enabled(input.device.type)
        return loss if autocast else loss.to(input.dtype)

    def _covers(self, input: Tensor, target: Tensor) -> bool:
        return (
            self.weight is None
            and input.dim() == 2
            and input.shape[1] > 0
            and input.dtype in DTYPE_CODES
            and target.dtype in (torch.int32, torch.int64)
            and target.shape == input.shape[:1]
            and target.device == input.device
            and backends(NAME, input.device.type)[0] != "eager"
        )
