"""linear_kd_cross_entropy on a sample of the classes, and sample_classes, which draws them."""

import math

import pytest
import torch
from head_helpers import NAME, dtype_of, each, each_kernel

from kdkernels import (
    ArcFace,
    LinearKDCrossEntropyLoss,
    checks,
    kd_cross_entropy,
    linear_kd_cross_entropy,
    sample_classes,
)
from kdkernels.linear_kd_cross_entropy.samples import make

CHOSEN = (0, 3, 4, 20, 40)


@each
@pytest.mark.parametrize("teacher", [None, "biased", "logits"])
def test_is_the_softmax_with_all_other_logits_at_minus_infinity(teacher, backend):
    sample = make(7, 41, 9, teacher=teacher, bias=True, ignored=1, classes_of=CHOSEN)
    sample = sample.to(dtype_of(backend))
    x, w, b = (sample.tensors[k].requires_grad_() for k in ("features", "weight", "bias"))
    loss = linear_kd_cross_entropy(
        **sample.tensors, label_smoothing=0.0, reduction="sum", backend=backend
    )
    got = torch.autograd.grad(loss, (x, w, b))

    given, y, classes = (sample.tensors.get(k) for k in ("teacher", "target", "classes"))
    t = given if isinstance(given, torch.Tensor) else None
    if isinstance(given, list):
        t = given[0] @ given[1].t() + given[2]
    others = torch.ones(41, dtype=torch.bool)
    others[classes] = False
    s, t = (None if z is None else z.masked_fill(others, -math.inf) for z in (x @ w.t() + b, t))
    want = kd_cross_entropy(s, t, y, reduction="sum", backend="eager")
    torch.testing.assert_close(loss.detach(), want.detach().to(loss.dtype), rtol=1e-6, atol=0)
    for mine, theirs in zip(got, torch.autograd.grad(want, (x, w, b)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
    assert bool((got[1][others] == 0).all())
    assert bool((got[1][~others] != 0).any(dim=1).all())


@each
def test_classes_that_take_no_part_are_not_read(backend):
    sample = make(5, 41, 9, classes_of=CHOSEN, normalize=True, scale=9.0, margin=ArcFace(0.3))
    others = torch.ones(41, dtype=torch.bool)
    others[sample.tensors["classes"]] = False
    spoiled = dict(sample.tensors)
    spoiled["weight"] = spoiled["weight"].clone()
    spoiled["weight"][others] = math.nan
    spoiled["teacher"] = [t.clone() for t in spoiled["teacher"]]
    spoiled["teacher"][1][others] = math.nan
    results = []
    for tensors in (sample.tensors, spoiled):
        w = tensors["weight"].clone().requires_grad_()
        loss = linear_kd_cross_entropy(
            **{**tensors, "weight": w}, **sample.options, backend=backend
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, w)))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@each
def test_all_classes_are_no_sample(backend):
    sample = make(5, 23, 9, return_terms=True, teacher="logits")
    want, want_terms = linear_kd_cross_entropy(**sample.tensors, **sample.options, backend=backend)
    got, terms = linear_kd_cross_entropy(
        **sample.tensors, **sample.options, classes=torch.arange(23).int(), backend=backend
    )
    assert torch.equal(got, want)
    assert all(map(torch.equal, terms, want_terms))


@each
def test_an_ignore_index_that_is_a_place_of_the_sample_ignores_its_own_rows_alone(backend):
    x, w = torch.randn(3, 4), torch.randn(9, 4)
    target, classes = torch.tensor([5, 1, 8]), torch.tensor([2, 5, 8])
    options = {"ignore_index": 1, "reduction": "none", "backend": backend}  # 5 is at place 1
    loss = linear_kd_cross_entropy(x, w, target, classes=classes, **options)
    assert (loss != 0).tolist() == [True, False, True]


