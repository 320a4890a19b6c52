"""Kernels with one planted mistake each, and the promise that must reject them.

Each is built on eager, so it is right but for the mistake. The gradient mistakes sit in autograd
Functions, as they would in a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import contract
import torch
from contract import Op

import kdkernels


@dataclass(frozen=True)
class Wrong:
    """A mistake planted into `op`, and the promise that must notice."""

    name: str
    op: str
    function: Callable
    promise: Callable[[Op], None]

    def plant(self, op: Op) -> Op:
        return replace(op, function=self.function)


class _EditGradient(torch.autograd.Function):
    """Identity whose gradient is passed through `edit(gradient)`."""

    @staticmethod
    def forward(ctx, value, edit):
        ctx.edit = edit
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.edit(gradient), None


def accurate(op: Op, dtype: torch.dtype = torch.float32) -> None:
    contract.accuracy(op, "eager", dtype)


def kd(student, teacher, target, **options):
    return kdkernels.kd_cross_entropy(student, teacher, target, **{**options, "backend": "eager"})


def last_column_dropped(student, teacher, target, **options):
    short = None if teacher is None else teacher[:, :-1]
    if student.shape[1] == 1:
        return kd(student, teacher, target, **options)
    if target is not None:
        target = torch.where(target == student.shape[1] - 1, 0, target)
    return kd(student[:, :-1], short, target, **options)


def alpha_missing(student, teacher, target, **options):
    return kd(student, teacher, target, **{**options, "alpha": 1.0})


def temperature_missing(student, teacher, target, **options):
    return kd(student, teacher, target, **{**options, "temperature": 1.0})


def temperature_on_the_hard_term(student, teacher, target, temperature=3.0, **options):
    if target is None:
        return kd(student, teacher, target, temperature=temperature, **options)
    tau = temperature
    teacher = None if teacher is None else teacher / tau
    return kd(student / tau, teacher, target, temperature=1.0, **options)


def tau_squared_missing(student, teacher, target, **options):
    return kd(student, teacher, target, **{**options, "tau_squared": False})


def ignored_rows_in_the_gradient(student, teacher, target, **options):
    def edit(gradient):
        if target is None:
            return gradient
        ignored = target == options.get("ignore_index", -100)
        return gradient + 1e-3 * ignored[:, None]

    return kd(_EditGradient.apply(student, edit), teacher, target, **options)


def all_rows_in_the_mean(student, teacher, target, **options):
    if options.get("reduction", "mean") != "mean" or not len(student):
        return kd(student, teacher, target, **options)
    return kd(student, teacher, target, **{**options, "reduction": "sum"}) / len(student)


def tail_unwritten(student, teacher, target, **options):
    def edit(gradient):
        out = torch.empty(gradient.shape, dtype=gradient.dtype)
        whole = gradient.shape[1] // 16 * 16
        out[:, :whole] = gradient[:, :whole]
        return out

    return kd(_EditGradient.apply(student, edit), teacher, target, **options)


class _StaleRows(torch.autograd.Function):
    """A per-row loss whose gradient takes the first row's incoming gradient for all."""

    @staticmethod
    def forward(ctx, loss):
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:1].expand(gradient.shape) if gradient.dim() else gradient


def stale_gradient_in_none(student, teacher, target, **options):
    return _StaleRows.apply(kd(student, teacher, target, **options))


class _MeanFoldedBeforeHalf(torch.autograd.Function):
    """Rounds gradient / n to float16 before the loss scale arrives."""

    @staticmethod
    def forward(ctx, student, teacher, target, options):
        with torch.enable_grad():
            leaf = student.detach().float().requires_grad_()
            loss = kd(leaf, None if teacher is None else teacher.float(), target, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        ctx.save_for_backward(gradient.half())
        return loss.detach()

    @staticmethod
    def backward(ctx, incoming):
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * incoming).half(), None, None, None


def float16_gradient_flushed(student, teacher, target, **options):
    options.pop("backend", None)
    return _MeanFoldedBeforeHalf.apply(student, teacher, target, options)


def maximum_not_subtracted(student, teacher, target, **options):
    if target is None or teacher is not None or options.get("reduction", "mean") != "mean":
        return kd(student, teacher, target, **options)
    picked = student.gather(1, target.clamp(min=0)[:, None].long())[:, 0]
    return (student.float().exp().sum(dim=1).log() - picked.float()).mean()


def writes_into_its_input(student, teacher, target, **options):
    if teacher is not None:
        teacher.data.mul_(0.5)
        teacher = teacher * 2.0
    return kd(student, teacher, target, **options)


def nan_swallowed(student, teacher, target, **options):
    student = student.nan_to_num()
    return kd(student, None if teacher is None else teacher.nan_to_num(), target, **options)


def second_backward_silent(student, teacher, target, **options):
    return kd(student, teacher, target, **options) * 1.0


def bad_arguments_accepted(student, teacher, target, **options):
    options.pop("backend", None)
    return torch.zeros(())


def loss_in_the_inputs_dtype(student, teacher, target, **options):
    return kd(student, teacher, target, **options).to(student.dtype)


_KD = [
    (last_column_dropped, accurate),
    (alpha_missing, accurate),
    (temperature_missing, accurate),
    (temperature_on_the_hard_term, accurate),
    (tau_squared_missing, accurate),
    (ignored_rows_in_the_gradient, accurate),
    (all_rows_in_the_mean, accurate),
    (stale_gradient_in_none, accurate),
    (maximum_not_subtracted, accurate),
    (tail_unwritten, partial(contract.every_element_written, backend="eager", dtype=torch.float32)),
    (float16_gradient_flushed, contract.half_survives_loss_scale),
    (
        writes_into_its_input,
        partial(contract.inputs_unmodified, backend="eager", dtype=torch.float32),
    ),
    (nan_swallowed, partial(contract.nan_in_nan_out, backend="eager")),
    (second_backward_silent, partial(contract.second_backward_raises, backend="native")),
    (bad_arguments_accepted, partial(contract.rejects_bad_arguments, backend="eager")),
    (
        loss_in_the_inputs_dtype,
        partial(contract.output_form, backend="eager", dtype=torch.bfloat16),
    ),
]

ALL = [Wrong(function.__name__, "kd_cross_entropy", function, promise) for function, promise in _KD]
