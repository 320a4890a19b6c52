"""The mathematics of nearest_neighbor: hand-worked cases, brute force in float64, scikit-learn."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from kdkernels import nearest_neighbor, set_isa
from kdkernels.backends import backends, isa_levels

BACKENDS = backends("nearest_neighbor", "cpu")
both = pytest.mark.parametrize("backend", BACKENDS)
native = pytest.mark.skipif(
    "native" not in BACKENDS, reason="runs where kdkernels._native is built"
)
NATIVE = importlib.import_module("kdkernels.nearest_neighbor.native")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def brute_force(queries: Tensor, gallery: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every distance in float64, one query at a time; the first of the smallest."""
    rows = (queries if gallery is None else gallery).double()
    distances = torch.stack([(rows - q.double()).square().sum(dim=1) for q in queries])
    if gallery is None:
        distances.fill_diagonal_(torch.inf)
    least = distances.amin(dim=1)
    return least, (distances == least[:, None]).int().argmax(dim=1)


def assert_right(queries: Tensor, gallery: Tensor | None, backend: str = "native") -> None:
    distance, index = nearest_neighbor(queries, gallery, backend=backend)
    want_distance, want_index = brute_force(queries, gallery)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(distance.double(), want_distance, rtol=2e-7, atol=0)


@both
def test_points_on_a_line_worked_by_hand(backend):
    queries = torch.tensor([[0.0], [3.2], [9.0]])
    gallery = torch.tensor([[4.0], [1.0], [-2.0]])
    found = nearest_neighbor(queries, gallery, backend=backend)
    assert found.index.tolist() == [1, 0, 0]
    assert found.distance.tolist() == pytest.approx([1.0, 0.64, 25.0])


@both
def test_leave_one_out_never_finds_itself(backend):
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 2.0], [5.0, 1.0]])
    found = nearest_neighbor(points, backend=backend)
    assert found.index.tolist() == [2, 3, 0, 1]
    assert found.distance.tolist() == [4.0, 1.0, 4.0, 1.0]


@both
def test_ties_go_to_the_lowest_index(backend):
    gallery = torch.tensor([[7.0], [1.0], [-1.0], [1.0]])
    assert nearest_neighbor(torch.zeros(1, 1), gallery, backend=backend).index.tolist() == [1]
    twice = normal(30, 7).repeat(3, 1)
    found = nearest_neighbor(twice, backend=backend)
    assert found.index.tolist() == [*range(30, 60), *range(30), *range(30)]
    assert not found.distance.any()


@both
def test_rows_that_are_all_the_same_find_the_first_other(backend):
    found = nearest_neighbor(normal(1, 11).expand(300, 11), backend=backend)
    assert found.index.tolist() == [1] + [0] * 299
    assert not found.distance.any()


@both
def test_a_tie_across_tiles_goes_to_the_lowest_index(backend):
    gallery = normal(5000, 3, seed=1) + 100
    gallery[[700, 2100, 4999]] = torch.tensor([1.0, 2.0, 3.0])
    found = nearest_neighbor(torch.tensor([[1.0, 2.0, 4.0]]), gallery, backend=backend)
    assert found.index.tolist() == [700]
    assert found.distance.tolist() == [1.0]


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_scikit_learn(backend, dtype):
    queries, gallery = normal(60, 24, seed=2).to(dtype), normal(300, 24, seed=3).to(dtype)
    model = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(gallery.double().numpy())
    distance, index = model.kneighbors(queries.double().numpy())
    found = nearest_neighbor(queries, gallery, backend=backend)
    assert found.index.tolist() == index[:, 0].tolist()
    want = torch.from_numpy(distance[:, 0]).square()
    torch.testing.assert_close(found.distance.double(), want, rtol=1e-5, atol=1e-6)


@both
def test_no_queries_give_empty_results(backend):
    found = nearest_neighbor(torch.zeros(0, 5), torch.zeros(3, 5), backend=backend)
    assert (found.distance.shape, found.distance.dtype) == ((0,), torch.float32)
    assert (found.index.shape, found.index.dtype) == ((0,), torch.int64)


@both
def test_nothing_carries_a_gradient(backend):
    queries = normal(5, 4).requires_grad_()
    gallery = normal(6, 4, seed=1).requires_grad_()
    assert not nearest_neighbor(queries, gallery, backend=backend).distance.requires_grad
    assert not nearest_neighbor(queries, backend=backend).distance.requires_grad


@both
def test_a_row_with_nan_is_never_the_nearest(backend):
    gallery = normal(9, 4, seed=4)
    queries = normal(7, 4, seed=5)
    queries[3] = gallery[2]
    gallery[2, 1] = torch.nan
    found = nearest_neighbor(queries, gallery, backend=backend)
    kept = torch.tensor([i for i in range(9) if i != 2])
    want = nearest_neighbor(queries, gallery[kept], backend=backend)
    assert torch.equal(found.index, kept[want.index])
    assert torch.equal(found.distance, want.distance)


