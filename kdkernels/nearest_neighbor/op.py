"""nearest_neighbor: schema, tiled CPU implementation, functional."""

import torch
from torch import Tensor

from kdkernels import library as lib
from kdkernels.nearest_neighbor import eager
from kdkernels.nearest_neighbor.eager import Nearest

NAME = "nearest_neighbor"

# One tile: (TILE_QUERIES, TILE_GALLERY) products from (.., TILE_COLUMNS) factors, 32 MB at most.
TILE_QUERIES = 1024
TILE_GALLERY = 2048
TILE_COLUMNS = 2048
BLOCK_QUERIES = 1 << 18  # queries with their state, 20 bytes each, at a time


def _fake(queries, gallery):
    rows = queries.shape[0]
    return (
        torch.empty(rows, dtype=torch.float32, device=queries.device),
        torch.empty(rows, dtype=torch.int64, device=queries.device),
    )


def _cpu(queries: Tensor, gallery: Tensor | None) -> tuple[Tensor, Tensor]:
    distance = torch.empty(queries.shape[0], dtype=torch.float32)
    index = torch.empty(queries.shape[0], dtype=torch.int64)
    search = _Search(queries, gallery)
    for first in range(0, queries.shape[0], BLOCK_QUERIES):
        search.block(first, min(BLOCK_QUERIES, queries.shape[0] - first), distance, index)
    return distance, index


lib.define(
    NAME,
    "(Tensor queries, Tensor? gallery) -> (Tensor, Tensor)",
    _fake,
    native=_cpu,
    triton="kdkernels.nearest_neighbor.triton_kernel:nearest_neighbor",
)


class _Search:
    """The buffers of one call, and the loops over tiles."""

    def __init__(self, queries: Tensor, gallery: Tensor | None) -> None:
        self.leave_one_out = gallery is None
        self.queries = queries
        self.gallery = queries if gallery is None else gallery
        self.columns = queries.shape[1]
        self.threads = torch.get_num_threads()
        self.tile_queries = min(TILE_QUERIES, len(queries))
        self.tile_gallery = min(TILE_GALLERY, len(self.gallery))
        self.tile_columns = min(TILE_COLUMNS, self.columns)
        self.centre = torch.empty(self.columns, dtype=torch.float32)
        self.gallery_norms = torch.empty(self.tile_gallery, dtype=torch.float32)
        self.products = torch.empty(self.tile_queries * self.tile_gallery, dtype=torch.float32)
        self.query_factor = torch.empty(self.tile_queries * self.tile_columns, dtype=torch.float32)
        self.gallery_factor = torch.empty(
            self.tile_gallery * self.tile_columns, dtype=torch.float32
        )
        everything = self.rows(self.gallery, 0, len(self.gallery))
        assert lib.native is not None
        self.native = lib.native
        self.native.nearest_centre(everything, self.centre.data_ptr(), self.threads)

    def rows(self, of: Tensor, first: int, count: int) -> tuple:
        """Some rows of a matrix as csrc's RowRange."""
        return (lib.matrix(of), first, count, self.columns)

    def norms(self, rows: tuple, out: Tensor) -> None:
        self.native.nearest_norms(rows, self.centre.data_ptr(), out.data_ptr(), self.threads)

    def factor(self, rows: tuple, column: int, norms: Tensor, scale: float, out: Tensor) -> Tensor:
        """Columns from `column` on of centred rows times `scale`, in the buffer `out`."""
        width = min(self.tile_columns, self.columns - column)
        self.native.nearest_stage(
            rows,
            column,
            width,
            self.centre.data_ptr(),
            norms.data_ptr(),
            scale,
            out.data_ptr(),
            self.threads,
        )
        return out[: rows[2] * width].view(rows[2], width)

    def block(self, start: int, count: int, distance: Tensor, index: Tensor) -> None:
        """Searches the whole gallery for queries [start, start + count)."""
        nearest = torch.empty(count, 2, dtype=torch.int64)  # csrc's Nearest, 16 bytes each
        query_norms = torch.empty(count, dtype=torch.float32)
        self.norms(self.rows(self.queries, start, count), query_norms)
        self.native.nearest_begin(nearest.data_ptr(), count)
        relative, absolute = error_of_products(self.columns)
        one_pass = self.columns <= self.tile_columns
        for first in range(0, len(self.gallery), self.tile_gallery):
            size = min(self.tile_gallery, len(self.gallery) - first)
            gallery = self.rows(self.gallery, first, size)
            self.norms(gallery, self.gallery_norms)
            x = None
            for at in range(0, count, self.tile_queries):
                some = min(self.tile_queries, count - at)
                queries = self.rows(self.queries, start + at, some)
                products = self.products[: some * size].view(some, size)
                norms = query_norms[at:]
                for column in range(0, self.columns, self.tile_columns):
                    if x is None or not one_pass:
                        x = self.factor(
                            gallery, column, self.gallery_norms, -2.0, self.gallery_factor
                        )
                    q = self.factor(queries, column, norms, 1.0, self.query_factor)
                    if column == 0:
                        torch.mm(q, x.t(), out=products)
                    else:
                        products.addmm_(q, x.t())
                self.native.nearest_scan(
                    queries,
                    gallery,
                    products.data_ptr(),
                    norms.data_ptr(),
                    self.gallery_norms.data_ptr(),
                    relative,
                    absolute,
                    self.leave_one_out,
                    nearest[at:].data_ptr(),
                    self.threads,
                )
        self.native.nearest_finish(
            nearest.data_ptr(),
            start,
            count,
            self.leave_one_out,
            distance[start:].data_ptr(),
            index[start:].data_ptr(),
        )


