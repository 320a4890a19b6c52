"""The mathematics of triplet_loss: values worked by hand, float64."""

import math
from itertools import product

import pytest
import torch

from kdkernels import TripletLoss, triplet_loss
from kdkernels.backends import backends
from kdkernels.triplet_loss.samples import make

BACKENDS = backends("triplet_loss", "cpu")
both = pytest.mark.parametrize("backend", BACKENDS)


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32, requires_grad=True)


@both
def test_squared_worked_by_hand(backend):
    # d(a,p) = 9 + 16, d(a,n) = 1 + 4, so 25 - 5 + 0.5; the gradients are 2(n - p), 2(p - a),
    # 2(a - n).
    a, p, n = row(0, 0), row(3, 4), row(1, -2)
    loss = triplet_loss(a, p, n, margin=0.5, backend=backend)
    loss.backward()
    assert loss.item() == 20.5
    assert a.grad.tolist() == [[-4, -12]]
    assert p.grad.tolist() == [[6, 8]]
    assert n.grad.tolist() == [[-2, 4]]


@both
def test_not_squared_worked_by_hand(backend):
    # d(a,p) = 5, d(a,n) = 2; the gradients are unit vectors.
    a, p, n = row(0, 0), row(3, 4), row(0, -2)
    loss = triplet_loss(a, p, n, margin=0.5, squared=False, backend=backend)
    loss.backward()
    assert loss.item() == 3.5
    torch.testing.assert_close(a.grad, torch.tensor([[-0.6, -0.8 - 1.0]]))
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(n.grad, torch.tensor([[0.0, 1.0]]))


@both
@pytest.mark.parametrize(("margin", "active"), [(3.0, False), (3.0 + 2**-20, True)])
def test_a_hinge_of_exactly_zero_has_no_gradient(backend, margin, active):
    a, p, n = row(0, 0), row(0, 1), row(2, 0)
    triplet_loss(a, p, n, margin=margin, backend=backend).backward()
    assert bool(a.grad.any()) == bool(p.grad.any()) == bool(n.grad.any()) == active


@both
def test_a_distance_of_zero_has_no_gradient(backend):
    a, p, n = row(1, 2), row(1, 2), row(1, 2)
    loss = triplet_loss(a, p, n, margin=0.25, squared=False, backend=backend)
    loss.backward()
    assert loss.item() == 0.25
    assert not any(bool(t.grad.any()) for t in (a, p, n))


@both
def test_no_rows_give_zero(backend):
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = triplet_loss(empty, empty, empty, backend=backend)
    loss.backward()
    assert loss.item() == 0.0
    assert empty.grad.shape == (0, 4)


@both
def test_gradients_go_where_they_are_wanted(backend):
    for wanted in product([True, False], repeat=3):
        sample = make(5, 9, seed=1, margin=50.0)
        members = [
            t.requires_grad_(w) for t, w in zip(sample.tensors.values(), wanted, strict=True)
        ]
        loss = triplet_loss(*members, margin=50.0, backend=backend)
        assert loss.requires_grad == any(wanted)
        if any(wanted):
            loss.backward()
        assert [t.grad is not None for t in members] == list(wanted)


@both
def test_a_tensor_that_is_two_members_gets_the_sum(backend):
    x, n = row(1, 2), row(0, 0)
    triplet_loss(x, x, n, margin=9.0, backend=backend).backward()
    assert x.grad.tolist() == [[-2, -4]]


@both
def test_moving_all_three_changes_nothing(backend):
    a, p, n = make(6, 40, seed=2).tensors.values()
    losses = [
        triplet_loss(a + s, p + s, n + s, reduction="none", margin=9.0, backend=backend)
        for s in (0.0, 2.0)
    ]
    torch.testing.assert_close(*losses)


X = torch.ones(4, 3)