@both
def test_a_nan_query_has_distance_nan_and_an_index_in_range(backend):
    points = normal(6, 4, seed=6)
    points[0, 0] = points[4, 2] = torch.nan
    found = nearest_neighbor(points, backend=backend)
    assert found.distance.isnan().tolist() == [True, False, False, False, True, False]
    assert found.index[[0, 4]].tolist() == [1, 0]
    outside = nearest_neighbor(points[:1], points, backend=backend)
    assert outside.index.tolist() == [0]


@both
def test_infinite_rows_are_infinitely_far(backend):
    gallery = torch.tensor([[torch.inf, 0.0], [1.0, 1.0], [1e30, 0.0]])
    queries = torch.tensor([[0.0, 0.0], [1e30, 1e28], [torch.inf, 0.0]])
    found = nearest_neighbor(queries, gallery, backend=backend)
    assert found.index.tolist()[0] == 1
    assert found.distance.tolist()[0] == 2.0
    assert found.distance[2] == torch.inf  # inf - inf with the first row: passed over
    assert found.index[2] == 1


@native
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12, 3e18, 1e25])
def test_numbers_whose_squares_leave_float32(size):
    queries, gallery = normal(20, 9, seed=7) * size, normal(50, 9, seed=8) * size
    found = nearest_neighbor(queries, gallery, backend="native")
    want_distance, want_index = brute_force(queries, gallery)
    assert torch.equal(found.index, want_index)
    torch.testing.assert_close(found.distance, want_distance.float(), rtol=1e-6, atol=1e-45)


@native
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("columns", [3, 128])
def test_far_from_the_origin_the_true_nearest_is_found(offset, columns):
    # in the plain Gram form squared norms of 1e12 would swallow distances of 1
    queries, gallery = (
        normal(150, columns, seed=9) + offset,
        normal(2500, columns, seed=10) + offset,
    )
    assert_right(queries, gallery)


@native
def test_two_clusters_far_apart_where_the_products_decide_nothing():
    # centered they are still 1e6 from the center: every row is within the rounding of the products
    side = torch.where(torch.arange(400) % 2 == 0, 1e6, -1e6)[:, None]
    assert_right(normal(50, 16, seed=11) + side[:50], normal(400, 16, seed=12) + side)


@native
def test_near_ties_are_settled_in_difference_form():
    # 64 rows on a sphere around each query, far from the center that 1000 other rows have: rounding
    # coordinates of 50 parts their squared distances by 1e-4, the products are off by 1e-1
    others = normal(1000, 256, seed=13)
    for seed in range(20):
        direction = torch.nn.functional.normalize(normal(64, 256, seed=seed).double(), dim=1)
        query = normal(1, 256, seed=seed + 100) + 50
        near = (query.double() + 10.0 * direction).float()
        distances = (near.double() - query.double()).square().sum(dim=1)
        assert distances.max() - distances.min() < 1e-3
        assert_right(query, torch.cat([others, near]))


@native
def test_rows_in_descending_order_of_distance():
    # each row beats all before it, in every tile
    far = torch.linspace(100, 1, 5000)[:, None] * torch.ones(1, 6)
    assert_right(torch.zeros(3, 6) + torch.tensor([[0.0], [0.5], [50.0]]), far)


@native
def test_one_outlier_changes_no_other_query():
    gallery = normal(3000, 20, seed=15)
    gallery[1234] = 1e15
    assert_right(normal(40, 20, seed=16), gallery)


@native
@pytest.mark.parametrize("level", isa_levels())
@pytest.mark.parametrize("columns", [1, 7, 16, 511, 512, 513, 2047, 2048, 2049, 4099])
def test_every_width_at_every_level(level, columns):
    set_isa(level)
    assert_right(normal(19, columns, seed=17), normal(83, columns, seed=18))


@native
def test_tiles_do_not_change_the_result(monkeypatch):
    queries, gallery = normal(301, 37, seed=19), normal(517, 37, seed=20)
    want = nearest_neighbor(queries, gallery, backend="native")
    alone = nearest_neighbor(queries, backend="native")
    for name, size in (
        ("TILE_QUERIES", 64),
        ("TILE_GALLERY", 100),
        ("TILE_COLUMNS", 10),
        ("BLOCK_QUERIES", 150),
    ):
        monkeypatch.setattr(NATIVE, name, size)
        for got, expected in zip(
            (*nearest_neighbor(queries, gallery, backend="native"), *nearest_neighbor(queries)),
            (*want, *alone),
            strict=True,
        ):
            assert torch.equal(got, expected), name


