"""The C++ row kernel on chunks of logits."""

import torch
from torch import Tensor

from kdkernels.linear_kd_cross_entropy.driver import Call, Chunk, run
from kdkernels.linear_kd_cross_entropy.products import Arithmetic
from kdkernels.linear_kd_cross_entropy.sparse_teacher import take_rows
from kdkernels.native import extension, matrix, new_gradient

CHUNK_BYTES = 32 << 20  # of both networks' logits: about the last-level cache of a processor
# Every chunk moves the weight, its gradient and what BLAS copies of them, so chunks of 128 rows are
# faster than those of 64. Chunks of a quarter of all rows hold a twelfth of what stored logits
# take: three matrices of all rows, seven with a teacher's head, here a quarter of one or two.
LEAST_ROWS, MOST_LEAST_ROWS = 64, 128


def _tail(x: Tensor, temperature: float, statistics: Tensor | None, factors: Tensor | None) -> None:
    assert extension is not None
    extension.sparse_teacher_tail(
        {
            "logits": x.data_ptr(),
            "stride": x.stride(0),
            "rows": len(x),
            "classes": x.shape[1],
            "temperature": temperature,
            "statistics": 0 if statistics is None else statistics.data_ptr(),
            "factors": 0 if factors is None else factors.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )


def _tail_statistics(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.empty((len(x), 3), dtype=torch.float32)
    _tail(x, temperature, found, None)
    most, plain, softened = found.double().unbind(dim=1)
    return most, plain, softened


def _tail_gradient(x: Tensor, factors: Tensor, temperature: float, out: Tensor) -> None:
    """In place: products on the CPU are float32, so the gradient has no memory of its own."""
    assert out is x
    _tail(x, temperature, None, factors)


def _rows(chunk: Chunk) -> None:
    if chunk.indices is not None:
        take_rows(chunk, _tail_statistics, _tail_gradient)
        return
    assert extension is not None
    call, target, gradient = chunk.call, chunk.target, chunk.gradient
    rows, classes = chunk.student.shape
    terms = torch.empty((rows, 4), dtype=torch.float32) if chunk.terms is None else chunk.terms
    assert gradient is None or gradient.stride(1) == 1
    extension.kd_cross_entropy_chunk(
        {
            "student": matrix(chunk.student),
            "teacher": matrix(chunk.teacher),
            "target": 0 if target is None else target.data_ptr(),
            "target_is_int64": target is not None and target.dtype == torch.int64,
            "target_stride": 0 if target is None else target.stride(0),
            "rows": rows,
            "classes": classes,
            "temperature": call.temperature,
            "alpha": call.alpha,
            "label_smoothing": call.label_smoothing,
            "ignore_index": call.ignore_index,
            "loss": chunk.loss.data_ptr(),
            "terms": terms.data_ptr(),
            "gradient": 0 if gradient is None else gradient.data_ptr(),
            "gradient_stride": 0 if gradient is None else gradient.stride(0),
            "gradient_scale": 1.0 if chunk.count is None else 1.0 / float(chunk.count),
            "margin": 0 if chunk.margin is None else chunk.margin.data_ptr(),
            "threads": torch.get_num_threads(),
        }
    )


def _scale(x: Tensor, row: Tensor | None, column: Tensor | None, out: Tensor) -> None:
    """In place on the CPU: products there are float32."""
    assert out is x
    if column is not None:
        x.mul_(column)
    if row is not None:
        x.mul_(row[:, None])


def arithmetic(rows: int) -> Arithmetic:
    """Arithmetic of the native backend for calls of so many rows."""
    return Arithmetic(
        block=16,
        chunk_bytes=CHUNK_BYTES,
        least_rows=max(LEAST_ROWS, min(rows // 4, MOST_LEAST_ROWS)),
        empty=new_gradient,
        rows=_rows,
        scale=_scale,
        multiplies_bf16=False,
        may_wait=True,
        transposes_logits=True,
    )


def forward(*arguments) -> tuple[Tensor, ...]:
    """The raw op: its schema is in op.py."""
    *call, want_features, want_weight, want_bias, want_terms = arguments
    want = (want_features, want_weight, want_bias)
    call = Call(*call)
    return run(call, want, None, want_terms, arithmetic(len(call.features)))


def backward(*arguments) -> tuple[Tensor, ...]:
    """The raw op that forms gradients for a weight per row: its schema is in op.py."""
    *call, want_features, want_weight, want_bias, weights = arguments
    call, want = Call(*call), (want_features, want_weight, want_bias)
    how = arithmetic(len(call.features))
    return run(call, want, weights.to(torch.float32), False, how)[2:]
