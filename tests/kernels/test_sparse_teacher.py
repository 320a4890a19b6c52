"""Mathematics of linear_kd_cross_entropy with a sparse teacher: k classes a row, and a tail."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from contract import accuracy, find_op
from head_helpers import BACKENDS, NAME, Largest, dtype_of, each, each_kernel, small_chunks

from kdkernels import CombinedMargin, SparseTeacher, checks, linear_kd_cross_entropy
from kdkernels.linear_kd_cross_entropy import native
from kdkernels.linear_kd_cross_entropy.samples import make


def on_logits(logits: torch.Tensor, target, teacher, backend: str, **options):
    """The op with the unit matrix for weight, so that features are logits; and their gradient."""
    x = logits.detach().clone().to(dtype_of(backend)).requires_grad_()
    loss = linear_kd_cross_entropy(
        x, torch.eye(x.shape[1], dtype=x.dtype), target, teacher=teacher, backend=backend, **options
    )
    value = loss[0] if isinstance(loss, tuple) else loss
    (gradient,) = torch.autograd.grad(value.sum(), x)
    detached = (loss[0].detach(), loss[1]) if isinstance(loss, tuple) else loss.detach()
    return detached, gradient.double()


def bins_by_hand(s, indices, log_probs, tau):
    """The soft term of each row in float64, a row and a bin at a time."""
    found = []
    for row, named, logs in zip(s.double(), indices.tolist(), log_probs.double(), strict=True):
        others = [c for c in range(len(row)) if c not in named]
        total = torch.logsumexp(row / tau, dim=0)
        p = logs.exp()
        terms = [p[i] * (total - row[c] / tau) for i, c in enumerate(named) if p[i] > 0]
        if others:
            terms.append((1 - p.sum()) * (total - torch.logsumexp(row[others] / tau, dim=0)))
        found.append(torch.stack(terms).sum())
    return torch.stack(found)


@each
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [None, CombinedMargin(0.4, 0.1)])
def test_equals_the_composition_by_hand(margin, smoothing, backend):
    sample = make(9, 67, 14, teacher="sparse", ignored=2, seed=5, temperature=2.2)
    dtype = dtype_of(backend)
    x, w = (sample.tensors[k].to(dtype).requires_grad_() for k in ("features", "weight"))
    indices, log_probs = sample.tensors["teacher"]
    log_probs[1, 0] = -math.inf
    y = sample.tensors["target"]
    loss = linear_kd_cross_entropy(
        *(x, w, y),
        teacher=(indices, log_probs),
        normalize=True,
        scale=12.0,
        margin=margin,
        label_smoothing=smoothing,
        temperature=2.2,
        alpha=0.6,
        reduction="sum",
        backend=backend,
    )
    got = torch.autograd.grad(loss, (x, w))

    unit = torch.nn.functional.normalize
    s = 12.0 * unit(x) @ unit(w).t()
    counts = y != -100
    hard = linear_kd_cross_entropy(
        *(x, w, y), normalize=True, scale=12.0, margin=margin, label_smoothing=smoothing,
        reduction="sum", backend="eager",
    )  # fmt: skip
    soft = bins_by_hand(s[counts], indices[counts], log_probs[counts], 2.2)
    want = hard + 0.6 * soft.sum()
    torch.testing.assert_close(loss.detach(), want.detach().to(loss.dtype), rtol=1e-6, atol=0)
    for mine, theirs in zip(got, torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


@each
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_naming_all_classes_equals_the_dense_teacher(temperature, backend):
    sample = make(6, 23, 9, teacher="logits", bias=True)
    logits = sample.tensors.pop("teacher")
    log_probs, indices = torch.log_softmax(logits / temperature, dim=1).topk(23)
    options = {"temperature": temperature, "backend": backend, "return_terms": True}
    want, want_terms = linear_kd_cross_entropy(**sample.tensors, teacher=logits, **options)
    sparse = SparseTeacher(indices, log_probs)
    got, terms = linear_kd_cross_entropy(**sample.tensors, teacher=sparse, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(terms, want_terms, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@each
def test_probabilities_that_add_up_to_1_leave_the_tail_out(backend):
    sample = make(6, 23, 9, teacher="sparse", top=3)
    indices, log_probs = sample.tensors.pop("teacher")
    log_probs = torch.log_softmax(log_probs, dim=1)
    dense = torch.full((6, 23), -math.inf).scatter(1, indices, 3.0 * log_probs)
    want = linear_kd_cross_entropy(**sample.tensors, teacher=dense, backend=backend)
    got = linear_kd_cross_entropy(**sample.tensors, teacher=(indices, log_probs), backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@each
def test_a_student_that_is_its_teacher_has_divergence_and_gradient_0(backend):
    s = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    log_probs, indices = torch.log_softmax(s.double() / 2.0, dim=1).topk(4)
    teacher = (indices, log_probs.to(dtype_of(backend)))
    options = {"temperature": 2.0, "return_terms": True, "reduction": "sum"}
    (_, terms), gradient = on_logits(s, None, teacher, backend, **options)
    assert float(terms.soft) == pytest.approx(float(terms.entropy), rel=1e-6)
    assert gradient.abs().max() <= 1e-7
    _, elsewhere = on_logits(s.flip(1), None, teacher, backend, **options)
    assert elsewhere.abs().max() > 0.01


@each
@pytest.mark.parametrize("label", [0, 1, 5])
def test_nothing_cancels_in_a_tail_of_student_probability_near_zero(label, backend):
    """The top k have all but e^-88 of the student's probability: 1 minus it would be 0."""
    s = torch.tensor([[90.0, 60.0, 0.0, 1.0, -1.0, 2.0]])
    log_probs = torch.tensor([[0.5, 0.25]]).log()
    target = torch.tensor([label])
    options = {"temperature": 1.0, "reduction": "sum", "backend": backend}
    loss, gradient = on_logits(s, target, (torch.tensor([[0, 1]]), log_probs), **options)
    wide = s.double()
    tail = torch.logsumexp(wide[0, 2:], dim=0)
    total = torch.logsumexp(wide[0], dim=0)
    soft = 0.5 * (total - 90) + 0.25 * (total - 60) + 0.25 * (total - tail)
    hard = total - wide[0, label]
    assert float(loss) == pytest.approx(float(soft + hard), rel=1e-6)
    q = torch.softmax(wide, dim=1)[0]
    want = 2 * q
    want[label] -= 1
    want[0] -= 0.5
    want[1] -= 0.25
    want[2:] -= 0.25 * torch.softmax(wide[0, 2:], dim=0)
    torch.testing.assert_close(gradient[0], want, rtol=2e-6, atol=1e-12)


