"""Mathematics of linear_kd_cross_entropy: margins, norms, chunks, teachers, memory."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from contract import accuracy, find_op
from head_helpers import BACKENDS, NAME, Largest, dtype_of, each, each_kernel, small_chunks

from kdkernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    LinearKDCrossEntropyLoss,
    adaface_margin,
    kd_cross_entropy,
    linear_kd_cross_entropy,
)
from kdkernels.linear_kd_cross_entropy import native, products
from kdkernels.linear_kd_cross_entropy.driver import chunks
from kdkernels.linear_kd_cross_entropy.samples import make


def at_angles(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Features at these angles to the first of two weights, both at a right angle to the second."""
    features = torch.stack((angles.cos(), angles.sin(), torch.zeros_like(angles)), dim=1)
    return (3.0 * features).to(dtype), torch.tensor([[2.0, 0, 0], [0, 0, 0.5]], dtype=dtype)


def label_cosines(angles: torch.Tensor, margin, backend: str) -> torch.Tensor:
    """The label's cosine with the margin, solved from the loss: two classes, the other logit 0."""
    features, weight = at_angles(angles, dtype_of(backend))
    target = torch.zeros(len(angles), dtype=torch.int64)
    loss = linear_kd_cross_entropy(
        *(features, weight, target),
        normalize=True,
        scale=2.0,
        margin=margin,
        reduction="none",
        backend=backend,
    )
    return -torch.log(torch.expm1(loss.double())) / 2.0


ANGLES = torch.tensor(
    [0.0, 0.002, 0.1, 0.7, 1.5, 2.2, 2.6, 2.64, 2.65, 3.0, 3.13], dtype=torch.float64
)


@each
@pytest.mark.parametrize(
    ("margin", "m2", "m3"),
    [
        (ArcFace(0.5), 0.5, 0.0),
        (CosFace(0.35), 0.0, 0.35),
        (CombinedMargin(0.3, 0.2), 0.3, 0.2),
        (CombinedMargin(-0.4, 0.1), -0.4, 0.1),
        (ArcFace(0.0), 0.0, 0.0),
    ],
)
def test_margins_are_those_of_acos(margin, m2, m3, backend):
    turned = (ANGLES + m2).clamp(min=0.0)
    want = torch.where(turned > math.pi, ANGLES.cos() - m2 * math.sin(m2), turned.cos()) - m3
    # float32 losses of a logit near 2 resolve 1e-6 of it
    tolerance = 1e-9 if backend == "eager" else 3e-6
    got = label_cosines(ANGLES, margin, backend)
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@each
def test_the_chord_near_angle_0_is_as_close_as_promised(backend):
    angles = torch.linspace(0.0, 2e-3, 41, dtype=torch.float64)
    got = label_cosines(angles, ArcFace(0.5), backend)
    want = (angles + 0.5).cos()
    assert (got - want).abs().max() <= 2.5e-4 * math.sin(0.5) + 2e-6


@each
def test_the_label_logit_keeps_falling_beyond_pi(backend):
    angles = torch.linspace(2.7, 3.14, 30, dtype=torch.float64)
    cosines = label_cosines(angles, ArcFace(0.5), backend)
    assert (cosines.diff() < 0).all()


@each
@pytest.mark.parametrize("margin_grad", ["exact", "straight_through"])
def test_the_slope_of_a_margin_is_that_of_its_formula_or_1(margin_grad, backend):
    for angle, m in ((0.9, 0.5), (2.9, 0.5), (0.3, -0.4), (1.2, -0.4)):
        features, weight = at_angles(torch.tensor([angle], dtype=torch.float64), dtype_of(backend))
        features.requires_grad_()
        target = torch.zeros(1, dtype=torch.int64)
        options = {"normalize": True, "scale": 2.0, "backend": backend, "margin_grad": margin_grad}
        loss = linear_kd_cross_entropy(features, weight, target, margin=ArcFace(m), **options)
        (gradient,) = torch.autograd.grad(loss, features)
        exact = math.sin(angle + m) / math.sin(angle)
        exact = 1.0 if angle + m > math.pi else 0.0 if angle + m < 0 else exact
        slope = 1.0 if margin_grad == "straight_through" else exact
        missing = -math.expm1(-float(loss.detach()))  # 1 - p_y
        # towards the label's weight, at a right angle to the features, whose norm is 3; the other
        # weight has the third axis
        along = torch.tensor([math.sin(angle), -math.cos(angle)], dtype=torch.float64)
        want = -2.0 * missing * slope * math.sin(angle) / 3.0 * along
        torch.testing.assert_close(gradient[0, :2].double(), want, rtol=1e-5, atol=1e-6)