@both
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X, X[:, :2], X), {}, r"positive must have anchor's shape \(4, 3\), got \(4, 2\)"),
        ((X, X, X[:3]), {}, "negative must have anchor's shape"),
        ((X[0], X[0], X[0]), {}, "anchor must have 2 dimensions"),
        ((X[:, :0], X[:, :0], X[:, :0]), {}, "at least one feature"),
        ((X.long(), X, X), {}, "anchor must be one of float32"),
        ((X, X.to("meta"), X), {}, "positive must be on cpu"),
        ((X, X, None), {}, "negative must be a torch.Tensor"),
        ((X, X, X), {"margin": math.nan}, "margin must be finite"),
        ((X, X, X), {"margin": "1"}, "margin must be a number"),
        ((X, X, X), {"reduction": "nonzero"}, "reduction must be one of mean, sum, none"),
    ],
)
def test_an_error_names_the_op(backend, arguments, options, message):
    with pytest.raises(ValueError, match=rf"^triplet_loss: .*{message}"):
        triplet_loss(*arguments, **options, backend=backend)


def test_the_module_rejects_bad_options_at_construction():
    for bad in ({"margin": math.nan}, {"reduction": "median"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            TripletLoss(**bad)


@both
def test_the_module_equals_its_function(backend):
    options = {"margin": 2.0, "squared": False, "reduction": "sum", "backend": backend}
    members = list(make(6, 11, seed=3).tensors.values())
    assert torch.equal(TripletLoss(**options)(*members), triplet_loss(*members, **options))


FAR, NEAR, NEARER = [1e11, 0.0], [0.002, 0.002], [0.001, 0.0]
ZERO = [0.0, 0.0]


@both
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("half", "rows", "expected"),
    [  # anchor, positive, negative of two rows; 2 (n - p), 2 (p - a), 2 (a - n) of the float16 one
        (0, [[ZERO, ZERO], [FAR, NEARER], [FAR, NEAR]], [ZERO, [0.002, 0.004]]),
        (1, [[ZERO, ZERO], [NEARER, NEAR], [FAR, FAR]], [[0.002, 0.0], [0.004, 0.004]]),
        (2, [[ZERO, ZERO], [FAR, FAR], [NEARER, NEAR]], [[-0.002, 0.0], [-0.004, -0.004]]),
    ],
)
def test_a_float16_gradient_is_stored_by_its_own_size(backend, other, half, rows, expected):
    # the gradients of the other members are 2e11
    members = [
        torch.tensor(r, dtype=torch.float16 if i == half else other).requires_grad_()
        for i, r in enumerate(rows)
    ]
    triplet_loss(*members, margin=1e30, reduction="sum", backend=backend).backward()
    got = members[half].grad.float()
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-2, atol=1e-7)


@both
@pytest.mark.parametrize("difference", [1e-9, 2e-8, 1e-6, 1e-3, 1.0, 400.0])
def test_a_loss_scale_saves_float16_gradients_of_any_size(backend, difference):
    anchor = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    positive, negative = torch.full((3, 4), difference), torch.full((3, 4), -difference)
    loss = triplet_loss(anchor, positive, negative, margin=1.0, backend=backend)
    scale = min(2.0**16, 2.0**15 / difference)
    loss.backward(torch.tensor(scale))
    expected = torch.full((3, 4), -4.0 * difference * scale / 3.0)
    torch.testing.assert_close(anchor.grad.float(), expected, rtol=2.0**-10, atol=0.0)


@both
@pytest.mark.parametrize("squared", [False, True])
def test_members_that_differ_by_almost_nothing(backend, squared):
    rows = torch.tensor([[[1.2, 0.0]], [[1.4, 0.0]], [[1.2, 0.1]]])
    options = {"margin": 0.0 if squared else 1.0, "squared": squared, "backend": backend}
    for size in (1e-17, 1e-18, 3e-19, 1e-19, 1e-20, 1e-25, 1e-38, 1e-44):
        members = [t.clone().requires_grad_() for t in rows * size]
        triplet_loss(*members, **options).backward()
        got = torch.stack([t.grad[0] for t in members])
        assert got.isfinite().all()
        # float32 squares of eager and triton lose their digits below 1e-19
        if size < (1e-28 if backend == "native" else 1e-19):
            continue
        want = torch.tensor([[-1.0, 1.0], [1.0, 0.0], [0.0, -1.0]])
        if squared:  # 2 (n - p), 2 (p - a), 2 (a - n)
            want = torch.tensor([[-0.4, 0.2], [0.4, 0.0], [0.0, -0.2]]) * size
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
