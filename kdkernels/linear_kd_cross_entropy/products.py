"""The products of a classifier, chunk of rows by chunk of rows: logits, and the gradients from
theirs.

With rho_n = scale / |x_n| and kappa_c = 1 / |w_c| (1 for a head that is not normalized) a logit is
rho_n kappa_c x_n . w_c, so norms are factors of rows and columns and no weight is ever copied
normalized. The gradient G of the logits becomes G' = G kappa, and

    dL/dx_n = B_n - (B_n . x_n) x_n / |x_n|^2        B = rho G' W
    dL/dw_c = A_c - (A_c . w_c) w_c / |w_c|^2        A = G'^T (rho x)

where the second terms, there in a normalized head alone, take out what would change the norms.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_PLAIN, LARGEST_PLAIN = 2.0**-40, 2.0**40  # as in eager.py
SMALLEST_CLASS = 2.0**-96  # norm of a class on a device that must not wait
COPIED_CLASSES = 2048  # of a weight that has to be copied: 4 MB at 512 features, so in the cache
# A part of logits that are formed as (W x^T)^T: half a megabyte, which a core's own cache holds,
# but of so many classes that a product pays.
TRANSPOSED_LOGITS, TRANSPOSED_CLASSES = 1 << 17, 512


def round_up(size: int, block: int) -> int:
    """The next multiple of `block`."""
    return (size + block - 1) // block * block


@dataclass(frozen=True)
class Arithmetic:
    """Arithmetic of a backend: the arguments of driver.run beside the call itself.

    block: products have whole blocks of so many rows, classes and features. On AMD's processors MKL
    then gives bitwise identical results at any number of threads (docs/ops.md, "Bits").
    transposes_logits: forms them as (W x^T)^T. scale: multiplies a matrix in place by a factor per
    row and one per column, each None for 1, or writes the result to another matrix."""

    block: int
    chunk_bytes: int
    least_rows: int
    empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    rows: Callable[..., None]
    scale: Callable[[Tensor, Tensor | None, Tensor | None, Tensor], None]
    multiplies_bf16: bool  # bfloat16 products on tensor cores, with float32 sums
    may_wait: bool  # whether a look at numbers costs no synchronization
    transposes_logits: bool


def float32_product(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """out (+)= left right, in float32 throughout."""
    if add:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def bf16_product(out: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """float32 out (+)= left right of bfloat16 factors."""
    if add:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def norms_of(x: Tensor) -> Tensor:
    """Float32 norms of the rows, taken of float32 numbers."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)


def powers_of(x: Tensor) -> Tensor:
    """(N, 1): a power of two near each row's largest component, 1 within 2^-40 to 2^40. Over it, a
    row has a norm whose square neither overflows nor underflows."""
    largest = x.abs().amax(dim=1, keepdim=True)
    is_plain = (largest >= SMALLEST_PLAIN) & (largest <= LARGEST_PLAIN)
    is_plain |= (largest == 0) | ~largest.isfinite()
    largest = largest.masked_fill(is_plain, 1.0)
    return largest / (2.0 * torch.frexp(largest).mantissa)


