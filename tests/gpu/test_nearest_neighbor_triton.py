"""Bounds and measured distances of Triton's nearest_neighbor: in the interpreter, or on a GPU.

`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_nearest_neighbor_triton.py` runs all of it.
"""

from dataclasses import replace

import pytest
import torch
from contract import accuracy, find_op
from test_nearest_neighbor import DTYPES, brute_force, normal
from torch import Tensor

from kdkernels import backends, nearest_neighbor

pytest.importorskip("triton")
from kdkernels import triton_common
from kdkernels.nearest_neighbor import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    "triton" not in backends("nearest_neighbor", DEVICE),
    reason="no GPU, and Triton's interpreter is off: TRITON_INTERPRET=1 turns it on",
)


@pytest.fixture
def launched(monkeypatch):
    """The arguments by name of every kernel that ran, under the kernel's name."""
    found: dict[str, dict] = {}
    launch = triton_common.launch

    def recorded(kernel, grid, *arguments, **options):
        launch(kernel, grid, *arguments, **options)
        found[kernel.fn.__name__] = dict(zip(kernel.arg_names, arguments, strict=False)) | options

    monkeypatch.setattr(triton_common, "launch", recorded)
    return found


def assert_right(queries: Tensor, gallery: Tensor | None) -> None:
    """The result of measuring every row in double, to the last index."""
    on_device = [None if t is None else t.to(DEVICE) for t in (queries, gallery)]
    distance, index = nearest_neighbor(*on_device, backend="triton")
    want_distance, want_index = brute_force(queries, gallery)
    assert torch.equal(index.cpu(), want_index)
    torch.testing.assert_close(distance.double().cpu(), want_distance, rtol=2e-7, atol=1e-45)


def listed(launched: dict) -> tuple[int, int]:
    """How many gallery rows were measured for all, and how many queries were rescanned."""
    unsafe, ambiguous = launched["resolve"]["counters_ptr"].tolist()
    return unsafe, ambiguous


@runs
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounds_are_below_every_distance_and_close(dtype, leave_one_out, launched):
    queries = normal(300 if leave_one_out else 70, 48, seed=1).to(dtype)
    gallery = normal(420, 48, seed=2).to(dtype)
    assert_right(queries, None if leave_one_out else gallery)
    scan = launched["scan"]
    assert scan["splits"] > 1
    assert scan["tiles_per_split"] > 1
    rows = queries if leave_one_out else gallery
    distances = (queries.double()[:, None] - rows.double()).square().sum(dim=2)
    if leave_one_out:
        distances.fill_diagonal_(torch.inf)
    center = scan["center_ptr"].double().cpu() if scan["CENTERED"] else 0.0
    norms = (queries.double() - center).square().sum(dim=1)
    error, absolute = triton_kernel.error_of_scores(48)
    score = scan["score_ptr"].double().cpu().flatten(1).amax(dim=1)
    lower = (1 - error) * norms - 2 * score - absolute
    least = distances.amin(dim=1)
    assert (lower <= least).all()
    largest = norms + (rows.double() - center).square().sum(dim=1).amax()
    assert (lower >= least - 2 * error * largest).all()
    assert listed(launched) == (0, 0)  # so the candidates decided


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointers_and_the_copy_engine_give_the_same_bits(dtype, launched, monkeypatch):
    queries, gallery = normal(37, 24, seed=3).to(dtype), normal(150, 24, seed=4).to(dtype)
    results = []
    for takes in (triton_kernel._takes_descriptor, lambda t: False):
        monkeypatch.setattr(triton_kernel, "_takes_descriptor", takes)
        results.append(nearest_neighbor(queries.to(DEVICE), gallery.to(DEVICE), backend="triton"))
        assert_right(queries, gallery)
    assert all(map(torch.equal, *results))
    assert launched["scan"]["DESCRIPTORS"] is False


@runs
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_sample_through_pointers(dtype, monkeypatch):
    monkeypatch.setattr(triton_kernel, "_takes_descriptor", lambda t: False)
    op = find_op("nearest_neighbor", DEVICE)
    small = [s for s in op.samples if s.tensors["queries"].numel() < 5000]
    assert len(small) > 20
    accuracy(replace(op, samples=tuple(small)), "triton", dtype)


@runs
@pytest.mark.parametrize("repeats", [2, 3, 6])
def test_copies_of_a_row_in_many_tiles_go_to_the_lowest_index(repeats, launched):
    # 2 copies are both candidates; of more some are not and are found by measuring whole splits
    base = normal(45, 7, seed=5)
    assert_right(base + 0.01, base.repeat(repeats, 1))
    assert (listed(launched)[1] > 0) == (repeats > 2)
    assert_right(base.repeat(repeats, 1), None)


@runs
def test_near_ties_are_settled_in_difference_form(launched):
    # 64 rows on a sphere around the query, which rounding parts by 1e-4, far from the center that
    # 200 other rows have: the products are off by more
    others = normal(200, 64, seed=6)
    direction = torch.nn.functional.normalize(normal(64, 64, seed=7).double(), dim=1)
    query = normal(1, 64, seed=8) + 50
    near = (query.double() + 10.0 * direction).float()
    assert_right(query, torch.cat([others, near]))
    assert listed(launched) == (0, 1)


