"""Kernels with one fault each that only their compiled code shows; test_triton_code.py and
test_triton_order.py must find it.

They have a module of their own because the compiling processes import them by name.
"""

import triton
import triton.language as tl


@triton.jit
def masked_everywhere(student_ptr, teacher_ptr, gradient_ptr, classes, BLOCK: tl.constexpr):
    """Right, but a class count that is no multiple of 16 makes every access a narrow one."""
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, classes, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < classes
        s = tl.load(student_ptr + row * classes + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(teacher_ptr + row * classes + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient_ptr + row * classes + at, tl.exp2(s) - tl.exp2(t), mask=inside)


@triton.jit
def exponentials_twice(student_ptr, teacher_ptr, gradient_ptr, blocks, BLOCK: tl.constexpr):
    """Wide accesses, and eight exponentials per class: one loop, worked out by hand in the test."""
    for block in range(blocks):
        at = block * BLOCK + tl.arange(0, BLOCK)
        s, t = tl.load(student_ptr + at), tl.load(teacher_ptr + at)
        total = s * 0.0
        for power in tl.static_range(1, 5):
            total += tl.exp2(s * power) + tl.exp2(t * power)
        tl.store(gradient_ptr + at, total)


@triton.jit
def too_much_in_registers(x_ptr, y_ptr, SIZE: tl.constexpr):
    """Sixteen tiles that are all needed again after a sum over all of them."""
    at = tl.arange(0, SIZE)
    tiles = ()
    total = 0.0
    for i in tl.static_range(16):
        tile = tl.load(x_ptr + i * SIZE + at)
        total += tl.sum(tile, axis=0)
        tiles = tiles + (tile,)  # noqa: RUF005  Triton has no stars
    for i in tl.static_range(16):
        tl.store(y_ptr + i * SIZE + at, tiles[i] / total)


@triton.jit
def too_much_shared(a_ptr, b_ptr, c_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A product whose pipeline holds more tiles than a program has shared memory for."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for begin in range(0, depth, K):
        a = tl.load(a_ptr + rows[:, None] * depth + begin + inner[None, :])
        b = tl.load(b_ptr + (begin + inner[:, None]) * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], total)


@triton.jit
def does_not_compile(x_ptr, y_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    if tl.program_id(0) == 0:
        value = tl.load(x_ptr + at).to(tl.float32)
    else:
        value = tl.load(x_ptr + at).to(tl.float16)
    tl.store(y_ptr + at, value)


@triton.jit
def label_written_twice(gradient_ptr, label_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """A row, then the label's column again by one lane; without BARRIER the order of the two
    stores is undefined, as another lane stores the row."""
    at = tl.arange(0, BLOCK)
    tl.store(gradient_ptr + at, at.to(tl.float32))
    label = tl.load(label_ptr)
    if BARRIER:
        tl.debug_barrier()
    tl.store(gradient_ptr + label, -1.0)
