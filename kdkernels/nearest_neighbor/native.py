"""The C++ kernels of nearest_neighbor (csrc/nearest_neighbor.inc) and the loops over tiles."""

import torch
from torch import Tensor

from kdkernels.native import extension, matrix
from kdkernels.product_error import error_of_products

# One tile: (TILE_QUERIES, TILE_GALLERY) products from (.., TILE_COLUMNS) factors, 32 MB at most.
TILE_QUERIES = 1024
TILE_GALLERY = 2048
TILE_COLUMNS = 2048
BLOCK_QUERIES = 1 << 18  # queries with their state, 20 bytes each, at a time


def nearest_neighbor(queries: Tensor, gallery: Tensor | None) -> tuple[Tensor, Tensor]:
    """The raw op: its schema is in op.py."""
    distance = torch.empty(queries.shape[0], dtype=torch.float32)
    index = torch.empty(queries.shape[0], dtype=torch.int64)
    search = _Search(queries, gallery)
    for first in range(0, queries.shape[0], BLOCK_QUERIES):
        search.block(first, min(BLOCK_QUERIES, queries.shape[0] - first), distance, index)
    return distance, index


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
        self.center = torch.empty(self.columns, dtype=torch.float32)
        self.gallery_norms = torch.empty(self.tile_gallery, dtype=torch.float32)
        self.products = torch.empty(self.tile_queries * self.tile_gallery, dtype=torch.float32)
        self.query_factor = torch.empty(self.tile_queries * self.tile_columns, dtype=torch.float32)
        self.gallery_factor = torch.empty(
            self.tile_gallery * self.tile_columns, dtype=torch.float32
        )
        everything = self.rows(self.gallery, 0, len(self.gallery))
        extension.nearest_center(
            {"gallery": everything, "center": self.center.data_ptr(), "threads": self.threads}
        )

    def rows(self, of: Tensor, first: int, count: int) -> tuple:
        """Some rows of a matrix as csrc's RowRange."""
        return (matrix(of), first, count, self.columns)

    def norms(self, rows: tuple, out: Tensor) -> None:
        extension.nearest_norms(
            {
                "rows": rows,
                "center": self.center.data_ptr(),
                "norms": out.data_ptr(),
                "threads": self.threads,
            }
        )

    def factor(self, rows: tuple, column: int, norms: Tensor, scale: float, out: Tensor) -> Tensor:
        """Columns from `column` on of centered rows times `scale`, in the buffer `out`."""
        width = min(self.tile_columns, self.columns - column)
        extension.nearest_stage(
            {
                "rows": rows,
                "column": column,
                "width": width,
                "center": self.center.data_ptr(),
                "norms": norms.data_ptr(),
                "factor": scale,
                "out": out.data_ptr(),
                "threads": self.threads,
            }
        )
        return out[: rows[2] * width].view(rows[2], width)

    def block(self, start: int, count: int, distance: Tensor, index: Tensor) -> None:
        """Searches the whole gallery for queries [start, start + count)."""
        nearest = torch.empty(count, 2, dtype=torch.int64)  # csrc's Nearest, 16 bytes each
        query_norms = torch.empty(count, dtype=torch.float32)
        self.norms(self.rows(self.queries, start, count), query_norms)
        extension.nearest_begin({"nearest": nearest.data_ptr(), "rows": count})
        relative, absolute = error_of_products(self.columns, "cpu")
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
                extension.nearest_scan(
                    {
                        "queries": queries,
                        "gallery": gallery,
                        "products": products.data_ptr(),
                        "query_norms": norms.data_ptr(),
                        "gallery_norms": self.gallery_norms.data_ptr(),
                        "relative_error": relative,
                        "absolute_error": absolute,
                        "leave_one_out": self.leave_one_out,
                        "nearest": nearest[at:].data_ptr(),
                        "threads": self.threads,
                    }
                )
        extension.nearest_finish(
            {
                "nearest": nearest.data_ptr(),
                "first": start,
                "rows": count,
                "leave_one_out": self.leave_one_out,
                "distance": distance[start:].data_ptr(),
                "index": index[start:].data_ptr(),
            }
        )
