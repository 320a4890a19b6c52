"""batch_triplet_loss by the paths of large batches, and where its Triton kernels decide exactly: in
the interpreter, or on a GPU if there is one.

`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_batch_triplet_triton.py` runs all of it.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from contract import IS_FULL, accuracy, every_element_written, find_op, same_bits_twice
from contract_device import paths_of_large_problems
from test_batch_triplet_loss import MININGS, all_triples, loss_and_gradient

from kdkernels import backends, batch_triplet_loss
from kdkernels.batch_triplet_loss.samples import make as make_batch
from kdkernels.sample import Sample

pytest.importorskip("triton")
from kdkernels import product_error, triton_common
from kdkernels.batch_triplet_loss import (
    triton_gradient,
    triton_kernel,
    triton_mining,
    triton_sort,
    triton_tiled_mining,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    "triton" not in backends("batch_triplet_loss", DEVICE),
    reason="no GPU, and Triton's interpreter is off: TRITON_INTERPRET=1 turns it on",
)


@pytest.fixture
def _large(monkeypatch):
    """Small batches take the path of large ones: tiles, shares, chunks of anchors, blocks."""
    monkeypatch.setattr(triton_kernel, "TILED_ROWS", 0)
    monkeypatch.setattr(triton_kernel, "CHUNK_ELEMENTS", 400)
    monkeypatch.setattr(triton_mining, "MOST_BLOCK", 32)
    monkeypatch.setattr(triton_gradient, "SPREAD_BLOCK", 16)
    monkeypatch.setattr(triton_sort, "SHIFT_ROWS", 4)
    for name, value in {"TILE": 16, "WIDTH": 16, "NARROW": 16, "COLUMNS": 16, "SHARES": 2}.items():
        monkeypatch.setattr(triton_tiled_mining, name, value)


def small(limit: int, **options: object) -> list[Sample]:
    """The contract's samples of fewer numbers than that, with these options."""
    op = find_op("batch_triplet_loss", DEVICE)
    return [
        s
        for s in op.samples
        if s.tensors["embeddings"].numel() < limit
        and all(s.options.get(k, "hard") == v for k, v in options.items())
    ]


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize(
    ("mining", "dtype"),
    [
        *((mining, torch.float32) for mining in MININGS),
        *(("semihard", torch.bfloat16), ("hard", torch.float16), ("all", torch.float16)),
        *(
            pytest.param(mining, dtype, marks=pytest.mark.prove)
            for mining, dtype in (
                *(("hard", torch.bfloat16), ("all", torch.bfloat16)),
                ("semihard", torch.float16),
            )
        ),
    ],
    ids=str,
)
def test_every_sample_by_the_paths_of_large_batches(mining, dtype):
    # what differs between 16-bit dtypes does not depend on the size
    some = small(10_000 if IS_FULL and dtype == torch.float32 else 600, mining=mining)
    assert len(some) >= 8
    accuracy(replace(find_op("batch_triplet_loss", DEVICE), samples=tuple(some)), "triton", dtype)


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("promise", [every_element_written, same_bits_twice])
def test_form_by_the_paths_of_large_batches(promise):
    op = find_op("batch_triplet_loss", DEVICE)
    promise(replace(op, samples=tuple(small(320))), "triton", torch.float32)


@pytest.mark.usefixtures("_large")
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_contract.py runs it, at full size")
def test_the_devices_own_check_takes_the_paths_of_large_batches(monkeypatch):
    rows = []
    chunks = triton_kernel._chunks

    def see(count):
        found = list(chunks(count))
        rows.append(len(found))
        return iter(found)

    monkeypatch.setattr(triton_kernel, "_chunks", see)
    paths_of_large_problems(find_op("batch_triplet_loss"), "triton")
    assert rows
    assert min(rows) > 1