def error_of_products(columns: int) -> tuple[float, float]:
    """e and f: ||q||^2 + ||x||^2 - 2 q.x in float32 is off by e (||q||^2 + ||x||^2) + f at most.

    A dot product of D terms in any order is off by D u |q| |x| (u = 2^-24, Higham, "Accuracy and
    Stability of Numerical Algorithms", 3.1), and 2 |q| |x| <= ||q||^2 + ||x||^2. 40 u covers the
    rounding of the centred numbers, of the norms and of the sums; f what is flushed to zero. Where
    torch may round the factors of a product to bfloat16 or TF32, each is off by 2^-8 at most.
    """
    relative = (columns + 40) * 2.0**-24
    if not products_are_float32():
        relative += 2.0**-6  # 2 factors, and room
    return relative, columns * 1e-36


def products_are_float32() -> bool:
    """Whether torch's settings keep float32 matrix products on the CPU in float32."""
    mkldnn = torch.backends.mkldnn
    # "none" leaves it to the next; torch.set_float32_matmul_precision sets the first
    for setting in (getattr(mkldnn, "matmul", None), mkldnn, torch.backends):
        precision = getattr(setting, "fp32_precision", "none")
        if precision != "none":
            return precision == "ieee"
    return True


def nearest_neighbor(
    queries: Tensor, gallery: Tensor | None = None, *, backend: str | None = None
) -> Nearest:
    """Squared distance and index of each query's nearest gallery row, without the N x M matrix.

        distance_i = min_j ||q_i - x_j||^2,   index_i = the lowest j that has it

    queries: (N, D), gallery: (M, D), D >= 1, float32, bfloat16 or float16, each its own dtype and
    strides (float64 runs on eager). gallery=None is leave-one-out: the nearest other query.

    Returns Nearest(distance, index): (N,) float32 and (N,) int64. Without queries both are empty.
    There is no gradient: inputs are detached.

    native and triton take matrix products for a lower bound on every distance (error_of_products
    and triton_kernel.error_of_scores derive it), and measure in difference form, in double, each
    row whose bound is not above a distance already found. So the result is that of measuring every
    row, near ties and points far from the origin included, and equal distances go to the lowest
    index. Only the time depends on the data: where most rows tie within the rounding of the
    products (native: D 6e-8 of the squared distance from the gallery's centre) most are measured.
    eager measures every row in float32.

    native needs at most 64 MB beyond inputs and outputs. triton needs 16 bytes for a query, 8 for
    a gallery row and 36 for a query and split of the gallery (22 MB for 100,000 queries on an
    H200). It centres float32 but not two matrices of one 16-bit dtype, where the bound is D 5e-7
    of the squared distance from the origin; those are fast where rows start at 16-byte addresses.
    It copies matrices whose columns are not adjacent.

    A gallery row at distance NaN is nobody's nearest. A query for which every distance is NaN gets
    distance NaN and the lowest index that is not its own.

    Raises ValueError where shapes, dtypes, devices or the backend are wrong, for an empty gallery,
    for rows without columns, and for a leave-one-out of fewer than 2 rows.
    """
    lib.check_tensor(NAME, "queries", queries, dims=2)
    if queries.shape[1] == 0:
        raise lib.reject(NAME, f"queries must have a column, got shape {tuple(queries.shape)}")
    if gallery is None:
        if queries.shape[0] < 2:
            raise lib.reject(
                NAME,
                f"queries must have at least 2 rows where gallery is None (leave-one-out), "
                f"got {queries.shape[0]}",
            )
    else:
        lib.check_tensor(NAME, "gallery", gallery, dims=2)
        if gallery.shape[0] == 0 or gallery.shape[1] != queries.shape[1]:
            raise lib.reject(
                NAME,
                f"gallery must have at least one row and queries' {queries.shape[1]} columns, "
                f"got shape {tuple(gallery.shape)}",
            )
        if gallery.device != queries.device:
            raise lib.reject(
                NAME, f"gallery must be on {queries.device} like queries, got {gallery.device}"
            )
        gallery = gallery.detach()
    queries = queries.detach()
    tensors = [queries] if gallery is None else [queries, gallery]
    backend = lib.choose_backend(NAME, backend, tensors)
    if backend == "eager":
        return eager.nearest_neighbor(queries, gallery)
    return Nearest(*lib.raw(NAME, backend)(queries, gallery))