@each
def test_a_margin_per_row_equals_each_row_alone(backend):
    sample = make(6, 23, 9, normalize=True, scale=8.0, seed=3)
    amounts = torch.linspace(-0.3, 0.8, 6)
    options = {**sample.options, "backend": backend, "reduction": "none"}
    both = CombinedMargin(amounts, amounts.flip(0))
    got = linear_kd_cross_entropy(**sample.tensors, margin=both, **options)
    for row in range(6):
        one = {
            k: v[row : row + 1] for k, v in sample.tensors.items() if k in ("features", "target")
        }
        teacher = [sample.tensors["teacher"][0][row : row + 1], sample.tensors["teacher"][1]]
        margin = CombinedMargin(float(amounts[row]), float(amounts[5 - row]))
        want = linear_kd_cross_entropy(
            *(one["features"], sample.tensors["weight"], one["target"]),
            teacher=teacher,
            margin=margin,
            **options,
        )
        torch.testing.assert_close(got[row : row + 1], want, rtol=1e-5, atol=1e-6)


def test_adaface_margin_worked_by_hand():
    features = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    got = adaface_margin(features, m=0.4, h=0.5, mean=2.0, std=0.25 - 1e-3)
    torch.testing.assert_close(got.m2, torch.tensor([0.4, 0.0, -0.4]))
    torch.testing.assert_close(got.m3, torch.tensor([0.0, 0.4, 0.8]))
    own = adaface_margin(features, m=0.4, h=0.333)
    z = torch.tensor([-1.0, 0.0, 1.0]) * 0.333 / (math.sqrt(2 / 3) + 1e-3)
    torch.testing.assert_close(own.m2, -0.4 * z)
    assert adaface_margin(features[:1]).m2.tolist() == [0.0]
    for wrong in (features[0], features.long()):
        with pytest.raises(ValueError, match=r"^adaface_margin: features must be \(N, D\)"):
            adaface_margin(wrong)


