"""Shared by the Triton kernels of all ops: launching, and device code for rows."""

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def warp_size() -> int:
    """Threads of a warp: 64 on AMD GPUs of the CDNA line, else 32."""
    return 64 if torch.version.hip else 32


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Starts `kernel` on `grid`; one place, so that a test can see what is launched."""
    kernel[grid](*arguments, **options)


def on(tensor: Tensor, op: str) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, whose current stream Triton launches on.

    Raises ValueError where Triton cannot compile for it. Which backend an op takes is decided at
    import, without touching a GPU, so this is the first place where it is known.
    """
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    fault = missing_on(tensor.device)
    if fault:
        raise ValueError(f"{op}: {fault}")
    return torch.cuda.device(tensor.device)


OLDEST = (8, 0)  # compute capability: every kernel is compiled for it in the tests


@functools.cache
def missing_on(device: torch.device) -> str:
    """Why Triton's kernels do not run on that GPU; empty where they do. AMD's GPUs have
    other numbers and are not checked."""
    if torch.version.hip:
        return ""
    has = torch.cuda.get_device_capability(device)
    if has >= OLDEST:
        return ""
    return (
        f"backend 'triton' needs a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, "
        f"got {device}, {torch.cuda.get_device_name(device)}, which has {has[0]}.{has[1]}: "
        f'use backend="eager"'
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Least number of programs that run side by side; a small number in the interpreter, so that
    small tests take the paths of large problems."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def register_limit(registers: int) -> dict[str, int]:
    """The launch option that holds threads to a number of registers; none on AMD GPUs."""
    return {} if torch.version.hip else {"maxnreg": registers}


@triton.jit
def power_for_half(largest):
    """The power of two that brings `largest` > 0 to the end of float16's range, [2^14, 2^15): small
    numbers would be flushed to zero, and a power costs no rounding."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(268 - exponent, 27), 227)  # 2^-100 to 2^100
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _give_all(gradient_ptr, incoming_ptr, post_scale_ptr, elements, BLOCK: tl.constexpr):
    # gradient *= incoming * post_scale
    factor = tl.load(post_scale_ptr) * tl.load(incoming_ptr).to(tl.float32)
    # A number of 1 leaves everything as it is: then no byte of the gradient moves.
    if factor != 1.0:
        blocks = tl.cast((tl.cast(elements, tl.int64) + BLOCK - 1) // BLOCK, tl.int32)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            begin = tl.cast(block, tl.int64) * BLOCK
            at = begin + tl.arange(0, BLOCK)
            if begin + BLOCK <= elements:  # unmasked accesses are wide ones
                value = tl.load(gradient_ptr + at).to(tl.float32) * factor
                tl.store(gradient_ptr + at, value.to(gradient_ptr.dtype.element_ty))
            else:
                inside = at < elements
                value = tl.load(gradient_ptr + at, mask=inside).to(tl.float32) * factor
                tl.store(gradient_ptr + at, value.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["incoming_stride", "pitch", "columns"])
def _give_rows(
    gradient_ptr,
    incoming_ptr,
    post_scale_ptr,
    incoming_stride,
    pitch,
    columns,
    BLOCK: tl.constexpr,
):
    # gradient[row] *= incoming[row] * post_scale, each row by the programs (row, 0), (row, 1), ...
    row = tl.program_id(0).to(tl.int64)
    arrives = tl.load(incoming_ptr + row * incoming_stride).to(tl.float32)
    factor = tl.load(post_scale_ptr) * arrives
    if factor != 1.0:
        # The row is cut at its own 16-byte boundaries: what is before the first and after the last
        # takes a lane each, so any pitch has wide accesses.
        kind = gradient_ptr.dtype.element_ty
        SIZE: tl.constexpr = kind.primitive_bitwidth // 8
        VEC: tl.constexpr = 16 // SIZE
        first = gradient_ptr + row * pitch
        before = (-(first.to(tl.int64) // SIZE)) & (VEC - 1)
        head = tl.minimum(before, columns).to(tl.int32)
        body = (columns - head) // VEC * VEC
        limit = tl.multiple_of(body, VEC)
        vectors = tl.multiple_of(first + head, 16)
        for begin in range(tl.program_id(1) * BLOCK, body, tl.num_programs(1) * BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = tl.load(vectors + at, mask=at < limit).to(tl.float32) * factor
            tl.store(vectors + at, value.to(kind), mask=at < limit)
        if tl.program_id(1) == 0:
            lane = tl.arange(0, 2 * VEC)
            column = tl.where(lane < VEC, lane, head + body + lane - VEC)
            on_edge = tl.where(lane < VEC, lane < head, column < columns)
            value = tl.load(first + column, mask=on_edge).to(tl.float32) * factor
            tl.store(first + column, value.to(kind), mask=on_edge)


GIVEN_BLOCK = (
    4096  # elements of a program of 8 warps at a time: 16 per thread. Counted, not measured
)


def give_gradient_(gradient: Tensor, incoming: Tensor, post_scale: Tensor) -> None:
    """`gradient` times the incoming one (0-d, or one per row) and `post_scale`, in place.

    Its rows may lie apart, but not their elements; where all share a number the gaps are scaled
    with them.
    """
    if gradient.numel() == 0:
        return
    pitch = gradient.stride(0) if gradient.dim() > 1 else 1
    columns = gradient[0].numel() if gradient.dim() else 1
    wanted = 8 * multiprocessors(gradient.device)
    with on(gradient, "give_gradient_"):
        if incoming.dim() == 0:
            elements = (gradient.shape[0] - 1) * pitch + columns if gradient.dim() else 1
            launch(
                _give_all,
                (min(triton.cdiv(elements, GIVEN_BLOCK), wanted),),
                gradient,
                incoming,
                post_scale,
                elements,
                BLOCK=GIVEN_BLOCK,
                num_warps=8,
            )
            return
        rows = gradient.shape[0]
        block = min(GIVEN_BLOCK, max(512, triton.next_power_of_2(columns)))
        launch(
            _give_rows,
            (rows, min(triton.cdiv(columns, block), triton.cdiv(wanted, rows))),
            gradient,
            incoming,
            post_scale,
            incoming.stride(0),
            pitch,
            columns,
            BLOCK=block,
            num_warps=block // 512,
        )
