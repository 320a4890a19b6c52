"""Kernels with one planted mistake each, and the promise that must reject them.

Each is built on eager, so it is right but for the mistake. The gradient mistakes sit in autograd
Functions, as they would in a kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import contract
import contract_values
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


class EditGradient(torch.autograd.Function):
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

    return kd(EditGradient.apply(student, edit), teacher, target, **options)


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

    return kd(EditGradient.apply(student, edit), teacher, target, **options)


class StaleRows(torch.autograd.Function):
    """A per-row loss whose gradient takes the first row's incoming gradient for all."""

    @staticmethod
    def forward(ctx, loss):
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:1].expand(gradient.shape) if gradient.dim() else gradient


def stale_gradient_in_none(student, teacher, target, **options):
    return StaleRows.apply(kd(student, teacher, target, **options))


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


def head_of_a_misaligned_row_dropped(student, teacher, target, **options):
    size = student.element_size()
    starts = student.data_ptr() // size + torch.arange(len(student)) * student.stride(0)
    before = -starts % (16 // size)  # columns before the first 16-byte boundary

    def edit(gradient):
        return gradient * (torch.arange(gradient.shape[1]) >= before[:, None])

    return kd(EditGradient.apply(student, edit), teacher, target, **options)


def parts_merged_without_rescaling(student, teacher, target, **options):
    loss = kd(student, teacher, target, **options)
    if options.get("reduction", "mean") != "mean" or student.shape[1] < 4000:
        return loss
    parts = student.detach().float().split(2048, dim=1)
    most = student.detach().float().amax(dim=1)
    sums = sum((part - part.amax(dim=1, keepdim=True)).exp().sum(dim=1) for part in parts)
    wrong = most + sums.log()
    return loss + (wrong - student.detach().float().logsumexp(dim=1)).mean()


def masked_lanes_count_as_zeros(student, teacher, target, **options):
    padding = -student.shape[1] % 16
    if options.get("label_smoothing") or not padding:
        return kd(student, teacher, target, **options)
    wide = torch.nn.functional.pad(student, (0, padding))
    teacher = None if teacher is None else torch.nn.functional.pad(teacher, (0, padding))
    return kd(wide, teacher, target, **options)


def label_written_before_its_tile(student, teacher, target, **options):
    def edit(gradient):
        if target is None or options.get("reduction", "mean") != "mean":
            return gradient
        counts = target != options.get("ignore_index", -100)
        one = counts / counts.sum().clamp(min=1) * (1 - options.get("label_smoothing", 0.0))
        label = torch.where(counts, target, 0).long()[:, None]
        return gradient.scatter_add(1, label, one[:, None].to(gradient.dtype))

    return kd(EditGradient.apply(student, edit), teacher, target, **options)


def any_largest_logit_is_a_hit(student, teacher, target, **options):
    found = kd(student, teacher, target, **options)
    if not options.get("return_terms"):
        return found
    return found[0], found[1]._replace(hits=(student.argmax(dim=1) == target).sum().float())


def soft_term_multiplied_by_0(call, *arguments, **options):
    """loss + 0 * soft in place of no soft term, which a NaN or infinity of the teacher shows."""
    found = call(*arguments, **options)
    if options.get("alpha") != 0.0 or not options.get("return_terms"):
        return found
    soft = call(*arguments, **{**options, "alpha": 1.0})[0]
    return found[0] + 0.0 * soft, found[1]


def no_gradient_where_nothing_is_computed(call, *arguments, **options):
    """A constant 0 for the loss without a target whose soft term has the factor 0."""
    found = call(*arguments, **options)
    if options.get("alpha") != 0.0 or arguments[2] is not None:
        return found
    return (found[0].detach(), found[1]) if options.get("return_terms") else found.detach()


def soft_term_in_the_terms(call, *arguments, **options):
    """The terms of a soft term that has the factor 0."""
    found = call(*arguments, **options)
    if options.get("alpha") != 0.0 or not options.get("return_terms"):
        return found
    return found[0], call(*arguments, **{**options, "alpha": 1.0})[1]


class _IncomingIgnored(torch.autograd.Function):
    """Returns early because post_scale is 1, whatever gradient arrives."""

    @staticmethod
    def forward(ctx, loss):
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones_like(gradient)


def early_return_ignores_the_incoming_gradient(student, teacher, target, **options):
    return _IncomingIgnored.apply(kd(student, teacher, target, **options))


def teacher_read_with_the_students_pitch(student, teacher, target, **options):
    if teacher is not None and student.stride(0) < teacher.stride(0):
        teacher = teacher.as_strided(teacher.shape, (student.stride(0), teacher.stride(1)))
    return kd(student, teacher, target, **options)


def triplet(anchor, positive, negative, **options):
    return kdkernels.triplet_loss(anchor, positive, negative, **{**options, "backend": "eager"})


def margin_forgotten(anchor, positive, negative, **options):
    return triplet(anchor, positive, negative, **{**options, "margin": 0.0})


def squared_ignored(anchor, positive, negative, **options):
    return triplet(anchor, positive, negative, **{**options, "squared": True})


def no_gradient_to_the_negative(anchor, positive, negative, **options):
    return triplet(anchor, positive, negative.detach() + 0.0 * negative, **options)


def batch(embeddings, labels, **options):
    return kdkernels.batch_triplet_loss(embeddings, labels, **{**options, "backend": "eager"})


def tie_to_the_highest_index(embeddings, labels, **options):
    if options.get("reduction") == "none":
        return batch(embeddings.flip(0), labels.flip(0), **options).flip(0)
    return batch(embeddings.flip(0), labels.flip(0), **options)


def mean_over_positive_hinges(embeddings, labels, **options):
    if options.get("reduction", "mean") == "mean":
        options["reduction"] = "nonzero"
    return batch(embeddings, labels, **options)


def semihard_mined_as_hard(embeddings, labels, **options):
    if options.get("mining", "hard") == "semihard":
        options["mining"] = "hard"
    return batch(embeddings, labels, **options)


def rows_at_infinity_dropped(embeddings, labels, **options):
    if options.get("reduction") == "none":
        return batch(embeddings, labels, **options)
    finite = ~embeddings.isinf().any(dim=1)
    return batch(embeddings[finite], labels[finite], **options)


def nan_hinges_not_counted(embeddings, labels, **options):
    if options.get("reduction") == "nonzero" and bool(embeddings.isnan().any()):
        options["reduction"] = "sum"
    return batch(embeddings, labels, **options)


class _AnchorsOnly(torch.autograd.Function):
    """The mined loss with a gradient that counts each row as an anchor only."""

    @staticmethod
    def forward(ctx, embeddings, labels, options):
        with torch.enable_grad():
            rows = []
            for row in range(len(embeddings)):
                leaf = embeddings.detach().requires_grad_()
                each = batch(leaf, labels, **{**options, "reduction": "none"})
                (gradient,) = torch.autograd.grad(each[row], leaf)
                rows.append(gradient[row])
        ctx.save_for_backward(torch.stack(rows) if rows else embeddings.detach())
        ctx.rows = options.get("reduction") == "none"
        return batch(embeddings.detach(), labels, **options)

    @staticmethod
    def backward(ctx, incoming):
        (gradient,) = ctx.saved_tensors
        return gradient * (incoming[:, None] if ctx.rows else incoming), None, None


def gradient_to_anchors_only(embeddings, labels, **options):
    return _AnchorsOnly.apply(embeddings, labels, options)


def hidden(students, teachers, **options):
    return kdkernels.hidden_l2(students, teachers, **{**options, "backend": "eager"})


def mean_for_batchmean(students, teachers, **options):
    if options.get("reduction", "batchmean") == "batchmean":
        options["reduction"] = "mean"
    return hidden(students, teachers, **options)


def weights_ignored(students, teachers, **options):
    return hidden(students, teachers, **{**options, "weights": None})


def last_pair_dropped(students, teachers, **options):
    if len(students) < 2 or options.get("weights") is not None:
        return hidden(students, teachers, **options)
    kept = hidden(students[:-1], teachers[:-1], **options)
    return kept + 0.0 * students[-1].float().sum()


def nearest(queries, gallery, **options):
    return kdkernels.nearest_neighbor(queries, gallery, backend="eager")


def the_query_finds_itself(queries, gallery, **options):
    return nearest(queries, queries if gallery is None else gallery)


def nearest_tie_to_the_highest_index(queries, gallery, **options):
    if gallery is None or not len(queries):
        return nearest(queries, gallery)
    distance, index = nearest(queries, gallery.flip(0))
    return distance, len(gallery) - 1 - index


def root_of_the_distance(queries, gallery, **options):
    distance, index = nearest(queries, gallery)
    return distance.sqrt(), index


def last_part_of_a_gallery_dropped(queries, gallery, **options):
    if gallery is None or len(gallery) < 16:
        return nearest(queries, gallery)
    return nearest(queries, gallery[: len(gallery) // 16 * 16])


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
    (head_of_a_misaligned_row_dropped, accurate),
    (parts_merged_without_rescaling, accurate),
    (masked_lanes_count_as_zeros, accurate),
    (label_written_before_its_tile, accurate),
    (early_return_ignores_the_incoming_gradient, accurate),
    (teacher_read_with_the_students_pitch, accurate),
    (tail_unwritten, partial(contract.every_element_written, backend="eager", dtype=torch.float32)),
    (float16_gradient_flushed, contract.half_survives_loss_scale),
    (
        writes_into_its_input,
        partial(contract.inputs_unmodified, backend="eager", dtype=torch.float32),
    ),
    (nan_swallowed, partial(contract.nan_in_nan_out, backend="eager")),
    (bad_arguments_accepted, partial(contract.rejects_bad_arguments, backend="eager")),
    (
        loss_in_the_inputs_dtype,
        partial(contract.output_form, backend="eager", dtype=torch.bfloat16),
    ),
]

if "native" in contract.available_backends("kd_cross_entropy"):
    # eager allows a second backward, so only a kernel can break this promise
    promise = partial(contract.second_backward_raises, backend="native")
    _KD.append((second_backward_silent, promise))

_OTHERS = {
    "triplet_loss": [margin_forgotten, squared_ignored, no_gradient_to_the_negative],
    "batch_triplet_loss": [
        tie_to_the_highest_index,
        mean_over_positive_hinges,
        semihard_mined_as_hard,
        gradient_to_anchors_only,
    ],
    "hidden_l2": [mean_for_batchmean, weights_ignored, last_pair_dropped],
    "nearest_neighbor": [
        the_query_finds_itself,
        nearest_tie_to_the_highest_index,
        root_of_the_distance,
        last_part_of_a_gallery_dropped,
    ],
}

_OF_VALUES = [
    (rows_at_infinity_dropped, contract_values.infinite_negatives_make_triplets),
    (nan_hinges_not_counted, contract_values.nan_hinges_count_as_nonzero),
]
# of both cross-entropy ops: their first argument is the op's eager
OF_FACTOR_0 = [
    soft_term_multiplied_by_0,
    no_gradient_where_nothing_is_computed,
    soft_term_in_the_terms,
]
_KD.append(
    (
        any_largest_logit_is_a_hit,
        partial(contract_values.rows_without_a_distribution_hit_nothing, backend="eager"),
    )
)

ALL = (
    [Wrong(function.__name__, "kd_cross_entropy", function, promise) for function, promise in _KD]
    + [
        Wrong(function.__name__, op, function, accurate)
        for op, functions in _OTHERS.items()
        for function in functions
    ]
    + [
        Wrong(function.__name__, "batch_triplet_loss", function, partial(promise, backend="eager"))
        for function, promise in _OF_VALUES
    ]
    + [
        Wrong(
            function.__name__,
            "kd_cross_entropy",
            partial(function, kd),
            partial(contract_values.a_soft_term_of_factor_0_is_not_computed, backend="eager"),
        )
        for function in OF_FACTOR_0
    ]
)
