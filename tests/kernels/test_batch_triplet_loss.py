"""The mathematics of batch_triplet_loss: values worked by hand, all triples in plain loops,
float64."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdkernels
from kdkernels import BatchTripletLoss, batch_triplet_loss
from kdkernels.backends import backends
from kdkernels.batch_triplet_loss import eager as batch_eager
from kdkernels.batch_triplet_loss.samples import make

BACKENDS = backends("batch_triplet_loss", "cpu")
LEVELS = kdkernels.isa_levels()
MININGS = ("hard", "semihard", "all")
REDUCTIONS = ("mean", "nonzero", "sum", "none")
both = pytest.mark.parametrize("backend", BACKENDS)
every_mining = pytest.mark.parametrize("mining", MININGS)
needs_native = pytest.mark.skipif(
    "native" not in BACKENDS, reason="needs the extension: install with a C++ compiler"
)


def loss_and_gradient(function, x, *arguments, incoming=None, **options):
    """Loss and gradient of `function(x, ...)` for the incoming gradient."""
    x = x.detach().clone().requires_grad_()
    loss = function(x, *arguments, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, x, incoming)
    return loss.detach(), gradient


def all_triples(x, labels, margin, mining, squared, reduction, incoming):
    """Loss and gradient by plain loops over (a, p, n) in Python's floats."""
    x, labels = x.double().tolist(), labels.tolist()
    rows = range(len(x))

    def d2(i, j):
        return sum((u - v) ** 2 for u, v in zip(x[i], x[j], strict=True))

    def d(i, j):
        return d2(i, j) if squared else math.sqrt(d2(i, j))

    mined = []
    for a in rows:
        positives = [p for p in rows if labels[p] == labels[a] and p != a]
        negatives = [n for n in rows if labels[n] != labels[a]]
        if mining == "hard" and positives and negatives:
            # max and min return the first of equals
            mined.append(
                (a, max(positives, key=lambda p: d2(a, p)), min(negatives, key=lambda n: d2(a, n)))
            )
        for p in positives if mining == "semihard" else []:
            farther = [n for n in negatives if d2(a, n) > d2(a, p)]
            if farther:
                mined.append((a, p, min(farther, key=lambda n: d2(a, n))))
        if mining == "all":
            mined += product([a], positives, negatives)

    hinges = [max(0.0, d(a, p) - d(a, n) + margin) for a, p, n in mined]
    divisor = {"mean": len(mined), "nonzero": sum(h > 0 for h in hinges)}.get(reduction, 1) or 1
    losses, gradient = [0.0] * len(x), [[0.0] * len(x[0]) for _ in rows]
    for (a, p, n), hinge in zip(mined, hinges, strict=True):
        losses[a] += hinge / divisor
        if hinge == 0.0:
            continue
        weight = (incoming[a] if reduction == "none" else incoming[0]) / divisor
        for other, sign in ((p, 1.0), (n, -1.0)):
            distance = d(a, other)
            slope = 2.0 if squared else (1.0 / distance if distance > 0 else 0.0)
            for k in range(len(x[0])):
                step = sign * weight * slope * (x[a][k] - x[other][k])
                gradient[a][k] += step
                gradient[other][k] -= step
    loss = losses if reduction == "none" else sum(losses)
    return torch.tensor(loss), torch.tensor(gradient)


@st.composite
def batches(draw):
    """Small batches on a grid, so that ties, duplicates and hinges of 0 are common, or of real
    numbers."""
    rows, features = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    identities = draw(st.integers(1, rows))
    labels = torch.randint(identities, (rows,), generator=generator)
    if draw(st.booleans()):
        x = torch.randint(-1, 2, (rows, features), generator=generator).float()
        margin = draw(st.sampled_from([0.0, 1.0, 2.0, -1.0]))
    else:
        x = torch.randn(rows, features, generator=generator) + draw(st.sampled_from([0.0, 30.0]))
        margin = draw(st.sampled_from([0.0, 0.4, 5.0]))
    return x, labels, margin


