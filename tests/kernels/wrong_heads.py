"""Kernels of linear_kd_cross_entropy with one planted mistake each, as in wrong_kernels.py."""

from functools import partial

import torch
from contract_values import a_soft_term_of_factor_0_is_not_computed_by_a_head as no_soft_term
from wrong_kernels import OF_FACTOR_0, EditGradient, StaleRows, Wrong, accurate, kd

import kdkernels
from kdkernels.linear_kd_cross_entropy import eager as specification


def head(features, weight, target, **options):
    call = kdkernels.linear_kd_cross_entropy
    return call(features, weight, target, **{**options, "backend": "eager"})


def margin_left_out(features, weight, target, **options):
    return head(features, weight, target, **{**options, "margin": None})


def slope_of_the_margin_taken_as_1(features, weight, target, **options):
    if options.get("margin") is not None:
        options["margin_grad"] = "straight_through"
    return head(features, weight, target, **options)


def margin_in_both_terms(features, weight, target, **options):
    """The soft term, too, sees the label's logit with its margin."""
    if options.get("margin") is None or options.get("teacher") is None:
        return head(features, weight, target, **options)
    changed = {**options, "label_smoothing": 0.0}
    label = torch.where(target >= 0, target, 0)[:, None]

    def logits(**of):
        unit = torch.nn.functional.normalize
        cosines = unit(features.float()) @ unit(weight.float()).t()
        m2, m3 = (torch.as_tensor(m) for m in of["margin"].amounts())
        angle = cosines.gather(1, label).clamp(-1 + 1e-6, 1 - 1e-6).acos()
        return of["scale"] * cosines.scatter(
            1, label, (angle + m2[..., None]).cos() - m3[..., None]
        )

    s = logits(**changed)
    teacher = options["teacher"]
    if isinstance(teacher, list):
        unit = torch.nn.functional.normalize
        of = options.get("teacher_scale") or options["scale"]
        teacher = of * unit(teacher[0].float()) @ unit(teacher[1].float()).t()
    kept = ("temperature", "alpha", "label_smoothing", "reduction", "return_terms")
    return kd(s, teacher, target, **{k: v for k, v in options.items() if k in kept})


def first_margin_for_all_rows(features, weight, target, **options):
    margin = options.get("margin")
    if margin is not None and any(isinstance(m, torch.Tensor) for m in margin.amounts()):
        m2, m3 = (torch.as_tensor(m).expand(len(target)) for m in margin.amounts())
        options["margin"] = kdkernels.CombinedMargin(float(m2[0]), float(m3[0]))
    return head(features, weight, target, **options)


def label_turned_on_beyond_pi(features, weight, target, **options):
    def without_guard(cosine, _squared, m2, m3):
        return (cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos() + m2.clamp(min=0.0)).cos() - m3

    original = specification.with_margin
    try:
        specification.with_margin = without_guard
        return head(features, weight, target, **options)
    finally:
        specification.with_margin = original


def norms_taken_as_constants(features, weight, target, **options):
    if options.get("normalize"):
        features, weight = (
            EditGradient.apply(x, partial(_with_share_along, x.detach()))
            for x in (features, weight)
        )
    return head(features, weight, target, **options)


def _with_share_along(x, gradient):
    return gradient + 1e-2 * x.to(gradient.dtype)


def scale_of_the_teacher_ignored(features, weight, target, **options):
    return head(features, weight, target, **{**options, "teacher_scale": None})


def bias_left_out(features, weight, target, **options):
    bias = options.pop("bias", None)
    if bias is None:
        return head(features, weight, target, **options)
    return head(features, weight, target, bias=0.0 * bias, **options)


def weights_of_a_row_come_too_late(features, weight, target, **options):
    found = head(features, weight, target, **options)
    if isinstance(found, tuple):
        return StaleRows.apply(found[0]), *found[1:]
    return StaleRows.apply(found)


def logits_rounded_to_16_bits(features, weight, target, **options):
    teacher = options.get("teacher")
    if options.get("normalize") or options.get("bias") is not None or isinstance(teacher, list):
        return head(features, weight, target, **options)
    kept = ("temperature", "alpha", "tau_squared", "label_smoothing", "reduction", "return_terms")
    options = {k: v for k, v in options.items() if k in kept}
    return kd(features @ weight.t(), teacher, target, **options)


class _LastChunk(torch.autograd.Function):
    """The weight's gradient of the later half of the rows alone, as if chunks overwrote it."""

    @staticmethod
    def forward(ctx, loss, weight, features, target, options):
        half = len(features) // 2
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            later = head(features[half:].detach(), leaf, target[half:], **options)
            (ctx.gradient,) = torch.autograd.grad(later, leaf)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, incoming):
        return incoming, ctx.gradient * incoming, None, None, None