@runs
@pytest.mark.parametrize("seed", range(5))
def test_near_ties_in_one_class_of_several_tiles_are_resolved(seed, launched):
    # one split, and only one of the four rows can be a candidate
    architecture = triton_kernel.architecture_of(torch.device(DEVICE))
    tile = triton_kernel.tiles(architecture, descriptors=False, centered=True).gallery
    direction = torch.nn.functional.normalize(normal(4, 64, seed=seed).double(), dim=1)
    query = normal(1, 64, seed=seed + 100) + 50
    gallery = normal(4 * tile, 64, seed=seed + 200)
    gallery[::tile] = (query.double() + 10.0 * direction).float()
    assert_right(query, gallery)
    assert launched["scan"]["splits"] == 1
    assert listed(launched) == (0, 1)


@runs
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 3e18, 1e25])
def test_numbers_whose_squares_leave_float32(size, launched):
    queries, gallery = normal(5, 9, seed=9) * size, normal(70, 9, seed=10) * size
    found = nearest_neighbor(queries.to(DEVICE), gallery.to(DEVICE), backend="triton")
    want_distance, want_index = brute_force(queries, gallery)
    assert torch.equal(found.index.cpu(), want_index)
    torch.testing.assert_close(found.distance.cpu(), want_distance.float(), rtol=1e-6, atol=1e-45)
    assert (listed(launched)[0] > 0) == (size >= 3e18)


@runs
def test_far_from_the_origin_centering_leaves_nothing_to_rescan(launched):
    assert_right(normal(20, 16, seed=11) + 1e4, normal(200, 16, seed=12) + 1e4)
    assert listed(launched) == (0, 0)


@runs
def test_far_from_the_origin_in_16_bits_is_rescanned_and_right(launched):
    queries, gallery = normal(9, 16, seed=13) * 8 + 1000, normal(100, 16, seed=14) * 8 + 1000
    assert_right(queries.half(), gallery.half())
    assert listed(launched)[1] > 0


@runs
def test_one_outlier_changes_no_other_result(launched):
    gallery = normal(300, 20, seed=15)
    gallery[123] = 1e15
    assert_right(normal(10, 20, seed=16), gallery)
    assert listed(launched) == (0, 0)


@runs
def test_a_row_too_large_for_a_product_is_measured_for_all(launched):
    gallery = normal(600, 6, seed=17)
    gallery[[4, 500]] = 2e19  # not among the rows whose mean is the center
    queries = torch.cat([normal(4, 6, seed=18), gallery[500:501] * 0.999])
    assert_right(queries, gallery)
    assert listed(launched) == (2, 1)


@runs
def test_the_nearest_row_may_be_one_too_large_for_a_product(launched):
    # squared norms 6e36, which is safe, and 1.2e37, which is not; bfloat16 is not centered
    queries = (torch.ones(3, 6) * torch.tensor([[1e18], [1.1e18], [1e3]])).bfloat16()
    gallery = normal(70, 6, seed=24).bfloat16()
    gallery[41] = 1.4e18
    assert_right(queries, gallery)
    assert listed(launched) == (1, 0)


@runs
@pytest.mark.parametrize("columns", [1, 7, 15, 16, 17, 63, 64, 65, 130])
def test_every_width(columns):
    assert_right(normal(19, columns, seed=19), normal(83, columns, seed=20))


@runs
def test_memory_grows_with_rows_times_splits_and_no_faster(launched, monkeypatch):
    total = 0
    empty = torch.empty

    def counted(*args, **kwargs):
        nonlocal total
        value = empty(*args, **kwargs)
        total += value.numel() * value.element_size()
        return value

    queries, gallery = normal(150, 32, seed=21).to(DEVICE), normal(500, 32, seed=22).to(DEVICE)
    monkeypatch.setattr(torch, "empty", counted)
    nearest_neighbor(queries, gallery, backend="triton")
    tile, splits = launched["scan"]["TILE_X"], launched["scan"]["splits"]
    outputs, padding, center = 12 * 150, 4 * 3 * tile, 4 * 32
    assert total <= outputs + 16 * 150 + 36 * 150 * splits + 8 * 500 + padding + center


@pytest.mark.parametrize(
    ("rows", "gallery"),
    [(1, 10**6), (1000, 10**6), (20_000, 20_000), (10**5, 10**5), (10**6, 2000)],
)
def test_splits_cover_the_gallery_and_fill_a_gpu(rows, gallery):
    query_tiles, gallery_tiles = -(-rows // 128), -(-gallery // 256)
    splits, per_split = triton_kernel.splits_of(query_tiles, gallery_tiles, 132)
    assert (splits - 1) * per_split < gallery_tiles <= splits * per_split
    programs = query_tiles * splits
    rounds = -(-programs // 132)
    assert programs / (132 * rounds) > 0.9
    assert rows * splits * 36 <= max(64e6, rows * 36)


@runs
@pytest.mark.skipif(DEVICE != "cpu", reason="the tensors of a GPU are not read by address here")
def test_columns_of_no_unit_stride_are_copied_and_rows_are_not():
    wide = normal(40, 50, seed=23)
    strided = wide[::2, 3:19]
    assert triton_kernel._with_adjacent_columns(strided).data_ptr() == strided.data_ptr()
    copied = triton_kernel._with_adjacent_columns(wide[:, ::2])
    assert copied.stride(1) == 1
    assert torch.equal(copied, wide[:, ::2])
