"""hidden_l2: schema, autograd, functional and module."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from kdkernels.backends import choose_backend
from kdkernels.checks import check_choice, check_like, check_number, check_tensor, reject
from kdkernels.hidden_l2 import eager, native
from kdkernels.registration import claim_gradients, define, raw, wants_gradient

NAME = "hidden_l2"


def _fake(students, teachers, weights, weight_tensor, reduction, want_gradient):
    floats = {"dtype": torch.float32, "device": students[0].device}
    gradients = [
        torch.empty_like(s, requires_grad=False) if wanted else s.new_empty(0)
        for s, wanted in zip(students, want_gradient, strict=True)
    ]
    pairs = len(students)
    return (
        torch.empty((), **floats),
        torch.empty(pairs, **floats),
        gradients,
        torch.empty(pairs, **floats),
    )


def _give_fake(gradients, incoming, post_scale):
    return None


# P pairs. loss is 0-d, terms and post_scale are (P,) float32; gradients holds a tensor without gaps
# in each student's dtype, shape and memory format, an empty one where none is wanted.
# weight_tensor, where given, replaces weights.
define(
    NAME,
    "(Tensor[] students, Tensor[] teachers, float[] weights, Tensor? weight_tensor, str reduction, "
    "bool[] want_gradient) -> (Tensor, Tensor, Tensor[], Tensor)",
    _fake,
    native=native.hidden_l2,
    triton="kdkernels.hidden_l2.triton_kernel:hidden_l2",
)
define(
    "hidden_l2_give_",
    "(Tensor(a!)[] gradients, Tensor incoming, Tensor post_scale) -> ()",
    _give_fake,
    native=native.hidden_l2_give_,
    triton="kdkernels.hidden_l2.triton_kernel:hidden_l2_give_",
)


class _HiddenL2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, weights, weight_tensor, reduction, want_gradient, *tensors):
        pairs = len(tensors) // 2
        loss, terms, gradients, post_scale = raw(NAME, backend)(
            tensors[:pairs], tensors[pairs:], weights, weight_tensor, reduction, want_gradient
        )
        ctx.backend = backend
        ctx.save_for_backward(post_scale, *gradients)
        ctx.want_gradient = want_gradient
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, incoming, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        claim_gradients(ctx, NAME)
        post_scale, *gradients = ctx.saved_tensors
        raw("hidden_l2_give_", ctx.backend)(gradients, incoming, post_scale)
        given = [g if w else None for g, w in zip(gradients, ctx.want_gradient, strict=True)]
        return None, None, None, None, None, *given, *(None,) * len(given)


@overload
def hidden_l2(
    students: Sequence[Tensor] | Tensor,
    teachers: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | Tensor | None = ...,
    reduction: str = ...,
    return_terms: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def hidden_l2(
    students: Sequence[Tensor] | Tensor,
    teachers: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | Tensor | None = ...,
    reduction: str = ...,
    return_terms: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def hidden_l2(
    students: Sequence[Tensor] | Tensor,
    teachers: Sequence[Tensor] | Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Weighted squared distances between many pairs of hidden layers, all in one launch.

        loss = sum_i w_i r_i ||S_i - T_i||^2

    Eq. (3) of "Model Distillation with Knowledge Transfer" (arXiv 1709.02929) for every pair at
    once. r_i is 1 / the pair's own first dimension ("batchmean"; 1 for a 0-d tensor), 1 / its own
    element count ("mean", as F.mse_loss) or 1 ("sum"). A pair without elements gives 0. A pair of
    weight 0 is not computed: its term and its gradient are 0, whatever its tensors hold.

    students, teachers: equally many tensors, or one each; S_i and T_i have the same shape, and any
    dtype of float32, bfloat16, float16, strides and memory format of their own (float64 runs on
    eager). weights: P numbers, or a (P,) float32 tensor on the pairs' device, taken without its
    gradient; None is 1 each.

    Returns a float32 scalar. With return_terms=True also the (P,) terms r_i ||S_i - T_i||^2,
    without their weights, float32 and detached.

    The gradient flows to the students only, to those that require one, each in its own dtype and,
    where its memory has no gaps, its own strides. It is formed in forward; backward scales it in
    place and gives it away, so a second backward or a double backward raises an error (use
    backend="eager" for either). A 16-bit gradient is rounded when it is stored and again where the
    incoming gradient is no power of two: it is within 1.5 units of the last place (docs/ops.md).
    float16 gradients are stored times a power of two until then, so that neither a mean over many
    elements nor a loss scale loses them. Inputs are never written to. Under autocast tensors are
    taken as they are given.

    Raises ValueError where lists are empty or of different lengths, and where shapes, dtypes,
    devices, weights or options are wrong.
    """
    students, teachers = _listed("students", students), _listed("teachers", teachers)
    if not students:
        raise reject(NAME, "students is empty: there must be at least one pair")
    if len(students) != len(teachers):
        raise reject(
            NAME, f"teachers must have {len(students)} tensors like students, got {len(teachers)}"
        )
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        check_tensor(NAME, f"students[{i}]", student)
        check_like(NAME, f"teachers[{i}]", teacher, student, f"students[{i}]")
        if student.device != students[0].device:
            raise reject(
                NAME,
                f"students[{i}] must be on {students[0].device} like students[0], "
                f"got {student.device}",
            )
    check_choice(NAME, "reduction", reduction, eager.REDUCTIONS)
    numbers, weight_tensor = _check_weights(weights, len(students), students[0].device)
    backend = choose_backend(NAME, backend, [*students, *teachers])
    if backend == "eager":
        each = numbers if weight_tensor is None else weight_tensor
        loss, terms = eager.hidden_l2(students, teachers, each, reduction)
        return (loss, terms) if return_terms else loss

    teachers = [t.detach() for t in teachers]
    want_gradient = [wants_gradient(s) for s in students]
    if any(want_gradient):
        loss, terms = _HiddenL2.apply(
            backend, numbers, weight_tensor, reduction, want_gradient, *students, *teachers
        )
    else:
        loss, terms, _, _ = raw(NAME, backend)(
            students, teachers, numbers, weight_tensor, reduction, want_gradient
        )
    return (loss, terms) if return_terms else loss