def without_extremes(x: Tensor, may_wait: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows for a normalized head, their norms, and (N, 1) powers of two that rows of extreme size
    were divided by, so that float32 holds their norms.

    Where a look at the norms costs no synchronization and finds no such row, the rows are returned
    as they are, with None for the powers.
    """
    norms = norms_of(x)
    if x.dtype == torch.float16 or x.numel() == 0:
        return x, norms, None
    if may_wait:
        low, high = torch.aminmax(norms)
        if float(low) >= SMALLEST_PLAIN and float(high) <= LARGEST_PLAIN:
            return x, norms, None
        is_odd = ~((norms >= SMALLEST_PLAIN) & (norms <= LARGEST_PLAIN))
        if not bool(x[is_odd].any()):  # they are zeros
            return x, norms, None
    powers = powers_of(x.float())
    x = (x / powers).to(x.dtype)
    return x, norms_of(x), powers


def unit(x: Tensor, may_wait: bool) -> tuple[Tensor, Tensor]:
    """Rows over their norms in float64, and which are zeros, (N,), which stay zero."""
    x, _, _ = without_extremes(x.float(), may_wait)
    x = x.double()
    norms = torch.linalg.vector_norm(x, dim=1)
    is_zero = norms == 0
    return x / norms.masked_fill(is_zero, 1.0)[:, None], is_zero


def class_norms(weight: Tensor) -> Tensor:
    """Norms of the classes without a look at them: squares are summed in float64. Classes of a norm
    below 2^-96 count as zeros, since their inverse would overflow what it is multiplied by."""
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    return torch.where(norms < SMALLEST_CLASS, 0.0, norms).to(torch.float32)


def inverse(norms: Tensor) -> Tensor:
    """1 / norm; 0 for a norm of 0, so that a row of zeros has logits and gradient 0."""
    return torch.where(norms == 0, 0.0, 1.0 / norms)


class Head:
    """A classifier's rows and weight in one of two forms: float32 with whole blocks, where rows
    carry rho already, or bfloat16 as given, where rho is a factor of the logits (`row_scale`)."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float | None,
        counts: Tensor | None,
        how: Arithmetic,
    ) -> None:
        """scale None: not normalized. counts (N,): rows that count; others are taken as zeros."""
        self.how, self.weight, self.scale = how, weight, scale or 1.0
        self.rows, self.features = features.shape
        self.classes = len(weight)
        self.is_bf16 = how.multiplies_bf16 and features.dtype == weight.dtype == torch.bfloat16
        self.product = bf16_product if self.is_bf16 else float32_product
        self.padded_features = round_up(self.features, how.block)
        self.padded_classes = round_up(self.classes, how.block)
        self.row_scale = self.column_scale = self.inverse_norms = None
        self.row_powers = self.class_powers = None
        self.bias = None
        if bias is not None:
            self.bias = torch.zeros(self.padded_classes, dtype=torch.float32, device=bias.device)
            self.bias[: self.classes] = bias

        x = features if counts is None else torch.where(counts[:, None], features, 0.0)
        rho = None
        if scale is not None:
            x, norms, self.row_powers = without_extremes(x, how.may_wait)
            self.inverse_norms = inverse(norms)
            rho = scale * self.inverse_norms
            if how.may_wait:
                self.weight, norms, self.class_powers = without_extremes(weight, True)
            else:
                norms = class_norms(weight)
            self.column_scale = inverse(norms)
        if self.is_bf16:
            self.x, self.row_scale = x, rho
            return
        shape = (round_up(self.rows, how.block), self.padded_features)
        self.x = torch.zeros(shape, dtype=torch.float32, device=x.device)
        inside = self.x[: self.rows, : self.features]
        inside.copy_(x)
        if rho is not None:
            inside.mul_(rho[:, None])

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """The weight as (first class, class behind the last, rows as products take them), without a
        copy where it already has whole blocks of their dtype."""
        first, padded = 0, self.padded_features
        # a broadcast or transposed weight would go another way through BLAS
        plain = self.weight.stride(1) == 1 and self.weight.stride(0) >= padded
        as_it_is = self.is_bf16 or self.weight.dtype == torch.float32
        if as_it_is and self.features == padded and (plain or self.how.block == 1):
            first = self.classes // self.how.block * self.how.block
            if first:
                yield 0, first, self.weight[:first]
        while first < self.classes:
            last = min(first + COPIED_CLASSES, self.classes)
            tile = self.how.empty((round_up(last - first, self.how.block), padded), torch.float32)
            tile[last - first :] = 0
            tile[:, self.features :] = 0
            tile[: last - first, : self.features] = self.weight[first:last]
            yield first, last, tile
            first = last

    def logits(self, begin: int, end: int, out: Tensor) -> None:
        """Logits of the rows from begin to end, into (at least end - begin, padded classes)."""
        x = self.x[begin : begin + len(out)]
        for first, _, tile in self.tiles():
            part = out[:, first : first + len(tile)]
            if self.how.transposes_logits:
                self._transposed_logits(part, tile, x)
            else:
                self.product(part, x, tile.t(), False)
        rho = None if self.row_scale is None else self.row_scale[begin:end]
        if rho is not None or self.column_scale is not None:
            inside = out[: end - begin, : self.classes]
            self.how.scale(inside, rho, self.column_scale, inside)
        if self.bias is not None:
            out[:, : self.padded_classes].add_(self.bias)

    def _transposed_logits(self, out: Tensor, tile: Tensor, x: Tensor) -> None:
        """out = (tile x^T)^T: a processor's BLAS multiplies many rows by a few that stay in its
        cache faster than it copies the many into the form that it wants of a right factor.
        """
        step = max(TRANSPOSED_LOGITS // max(len(x), 1), TRANSPOSED_CLASSES)
        step = round_up(min(step, len(tile)), self.how.block)
        transposed = self.how.empty((step, len(x)), torch.float32)
        for first in range(0, len(tile), step):
            part = transposed[: len(tile) - first]
            self.product(part, tile[first : first + step], x.t(), False)
            out[:, first : first + step].copy_(part.t())


@dataclass(frozen=True)
class LabelDirections:
    """Derivatives of the labels' cosines c by the unit vectors x of rows and w of classes.

    The exact slope of a margin is large at a small angle, where x - c w is small: as the difference
    of two products it would lose its digits.
    """

    label: Tensor  # (N,)
    of_rows: Tensor  # w - c x, (N, D)
    of_classes: Tensor  # x - c w, (N, D)


class Gradients:
    """The gradients of a head, summed over its chunks in float32."""

    def __init__(
        self,
        head: Head,
        want: tuple[bool, bool, bool],
        weights: Tensor | None,
        directions: LabelDirections | None,
    ) -> None:
        """want: of features, weight and bias. weights (N,): what each row's gradient is multiplied
        by, float32, or None. directions: for labels that do not go through the products."""
        self.head, self.want, self.weights, self.directions = head, want, weights, directions
        self.by_label = None
        if directions is not None:
            self.by_label = torch.empty(head.rows, dtype=torch.float32, device=head.x.device)
        empty = head.how.empty
        shapes = ((head.rows, head.features), (head.classes, head.features), (head.classes,))
        self.features, self.weight, self.bias = (
            empty(shape if wanted else (0,), torch.float32)
            for shape, wanted in zip(shapes, want, strict=True)
        )
        if want[2]:
            self.bias.zero_()
        if head.rows == 0 and want[1]:
            self.weight.zero_()

    def add(self, logits: Tensor, begin: int, end: int) -> None:
        """Takes the gradient of the logits of the rows from begin to end, which it may change."""
        head, rows = self.head, end - begin
        rho = None if head.row_scale is None else head.row_scale[begin:end]
        if self.weights is not None:
            rho = self.weights[begin:end] if rho is None else rho * self.weights[begin:end]
        inside = logits[:rows, : head.classes]
        if self.directions is not None and self.by_label is not None:
            label = self.directions.label[begin:end, None]
            self.by_label[begin:end] = inside.gather(1, label)[:, 0]
            inside.scatter_(1, label, 0.0)
        if self.want[2]:
            total = inside if self.weights is None else inside * self.weights[begin:end, None]
            self.bias.add_(total.sum(dim=0, dtype=torch.float32))
        changed = rho is not None or head.column_scale is not None
        if head.is_bf16 and logits.dtype != torch.bfloat16:
            logits = head.how.empty((rows, logits.shape[1]), torch.bfloat16)
            head.how.scale(inside, rho, head.column_scale, logits[:, : head.classes])
        elif changed:
            head.how.scale(inside, rho, head.column_scale, inside)
        logits = logits[:, : head.padded_classes]
        logits[rows:] = 0
        if self.want[0]:
            self._add_features(logits, begin, end)
        if self.want[1]:
            self._add_weight(logits, begin)

    def _add_features(self, logits: Tensor, begin: int, end: int) -> None:
        head = self.head
        total = head.how.empty((len(logits), head.padded_features), torch.float32)
        for first, _, tile in head.tiles():
            head.product(total, logits[:, first : first + len(tile)], tile, first > 0)
        self.features[begin:end] = total[: end - begin, : head.features]

    def _add_weight(self, logits: Tensor, begin: int) -> None:
        head = self.head
        x = head.x[begin : begin + len(logits)]
        whole = head.classes // head.how.block * head.how.block
        if head.features == head.padded_features and whole:
            head.product(self.weight[:whole], logits[:, :whole].t(), x, begin > 0)
        else:
            whole = 0
        for first in range(whole, head.classes, COPIED_CLASSES):
            last = min(first + COPIED_CLASSES, head.classes)
            padded = round_up(last - first, head.how.block)
            part = head.how.empty((padded, head.padded_features), torch.float32)
            head.product(part, logits[:, first : first + padded].t(), x, False)
            part = part[: last - first, : head.features]
            self.weight[first:last] = part if begin == 0 else self.weight[first:last] + part

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of features, weight and bias; (0,) where not wanted."""
        head = self.head
        if head.inverse_norms is not None and head.column_scale is not None:
            by_label = self.by_label
            if by_label is not None:
                by_label *= head.scale
                if self.weights is not None:
                    by_label *= self.weights
            if self.want[0]:
                self._finish_features(head.inverse_norms[:, None])
            if self.want[1]:
                for first in range(0, head.classes, COPIED_CLASSES):
                    part = slice(first, first + COPIED_CLASSES)
                    unit = head.weight[part] * head.column_scale[part, None]
                    _take_out(self.weight[part], unit)
                if self.directions is not None and by_label is not None:
                    label = self.directions.label
                    factor = by_label * head.column_scale[label]
                    _add_rows(self.weight, label, self.directions.of_classes * factor[:, None])
                if head.class_powers is not None:
                    self.weight.div_(head.class_powers)
        return self.features, self.weight, self.bias

    def _finish_features(self, inverse_norms: Tensor) -> None:
        head = self.head
        inside = head.x[: head.rows, : head.features]
        if head.row_scale is not None:
            unit = inside * inverse_norms
        else:  # rows hold scale x / |x| and the products lack it
            unit = inside / head.scale
            self.features.mul_(head.scale * inverse_norms)
        _take_out(self.features, unit)
        if self.directions is not None and self.by_label is not None:
            self.features.addcmul_(self.directions.of_rows, self.by_label[:, None] * inverse_norms)
        if head.row_powers is not None:
            self.features.div_(head.row_powers)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index[n]] += rows[n], in an order that is the same in every call."""
    if out.is_cuda:
        out.index_put_((index,), rows, accumulate=True)  # sorts the index
    else:
        out.index_add_(0, index, rows)  # row after row


def _take_out(gradient: Tensor, unit: Tensor) -> None:
    """Each row of `gradient` loses its share along the unit vector beside it."""
    along = (gradient * unit).sum(dim=1, keepdim=True)
    gradient.addcmul_(along, unit, value=-1.0)
