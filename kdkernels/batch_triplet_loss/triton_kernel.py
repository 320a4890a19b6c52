"""batch_triplet_loss in Triton: the steps of forward and backward.

Sort by identity and center, then mine. "hard" mines by a Gram matrix up to TILED_ROWS rows and by
tiles above; "semihard" and "all" mine lines of the Gram matrix, CHUNK_ELEMENTS at a time, so
nothing is ever N x N where N is large. What the gradient needs of "hard" are two partners and two
slopes per anchor; of the others a chunk's coefficients W, which backward computes again for
reduction "none".
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.batch_triplet_loss.triton_gradient import add_up, gather_hard, narrow, spread
from kdkernels.batch_triplet_loss.triton_mining import mine
from kdkernels.batch_triplet_loss.triton_sort import Batch, arrange
from kdkernels.batch_triplet_loss.triton_tiled_mining import mine_hard_tiled

# "hard" by tiles above: there the float32 product alone takes longer. Counted, not measured.
TILED_ROWS = 2048
CHUNK_ELEMENTS = 4096 * 4096  # of the two matrices that the other minings hold: 64 MB each


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """Begin and size of each chunk of anchors."""
    size = count if count * count <= CHUNK_ELEMENTS else max(1, CHUNK_ELEMENTS // count)
    return ((begin, min(size, count - begin)) for begin in range(0, count, size))


def _mine_hard(
    embeddings: Tensor, labels: Tensor, margin: float, squared: bool, *results: Tensor | None
) -> Tensor:
    """Fills losses, totals, partners and slopes; returns the embeddings as kernels read them."""
    if len(embeddings) > TILED_ROWS:
        return mine_hard_tiled(embeddings, labels, margin, squared, *results)
    batch = arrange(embeddings, labels)
    gram = torch.mm(batch.centered, batch.centered.t())
    mine(batch, gram, None, 0, "hard", margin, squared, *results)
    return batch.x


def _mine_chunks(
    batch: Batch,
    margin: float,
    mining: str,
    squared: bool,
    losses: Tensor,
    totals: Tensor,
    weights: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Fills losses and totals, and the gradient by place where there is one."""
    count = len(batch.x)
    gram = coefficients = _floats(batch.x, 0)
    if gradient is not None:
        gradient.zero_()
    for begin, size in _chunks(count):
        if begin == 0:
            gram = _floats(batch.x, size, count)
            coefficients = torch.empty_like(gram)
        gram, coefficients = gram[:size], coefficients[:size]
        torch.mm(batch.centered[begin : begin + size], batch.centered.t(), out=gram)
        if gradient is None:
            mine(batch, gram, None, begin, mining, margin, squared, losses, totals)
            continue
        if mining == "semihard":
            coefficients.zero_()
        mine(batch, gram, coefficients, begin, mining, margin, squared, losses, totals)
        spread(batch, gram, coefficients, begin, weights, gradient)


def batch_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    reduction: str,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient, partners, slopes and post_scale as batch_op declares them. Embeddings whose
    columns are not side by side are copied."""
    count, is_none, is_hard = len(embeddings), reduction == "none", mining == "hard"
    forms_now = want_gradient and not is_none
    gradient = torch.empty((0,), dtype=embeddings.dtype, device=embeddings.device)
    partners = slopes = None
    if want_gradient and is_hard:
        partners = torch.empty((2, count), dtype=torch.int32, device=embeddings.device)
        slopes = _floats(embeddings, 2, count)
    losses = _floats(embeddings, count)
    if count == 0:
        loss, scale = (
            losses if is_none else _floats(embeddings).zero_(),
            _floats(embeddings).fill_(1),
        )
        gradient = torch.empty_like(embeddings) if forms_now else gradient
        return loss, gradient, *_kept(embeddings, is_none, partners, slopes), scale
    totals = torch.empty((3, count), dtype=torch.float64, device=embeddings.device)
    # Autocast would run the products in 16 bits.
    with (
        common.on(embeddings, "batch_triplet_loss"),
        torch.autocast(embeddings.device.type, enabled=False),
    ):
        if is_hard:
            x = _mine_hard(embeddings, labels, margin, squared, losses, totals, partners, slopes)
            loss, factor, scale = add_up(totals, reduction)
            if forms_now:
                assert partners is not None
                assert slopes is not None
                gradient = gather_hard(x, partners, slopes, factor, scale)
        else:
            batch = arrange(embeddings, labels)
            sums = _floats(embeddings, *embeddings.shape) if forms_now else None
            _mine_chunks(batch, margin, mining, squared, losses, totals, None, sums)
            loss, factor, scale = add_up(totals, reduction)
            if sums is not None:
                gradient = narrow(sums, embeddings.dtype, batch.order, factor, scale)
    loss = losses if is_none else loss
    return loss, gradient, *_kept(embeddings, is_none, partners, slopes), scale


def _kept(
    like: Tensor, is_none: bool, partners: Tensor | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Partners and slopes where backward needs them, else empty."""
    if is_none and partners is not None and slopes is not None:
        return partners, slopes
    return torch.empty((0,), dtype=torch.int32, device=like.device), _floats(like, 0)


def batch_triplet_gradient(
    embeddings: Tensor,
    labels: Tensor,
    partners: Tensor,
    slopes: Tensor,
    margin: float,
    mining: str,
    squared: bool,
    incoming: Tensor,
) -> Tensor:
    """The gradient of reduction "none" for the incoming one (N,)."""
    if len(embeddings) == 0:
        return torch.empty_like(embeddings, memory_format=torch.contiguous_format)
    with (
        common.on(embeddings, "batch_triplet_loss"),
        torch.autocast(embeddings.device.type, enabled=False),
    ):
        if mining == "hard":
            x = embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()
            return gather_hard(x, partners, slopes, incoming, None)
        batch = arrange(embeddings, labels)
        losses = _floats(embeddings, len(embeddings))
        totals = torch.empty((3, len(embeddings)), dtype=torch.float64, device=embeddings.device)
        sums = _floats(embeddings, *embeddings.shape)
        _mine_chunks(batch, margin, mining, squared, losses, totals, incoming, sums)
        return narrow(sums, embeddings.dtype, batch.order, None, None)
