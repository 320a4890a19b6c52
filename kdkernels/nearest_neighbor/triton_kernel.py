"""nearest_neighbor in Triton: the launcher, its shapes and the error bound; docs/ops.md."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kdkernels import triton_common as common
from kdkernels.nearest_neighbor import triton_measure, triton_scan

SAMPLE_ROWS = 256  # of the gallery: enough to take the distance to the origin away
COLUMNS = 64  # at a time, as double
NORM_ROWS = 16  # of a program of norms; divides Tiles.gallery
RESCAN_ROWS = 16  # gallery rows measured at a time
REGISTERS = 128  # unless named, ptxas spills a few to fit more warps
WAVES = 32  # programs a multiprocessor gets: the last, partly filled round is 3 % of the time
SPLITS = 256  # at most
TILES_PER_SPLIT = 4  # at least


class Tiles(NamedTuple):
    """A program of scan: queries x gallery rows, `columns` of both at a time; one of resolve."""

    queries: int
    gallery: int
    columns: int
    warps: int
    stages: int
    resolved: int  # queries


def architecture_of(device: torch.device) -> str:
    """The first digit of the compute capability, "hip" or "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    return "hip" if torch.version.hip else str(torch.cuda.get_device_capability(device)[0])


def tiles(architecture: str, descriptors: bool, centered: bool) -> Tiles:
    """The shapes for 16-bit operands through the copy engine, for centered ones, for other ones.

    Counted, not measured. 128 x 256 makes the L2 cache deliver 47 bytes a clock to a Hopper
    multiprocessor at full speed (128 x 128: 64) and leaves no register spilled; pointers and three
    TF32 products take more registers: their tiles are the largest of which no variant spills.
    """
    if architecture == "interpreter":
        return Tiles(32, 32, 16, 4, 1, 64)
    if descriptors:
        return Tiles(128, 256, 64, 8, 4, 1)
    gallery = 128 if architecture in ("8", "hip") and not centered else 64
    columns = 16 if architecture == "8" and centered else 32
    return Tiles(128, gallery, columns, 8, 2 if architecture == "hip" else 3, 1)