@each
def test_labels_without_a_place_are_named_on_the_cpu_and_make_their_row_nan_elsewhere(
    backend, monkeypatch
):
    x, w, y = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([5, 1, 8])
    wrong = [
        (torch.tensor([5, 8]), "target 1 of row 1 is not among classes"),
        (torch.tensor([5, 1, 8]), "classes must rise"),
        (torch.tensor([1, 5, 5, 8]), "classes must rise"),
        (torch.tensor([1, 5, 8, 9]), r"within \[0, 9\)"),
        (torch.tensor([1.0, 5.0]), "int32 or int64 tensor, got torch.float32"),
        ([1, 5, 8], "int32 or int64 tensor, got list"),
        (torch.tensor([[1, 5, 8]]), r"shape \(S,\)"),
    ]
    options = {"reduction": "none", "backend": backend}
    for classes, message in wrong:
        with pytest.raises(ValueError, match=rf"^{NAME}: .*{message}"):
            linear_kd_cross_entropy(x, w, y, classes=classes, **options)
    monkeypatch.setattr(checks, "looks_at_values", lambda _: False)
    x.requires_grad_()
    loss = linear_kd_cross_entropy(x, w, y, classes=torch.tensor([2, 5, 8]), **options)
    assert loss.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.isnan().all(dim=1).tolist() == [False, True, False]
    assert gradient.isnan().any(dim=1).tolist() == [False, True, False]


@each_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_call_with_classes_compiles_whole(backend):
    torch._dynamo.reset()
    sample = make(5, 41, 9, classes_of=CHOSEN, teacher=None)
    compiled = torch.compile(linear_kd_cross_entropy, fullgraph=True, backend="aot_eager")
    found = []
    for call in (linear_kd_cross_entropy, compiled):
        w = sample.tensors["weight"].clone().requires_grad_()
        loss = call(**{**sample.tensors, "weight": w}, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, w)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_the_module_takes_classes():
    sample = make(5, 41, 9, classes_of=CHOSEN)
    want = linear_kd_cross_entropy(**sample.tensors, temperature=2.0)
    got = LinearKDCrossEntropyLoss(temperature=2.0)(**sample.tensors)
    assert torch.equal(got, want)
    assert float(got) < float(linear_kd_cross_entropy(
        **{**sample.tensors, "classes": None}, temperature=2.0
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "fraction", "size"),
    [([7, 3, 7, -100], 0.2, 10), ([7, 3], 0.21, 11), ([7, 3], 1.0, 50), ([3, 7] * 20, 0.1, 5),
     (list(range(8, 20)), 0.1, 12), ([-100], 0.02, 1), ([7, 3], 0.01, 2)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_sample_has_every_positive_and_the_promised_size(labels, fraction, size, dtype):
    target = torch.tensor(labels, dtype=dtype)
    found = sample_classes(target, 50, fraction)
    assert found.dtype == torch.int64
    assert len(found) == size
    assert bool((found[1:] > found[:-1]).all())
    assert 0 <= int(found.min()) <= int(found.max()) < 50
    assert set(labels) - {-100} <= set(found.tolist())


def test_a_fraction_that_rounds_up_takes_no_extra_class():
    assert 0.07 * 100 > 7
    assert len(sample_classes(torch.tensor([4]), 100, 0.07)) == 7


def test_negatives_are_drawn_uniformly_and_by_the_generator_alone():
    target, draws = torch.tensor([4, 9]), 600
    generator = torch.Generator().manual_seed(7)
    state = torch.get_rng_state()
    counts = torch.zeros(30)
    for _ in range(draws):
        counts[sample_classes(target, 30, 0.4, generator)] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert counts[target].tolist() == [draws, draws]
    counts[target] = draws * 10 / 28
    # binomial: 10 of 28 negatives a draw; five standard deviations
    assert float((counts / draws - 10 / 28).abs().max()) < 5 * math.sqrt(10 / 28 * 18 / 28 / draws)
    again = torch.Generator().manual_seed(7)
    first = sample_classes(target, 30, 0.4, again)
    assert torch.equal(first, sample_classes(target, 30, 0.4, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, sample_classes(target, 30, 0.4, again))


def test_wrong_arguments_of_the_sample_name_what_is_wrong():
    y = torch.tensor([0, 4])
    wrong = [
        ((y.float(), 5, 0.5), "int32 or int64"),
        ((y[None], 5, 0.5), r"shape \(N,\)"),
        ((y, 5, 0.0), "fraction must be greater"),
        ((y, 5, 1.5), "fraction must be at most"),
        ((y, 0, 0.5), "num_classes must be"),
        ((y, 4, 0.5), r"target must lie in \[0, 4\)"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=f"^sample_classes: .*{message}"):
            sample_classes(*arguments)
