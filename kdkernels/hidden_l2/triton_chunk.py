"""Device code of hidden_l2: a pair's place in the table, and one chunk of its elements.

A pair whose two tensors lie alike in memory is one linear run; others are read along their strides.
"""

import triton
import triton.language as tl

from kdkernels.hidden_l2 import triton_table as tables

INF = tl.constexpr(float("inf"))
LARGEST_HALF = tl.constexpr(65504.0)
EXPONENT = tl.constexpr(255 << 23)  # the bits of a float32's exponent
CHUNK = tl.constexpr(tables.CHUNK)
SCATTERED_TILE = tl.constexpr(1024)  # where every element is an access of its own, with its address
ELEMENTS = tl.constexpr(tables.ELEMENTS)
PLACE = tl.constexpr(tables.PLACE)
SCALE = tl.constexpr(tables.SCALE)
WEIGHT = tl.constexpr(tables.WEIGHT)
STUDENT = tl.constexpr(tables.STUDENT)
TEACHER = tl.constexpr(tables.TEACHER)
GRADIENT = tl.constexpr(tables.GRADIENT)
STRIDED = tl.constexpr(tables.STRIDED)


@triton.jit
def find(first_ptr, begin, pairs, chunk, PAIRS: tl.constexpr):
    """The row of the table with the pair that a chunk belongs to."""
    row = tl.arange(0, PAIRS)
    starts_after = tl.load(first_ptr + begin + row, mask=row < pairs, other=2**62) > chunk
    return begin + pairs - 1 - tl.sum((starts_after & (row < pairs)).to(tl.int32), axis=0)


@triton.jit
def float_at(table_ptr, at):
    return tl.load(table_ptr + at).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(table_ptr, weight_ptr, weight_stride, rows_of_table, row, place):
    if weight_ptr is not None:
        return tl.load(weight_ptr + (place >> 1) * weight_stride)
    else:
        return float_at(table_ptr, WEIGHT * rows_of_table + row)


@triton.jit
def as_stored(coefficient):
    """2^8 m of a coefficient m 2^e with m in [1/2, 1), and 2^(e-8), for float16: a mean over
    millions of elements cannot flush the gradient to zero, and a power of two costs no rounding."""
    bits = coefficient.to(tl.int32, bitcast=True)
    exponent = (bits & EXPONENT) >> 23
    plain = (exponent < 8) | (exponent == 255)  # 0, infinite, or nothing that float16 could hold
    stored = ((bits & ~EXPONENT) | (134 << 23)).to(tl.float32, bitcast=True)
    post_scale = ((exponent - 7) << 23).to(tl.float32, bitcast=True)
    return tl.where(plain, coefficient, stored), tl.where(plain, 1.0, post_scale)


@triton.jit
def _difference(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    mask,
    coefficient,
    acc,
    largest,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
):
    # one tile: gradient = coefficient (s - t)
    if mask is None:
        student, teacher = tl.load(student_ptr), tl.load(teacher_ptr)
    else:
        student = tl.load(student_ptr, mask=mask, other=0.0)
        teacher = tl.load(teacher_ptr, mask=mask, other=0.0)
    difference = student.to(tl.float32) - teacher.to(tl.float32)
    acc += difference * difference
    if HAS_GRADIENT:
        value = coefficient * difference
        if HALF:  # finite until it is formed again; what is infinite or NaN stays so
            size = tl.abs(difference)
            largest = tl.maximum(largest, tl.where(size < INF, size, 0.0))
            clamped = tl.clamp(value, -LARGEST_HALF, LARGEST_HALF)
            value = tl.where(size < INF, clamped, value)
        tl.store(gradient_ptr, value.to(gradient_ptr.dtype.element_ty), mask=mask)
    return acc, largest