@each
def test_infinite_logits_and_log_probabilities(backend):
    """-inf is probability 0 on both sides; a tail that the student cannot reach costs +inf, without
    NaN in the gradient."""
    inf = math.inf
    s = torch.tensor([[1.0, 2.0, -inf, 0.5], [1.0, 2.0, -inf, -inf], [-inf] * 4, [1.0, inf, 0, 0]])
    indices = torch.tensor([[0, 2], [0, 1], [0, 1], [0, 1]])
    log_probs = torch.tensor([[0.5, 0.0], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25]]).log()
    options = {"reduction": "none", "temperature": 1.0, "backend": backend}
    finite = torch.where(s.isinf(), 0.0, s)
    features = finite.to(dtype_of(backend)).requires_grad_()
    eye = torch.eye(4, dtype=features.dtype)
    found = []
    for row in range(4):
        bias = (s[row] - finite[row]).to(features)
        teacher = (indices[row : row + 1], log_probs[row : row + 1])
        target = torch.zeros(1, dtype=torch.int64)
        x = features[row : row + 1]
        loss = linear_kd_cross_entropy(x, eye, target, bias=bias, teacher=teacher, **options)
        found.append((loss.detach().double(), torch.autograd.grad(loss, x)[0].double()))
    total = math.log(math.e + math.exp(2) + math.exp(0.5))
    tail = math.log(math.exp(2) + math.exp(0.5))
    want = (total - 1) + 0.5 * (total - 1) + 0.5 * (total - tail)
    assert float(found[0][0]) == pytest.approx(want, rel=1e-6)
    assert float(found[0][1][0, 2]) == 0.0
    assert found[1][0].tolist() == [inf]
    assert bool(found[1][1].isfinite().all())
    assert all(bool(loss.isnan().all()) for loss, _ in found[2:])


@each
def test_rows_that_count_for_nothing_may_hold_anything(backend):
    sample = make(6, 30, 8, teacher="sparse", ignored=2, bias=True, return_terms=True)
    indices, log_probs = (t.clone() for t in sample.tensors["teacher"])
    indices[-2:] = torch.tensor([[-1, 30, 2, 2]])
    log_probs[-2:] = torch.tensor([[math.nan, math.inf, 5.0, 0.0]])
    spoiled = {**sample.tensors, "teacher": [indices, log_probs]}
    results = []
    for tensors in (sample.tensors, spoiled):
        leaves = {k: tensors[k].clone().requires_grad_() for k in ("features", "weight", "bias")}
        loss, terms = linear_kd_cross_entropy(
            **{**tensors, **leaves}, **sample.options, backend=backend
        )
        results.append([loss.detach(), *terms, *torch.autograd.grad(loss, list(leaves.values()))])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@each