def _listed(name: str, value: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The tensors of a list or tuple; one tensor is a list of one."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise reject(
            NAME, f"{name} must be a list of tensors or a tensor, got {type(value).__name__}"
        )
    return list(value)


def _check_weights(
    weights: Sequence[float] | Tensor | None, pairs: int, device: torch.device
) -> tuple[list[float], Tensor | None]:
    """The weights as numbers, and as the tensor where one was given (the numbers are then 1)."""
    if weights is None:
        return [1.0] * pairs, None
    if isinstance(weights, Tensor):
        if weights.dtype != torch.float32 or weights.shape != (pairs,) or weights.device != device:
            raise reject(
                NAME,
                f"weights must be a float32 tensor of shape ({pairs},) on {device}, "
                f"got {weights.dtype} of shape {tuple(weights.shape)} on {weights.device}",
            )
        return [1.0] * pairs, weights.detach()
    if not isinstance(weights, (list, tuple)):
        raise reject(
            NAME,
            f"weights must be a list of {pairs} numbers or a float32 tensor, "
            f"got {type(weights).__name__}",
        )
    if len(weights) != pairs:
        raise reject(NAME, f"weights must have {pairs} numbers, one per pair, got {len(weights)}")
    return [check_number(NAME, f"weights[{i}]", w) for i, w in enumerate(weights)], None


class HiddenL2Loss(nn.Module):
    """hidden_l2 as a module: `loss(students, teachers)`; arguments and errors as there.

    Replaces the sum of F.mse_loss(S_i, T_i) over pairs (reduction="mean"), or of
    F.mse_loss(S_i, T_i, reduction="sum") / len(S_i) ("batchmean"). Differences: float32 loss for
    16-bit tensors; a pair without elements gives 0, not NaN; no gradient for the teachers; shapes
    must be equal, none is broadcast; one backward a forward.

    weights: numbers, or a (P,) float32 tensor, which becomes a buffer: it moves with the module and
    is part of its state_dict.
    """

    weights: Sequence[float] | Tensor | None

    def __init__(
        self,
        *,
        weights: Sequence[float] | Tensor | None = None,
        reduction: str = "batchmean",
        return_terms: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(weights, Tensor):
            self.register_buffer("weights", weights.detach())
        else:
            self.weights = weights
        self.reduction = check_choice(NAME, "reduction", reduction, eager.REDUCTIONS)
        self.return_terms = return_terms
        self.backend = backend

    def forward(
        self, students: Sequence[Tensor] | Tensor, teachers: Sequence[Tensor] | Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        return hidden_l2(
            students,
            teachers,
            weights=self.weights,
            reduction=self.reduction,
            return_terms=self.return_terms,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        weights = "tensor" if isinstance(self.weights, Tensor) else self.weights
        return f"weights={weights}, reduction={self.reduction!r}"