class TestBatchTripletLoss:
    # 1-d points: identity 0 at 0 and 2, identity 1 at 3 and 7.
    POINTS = torch.tensor([[0.0], [2.0], [3.0], [7.0]])
    LABELS = torch.tensor([0, 0, 1, 1])

    @both
    @pytest.mark.parametrize(
        ("mining", "losses"),
        [
            # squared distances from 0: 4 | 9 49; from 2: 4 | 1 25; from 3: 16 | 9 1; from 7: 16 |
            # 49 25. Margin 6.
            ("hard", [4 - 9 + 6, 4 - 1 + 6, 16 - 1 + 6, 0]),
            ("semihard", [4 - 9 + 6, 0, 0, 0]),
            ("all", [1 + 0, 9 + 0, 13 + 21, 0]),
        ],
    )
    def test_four_points_worked_by_hand(self, backend, mining, losses):
        def run(reduction):
            return batch_triplet_loss(
                self.POINTS,
                self.LABELS,
                margin=6.0,
                mining=mining,
                reduction=reduction,
                backend=backend,
            )

        assert run("none").tolist() == [float(v) for v in losses]
        assert float(run("sum")) == sum(losses)
        # semihard: from 3 there is no negative farther than its positive, so 3 triplets
        triplets = {"hard": 4, "semihard": 3, "all": 8}[mining]
        active = {"hard": 3, "semihard": 1, "all": 4}[mining]
        assert float(run("mean")) == pytest.approx(sum(losses) / triplets)
        assert float(run("nonzero")) == pytest.approx(sum(losses) / active)

    @both
    def test_ties_go_to_the_lowest_index(self, backend):
        # Two positives and two negatives at the same distance from the anchor, row 0: rows 1 and 3.
        x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-3.0, 0.0], [0.0, 4.0], [0.0, -4.0]])
        labels = torch.tensor([0, 0, 0, 1, 2])
        weights = torch.tensor([1.0, 0, 0, 0, 0])
        for mining in ("hard", "semihard"):
            _, gradient = loss_and_gradient(
                batch_triplet_loss,
                x,
                labels,
                margin=100.0,
                mining=mining,
                reduction="none",
                incoming=weights,
                backend=backend,
            )
            assert gradient[3].any()
            assert not gradient[4].any()
            assert gradient[1].any()
            assert bool(gradient[2].any()) == (mining == "semihard")

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        batch=batches(),
        mining=st.sampled_from(MININGS),
        squared=st.booleans(),
        reduction=st.sampled_from(REDUCTIONS),
        level=st.sampled_from(LEVELS or [""]),
        backend=st.sampled_from(BACKENDS),
    )
    def test_equals_a_loop_over_all_triples(
        self, batch, mining, squared, reduction, level, backend
    ):
        if level:
            kdkernels.set_isa(level)
        x, labels, margin = batch
        incoming = torch.linspace(-1.0, 2.0, len(x)) if reduction == "none" else torch.tensor(0.37)
        options = {"margin": margin, "mining": mining, "squared": squared, "reduction": reduction}
        want = all_triples(x, labels, **options, incoming=incoming.reshape(-1).tolist())
        got = loss_and_gradient(
            batch_triplet_loss, x, labels, incoming=incoming, **options, backend=backend
        )
        # float32 rounding of distances up to 200 and of sums of up to 400 of them
        scale = max(1.0, *(float(t.abs().max()) for t in want))
        for name, ours, truth in zip(("loss", "gradient"), got, want, strict=True):
            torch.testing.assert_close(
                ours.double(),
                truth.double(),
                rtol=2e-5,
                atol=3e-6 * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )

    @both
    @every_mining
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [7], []])
    def test_no_triplet_gives_zero_and_no_gradient(self, backend, mining, reduction, labels):
        x = torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(3))
        options = {"mining": mining, "reduction": reduction, "backend": backend}
        loss, gradient = loss_and_gradient(
            batch_triplet_loss, x, torch.tensor(labels, dtype=torch.int32), **options
        )
        assert loss.shape == ((len(x),) if reduction == "none" else ())
        assert not loss.any()
        assert gradient.shape == x.shape
        assert not gradient.any()

    @both
    @pytest.mark.parametrize("mining", ["hard", "all"])
    def test_a_distance_of_zero_has_no_gradient(self, backend, mining):
        # Rows 0 and 1 are one identity's, row 2 is another's: all at one point.
        x, labels = torch.ones(3, 4), torch.tensor([0, 0, 1])
        options = {"margin": 0.25, "mining": mining, "squared": False, "backend": backend}
        loss, gradient = loss_and_gradient(batch_triplet_loss, x, labels, **options)
        assert loss.item() == 0.25
        assert not gradient.any()

    @both
    @every_mining
    def test_the_order_of_the_batch_does_not_matter(self, backend, mining):
        x, labels = make([4] * 9, 40, seed=6).tensors.values()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
        options = {"mining": mining, "margin": 9.0, "backend": backend}
        loss, gradient = loss_and_gradient(batch_triplet_loss, x, labels, **options)
        moved = loss_and_gradient(batch_triplet_loss, x[order], 5 - 3 * labels[order], **options)
        torch.testing.assert_close(moved[0], loss)
        torch.testing.assert_close(moved[1], gradient[order], rtol=1e-4, atol=1e-5)

    @both
    @every_mining
    @pytest.mark.parametrize("squared", [True, False])
    def test_gradient_rows_sum_to_zero(self, backend, mining, squared):
        # The loss does not change when all rows move together.
        x, labels = make([4] * 12, 64, seed=7).tensors.values()
        options = {"mining": mining, "squared": squared, "margin": 200.0, "backend": backend}
        loss, gradient = loss_and_gradient(batch_triplet_loss, x, labels, **options)
        assert float(loss) > 0
        assert float(gradient.sum(dim=0).abs().max()) <= 1e-5 * float(gradient.abs().max())

    @both
    @every_mining
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_nan_reaches_every_anchor_that_has_triplets(self, backend, mining, bad):
        x, labels = make([3, 3, 2, 1], 20, seed=8).tensors.values()
        x[int((labels == 0).nonzero()[0])] = bad
        loss = batch_triplet_loss(
            x, labels, mining=mining, margin=9.0, reduction="none", backend=backend
        )
        if math.isnan(bad):
            assert torch.equal(loss.isnan(), labels != 3)  # the identity with one image has none
        else:
            # An infinite distance to a negative is a triplet without loss; to a positive it is
            # infinite.
            assert bool(loss[(labels != 0) & (labels != 3)].isfinite().all())
            assert not bool(loss[labels == 0].isfinite().any()) or mining == "semihard"

    @needs_native
    @pytest.mark.parametrize("level", LEVELS)
    @every_mining
    def test_close_points_far_away_are_selected_as_in_float64(self, mining, level):
        # Norms of 64 * 1000^2 against distances of 64 * 0.01^2: float32 |a|^2 + |b|^2 - 2ab keeps
        # nothing.
        kdkernels.set_isa(level)
        sample = make([4] * 10, 64, seed=9, spread=0.01)
        x, labels = sample.tensors["embeddings"], sample.tensors["labels"]
        x[::2] += 1000.0
        x[1::2] -= 1000.0
        options = {"mining": mining, "margin": 0.01, "squared": False}
        got = loss_and_gradient(batch_triplet_loss, x, labels, **options, backend="native")
        want = loss_and_gradient(batch_triplet_loss, x.double(), labels, **options, backend="eager")
        for ours, truth in zip(got, want, strict=True):
            torch.testing.assert_close(
                ours.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max())
            )

    @needs_native
    @pytest.mark.parametrize("level", LEVELS)
    def test_a_batch_with_many_positives_and_ties_everywhere(self, level):
        # 2 identities of 64 on a small grid: the product of S and X, with hundreds of ties a row.
        kdkernels.set_isa(level)
        generator = torch.Generator().manual_seed(10)
        x = torch.randint(-2, 3, (128, 24), generator=generator).float()
        labels = torch.arange(128) % 2
        for mining, squared in product(MININGS, [True, False]):
            options = {"mining": mining, "squared": squared, "margin": 4.0}
            got = loss_and_gradient(batch_triplet_loss, x, labels, **options, backend="native")
            want = loss_and_gradient(
                batch_triplet_loss, x.double(), labels, **options, backend="eager"
            )
            for ours, truth in zip(got, want, strict=True):
                torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)

    @needs_native
    @every_mining
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_float16_gradient_survives_the_loss_scale(self, mining, reduction):
        # Most gradients divided by the number of triplets are below float16's smallest number,
        # 6e-8.
        x, labels = make([4] * 32, 64, seed=11, spread=0.002).tensors.values()
        x = x.half()
        options = {"mining": mining, "margin": 1e-3, "reduction": reduction}
        divisor = 1.0 if reduction == "mean" else 128.0 * 64
        incoming = torch.full((128,) if reduction == "none" else (), 65536.0 / divisor)
        _, got = loss_and_gradient(
            batch_triplet_loss, x, labels, **options, incoming=incoming, backend="native"
        )
        _, want = loss_and_gradient(
            batch_triplet_loss, x.double(), labels, **options, incoming=incoming, backend="eager"
        )
        assert got.dtype == torch.float16
        assert float((got.double() - want).norm() / want.norm()) <= 1e-3

    @every_mining
    @pytest.mark.parametrize("squared", [True, False])
    @pytest.mark.parametrize("reduction", ["nonzero", "none"])
    def test_gradcheck_of_eager(self, mining, squared, reduction):
        x, labels = make([2, 3, 1, 2], 4, seed=12).tensors.values()
        x = x.double().requires_grad_()

        def loss(x):
            return batch_triplet_loss(
                x, labels, mining=mining, squared=squared, reduction=reduction, margin=3.0
            )

        assert float(loss(x).detach().sum()) > 0
        assert torch.autograd.gradcheck(loss, x)
        assert torch.autograd.gradgradcheck(loss, x)

    def test_eager_in_blocks_of_rows_equals_eager_at_once(self, monkeypatch):
        x, labels = make([4] * 5, 12, seed=13).tensors.values()
        options = {"mining": "all", "margin": 9.0, "backend": "eager"}
        whole = loss_and_gradient(batch_triplet_loss, x, labels, **options)
        monkeypatch.setattr(batch_eager, "BLOCK_ELEMENTS", 500)
        blocks = loss_and_gradient(batch_triplet_loss, x, labels, **options)
        torch.testing.assert_close(blocks, whole)