def test_order_and_form_of_the_pair_do_not_matter(backend):
    sample = make(6, 30, 8, teacher="sparse", top=5)
    indices, log_probs = sample.tensors.pop("teacher")
    want = linear_kd_cross_entropy(**sample.tensors, teacher=(indices, log_probs), backend=backend)
    order = torch.tensor([3, 0, 4, 2, 1])
    strided = torch.stack((indices, indices), dim=2)[:, :, 0]
    for teacher in (
        SparseTeacher(indices.int(), log_probs),
        [indices[:, order], log_probs[:, order]],
        (strided, log_probs.requires_grad_()),
    ):
        got = linear_kd_cross_entropy(**sample.tensors, teacher=teacher, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert not got.requires_grad


@each
def test_bad_indices_are_named_on_the_cpu_and_make_their_row_nan_elsewhere(backend, monkeypatch):
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    indices = torch.tensor([[0, 1], [2, 3], [4, 0]])
    log_probs = torch.full((3, 2), 0.3).log()
    cosine = {"normalize": True, "scale": 4.0}
    spoiled = indices.clone()
    spoiled[1] = torch.tensor([3, 3])
    far = indices.clone()
    far[1, 0] = 5
    wrong = [
        ((spoiled, log_probs), {}, r"name each class once in each row, got \[3, 3\] in row 1"),
        ((far, log_probs), {}, r"lie in \[0, 5\) in each row, got \[5, 3\] in row 1"),
        ((indices, torch.zeros(3, 2)), {}, "add up to 2 in row 0"),
        ((indices, log_probs[:, :1]), {}, "must both have shape"),
        ((indices.short(), log_probs), {}, "int32 or int64"),
        (SparseTeacher(x, w), {}, "int32 or int64"),
        ((indices, indices), {}, "log_probs must be one of"),
        ((indices[:, :0], log_probs[:, :0]), {}, "k from 1 to 5"),
        ((indices, log_probs), {"teacher_scale": 2.0, **cosine}, "not for a sparse teacher"),
        ((indices, log_probs), {"classes": torch.arange(5)}, "not for a sparse teacher"),
    ]
    for teacher, options, message in wrong:
        with pytest.raises(ValueError, match=rf"^{NAME}: .*{message}"):
            linear_kd_cross_entropy(x, w, y, teacher=teacher, **options, backend=backend)
    monkeypatch.setattr(checks, "looks_at_values", lambda _: False)
    for bad in (spoiled, far):
        leaf = x.clone().requires_grad_()
        options = {"reduction": "none", "backend": backend}
        loss = linear_kd_cross_entropy(leaf, w, y, teacher=(bad, log_probs), **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(dim=1).tolist() == [False, True, False]
        assert gradient.isnan().any(dim=1).tolist() == [False, True, False]


@each_kernel
def test_several_chunks_and_parts_are_as_accurate_as_one(backend, monkeypatch):
    small_chunks(backend, monkeypatch)
    if backend == "triton":
        kernels = importlib.import_module(f"kdkernels.{NAME}.triton_tail")
        monkeypatch.setattr(kernels, "BLOCK", 32)
    found = [
        make(19, 70, 16, teacher="sparse", bias=True, ignored=1, reduction="none"),
        make(33, 39, 7, teacher="sparse", normalize=True, scale=16.0, return_terms=True),
        make(3, 70, 7, teacher="sparse", spread=20.0, label_smoothing=0.2),
    ]
    accuracy(replace(find_op(NAME), samples=tuple(found)), backend, torch.float32)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs the extension")
def test_no_tensor_of_all_rows_and_classes_is_made():
    rows, classes = 512, 20_011
    sample = make(2, classes, 16, teacher="sparse", top=8, label_smoothing=0.1, return_terms=True)
    tensors = {k: v for k, v in sample.tensors.items() if k != "weight"}
    tensors["teacher"] = [t[:1].expand(rows, 8) for t in tensors["teacher"]]
    tensors["features"] = tensors["features"][:1].expand(rows, 16).clone().requires_grad_()
    tensors["target"] = tensors["target"][:1].expand(rows)
    weight = sample.tensors["weight"].requires_grad_()
    with Largest() as largest:
        loss, _ = linear_kd_cross_entropy(
            **tensors, weight=weight, **sample.options, backend="native"
        )
        loss.backward()
    assert largest.bytes <= native.CHUNK_BYTES * 1.05


def test_eager_differentiates_twice():
    sample = make(3, 6, 4, teacher="sparse", top=2, normalize=True, scale=4.0).to(torch.float64)
    leaves = [sample.tensors[k].requires_grad_() for k in ("features", "weight")]
    rest = {k: sample.tensors[k] for k in ("teacher", "target")}

    def call(x, w):
        return linear_kd_cross_entropy(x, w, **rest, **sample.options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
