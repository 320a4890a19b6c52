"""Device code of triplet_loss: a few rows, their losses and their gradients."""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _differences(
    anchor_ptr, positive_ptr, negative_ptr, at_anchor, at_positive, at_negative, mask, eps
):
    # masked lanes are 0, with eps as well
    anchor = tl.load(anchor_ptr + at_anchor, mask=mask, other=0.0).to(tl.float32)
    positive = tl.load(positive_ptr + at_positive, mask=mask, other=0.0).to(tl.float32)
    negative = tl.load(negative_ptr + at_negative, mask=mask, other=0.0).to(tl.float32)
    to_positive = tl.where(mask, anchor - positive + eps, 0.0)
    to_negative = tl.where(mask, anchor - negative + eps, 0.0)
    return to_positive, to_negative


@triton.jit
def is_half(gradient_ptr):
    """Whether a gradient is wanted and stored in float16."""
    return gradient_ptr is not None and gradient_ptr.dtype.element_ty == tl.float16


@triton.jit
def _store(gradient_ptr, at, mask, value, power, largest, MEASURE: tl.constexpr):
    # The gradient of one member, in float16 times its power; returns the largest finite size.
    if gradient_ptr is not None:
        if gradient_ptr.dtype.element_ty == tl.float16:
            if MEASURE:  # what is infinite stays so at any power
                size = tl.abs(value)
                finite = size < INF
                largest = tl.maximum(largest, tl.max(tl.where(finite, size, 0.0), axis=1))
                # finite until it is formed again; infinite or NaN stays so
                clamped = tl.clamp(value * power, -LARGEST_HALF, LARGEST_HALF)
                value = tl.where(finite, clamped, value)
            else:
                value *= power
        tl.store(gradient_ptr + at, value.to(gradient_ptr.dtype.element_ty), mask=mask)
    return largest


@triton.jit
def _store_gradients(
    grad_anchor_ptr,
    grad_positive_ptr,
    grad_negative_ptr,
    at,
    mask,
    near,
    far,
    powers,
    largest,
    MEASURE: tl.constexpr,
):
    return (
        _store(grad_anchor_ptr, at, mask, near - far, powers[0], largest[0], MEASURE),
        _store(grad_positive_ptr, at, mask, -near, powers[1], largest[1], MEASURE),
        _store(grad_negative_ptr, at, mask, far, powers[2], largest[2], MEASURE),
    )


@triton.jit
def _factor(distance, scale, SQUARED: tl.constexpr):
    # what a - p or a - n is multiplied by; the gradient of a root at 0 is 0
    if SQUARED:
        return tl.zeros_like(distance) + 2.0 * scale
    else:
        at_zero = distance == 0.0
        return tl.where(at_zero, 0.0, tl.div_rn(scale, tl.where(at_zero, 1.0, distance)))


@triton.jit
def _at_row(matrix_ptr, row, stride, UNIT: tl.constexpr):
    if matrix_ptr is not None:
        matrix_ptr += row * stride * UNIT
        if UNIT > 1:  # the launcher has checked that every row starts on 16 bytes
            matrix_ptr = tl.multiple_of(matrix_ptr, 16)
    return matrix_ptr


@triton.jit
def triplets(
    anchor_ptr,
    positive_ptr,
    negative_ptr,
    grad_anchor_ptr,
    grad_positive_ptr,
    grad_negative_ptr,
    stride_anchor,  # strides and `features` count units of UNIT elements
    stride_positive,
    stride_negative,
    first,  # row
    count,
    features,
    margin,
    eps,
    active_at_zero,
    scale,
    powers,  # of two, that float16 gradients of anchor, positive and negative are stored times
    SQUARED: tl.constexpr,
    GRADIENT: tl.constexpr,
    MEASURE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows' losses, and the largest sizes of their three gradients before `powers`; the
    gradients are stored."""
    limit = features * UNIT
    row = tl.arange(0, ROWS)
    exists = first + row < count
    row = row.to(tl.int64)[:, None]
    first = first.to(tl.int64)
    anchor_ptr = _at_row(anchor_ptr, first, stride_anchor, UNIT)
    positive_ptr = _at_row(positive_ptr, first, stride_positive, UNIT)
    negative_ptr = _at_row(negative_ptr, first, stride_negative, UNIT)
    grad_anchor_ptr = _at_row(grad_anchor_ptr, first, features, UNIT)
    grad_positive_ptr = _at_row(grad_positive_ptr, first, features, UNIT)
    grad_negative_ptr = _at_row(grad_negative_ptr, first, features, UNIT)
    at_anchor = row * stride_anchor * UNIT
    at_positive = row * stride_positive * UNIT
    at_negative = row * stride_negative * UNIT
    at_gradient = row * features * UNIT
    cols = tl.arange(0, BLOCK_D)[None, :]

    if ONE_TILE:
        mask = exists[:, None] & (cols < limit)
        to_positive, to_negative = _differences(
            anchor_ptr,
            positive_ptr,
            negative_ptr,
            at_anchor + cols,
            at_positive + cols,
            at_negative + cols,
            mask,
            eps,
        )
        near_acc, far_acc = to_positive * to_positive, to_negative * to_negative
    else:
        near_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        far_acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for start in range(0, limit, BLOCK_D):
            col = start + cols
            to_positive, to_negative = _differences(
                anchor_ptr,
                positive_ptr,
                negative_ptr,
                at_anchor + col,
                at_positive + col,
                at_negative + col,
                exists[:, None] & (col < limit),
                eps,
            )
            near_acc += to_positive * to_positive
            far_acc += to_negative * to_negative
    positive, negative = tl.sum(near_acc, axis=1), tl.sum(far_acc, axis=1)
    if not SQUARED:
        positive, negative = tl.sqrt_rn(positive), tl.sqrt_rn(negative)
    hinge = positive - negative + margin
    # a NaN is active: it has to come out
    active = exists & ~((hinge < 0.0) | ((hinge == 0.0) & (active_at_zero == 0)))
    loss = tl.where(active, hinge, 0.0)

    largest = (tl.zeros_like(loss), tl.zeros_like(loss), tl.zeros_like(loss))
    if GRADIENT:
        near_factor = _factor(positive, scale, SQUARED)[:, None]
        far_factor = _factor(negative, scale, SQUARED)[:, None]
        active = active[:, None]
        if ONE_TILE:
            # 0 * inf would be NaN: a row without a loss has no gradient, whatever is in it
            largest = _store_gradients(
                grad_anchor_ptr,
                grad_positive_ptr,
                grad_negative_ptr,
                at_gradient + cols,
                mask,
                tl.where(active, to_positive * near_factor, 0.0),
                tl.where(active, to_negative * far_factor, 0.0),
                powers,
                largest,
                MEASURE,
            )
        else:
            for start in range(tl.cdiv(limit, BLOCK_D) * BLOCK_D, 0, -BLOCK_D):
                col = start - BLOCK_D + cols  # backwards: the last tile is still in the cache
                mask = exists[:, None] & (col < limit)
                to_positive, to_negative = _differences(
                    anchor_ptr,
                    positive_ptr,
                    negative_ptr,
                    at_anchor + col,
                    at_positive + col,
                    at_negative + col,
                    mask,
                    eps,
                )
                largest = _store_gradients(
                    grad_anchor_ptr,
                    grad_positive_ptr,
                    grad_negative_ptr,
                    at_gradient + col,
                    mask,
                    tl.where(active, to_positive * near_factor, 0.0),
                    tl.where(active, to_negative * far_factor, 0.0),
                    powers,
                    largest,
                    MEASURE,
                )
    return loss, largest
