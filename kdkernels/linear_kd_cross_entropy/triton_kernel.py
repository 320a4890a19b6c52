"""linear_kd_cross_entropy in Triton: the row kernels of kd_cross_entropy on chunks of logits, and
the scaling of a chunk's rows and columns.

Products are torch's. bfloat16 features and weight stay bfloat16 and their products are summed and
stored in float32; other mixtures of 16-bit tensors are multiplied as float32 copies, tile by tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common
from kdkernels.kd_cross_entropy.triton_kernel import launch_rows, parts_of, with_unit_columns
from kdkernels.linear_kd_cross_entropy.driver import Call, Chunk, run
from kdkernels.linear_kd_cross_entropy.products import Arithmetic
from kdkernels.linear_kd_cross_entropy.sparse_teacher import take_rows
from kdkernels.linear_kd_cross_entropy.triton_sparse_teacher import gradient as tail_gradient
from kdkernels.linear_kd_cross_entropy.triton_sparse_teacher import statistics as tail_statistics

# Each chunk reads and writes the float32 gradient of the weight: as much time as the products of
# some 700 rows in bfloat16 on an H200, so chunks are as large as memory is cheap. Counted, not
# measured.
CHUNK_BYTES = 3 << 29
LEAST_ROWS = 256
BLOCK = 2048  # elements of a program of 4 warps: 16 per thread


@triton.jit(do_not_specialize=["pitch", "pitch_out", "columns"])
def _scale(
    x_ptr, row_ptr, column_ptr, out_ptr, pitch, pitch_out, columns,
    HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, c] = x[n, c] row[n] column[c]; pitches are multiples of 16."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    factor = tl.load(row_ptr + row) if HAS_ROW else 1.0
    x = x_ptr + tl.multiple_of(row * pitch, 16)
    out = out_ptr + tl.multiple_of(row * pitch_out, 16)
    if begin + BLOCK <= columns:  # unmasked accesses are wide ones
        value = tl.load(x + at) * factor
        if HAS_COLUMN:
            value *= tl.load(column_ptr + at)
        tl.store(out + at, value.to(out_ptr.dtype.element_ty))
    else:
        inside = at < columns
        value = tl.load(x + at, mask=inside) * factor
        if HAS_COLUMN:
            value *= tl.load(column_ptr + at, mask=inside)
        tl.store(out + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def scale_rows_and_columns(
    x: Tensor, row: Tensor | None, column: Tensor | None, out: Tensor
) -> None:
    """out = x times a factor per row and a factor per column, None for 1; out may be x."""
    if x.numel() == 0:
        return
    n, columns = x.shape
    common.launch(
        _scale,
        (n, triton.cdiv(columns, BLOCK)),
        x,
        x if row is None else row,
        x if column is None else column,
        out,
        x.stride(0),
        out.stride(0),
        columns,
        HAS_ROW=row is not None,
        HAS_COLUMN=column is not None,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _rows(chunk: Chunk) -> None:
    if chunk.indices is not None:
        take_rows(chunk, tail_statistics, tail_gradient)
        return
    call, student, gradient = chunk.call, chunk.student, chunk.gradient
    teacher = None if chunk.teacher is None else with_unit_columns(chunk.teacher)
    # programs that share a row would read the label's logit after another one has written there
    shared = gradient is student and parts_of(student) > 1
    given = gradient
    if shared:
        memory = student.new_empty((len(student), student.stride(0)))
        given = memory[:, : student.shape[1]]
    count = chunk.loss if chunk.count is None else chunk.count
    launch_rows(
        student,
        teacher,
        chunk.target,
        given,
        (chunk.loss, chunk.terms, count),
        chunk.margin,
        temperature=1.0 if teacher is None else call.temperature,
        alpha=call.alpha,
        ignore_index=call.ignore_index,
        label_smoothing=call.label_smoothing,
        divisor="one" if chunk.count is None else "given",
        gradient_scale=1.0,
    )
    if shared and gradient is not None and given is not None:
        gradient.copy_(given)


def multiplies_bf16(like: Tensor) -> bool:
    """Whether torch multiplies bfloat16 matrices into float32 there."""
    return like.is_cuda


def _arithmetic(like: Tensor) -> Arithmetic:
    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)

    return Arithmetic(
        block=1,
        chunk_bytes=CHUNK_BYTES,
        least_rows=LEAST_ROWS,
        empty=empty,
        rows=_rows,
        scale=scale_rows_and_columns,
        multiplies_bf16=multiplies_bf16(like),
        may_wait=False,
        transposes_logits=False,
    )


def forward(features: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The raw op: its schema is in op.py."""
    *call, want_features, want_weight, want_bias, want_terms = arguments
    want = (want_features, want_weight, want_bias)
    with common.on(features, "linear_kd_cross_entropy"):
        return run(Call(features, *call), want, None, want_terms, _arithmetic(features))


def backward(features: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The raw op that forms gradients for a weight per row: its schema is in op.py."""
    *call, want_features, want_weight, want_bias, incoming = arguments
    want = (want_features, want_weight, want_bias)
    weights = incoming.to(torch.float32).contiguous()
    with common.on(features, "linear_kd_cross_entropy"):
        return run(Call(features, *call), want, weights, False, _arithmetic(features))[2:]