@each
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [None, CombinedMargin(0.4, 0.1)])
def test_equals_the_unfused_composition(margin, smoothing, backend):
    sample = make(9, 131, 14, ignored=2, seed=5)
    dtype = dtype_of(backend)
    x, w = (sample.tensors[k].to(dtype).requires_grad_() for k in ("features", "weight"))
    tx, tw = (t.to(dtype) for t in sample.tensors["teacher"])
    y = sample.tensors["target"]
    loss = linear_kd_cross_entropy(
        *(x, w, y),
        teacher=(tx, tw),
        normalize=True,
        scale=12.0,
        teacher_scale=6.0,
        margin=margin,
        label_smoothing=smoothing,
        reduction="sum",
        backend=backend,
    )
    got = torch.autograd.grad(loss, (x, w))

    unit = torch.nn.functional.normalize
    s, t = 12.0 * unit(x) @ unit(w).t(), 6.0 * unit(tx) @ unit(tw).t()
    counts = y != -100
    label = torch.where(counts, y, 0)[:, None]
    changed = s
    if margin is not None:
        angle = (s.gather(1, label) / 12.0).acos() + 0.4
        assert float(angle.detach().max()) < math.pi
        changed = s.scatter(1, label, 12.0 * (angle.cos() - 0.1))
    options = {"backend": "eager", "reduction": "sum"}
    want = kd_cross_entropy(changed, None, y, label_smoothing=smoothing, **options)
    want = want + kd_cross_entropy(s[counts], t[counts], None, **options)
    torch.testing.assert_close(loss.detach(), want.detach().to(loss.dtype), rtol=1e-6, atol=0)
    for mine, theirs in zip(got, torch.autograd.grad(want, (x, w)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)


@each
def test_a_cosine_head_ignores_norms_of_features_and_weights(backend):
    sample = make(5, 40, 8, normalize=True, scale=8.0, margin=ArcFace(0.3), backend=backend)
    x, w = (sample.tensors[k].clone().requires_grad_() for k in ("features", "weight"))
    rest = {k: v for k, v in sample.tensors.items() if k not in ("features", "weight")}
    loss = linear_kd_cross_entropy(x, w, **rest, **sample.options)
    for leaf, gradient in zip((x, w), torch.autograd.grad(loss, (x, w)), strict=True):
        along = (gradient * leaf.detach()).sum(dim=1)
        assert along.abs().max() <= 1e-6 * gradient.norm()
    longer = linear_kd_cross_entropy(100 * x, 0.01 * w, **rest, **sample.options)
    torch.testing.assert_close(longer, loss, rtol=1e-5, atol=0)


def changed_cosine(angle: torch.Tensor, m2: float, m3: float) -> torch.Tensor:
    start = float(angle.detach())
    if m2 > 0 and start + m2 > math.pi:
        return angle.cos() - m2 * math.sin(m2) - m3
    if m2 < 0 and start + m2 < 0:
        return 1.0 - m3 + 0.0 * angle
    return (angle + m2).cos() - m3


@each
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(
    ("margin", "m2", "m3"),
    [
        (ArcFace(0.5), 0.5, 0.0),
        (ArcFace(-0.4), -0.4, 0.0),
        (CosFace(0.35), 0.0, 0.35),
        (CombinedMargin(0.3, 0.2), 0.3, 0.2),
        (CombinedMargin(-0.3, 0.2), -0.3, 0.2),
    ],
)
def test_slopes_are_right_near_angle_zero_and_pi(backend, margin, m2, m3, reduction):
    # another class at 0.45 rad; both gradients at a right angle to their vectors
    for distance in (1e-6, 1e-5, 1e-4, 9e-4, 1.2e-3):
        for at_pi in (False, True):
            sign = -1.0 if at_pi else 1.0
            x = torch.tensor([[sign * math.cos(distance), distance]], requires_grad=True)
            w = torch.tensor([[1.0, 0.0], [math.cos(0.45), math.sin(0.45)]], requires_grad=True)
            options = {"normalize": True, "scale": 64.0, "margin": margin, "backend": backend}
            loss = linear_kd_cross_entropy(x, w, torch.tensor([0]), reduction=reduction, **options)
            by_x, by_w = torch.autograd.grad(loss.sum(), (x, w))
            start = math.pi - distance if at_pi else distance
            to_label, to_other = (
                torch.tensor(start, dtype=torch.float64, requires_grad=True) for _ in range(2)
            )
            label = 64.0 * changed_cosine(to_label, m2, m3)
            other = 64.0 * (0.45 - to_other).cos()
            right = torch.logsumexp(torch.stack([label, other]), 0) - label
            by_label, by_other = torch.autograd.grad(right, (to_label, to_other))
            slope = sign * math.cos(distance) * by_x[0, 1] - distance * by_x[0, 0]
            # the other class's part goes through float32 products
            assert float(loss.detach().sum()) == pytest.approx(float(right.detach()), abs=3e-5)
            assert float(slope) == pytest.approx(float(by_label + by_other), rel=1e-4, abs=1e-4)
            assert float(by_w[0, 1]) == pytest.approx(-float(by_label), rel=1e-4, abs=1e-4)


def loss_and_gradients(parts, sizes, target, **options) -> list[torch.Tensor]:
    """The loss of features and weight times their sizes, and both gradients times these again."""
    leaves = [
        (t.double() * size).to(t.dtype).requires_grad_()
        for t, size in zip(parts, sizes, strict=True)
    ]
    loss = linear_kd_cross_entropy(*leaves, target, **options)
    gradients = torch.autograd.grad(loss, leaves)
    return [loss.double(), *(g.double() * size for g, size in zip(gradients, sizes, strict=True))]


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exponent", [-120, -80, -66, 70, 120])
def test_cosines_do_not_depend_on_the_size_of_a_row(backend, exponent, dtype):
    # powers of two, so that rows keep their digits; some classes keep their size
    generator = torch.Generator().manual_seed(8)
    parts = [torch.randn(n, 7, generator=generator).to(dtype) for n in (3, 5)]
    of_classes = max(-80, min(80, exponent)) if backend == "triton" else exponent
    sizes = [
        2.0 ** torch.tensor([exponent, 0.0, exponent], dtype=torch.float64)[:, None],
        2.0 ** torch.tensor([0.0, of_classes, 0.0, of_classes, 1.0], dtype=torch.float64)[:, None],
    ]
    options = {"normalize": True, "scale": 8.0, "margin": ArcFace(0.3)}
    target = torch.tensor([1, 0, 3])
    got = loss_and_gradients(parts, sizes, target, backend=backend, **options)
    wide = [t.double() for t in parts]
    ones = [torch.ones_like(size) for size in sizes]
    want = loss_and_gradients(wide, ones, target, backend="eager", **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@each
@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-40, 1e-44, 1e38])
def test_one_feature_has_cosine_one_at_any_size(backend, size):
    x = torch.tensor([[size]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    options = {"normalize": True, "scale": 64.0, "backend": backend}
    loss = linear_kd_cross_entropy(x, w, torch.tensor([1]), **options)
    loss.backward()
    assert loss.item() == 128.0
    assert not x.grad.any()
    assert not w.grad.any()


@each
def test_a_row_of_zeros_has_uniform_logits_and_gradient_0(backend):
    x, w = torch.zeros(2, 6), torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    x[1] = 1.0
    w[3] = 0.0
    x.requires_grad_()
    w.requires_grad_()
    target = torch.tensor([1, 3])
    options = {"normalize": True, "scale": 30.0, "reduction": "none", "backend": backend}
    loss = linear_kd_cross_entropy(x, w, target, **options)
    by_x, by_w = torch.autograd.grad(loss.sum(), (x, w))
    assert float(loss[0].detach()) == pytest.approx(math.log(5), rel=1e-6)
    assert by_x[0].tolist() == [0.0] * 6
    assert by_w[3].tolist() == [0.0] * 6
    assert bool(by_x[1].any())


@each
def test_rows_that_count_for_nothing_may_hold_anything(backend):
    sample = make(6, 30, 8, ignored=2, bias=True, teacher="logits", backend=backend)
    spoiled = {k: v.clone() for k, v in sample.tensors.items()}
    spoiled["features"][-2:] = torch.nan
    spoiled["features"][-1, 0] = torch.inf
    results = []
    for tensors in (sample.tensors, spoiled):
        leaves = {k: tensors[k].clone().requires_grad_() for k in ("features", "weight", "bias")}
        loss = linear_kd_cross_entropy(**{**tensors, **leaves}, **sample.options)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@each
def test_a_teacher_head_equals_its_logits(backend):
    sample = make(7, 45, 10, teacher="biased")
    tx, tw, tb = sample.tensors["teacher"]
    rest = {k: v for k, v in sample.tensors.items() if k != "teacher"}
    logits = (tx.double() @ tw.double().t() + tb.double()).float()
    for temperature in (3.0, 2.2):
        options = {"temperature": temperature, "backend": backend}
        want = linear_kd_cross_entropy(**rest, teacher=logits, **options)
        got = linear_kd_cross_entropy(**rest, teacher=(tx, tw, tb), **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        without = linear_kd_cross_entropy(**rest, teacher=(tx, tw), **options)
        assert abs(float(without - want)) > 1e-3


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded_to_16_bits(dtype, backend):
    sample = make(6, 300, 32, spread=10.0, teacher=None).to(dtype)
    got = linear_kd_cross_entropy(**sample.tensors, backend=backend)
    want = linear_kd_cross_entropy(**sample.to(torch.float64).tensors)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_are_as_accurate_as_one(dtype, backend, monkeypatch):
    small_chunks(backend, monkeypatch)
    cosine = {"normalize": True, "scale": 16.0}
    found = [
        make(19, 41, 16, bias=True, ignored=18, reduction="none"),
        make(33, 19, 7, teacher=None, **cosine, margin=ArcFace(0.4), return_terms=True),
        make(20, 50, 12, teacher="logits", **cosine, reduction="none", margin=CosFace(0.2)),
    ]
    accuracy(replace(find_op(NAME), samples=tuple(found)), backend, dtype)


@pytest.mark.skipif("triton" not in BACKENDS, reason="TRITON_INTERPRET=1 runs it")
def test_bfloat16_products_of_the_triton_backend_keep_the_accuracy(monkeypatch):
    """The arithmetic of a GPU, with products on the CPU: torch has bfloat16 products into float32
    on CUDA."""
    kernel = importlib.import_module(f"kdkernels.{NAME}.triton_kernel")
    calls = []

    def narrow(out, left, right, add):
        assert (left.dtype, right.dtype, out.dtype) == (*[torch.bfloat16] * 2, torch.float32)
        calls.append(1)
        product = left.float() @ right.float()
        out.copy_(out + product if add else product)

    monkeypatch.setattr(kernel, "multiplies_bf16", lambda _: True)
    monkeypatch.setattr(products, "bf16_product", narrow)
    small_chunks("triton", monkeypatch)
    cosine = {"normalize": True, "scale": 8.0}
    found = [
        make(20, 41, 16, bias=True, ignored=2),
        make(5, 41, 16, reduction="none"),
        make(19, 30, 9, **cosine, margin=ArcFace(0.4)),
        make(6, 30, 9, **cosine, reduction="none"),
        make(20, 41, 16, teacher="sparse"),
    ]
    accuracy(replace(find_op(NAME), samples=tuple(found)), "triton", torch.bfloat16)
    assert len(calls) == 2 * (2 * 2 + 2 * 2) + 2 * (4 + 2) + 2 * 3


@each_kernel
def test_products_of_frozen_tensors_are_not_computed(backend, monkeypatch):
    counts = []
    product = products.float32_product

    def count(*arguments):
        counts[-1] += 1
        product(*arguments)

    monkeypatch.setattr(products, "float32_product", count)
    sample = make(32, 48, 16, teacher=None)
    for wanted in (("features", "weight"), ("features",), ("weight",), ()):
        tensors = {
            k: v.clone().requires_grad_() if k in wanted else v for k, v in sample.tensors.items()
        }
        counts.append(0)
        loss = linear_kd_cross_entropy(**tensors, backend=backend)
        if wanted:
            loss.backward()
        assert all((tensors[k].grad is not None) == (k in wanted) for k in ("features", "weight"))
    assert counts == [3, 2, 2, 1]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.skipif("native" not in BACKENDS, reason="needs the extension")
def test_no_tensor_of_all_rows_and_classes_is_made(reduction):
    rows, classes = 512, 20_011
    sample = make(rows, classes, 16, normalize=True, scale=16.0, reduction=reduction)
    sizes = {}
    for backend in ("eager", "native") if reduction == "mean" else ("native",):
        leaves = {k: sample.tensors[k].clone().requires_grad_() for k in ("features", "weight")}
        with Largest() as largest:
            loss = linear_kd_cross_entropy(
                **{**sample.tensors, **leaves}, **sample.options, backend=backend
            )
            loss.sum().backward()
        sizes[backend] = largest.bytes
    # the measure sees what there is
    assert sizes.get("eager", math.inf) >= 4 * rows * classes
    assert sizes["native"] <= native.CHUNK_BYTES / 2 * 1.05


@pytest.mark.parametrize(
    ("rows", "classes", "networks"),
    [(256, 10_575, 2), (1024, 93_431, 2), (256, 360_232, 1), (1, 5, 1), (97, 360_232, 2)],
)
def test_chunks_cover_all_rows_and_have_at_least_the_least_rows(rows, classes, networks):
    how = native.arithmetic(rows)
    found = list(chunks(rows, classes, networks, how))
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == rows
    sizes = [end - begin for begin, end in found]
    assert min(sizes) >= min(rows, how.least_rows // 3)
    fits = max(sizes) * classes * 4 * networks <= 1.2 * how.chunk_bytes
    assert fits or max(sizes) <= how.least_rows + 16


@each
def test_labels_out_of_range_and_wrong_arguments_name_what_is_wrong(backend):
    x, w, y = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    cosine = {"normalize": True, "scale": 4.0}
    wrong = [
        ((x, w, torch.tensor([0, 5, 2])), {}, "target must lie in"),
        ((x, torch.randn(5, 3), y), {}, "must agree in D"),
        ((x, w, None), {}, "nothing to compare with"),
        ((x, w, y), {"bias": torch.randn(4)}, "bias must have shape"),
        ((x, w, y), {"bias": torch.randn(5), **cosine}, "bias and normalize"),
        ((x, w, y), {"teacher": (x, w, torch.randn(5)), **cosine}, "bias and normalize"),
        ((x, w, y), {"teacher": torch.randn(3, 6)}, "teacher must be logits"),
        ((x, w, y), {"teacher": (x,)}, "teacher must be logits"),
        ((x, w, y), {"teacher": (x[:2], w)}, "student's 3 rows"),
        ((x, w, y), {"teacher": torch.randn(3, 5), "teacher_scale": 2.0, **cosine}, "taken as"),
        ((x, w, y), {"scale": 2.0}, "normalize=True"),
        ((x, w, y), {"scale": 0.0, "normalize": True}, "scale must be at least"),
        ((x, w, y), {"margin": ArcFace(0.5)}, "margin needs"),
        ((x, w, None), {"teacher": (x, w), "margin": ArcFace(0.5), **cosine}, "margin needs"),
        ((x, w, y), {"margin": 0.5, **cosine}, "ArcFace, CosFace"),
        ((x, w, y), {"margin": ArcFace(4.0), **cosine}, "m2 must be at most"),
        ((x, w, y), {"margin": ArcFace(torch.ones(2)), **cosine}, "m2 must have shape"),
        ((x, w, y), {"margin_grad": "insightface"}, "margin_grad must be one of"),
        ((x, w, y), {"temperature": 0.0}, "temperature must be greater"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=rf"^{NAME}: .*{message}"):
            linear_kd_cross_entropy(*arguments, **options, backend=backend)


def test_calling_a_margin_names_the_op_that_takes_it():
    for margin in (ArcFace(0.5), CosFace(), CombinedMargin(0.3, 0.2)):
        with pytest.raises(TypeError, match=r"is a margin, not a loss: .*scale=64.0, margin="):
            margin(torch.randn(3, 4), torch.tensor([0, 1, 2]))


def test_the_module_passes_every_option_on():
    sample = make(6, 30, 8, reduction="none")
    options = {
        "normalize": True, "scale": 9.0, "teacher_scale": 5.0, "margin": ArcFace(0.2),
        "margin_grad": "straight_through", "temperature": 2.0, "alpha": 0.7, "tau_squared": True,
        "ignore_index": 3, "label_smoothing": 0.1, "reduction": "sum", "return_terms": True,
    }  # fmt: skip
    module = LinearKDCrossEntropyLoss(**options)
    want, want_terms = linear_kd_cross_entropy(**sample.tensors, **options)
    got, terms = module(**sample.tensors)
    assert torch.equal(got, want)
    assert all(map(torch.equal, terms, want_terms))
    other = module(**sample.tensors, margin=ArcFace(torch.full((6,), 0.4)))[0]
    assert float(other) > float(got)
    with pytest.raises(ValueError, match="normalize=True"):
        LinearKDCrossEntropyLoss(scale=2.0)


def test_eager_differentiates_twice():
    sample = make(3, 5, 4, normalize=True, scale=4.0, margin=ArcFace(0.5)).to(torch.float64)
    leaves = [sample.tensors[k].requires_grad_() for k in ("features", "weight")]
    rest = {k: sample.tensors[k] for k in ("teacher", "target")}

    def call(x, w):
        return linear_kd_cross_entropy(x, w, **rest, **sample.options)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