def splits_of(query_tiles: int, gallery_tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many parts the gallery is cut, and the tiles of a part."""
    wanted = triton.cdiv(WAVES * multiprocessors, query_tiles)
    wanted = max(1, min(wanted, gallery_tiles // TILES_PER_SPLIT, SPLITS))
    per_split = triton.cdiv(gallery_tiles, wanted)
    return triton.cdiv(gallery_tiles, per_split), per_split


def error_of_scores(columns: int) -> tuple[float, float]:
    """e and f: ||q||^2 + ||x||^2 - 2 q.x from scan is off by e (||q||^2 + ||x||^2) + f at most.

    Tensor cores cut where a float32 sum would round, each of the terms that they add at a time (4
    or more) and their sum: at most 1.5 D units of 2^-23 of the largest partial sum (Fasi et al.,
    "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021). Partial sums start at ||x||^2 / 2
    and so stay below ||q||^2 + ||x||^2; 2 q.x is off by 6 D 2^-24 of that. 8 D leaves room for
    other hardware; 256 covers the rounding of the centered numbers, of the norms and of three TF32
    products for one of float32. f covers what is flushed to zero.
    """
    return (8 * columns + 256) * 2.0**-24, columns * 1e-36


def _with_adjacent_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


def _takes_descriptor(t: Tensor) -> bool:
    """Whether the copy engine can read the matrix: 16-byte base and pitch, rows apart."""
    pitch = t.stride(0)
    aligned = t.data_ptr() % 16 == 0 and pitch * t.element_size() % 16 == 0
    return aligned and pitch >= t.shape[1] and t.stride(1) == 1


def nearest_neighbor(queries: Tensor, gallery: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared distance (N,) float32 and index (N,) int64; arguments as checked by op.

    A matrix whose columns are not adjacent is copied. Memory beyond inputs and outputs: 16 bytes
    for a query, 8 for a gallery row, 36 for a query and split (splits_of).
    """
    leave_one_out = gallery is None
    queries = _with_adjacent_columns(queries)
    gallery = queries if gallery is None else _with_adjacent_columns(gallery)
    device = queries.device
    count, columns = queries.shape
    gallery_count = gallery.shape[0]
    distance = torch.empty(count, dtype=torch.float32, device=device)
    index = torch.empty(count, dtype=torch.int64, device=device)
    if count == 0:
        return distance, index

    # 16-bit operands are not centered: their difference from a center does not fit 16 bits
    centered = queries.dtype != gallery.dtype or queries.dtype == torch.float32
    architecture = architecture_of(device)
    descriptors = (
        not centered
        and architecture in ("9", "10")  # of those with a copy engine, these have memory for it
        and _takes_descriptor(queries)
        and _takes_descriptor(gallery)
    )
    tile = tiles(architecture, descriptors, centered)
    query_tiles = triton.cdiv(count, tile.queries)
    gallery_tiles = triton.cdiv(gallery_count, tile.gallery)
    processors = common.multiprocessors(device)
    splits, per_split = splits_of(query_tiles, gallery_tiles, processors)
    padded = (gallery_tiles + 2) * tile.gallery
    error, absolute = error_of_scores(columns)
    keep = 1.0 - error

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    center, norms, halves = empty(columns), empty(count), empty(padded)
    scores, rests = empty(count, splits, 2), empty(count, splits)
    places = empty(count, splits, 2, dtype=torch.int32)
    counters = torch.zeros(2, dtype=torch.int32, device=device)
    unsafe = empty(gallery_count, dtype=torch.int32)
    ambiguous = empty(count, dtype=torch.int32)
    best = empty(count, dtype=torch.float64)
    part_distance = empty(count, splits, dtype=torch.float64)
    part_index = empty(count, splits, dtype=torch.int64)
    operands = (queries, gallery)
    if descriptors:
        operands = (
            TensorDescriptor.from_tensor(queries, [tile.queries, tile.columns]),
            TensorDescriptor.from_tensor(gallery, [tile.gallery, tile.columns]),
        )
    limits = {} if architecture == "hip" else {"maxnreg": REGISTERS}
    strides = (queries.stride(0), gallery.stride(0))
    found = (counters, ambiguous, best, distance, index)

    with common.on(queries, "nearest_neighbor"):
        if centered:
            step = triton.cdiv(gallery_count, SAMPLE_ROWS)
            common.launch(
                triton_scan.center,
                (triton.cdiv(columns, 64),),
                *(gallery, center, strides[1], gallery_count, step, columns),
                ROWS=16,
                BLOCK=64,
            )
        for matrix, is_queries, is_gallery in (
            (gallery, leave_one_out, True),
            (queries, True, False),
        )[: 1 if leave_one_out else 2]:
            common.launch(
                triton_scan.norms,
                (triton.cdiv(padded if is_gallery else count, NORM_ROWS),),
                *(matrix, center, norms, halves, unsafe, counters),
                *(matrix.stride(0), matrix.shape[0], columns, keep),
                CENTERED=centered,
                QUERIES=is_queries,
                GALLERY=is_gallery,
                ROWS=NORM_ROWS,
                BLOCK=COLUMNS,
                **limits,
            )
        common.launch(
            triton_scan.scan,
            (query_tiles, splits),
            *(*operands, center, halves, scores, places, rests, *strides),
            *(count, gallery_count, columns, splits, per_split),
            LEAVE_ONE_OUT=leave_one_out,
            DESCRIPTORS=descriptors,
            CENTERED=centered,
            EVEN=columns % tile.columns == 0,
            INTERPRETED=architecture == "interpreter",
            PRECISION="ieee" if architecture == "hip" else "tf32x3",
            TILE_Q=tile.queries,
            TILE_X=tile.gallery,
            BLOCK=tile.columns,
            STAGES=tile.stages,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        common.launch(
            triton_measure.resolve,
            (triton.cdiv(count, tile.resolved),),
            *(queries, gallery, norms, scores, places, rests, unsafe, *found, *strides),
            *(count, gallery_count, columns, splits, keep, absolute),
            LEAVE_ONE_OUT=leave_one_out,
            QUERIES=tile.resolved,
            TILE_X=tile.gallery,
            SLOTS=2 * SPLITS,
            BLOCK=COLUMNS,
            **limits,
        )
        common.launch(
            triton_measure.rescan,
            (min(count * splits, 8 * processors),),
            *(queries, gallery, norms, rests, *found, part_distance, part_index, *strides),
            *(gallery_count, columns, splits, per_split * tile.gallery, keep, absolute),
            LEAVE_ONE_OUT=leave_one_out,
            ROWS=RESCAN_ROWS,
            BLOCK=COLUMNS,
            **limits,
        )
        common.launch(
            triton_measure.merge,
            (min(count, 8 * processors),),
            *(counters, ambiguous, part_distance, part_index, distance, index, splits),
            LEAVE_ONE_OUT=leave_one_out,
            SLOTS=SPLITS,
        )
    return distance, index