def test_large_batches_hold_no_square_matrix(monkeypatch):
    # of "hard" nothing is N x N; of the others two matrices of CHUNK_ELEMENTS
    largest = []
    empty = torch.empty

    def seen(*shape, **options):
        result = empty(*shape, **options)
        largest.append(result.numel())
        return result

    x, labels = make_batch([2] * 36, 4, seed=1, device=DEVICE).tensors.values()
    monkeypatch.setattr(torch, "empty", seen)
    monkeypatch.setattr(triton_kernel, "TILED_ROWS", 0)
    monkeypatch.setattr(triton_kernel, "CHUNK_ELEMENTS", 3000)
    for mining in MININGS:
        largest.clear()
        loss_and_gradient(batch_triplet_loss, x, labels, mining=mining, backend="triton")
        assert 72 * 4 <= max(largest) <= 128 * 32 < 72 * 72, mining


@pytest.mark.usefixtures("_large")
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize(
    "reduction",
    ["mean", "none", *(pytest.param(one, marks=pytest.mark.prove) for one in ("sum", "nonzero"))],
)
def test_paths_of_large_batches_equal_a_loop_over_all_triples(mining, reduction):
    generator = torch.Generator().manual_seed(21)
    for rows, features, identities, on_grid in (
        (21, 3, 5, True),
        (19, 2, 2, True),
        (18, 17, 4, False),
    ):
        labels = torch.randint(identities, (rows,), generator=generator)
        if on_grid:  # ties and hinges of 0
            x = torch.randint(-1, 2, (rows, features), generator=generator).float()
        else:
            x = torch.randn(rows, features, generator=generator) + 30.0
        is_none = reduction == "none"
        incoming = torch.linspace(-1.0, 2.0, rows) if is_none else torch.tensor(0.37)
        options = {"margin": 1.0, "mining": mining, "squared": False, "reduction": reduction}
        want = all_triples(x, labels, **options, incoming=incoming.reshape(-1).tolist())
        x, labels, incoming = x.to(DEVICE), labels.to(DEVICE), incoming.to(DEVICE)
        got = loss_and_gradient(
            batch_triplet_loss, x, labels, **options, incoming=incoming, backend="triton"
        )
        for ours, truth in zip(got, want, strict=True):
            torch.testing.assert_close(ours.cpu().double(), truth.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("_large")
def test_a_tie_between_shares_goes_to_the_lowest_row():
    # Rows 0 and 30 are one point, the nearest negative of row 20. By identity row 30 comes first
    # and row 0 last: neither is in the anchor's own tile.
    x = 10.0 * torch.randn(64, 8, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(64) // 2 + 5
    labels[:2], labels[30:32] = 60, 0
    x[0] = x[30] = x[20] + 0.5
    gradient = loss_and_gradient(
        batch_triplet_loss,
        x.to(DEVICE),
        labels.to(DEVICE),
        reduction="none",
        margin=1e4,
        incoming=torch.eye(64, device=DEVICE)[20],
        backend="triton",
    )[1]
    assert gradient[0].any()
    assert not gradient[30].any()


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("mining", MININGS)
def test_close_points_far_away_are_selected_as_in_float64(mining, is_large, request):
    # Norms of 16 * 1000^2 against distances of 16 * 0.01^2: products lose these entirely.
    if is_large:
        request.getfixturevalue("_large")
    x, labels = make_batch([4] * 5, 16, seed=9, spread=0.01, device=DEVICE).tensors.values()
    x[::2] += 1000.0
    x[1::2] -= 1000.0
    options = {"mining": mining, "margin": 0.01, "squared": False}
    got = loss_and_gradient(batch_triplet_loss, x, labels, **options, backend="triton")
    want = loss_and_gradient(batch_triplet_loss, x.double(), labels, **options, backend="eager")
    for ours, truth in zip(got, want, strict=True):
        torch.testing.assert_close(
            ours.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max())
        )


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_come_out_as_from_eager(bad, is_large, request):
    if is_large:
        request.getfixturevalue("_large")
    x, labels = make_batch([3, 3, 2, 1], 20, seed=8, device=DEVICE).tensors.values()
    x[int((labels == 0).nonzero()[0])] = bad
    for mining, squared in product(("hard", "all"), (True, False)):
        options = {"mining": mining, "squared": squared, "margin": 9.0, "reduction": "none"}
        got = batch_triplet_loss(x, labels, **options, backend="triton")
        want = batch_triplet_loss(x, labels, **options, backend="eager")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_float16_gradient_survives_the_loss_scale():
    # Most gradients divided by the number of triplets are below float16's smallest number, 6e-8.
    x, labels = make_batch([4] * 8, 16, seed=11, spread=0.002, device=DEVICE).tensors.values()
    x = x.half()
    for mining in MININGS:
        options = {"mining": mining, "margin": 1e-3}
        incoming = torch.tensor(65536.0 / 128, device=DEVICE)
        _, got = loss_and_gradient(
            batch_triplet_loss, x, labels, **options, incoming=incoming, backend="triton"
        )
        _, want = loss_and_gradient(
            batch_triplet_loss, x.double(), labels, **options, incoming=incoming, backend="eager"
        )
        assert got.dtype == torch.float16
        assert float((got.double() - want).norm() / want.norm()) <= 1e-3, mining


@pytest.mark.skipif(DEVICE != "cpu", reason="the setting is that of the CPU")
def test_coarse_products_change_no_choice(monkeypatch):
    # As if torch were allowed to take bfloat16 factors: the error of G is as large as its bound.
    x, labels = make_batch([2] * 40, 3, seed=3).tensors.values()
    product_of = torch.mm

    def coarse(a, b, **options):
        return product_of(a.bfloat16().float(), b.bfloat16().float(), **options)

    monkeypatch.setattr(product_error, "products_are_float32", lambda device_type: False)
    for mining in ("hard", "semihard"):
        options = {"mining": mining, "margin": 9.0, "reduction": "none"}
        want = batch_triplet_loss(x, labels, **options, backend="eager")
        monkeypatch.setattr(torch, "mm", coarse)
        got = batch_triplet_loss(x, labels, **options, backend="triton")
        monkeypatch.setattr(torch, "mm", product_of)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("_large")
def test_few_shares_of_random_points_are_measured_whole(monkeypatch):
    # the input of _settle from tiles: lower bounds of all distances, tight enough to decide alone
    settled = []
    launch = triton_common.launch

    def see(kernel, grid, *arguments, **options):
        launch(kernel, grid, *arguments, **options)
        if kernel is triton_tiled_mining._settle:
            settled.append(arguments)

    monkeypatch.setattr(triton_common, "launch", see)
    x, labels = make_batch([2] * 48, 32, seed=2, device=DEVICE).tensors.values()
    batch_triplet_loss(x, labels, backend="triton")
    _, norms, order, first, last, best, second = settled[0][:7]
    rows = len(x)
    relative, absolute = triton_tiled_mining.error_of_planes(32)
    own = norms[:rows].double() * (1 - relative) - absolute
    sorted_x = x[order[:rows].long()].double()
    distance = (sorted_x[:, None] - sorted_x[None]).square().sum(dim=2)
    place = torch.arange(rows, device=DEVICE)
    same = (place >= first[:rows, None]) & (place < last[:rows, None])
    nearest = distance.masked_fill(same, torch.inf).amin(dim=1)
    shares = triton_tiled_mining.SHARES + 1  # the last is the diagonal
    bounds = own - 2.0 * best[:shares, :rows].double()
    assert bool((bounds.amin(dim=0) <= nearest).all())
    assert bool((bounds.amin(dim=0) >= nearest * 0.999).all())
    is_whole = own - 2.0 * second[:shares, :rows].double() <= nearest
    assert float(is_whole.double().mean()) < 0.02
