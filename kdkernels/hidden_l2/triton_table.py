"""The work list of the Triton kernels of hidden_l2: pairs ordered into launches, and a table
of their sizes, addresses and strides in device memory.

The table is written by a tiny kernel whose integer arguments are its contents, 448 per launch: no
copy from the host, so a CUDA graph can hold it, and no wait. It is filled anew in every call. A
table cached from an earlier call would lie in the memory pool that was current then, and CUDA graph
trees rewind theirs; filling takes one launch for 55 pairs.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton_common as common

CHUNK = 16384  # elements of one program, and of the fixed summation order
# Columns of the table, each with a number per pair. Then, if some pair is strided, sizes, the
# student's and the teacher's strides, innermost first; then a zero that programs count with.
FIRST, ELEMENTS, PLACE, SCALE, WEIGHT, STUDENT, TEACHER, GRADIENT, STRIDED = range(9)
# Numbers of one launch. 448 are 3.5 KB of arguments, of 4 KB that exist; an AMD GPU keeps arguments
# in scalar registers, which 64 numbers fit and 192 do not.
FILLS = (64,) if torch.version.hip else (64, 192, 448)
NARROW = 2**31 - CHUNK  # elements of a pair whose indices fit 32 bits
BIAS = tl.constexpr(2**62)


@triton.jit(do_not_specialize=["first"])
def _fill(table_ptr, first, values, COUNT: tl.constexpr):
    # 64 numbers are gathered into one store, as a store of a number is a branch
    lane = tl.arange(0, 64)
    for begin in tl.static_range(0, COUNT, 64):
        number = tl.zeros((64,), tl.int64)
        for i in tl.static_range(64):
            number = tl.where(lane == i, values[begin + i], number)
        tl.store(table_ptr + first + begin + lane, (number - BIAS) >> 1)


def fill(values: Sequence[int], like: Tensor) -> Tensor:
    """The numbers, each of less than 2^60, as an int64 tensor on the device of `like`."""
    parts = []
    while sum(parts) < len(values):
        left = len(values) - sum(parts)
        parts.append(next((size for size in FILLS if size >= left), FILLS[-1]))
    table = torch.empty(sum(parts), dtype=torch.int64, device=like.device)
    # odd and beyond 2^32: every number has one type and no divisor that could be compiled in
    odd = 2**62 + 1
    encoded = [2 * value + odd for value in values]
    encoded += [odd] * (sum(parts) - len(values))
    first = 0
    for size in parts:
        numbers = tuple(encoded[first : first + size])
        common.launch(_fill, (1,), table, first, numbers, COUNT=size, num_warps=1)
        first += size
    return table


class Form(NamedTuple):
    """Everything of a pair but its addresses: the order of the launches depends on it."""

    student: torch.dtype
    teacher: torch.dtype
    shape: tuple[int, ...]
    student_strides: tuple[int, ...]
    teacher_strides: tuple[int, ...]
    gradient_strides: tuple[int, ...] | None  # without gaps; None where no gradient is wanted
    aligned: bool  # both addresses are multiples of 16


@dataclass(frozen=True)
class Sweep:
    """One launch over pairs of the same dtypes and layout, which are neighbors in the table."""

    begin: int  # its first pair in the table
    pairs: int
    first_chunk: int
    chunks: int
    student: torch.dtype
    teacher: torch.dtype
    gradient: bool
    unit: int  # 0: both tensors are one linear run. Else elements that are neighbors in all three
    wide: bool  # an index needs 64 bits

    @property
    def half(self) -> bool:
        """Whether its gradients are stored times a power of two."""
        return self.gradient and self.student == torch.float16


@dataclass(frozen=True)
class Plan:
    """Everything of a call but addresses."""

    order: tuple[int, ...]  # the pair of each row of the table
    sizes: tuple[int, ...]  # the columns before weights and addresses
    strides: tuple[int, ...]  # the columns behind them
    dims: int
    sweeps: tuple[Sweep, ...]
    chunks: int

    @property
    def half(self) -> bool:
        """Whether some gradient is stored times a power of two."""
        return any(sweep.half for sweep in self.sweeps)

    @property
    def counter(self) -> int:
        """The place of the table's zero."""
        return STRIDED * len(self.order) + len(self.strides)

    def table(
        self,
        weights: Sequence[float],
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> Tensor:
        """The table in device memory."""
        numbers = [_bits(weights[i]) for i in self.order]
        addresses = [of[i].data_ptr() for of in (students, teachers, gradients) for i in self.order]
        return fill([*self.sizes, *numbers, *addresses, *self.strides, 0], students[0])


def _scale_of(shape: Sequence[int], elements: int, reduction: str) -> float:
    if elements == 0:
        return 0.0
    if reduction == "batchmean":
        return 1.0 / shape[0] if len(shape) else 1.0
    return 1.0 / elements if reduction == "mean" else 1.0


def _bits(number: float) -> int:
    """The float32 next to it, as the integer with these bits."""
    return int.from_bytes(bytes(ctypes.c_float(number)), "little", signed=True)


def _elements(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _merged(form: Form) -> list[tuple[int, int, int]]:
    """(size, student's stride, teacher's stride) of the dimensions, innermost first, in the order
    of the gradient's memory, else of the student's, neighbors merged where both tensors can."""
    memory = form.gradient_strides or form.student_strides
    dims = [d for d, size in enumerate(form.shape) if size != 1]
    merged: list[tuple[int, int, int]] = []
    for d in reversed(sorted(dims, key=lambda d: memory[d], reverse=True)):
        size, student, teacher = form.shape[d], form.student_strides[d], form.teacher_strides[d]
        if merged and (student, teacher) == (merged[-1][0] * merged[-1][1],
                                             merged[-1][0] * merged[-1][2]):  # fmt: skip
            merged[-1] = (merged[-1][0] * size, *merged[-1][1:])
        else:
            merged.append((size, student, teacher))
    return merged or [(1, 1, 1)]


def _unit(form: Form, merged: list[tuple[int, int, int]]) -> int:
    """0 for one linear run; else how many neighbors one access takes: a whole 16 bytes, or 1."""
    (inner, *steps), *outer = merged
    if not outer and steps == [1, 1]:
        return 0
    unit = 16 // min(form.student.itemsize, form.teacher.itemsize)
    even = inner % unit == 0 and all(s % unit == 0 and t % unit == 0 for _, s, t in outer)
    return unit if even and steps == [1, 1] and form.aligned else 1


@functools.lru_cache(maxsize=256)
def plan(forms: tuple[Form, ...], reduction: str) -> Plan:
    """Launches for these pairs: one, where all have the same dtypes and are linear runs."""
    merged = [_merged(form) for form in forms]
    elements = [_elements(form.shape) for form in forms]
    units = [_unit(form, dims) for form, dims in zip(forms, merged, strict=True)]

    def key(i: int) -> tuple:
        form = forms[i]
        wide = units[i] > 0 and elements[i] >= NARROW
        dtypes = (str(form.student), str(form.teacher))
        return (form.gradient_strides is not None, *dtypes, units[i], wide)

    # a pair without elements belongs to no launch
    order = sorted(range(len(forms)), key=lambda i: (elements[i] == 0, key(i)))
    sweeps: list[Sweep] = []
    first, begin = [], 0
    chunks = 0
    while begin < len(order) and elements[order[begin]] > 0:
        end = begin
        while end < len(order) and elements[order[end]] and key(order[end]) == key(order[begin]):
            first.append(chunks)
            chunks += triton.cdiv(elements[order[end]], CHUNK)
            end += 1
        form = forms[order[begin]]
        gradient, _, _, unit, wide = key(order[begin])
        first_chunk = first[begin]
        sweeps.append(
            Sweep(begin, end - begin, first_chunk, chunks - first_chunk, form.student, form.teacher,
                  gradient, unit, wide)
        )  # fmt: skip
        begin = end
    first += [chunks] * (len(order) - len(first))

    def half(i: int) -> bool:
        return forms[i].gradient_strides is not None and forms[i].student == torch.float16

    sizes = [
        first,
        [elements[i] for i in order],
        [2 * i + half(i) for i in order],
        [_bits(_scale_of(forms[i].shape, elements[i], reduction)) for i in order],
    ]
    dims = max((len(merged[i]) for i in order if units[i] > 0), default=0)
    strides = [[0] * len(order) for _ in range(3 * dims)]
    for row, i in enumerate(order):
        unit = units[i]
        if unit == 0:
            continue
        for d in range(dims):
            size, student, teacher = merged[i][d] if d < len(merged[i]) else (1, 0, 0)
            inner = d == 0 and unit > 1  # counted in units, whose stride is 1
            strides[d][row] = size // unit if inner else size
            strides[dims + d][row] = student if inner else student // unit
            strides[2 * dims + d][row] = teacher if inner else teacher // unit

    def flat(columns: list[list[int]]) -> tuple[int, ...]:
        return tuple(value for column in columns for value in column)

    return Plan(tuple(order), flat(sizes), flat(strides), dims, tuple(sweeps), chunks)
