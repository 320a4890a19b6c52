"""kdkernels.TripletMarginLoss is torch.nn.TripletMarginLoss: results, dtypes, errors, documented
example."""

import doctest
from types import SimpleNamespace

import pytest
import torch

from kdkernels import TripletMarginLoss, triplet_loss
from kdkernels.backends import backends
from kdkernels.triplet_loss.op import _kernel
from kdkernels.triplet_loss.samples import make

BACKENDS = backends("triplet_loss", "cpu")
triton = pytest.mark.skipif("triton" not in BACKENDS, reason="runs under TRITON_INTERPRET=1")
each_kernel = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])


def compare(*members, incoming=0.37, rtol=1.3e-6, atol=1e-5, **options):
    found = []
    for module in (TripletMarginLoss, torch.nn.TripletMarginLoss):
        leaves = [t.detach().clone().requires_grad_() for t in members]
        loss = module(**options)(*leaves)
        found.append([loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, incoming))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": 3.0, "eps": 1e-2},
        {"reduction": "none"},
        {"reduction": "sum"},
        {"size_average": False},
        {"reduce": False},
        {"p": 1.0},
        {"p": 3.0},
        {"swap": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning")
def test_equals_torch(options):
    compare(*make(37, 21, seed=1).tensors.values(), **options)


def test_other_shapes_and_dtypes():
    triplet = list(make(12, 20, seed=2).tensors.values())
    compare(*(t.view(3, 4, 20) for t in triplet))
    compare(*(t[0] for t in triplet))
    compare(triplet[0], triplet[1], triplet[2][:1])  # torch broadcasts
    compare(*(t.double() for t in triplet))
    compare(*(t.bfloat16() for t in triplet), rtol=2e-2, atol=2e-2)
    compare(*(t.half() for t in triplet), rtol=2e-3, atol=2e-3)


def test_no_rows_are_nan_as_in_torch():
    assert TripletMarginLoss()(*[torch.zeros(0, 3)] * 3).isnan()


def test_gradient_where_the_hinge_is_exactly_zero_is_torchs():
    a, p, n = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    compare(a, p, n, margin=1.0, eps=0.0)


def test_equal_members_without_eps():
    same = [torch.ones(2, 3)] * 3
    compare(*same, eps=0.0)


def test_dtype_under_autocast_is_torchs():
    triplet = [t.bfloat16() for t in make(4, 20, seed=3).tensors.values()]
    with torch.autocast("cpu"):
        ours, theirs = (m()(*triplet) for m in (TripletMarginLoss, torch.nn.TripletMarginLoss))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_torchs_documented_example():
    examples = doctest.DocTestParser().get_examples(torch.nn.TripletMarginLoss.__doc__)
    assert len(examples) >= 6
    found = []
    for module in (TripletMarginLoss, torch.nn.TripletMarginLoss):
        names = {"torch": torch, "nn": SimpleNamespace(TripletMarginLoss=module)}
        torch.manual_seed(0)
        for example in examples:
            exec(example.source, names)
        found.append([names[k] for k in ("output", "anchor", "positive", "negative")])
    (ours, *leaves), (theirs, *their_leaves) = found
    torch.testing.assert_close(ours, theirs)
    for leaf, their_leaf in zip(leaves, their_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, their_leaf.grad)


def test_torchs_errors_stay():
    with pytest.raises(ValueError, match="margin to be greater than 0"):
        TripletMarginLoss(margin=0.0)
    with pytest.raises(ValueError, match="reduction"):
        TripletMarginLoss(reduction="median")(*[torch.ones(2, 3)] * 3)


@pytest.mark.skipif(
    "native" not in BACKENDS,
    reason="needs the extension: install with a C++ compiler",
)
def test_the_kernel_runs_where_it_covers_the_call():
    leaf = torch.ones(2, 3, requires_grad=True)
    assert "TripletLoss" in TripletMarginLoss(reduction="none")(leaf, leaf, leaf).grad_fn.name()


@each_kernel
@pytest.mark.parametrize("features", [1, 21, 64, 130])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kernel_with_eps_equals_torch(backend, features, reduction):
    # 130 leaves lanes idle, which eps must not count
    leaves = [t.requires_grad_() for t in make(9, features, seed=4).tensors.values()]
    ours = _kernel(backend, *leaves, 1.0, False, 0.05, True, reduction)
    theirs = torch.nn.TripletMarginLoss(eps=0.05, reduction=reduction)(*leaves)
    torch.testing.assert_close(ours, theirs)
    found = [torch.autograd.grad(loss.sum(), leaves) for loss in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@each_kernel
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("squared", [True, False])
def test_float16_gradients_keep_their_digits_at_any_size(backend, size, squared):
    # at 300 a square's gradients outgrow the stored power of two and are formed again
    triplet = [t.half() for t in make(40, 70, seed=5, spread=size).tensors.values()]
    margin = 1e3 * size**2
    found = []
    for which, dtype in ((backend, torch.float16), ("eager", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in triplet]
        loss = triplet_loss(*leaves, margin=margin, squared=squared, backend=which)
        found.append(torch.autograd.grad(loss, leaves, torch.full_like(loss, 4.0 / size)))
    for got, want in zip(*found, strict=True):
        assert got.isfinite().all()
        assert (got.double() - want).norm() / want.norm() < 6e-4


@each_kernel
def test_infinite_float16_features_change_no_other_row(backend):
    triplet = [t.half() for t in make(5, 12, seed=6).tensors.values()]
    triplet[1][2, 3] = torch.inf
    leaves = [t.requires_grad_() for t in triplet]
    loss = triplet_loss(*leaves, margin=100.0, reduction="none", backend=backend)
    assert loss.isinf().tolist() == [False, False, True, False, False]
    gradients = torch.autograd.grad(loss, leaves, torch.ones(5))
    others = [0, 1, 3, 4]
    want = torch.autograd.grad(
        triplet_loss(*(t[others] for t in leaves), margin=100.0, backend="eager") * 4, leaves
    )
    for got, true in zip(gradients, want, strict=True):
        torch.testing.assert_close(got[others], true[others])


@triton
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_long_rows_are_read_twice(squared, reduction):
    leaves = [t.requires_grad_() for t in make(2, 9001, seed=7).tensors.values()]
    options = {"margin": 200.0, "squared": squared, "reduction": reduction}
    found = []
    for backend in ("triton", "eager"):
        loss = triplet_loss(*leaves, **options, backend=backend)
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@triton
@pytest.mark.parametrize(
    ("dtype", "options", "want"),
    [
        (torch.float32, {}, ["_forward", "_finish", "_give"]),
        (torch.float32, {"reduction": "none"}, ["_forward", "_give"]),
        (torch.float16, {"squared": False}, ["_forward", "_finish", "_give"]),
        (torch.float16, {}, ["_forward", "_finish", "_again", "_give"]),
    ],
    ids=["mean", "none", "float16 root", "float16 square"],
)
def test_launches(monkeypatch, dtype, options, want):
    from kdkernels import triton_common

    names, launch = [], triton_common.launch

    def record(kernel, *arguments, **meta):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **meta)

    monkeypatch.setattr(triton_common, "launch", record)
    leaves = [t.to(dtype).requires_grad_() for t in make(9, 33).tensors.values()]
    triplet_loss(*leaves, **options, backend="triton").sum().backward()
    assert names == want
