"""nearest_neighbor: schema and functional."""

import torch
from torch import Tensor

from kdkernels.backends import choose_backend
from kdkernels.checks import check_tensor, reject
from kdkernels.nearest_neighbor import eager, native
from kdkernels.nearest_neighbor.eager import Nearest
from kdkernels.registration import define, raw

NAME = "nearest_neighbor"


def _fake(queries, gallery):
    rows = queries.shape[0]
    return (
        torch.empty(rows, dtype=torch.float32, device=queries.device),
        torch.empty(rows, dtype=torch.int64, device=queries.device),
    )


define(
    NAME,
    "(Tensor queries, Tensor? gallery) -> (Tensor, Tensor)",
    _fake,
    native=native.nearest_neighbor,
    triton="kdkernels.nearest_neighbor.triton_kernel:nearest_neighbor",
)


def nearest_neighbor(
    queries: Tensor, gallery: Tensor | None = None, *, backend: str | None = None
) -> Nearest:
    """Squared distance and index of each query's nearest gallery row, without the N x M matrix.

        distance_i = min_j ||q_i - x_j||^2,   index_i = the lowest j that has it

    queries: (N, D), gallery: (M, D), D >= 1, float32, bfloat16 or float16, each its own dtype and
    strides (float64 runs on eager). gallery=None is leave-one-out: the nearest other query.

    Returns Nearest(distance, index): (N,) float32 and (N,) int64. Without queries both are empty.
    There is no gradient: inputs are detached.

    native and triton take matrix products for a lower bound on every distance (product_error.py
    and triton_kernel.error_of_scores derive it), and measure in difference form, in double, each
    row whose bound is not above a distance already found. So the result is that of measuring every
    row, near ties and points far from the origin included, and equal distances go to the lowest
    index. Only the time depends on the data: where most rows tie within the rounding of the
    products (native: D 6e-8 of the squared distance from the gallery's center) most are measured.
    eager measures every row in float32, where the squares of differences below 1e-23 are 0.

    native needs at most 64 MB beyond inputs and outputs. triton needs 16 bytes for a query, 8 for
    a gallery row and 36 for a query and split of the gallery (22 MB for 100,000 queries on an
    H200). It centers float32 but not two matrices of one 16-bit dtype, where the bound is D 5e-7
    of the squared distance from the origin; those are fast where rows start at 16-byte addresses.
    It copies matrices whose columns are not adjacent.

    A gallery row at distance NaN is never the nearest. A query for which every distance is NaN gets
    distance NaN and the lowest index that is not its own.

    Raises ValueError where shapes, dtypes, devices or the backend are wrong, for an empty gallery,
    for rows without columns, and for a leave-one-out of fewer than 2 rows.
    """
    check_tensor(NAME, "queries", queries, dims=2)
    if queries.shape[1] == 0:
        raise reject(NAME, f"queries must have a column, got shape {tuple(queries.shape)}")
    if gallery is None:
        if queries.shape[0] < 2:
            raise reject(
                NAME,
                f"queries must have at least 2 rows where gallery is None (leave-one-out), "
                f"got {queries.shape[0]}",
            )
    else:
        check_tensor(NAME, "gallery", gallery, dims=2)
        if gallery.shape[0] == 0 or gallery.shape[1] != queries.shape[1]:
            raise reject(
                NAME,
                f"gallery must have at least one row and queries' {queries.shape[1]} columns, "
                f"got shape {tuple(gallery.shape)}",
            )
        if gallery.device != queries.device:
            raise reject(
                NAME, f"gallery must be on {queries.device} like queries, got {gallery.device}"
            )
        gallery = gallery.detach()
    queries = queries.detach()
    tensors = [queries] if gallery is None else [queries, gallery]
    backend = choose_backend(NAME, backend, tensors)
    if backend == "eager":
        return eager.nearest_neighbor(queries, gallery)
    return Nearest(*raw(NAME, backend)(queries, gallery))