@native
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_torchs_reduced_precision_does_not_change_the_result(precision, monkeypatch):
    # what oneDNN may do with these settings, on every machine: factors rounded to bfloat16
    product = torch.mm

    def rounded(a, b, out):
        return product(a.bfloat16().float(), b.bfloat16().float(), out=out)

    monkeypatch.setattr(torch, "mm", rounded)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        for seed in range(10):
            direction = torch.nn.functional.normalize(normal(64, 256, seed=seed), dim=1)
            query = normal(1, 256, seed=seed + 100)
            near = query + direction * (10 + 0.01 * normal(64, 1, seed=seed + 200))
            assert_right(query, torch.cat([normal(1000, 256, seed=21), near]))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 40),
    st.integers(2, 90),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.sampled_from(["rows", "columns", "steps", "misaligned"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape_and_layout_agrees_with_brute_force(
    rows, gallery_rows, columns, dtype, gallery_dtype, layout, coarse, seed
):
    def laid_out(t: Tensor, kind: torch.dtype) -> Tensor:
        t = ((t * 2).round() if coarse else t).to(kind)  # coarse numbers tie often
        if layout == "columns":
            return t.t().contiguous().t()
        if layout == "rows":
            return t
        wide = torch.zeros(2 * t.shape[0], 2 * t.shape[1] + 3, dtype=kind)
        view = wide[::2, 1::2] if layout == "steps" else wide[::2, 1:]
        return view[:, : t.shape[1]].copy_(t)

    queries = laid_out(normal(rows, columns, seed=seed), dtype)
    gallery = laid_out(normal(gallery_rows, columns, seed=seed + 100), gallery_dtype)
    for backend in BACKENDS:
        for x in (gallery, None) if rows > 1 else (gallery,):
            found = nearest_neighbor(queries, x, backend=backend)
            want_distance, want_index = brute_force(queries, x)
            torch.testing.assert_close(
                found.distance.double(), want_distance, rtol=1e-6, atol=1e-30
            )
            if backend != "eager" or coarse:  # eager in float32 may confuse near ties
                assert torch.equal(found.index, want_index)


@native
def test_memory_stays_below_64_mb(monkeypatch):
    # everything that op.py allocates, outputs included, as if nothing were freed
    total = 0
    empty = torch.empty

    def counted(*args, **kwargs):
        nonlocal total
        value = empty(*args, **kwargs)
        total += value.numel() * value.element_size()
        return value

    monkeypatch.setattr(torch, "empty", counted)
    for rows, columns in ((3000, 128), (1100, 6000)):
        total = 0
        nearest_neighbor(normal(rows, columns), normal(2500, columns, seed=1), backend="native")
        assert total < 64e6


ROWS = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("queries", "gallery", "options", "message"),
    [
        (torch.ones(4), None, {}, "queries must have 2 dimensions"),
        (ROWS.long(), None, {}, "queries must be one of float32"),
        ("rows", None, {}, "queries must be a torch.Tensor, got str"),
        (torch.ones(3, 0), None, {}, "queries must have a column"),
        (ROWS[:1], None, {}, "queries must have at least 2 rows where gallery is None"),
        (ROWS[:0], None, {}, "queries must have at least 2 rows where gallery is None"),
        (ROWS, ROWS[:0], {}, r"gallery must have at least one row .* got shape \(0, 4\)"),
        (ROWS, torch.ones(3, 5), {}, "gallery must have .* queries' 4 columns"),
        (ROWS, torch.ones(4), {}, "gallery must have 2 dimensions"),
        (ROWS, ROWS.int(), {}, "gallery must be one of float32"),
        (ROWS, ROWS.to("meta"), {}, "gallery must be on cpu"),
        (ROWS, ROWS, {"backend": "faiss"}, "backend 'faiss' has no kernel"),
    ],
)
def test_bad_arguments_are_one_clear_error(queries, gallery, options, message):
    with pytest.raises(ValueError, match=f"^nearest_neighbor: {message}"):
        nearest_neighbor(queries, gallery, **options)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize("size", [1e-40, 1e-44, 1e-30])
def test_numbers_that_float32_holds_as_denormals_count(backend, size):
    # eager sums float32 squares: below 1e-23 all are 0 there
    queries = torch.tensor([[size, -size]])
    gallery = torch.tensor([[3.0, -3.0], [2.0, -3.0], [1.0, -2.0], [1.0, 3.0]]) * size
    assert nearest_neighbor(queries, gallery, backend=backend).index.item() == 2


@both
def test_equal_rows_tie_however_they_are_stored(backend):
    queries, row = normal(5, 68, seed=31), normal(1, 68, seed=32)
    equal = row.expand(40, 68)
    for gallery in (equal, equal.t().contiguous().t(), equal.t().contiguous().t().bfloat16()):
        found = nearest_neighbor(queries.t().contiguous().t(), gallery, backend=backend)
        assert not found.index.any()
        assert found.distance.isfinite().all()