X = torch.ones(4, 3)
Y = torch.tensor([0, 0, 1, 1])


@both
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, Y[:3]), {}, r"labels must have shape \(4,\), got \(3,\)"),
        ((X, Y.float()), {}, "labels must be int32 or int64"),
        ((X, Y.to("meta")), {}, "labels must be on cpu"),
        ((X, [0, 0, 1, 1]), {}, "labels must be a torch.Tensor"),
        ((X[None], Y), {}, "embeddings must have 2 dimensions"),
        ((X[:, :0], Y), {}, "at least one feature"),
        ((X, Y), {"margin": math.inf}, "margin must be finite"),
        ((X, Y), {"mining": "easy"}, "mining must be one of hard, semihard, all"),
        ((X, Y), {"reduction": "median"}, "reduction must be one of mean, nonzero, sum, none"),
    ],
)
def test_an_error_names_the_op(backend, arguments, options, message):
    with pytest.raises(ValueError, match=rf"^batch_triplet_loss: .*{message}"):
        batch_triplet_loss(*arguments, **options, backend=backend)


def test_the_module_rejects_bad_options_at_construction():
    for bad in ({"margin": math.nan}, {"reduction": "median"}, {"mining": "easy"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            BatchTripletLoss(**bad)


@both
def test_the_module_equals_its_function(backend):
    options = {"margin": 2.0, "squared": False, "reduction": "sum", "backend": backend}
    options["mining"] = "all"
    batch = list(make([3, 3, 2], 11, seed=4).tensors.values())
    assert torch.equal(BatchTripletLoss(**options)(*batch), batch_triplet_loss(*batch, **options))


@both
@pytest.mark.parametrize("mining", ["hard", "all"])
def test_a_loss_beyond_float32_is_not_finite_and_no_error(backend, mining):
    generator = torch.Generator().manual_seed(0)
    huge = torch.randn(8, 5, generator=generator) * 1e25
    loss = batch_triplet_loss(huge, torch.arange(8) // 2, mining=mining, backend=backend)
    assert not bool(loss.isfinite())


@both
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("mining", ["hard", "semihard", "all"])
def test_rows_that_differ_by_almost_nothing(backend, mining, squared):
    generator = torch.Generator().manual_seed(4)
    rows, labels = torch.randn(10, 3, generator=generator), torch.tensor([0, 1] * 5)
    # a margin of 0 asks for the sign of a difference of squares
    margin = 0.0 if squared and mining != "semihard" else 1.0
    options = {"mining": mining, "squared": squared, "margin": margin}
    for size in (1e-17, 1e-19, 3e-20, 1e-21, 1e-25, 1e-38, 1e-44):
        x = (rows * size).requires_grad_()
        batch_triplet_loss(x, labels, backend=backend, **options).backward()
        assert x.grad.isfinite().all()
        # float32 squares of eager and triton lose their digits below 1e-19
        if size < (1e-27 if backend == "native" else 1e-18):
            continue
        wide = x.detach().double().requires_grad_()
        batch_triplet_loss(wide, labels, backend="eager", **options).backward()
        largest = float(wide.grad.abs().max())
        assert largest > 0.0
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=1e-5 * largest)
