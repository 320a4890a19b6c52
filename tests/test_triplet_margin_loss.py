"""kdkernels.TripletMarginLoss is torch.nn.TripletMarginLoss: results, dtypes, errors, documented
example."""

import doctest
from types import SimpleNamespace

import pytest
import torch

from kdkernels import TripletMarginLoss
from kdkernels.library import backends
from kdkernels.triplet.samples import make_triplets


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
    compare(*make_triplets(37, 21, seed=1).tensors.values(), **options)


def test_other_shapes_and_dtypes():
    triplet = list(make_triplets(12, 20, seed=2).tensors.values())
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
    triplet = [t.bfloat16() for t in make_triplets(4, 20, seed=3).tensors.values()]
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
    "native" not in backends("triplet_loss", "cpu"),
    reason="needs the extension: install with a C++ compiler",
)
def test_the_kernel_runs_where_it_covers_the_call():
    leaf = torch.ones(2, 3, requires_grad=True)
    assert "TripletLoss" in TripletMarginLoss(reduction="none")(leaf, leaf, leaf).grad_fn.name()