@triton.jit
def _run(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    count,  # None: a whole chunk
    coefficient,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.arange(0, TILE)
    acc = tl.zeros((TILE,), tl.float32)
    largest = tl.zeros((TILE,), tl.float32)
    if count is None:
        for start in range(0, CHUNK, TILE):
            acc, largest = _difference(
                student_ptr + start + at,
                teacher_ptr + start + at,
                gradient_ptr + start + at,
                None,
                coefficient,
                acc,
                largest,
                HAS_GRADIENT,
                HALF,
            )
    else:
        for start in range(0, count, TILE):
            acc, largest = _difference(
                student_ptr + start + at,
                teacher_ptr + start + at,
                gradient_ptr + start + at,
                start + at < count,
                coefficient,
                acc,
                largest,
                HAS_GRADIENT,
                HALF,
            )
    return tl.sum(acc, axis=0), tl.max(largest, axis=0)


@triton.jit
def _linear_chunk(
    student,  # addresses of its first elements
    teacher,
    gradient,
    left,
    coefficient,
    STUDENT_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    misaligned = (student | teacher) & 15
    if HAS_GRADIENT:
        misaligned |= gradient & 15
    if (misaligned == 0) & (left >= CHUNK):  # no masks, 16 bytes an access
        total, largest = _run(
            tl.multiple_of(student.to(tl.pointer_type(STUDENT_DTYPE)), 16),
            tl.multiple_of(teacher.to(tl.pointer_type(TEACHER_DTYPE)), 16),
            tl.multiple_of(gradient.to(tl.pointer_type(STUDENT_DTYPE)), 16),
            None,
            coefficient,
            HAS_GRADIENT,
            HALF,
            TILE,
        )
    else:
        total, largest = _run(
            student.to(tl.pointer_type(STUDENT_DTYPE)),
            teacher.to(tl.pointer_type(TEACHER_DTYPE)),
            gradient.to(tl.pointer_type(STUDENT_DTYPE)),
            tl.minimum(left, CHUNK).to(tl.int32),
            coefficient,
            HAS_GRADIENT,
            HALF,
            SCATTERED_TILE,
        )
    return total, largest


@triton.jit
def _strided_chunk(
    strides_ptr,  # the row's sizes and strides, counted in units
    rows_of_table,
    student,  # addresses of the pair's first elements
    teacher,
    gradient,
    begin,
    elements,
    coefficient,
    STUDENT_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    student_ptr = student.to(tl.pointer_type(STUDENT_DTYPE))
    teacher_ptr = teacher.to(tl.pointer_type(TEACHER_DTYPE))
    gradient_ptr = gradient.to(tl.pointer_type(STUDENT_DTYPE))
    if UNIT > 1:
        student_ptr = tl.multiple_of(student_ptr, 16)
        teacher_ptr = tl.multiple_of(teacher_ptr, 16)
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
    sizes, student_strides, teacher_strides = (), (), ()
    for d in tl.static_range(DIMS):
        size = tl.load(strides_ptr + d * rows_of_table)
        if not WIDE:
            size = size.to(tl.int32)
        sizes = sizes + (size,)
        student_strides = student_strides + (tl.load(strides_ptr + (DIMS + d) * rows_of_table),)
        teacher_strides = teacher_strides + (tl.load(strides_ptr + (2 * DIMS + d) * rows_of_table),)
    units, begin = elements // UNIT, begin // UNIT
    count = tl.minimum(units - begin, CHUNK // UNIT).to(tl.int32)
    if not WIDE:
        units, begin = units.to(tl.int32), begin.to(tl.int32)
    lane = tl.arange(0, TILE // UNIT)[:, None]
    within = tl.arange(0, UNIT)[None, :]
    acc = tl.zeros((TILE // UNIT, UNIT), tl.float32)
    largest = tl.zeros((TILE // UNIT, UNIT), tl.float32)
    for start in range(0, count, TILE // UNIT):
        unit = begin + start + lane
        mask = (unit < units) & (within >= 0)
        rest = unit
        student_at = tl.zeros((TILE // UNIT, 1), tl.int64)
        teacher_at = tl.zeros((TILE // UNIT, 1), tl.int64)
        for d in tl.static_range(DIMS):
            position = rest
            if d < DIMS - 1:
                rest = rest // sizes[d]
                position -= rest * sizes[d]
            student_at += position.to(tl.int64) * student_strides[d]
            teacher_at += position.to(tl.int64) * teacher_strides[d]
        acc, largest = _difference(
            student_ptr + student_at * UNIT + within,
            teacher_ptr + teacher_at * UNIT + within,
            gradient_ptr + unit.to(tl.int64) * UNIT + within,
            mask,
            coefficient,
            acc,
            largest,
            HAS_GRADIENT,
            HALF,
        )
    acc, largest = tl.sum(acc, axis=1), tl.max(largest, axis=1)
    return tl.sum(acc, axis=0), tl.max(largest, axis=0)


@triton.jit
def clear_chunk(table_ptr, rows_of_table, row, chunk, STUDENT_DTYPE: tl.constexpr):
    """Stores a gradient of 0 for a chunk of a pair of weight 0, whose tensors are not read."""
    begin = (chunk - tl.load(table_ptr + row)) * CHUNK
    left = tl.load(table_ptr + ELEMENTS * rows_of_table + row) - begin
    address = tl.load(table_ptr + GRADIENT * rows_of_table + row)
    gradient_ptr = address.to(tl.pointer_type(STUDENT_DTYPE)) + begin
    zeros = tl.zeros((SCATTERED_TILE,), STUDENT_DTYPE)
    for start in range(0, tl.minimum(left, CHUNK).to(tl.int32), SCATTERED_TILE):
        at = start + tl.arange(0, SCATTERED_TILE)
        tl.store(gradient_ptr + at, zeros, mask=at < left)


@triton.jit
def chunk_of_pair(
    table_ptr,
    rows_of_table,
    row,
    chunk,
    coefficient,
    STUDENT_DTYPE: tl.constexpr,
    TEACHER_DTYPE: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum of squares and largest finite difference of a chunk; its gradient is stored."""
    begin = (chunk - tl.load(table_ptr + row)) * CHUNK
    elements = tl.load(table_ptr + ELEMENTS * rows_of_table + row)
    student = tl.load(table_ptr + STUDENT * rows_of_table + row)
    teacher = tl.load(table_ptr + TEACHER * rows_of_table + row)
    gradient = tl.load(table_ptr + GRADIENT * rows_of_table + row)
    if UNIT == 0:
        student_bytes: tl.constexpr = STUDENT_DTYPE.primitive_bitwidth // 8
        teacher_bytes: tl.constexpr = TEACHER_DTYPE.primitive_bitwidth // 8
        return _linear_chunk(
            student + begin * student_bytes,
            teacher + begin * teacher_bytes,
            gradient + begin * student_bytes,
            elements - begin,
            coefficient,
            STUDENT_DTYPE,
            TEACHER_DTYPE,
            HAS_GRADIENT,
            HALF,
            TILE,
        )
    else:
        return _strided_chunk(
            table_ptr + STRIDED * rows_of_table + row,
            rows_of_table,
            student,
            teacher,
            gradient,
            begin,
            elements,
            coefficient,
            STUDENT_DTYPE,
            TEACHER_DTYPE,
            HAS_GRADIENT,
            HALF,
            UNIT,
            WIDE,
            DIMS,
            TILE,
        )