def each_chunk_overwrites_the_weights_gradient(features, weight, target, **options):
    simple = {"normalize", "scale", "backend", "reduction"}
    if set(options) - simple - {"teacher"} or options.get("teacher") is not None:
        return head(features, weight, target, **options)
    if options.get("reduction", "mean") == "none" or len(features) < 2:
        return head(features, weight, target, **options)
    loss = head(features, weight.detach(), target, **options)
    return _LastChunk.apply(loss, weight, features, target, options)


def _is_sparse(options):
    teacher = options.get("teacher")
    return isinstance(teacher, list) and not teacher[0].is_floating_point()


def tail_left_out(features, weight, target, **options):
    """The top k as if they were all there is: their probabilities made to add up to 1."""
    if _is_sparse(options):
        indices, log_probs = options["teacher"]
        options["teacher"] = [indices, torch.log_softmax(log_probs, dim=1)]
    return head(features, weight, target, **options)


def _with_bins(bins, features, weight, target, **options):
    original = specification.soft_over_bins
    try:
        specification.soft_over_bins = bins
        return head(features, weight, target, **options)
    finally:
        specification.soft_over_bins = original


def tail_forgotten_in_the_gradient(features, weight, target, **options):
    right = specification.soft_over_bins

    def bins(student, indices, log_probs, temperature):
        soft, entropy = right(student, indices, log_probs, temperature)
        # all probability outside the top k is taken to have gradient q alone
        top = specification.rows.cross_entropy_of(
            torch.log_softmax(student / temperature, dim=1).gather(1, indices), log_probs.exp()
        )
        return soft.detach() + top - top.detach(), entropy

    return _with_bins(bins, features, weight, target, **options)


def tail_by_cancellation(features, weight, target, **options):
    def bins(student, indices, log_probs, temperature):
        p = log_probs.exp()
        q = torch.softmax(student / temperature, dim=1).gather(1, indices)
        both = ((x, (1.0 - x.sum(dim=1)).clamp(min=0.0)) for x in (p, q))
        p, q = (torch.cat((x, rest[:, None]), dim=1) for x, rest in both)
        return tuple(specification.rows.cross_entropy_of(x.log(), p) for x in (q, p))

    return _with_bins(bins, features, weight, target, **options)


def entropy_without_the_tail(features, weight, target, **options):
    right = specification.soft_over_bins

    def bins(student, indices, log_probs, temperature):
        soft, _ = right(student, indices, log_probs, temperature)
        return soft, specification.rows.cross_entropy_of(log_probs, log_probs.exp())

    return _with_bins(bins, features, weight, target, **options)


def softmax_over_classes_that_take_no_part(features, weight, target, **options):
    return head(features, weight, target, **{**options, "classes": None})


def gradient_of_sampled_classes_at_their_places(features, weight, target, **options):
    """The S rows of the weight's gradient lie where the sample has them, not where the weight."""
    classes = options.get("classes")

    def edit(gradient):
        out = torch.zeros_like(gradient)
        out[: len(classes)] = gradient[classes]
        return out

    if classes is not None:
        weight = EditGradient.apply(weight, edit)
    return head(features, weight, target, **options)


_RIGHT_IN_FLOAT32 = [logits_rounded_to_16_bits]
_OTHERS = [
    margin_left_out,
    slope_of_the_margin_taken_as_1,
    margin_in_both_terms,
    first_margin_for_all_rows,
    label_turned_on_beyond_pi,
    norms_taken_as_constants,
    scale_of_the_teacher_ignored,
    bias_left_out,
    weights_of_a_row_come_too_late,
    each_chunk_overwrites_the_weights_gradient,
    tail_left_out,
    tail_forgotten_in_the_gradient,
    tail_by_cancellation,
    entropy_without_the_tail,
    softmax_over_classes_that_take_no_part,
    gradient_of_sampled_classes_at_their_places,
]
NAME = "linear_kd_cross_entropy"
ALL = [
    *(Wrong(f.__name__, NAME, f, accurate) for f in _OTHERS),
    *(
        Wrong(f.__name__, NAME, f, partial(accurate, dtype=torch.bfloat16))
        for f in _RIGHT_IN_FLOAT32
    ),
    *(
        Wrong(
            f"{f.__name__} of a head",
            NAME,
            partial(f, head),
            partial(no_soft_term, backend="eager"),
        )
        for f in OF_FACTOR_0
    ),
]
