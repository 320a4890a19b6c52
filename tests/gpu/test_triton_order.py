"""Where lanes of a Triton kernel write global memory that other lanes have read or written, a
barrier must stand between both. Read in the machine code for four GPUs, as in test_triton_code.py.

No tool finds such races on a GPU: compute-sanitizer's racecheck watches shared memory alone.
"""

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from kdkernels.backends import is_interpreted

pytest.importorskip("triton", reason="needs the package triton (Linux)")
if is_interpreted():
    pytest.skip("compiles: runs without TRITON_INTERPRET", allow_module_level=True)

import planted_gpu_kernels as planted
from gpu_code import TARGETS, Variant, compile_all, found_for, variant_of
from machine_code import Code, Instruction, parse_amd, parse_sass, without_barrier
from triton.runtime.jit import JITFunction

from kdkernels.batch_triplet_loss import triton_gradient as spreading
from kdkernels.batch_triplet_loss import triton_mining as mining
from kdkernels.hidden_l2 import triton_kernel as hidden
from kdkernels.kd_cross_entropy import triton_row, triton_tiles


@dataclass(frozen=True)
class Order:
    """Accesses of global memory, by the text of their lines, that a barrier has to separate: those
    in `then` touch memory that other lanes have read or written in `first`. `first` "" is every
    write that is not in `then`. `not_on`: a target whose code does not show it."""

    kernel: str
    in_first: JITFunction
    first: str
    in_then: JITFunction
    then: str
    not_on: str = ""


KD_KERNELS = ("_one_tile", "two_sweeps", "split_gradient")
LABEL = (triton_row.store_label, "tl.store(")
# Gradients take the place of logits: every lane has read the label by then, and in registers its
# own and the others' classes.
READ_LABEL = (triton_tiles.load_label, "s = tl.load(student + label)")
READ, WRITTEN = (triton_tiles.load_tile, "tl.load(base"), (triton_tiles.store_tile, "tl.store(base")
SEMIHARD, ALL, SPREAD = mining._mine_semihard, mining._mine_all, spreading._spread
ORDERS = {
    "kd_cross_entropy": [Order(kernel, LABEL[0], "", *LABEL) for kernel in KD_KERNELS],
    "linear_kd_cross_entropy": [
        *(Order(kernel, LABEL[0], "", *LABEL) for kernel in KD_KERNELS),
        # AMD reads the label by a scalar load, which the exchange of maxima waits for
        *(Order(kernel, *READ_LABEL, *WRITTEN, "gfx942") for kernel in KD_KERNELS[:2]),
        Order("_one_tile", *READ, *WRITTEN),
    ],
    "batch_triplet_loss": [
        Order("_mine_semihard", SEMIHARD, "sum_now = tl.load(", SEMIHARD, "+ there, sum_now"),
        Order("_mine_semihard", SEMIHARD, "+ there, sum_now", SEMIHARD, "sum_now = tl.load("),
        Order("_mine_all", ALL, "tl.store(line_ptr + at, tl.zeros(", ALL, "so_far = tl.load("),
        Order("_mine_all", ALL, "tl.store(line_ptr + at, -count", ALL, "so_far = tl.load("),
        Order("_spread", spreading._is_close, "tl.load(gram_ptr", SPREAD, "tl.store(gram_ptr"),
        Order("_spread", SPREAD, "tl.store(sum_ptr", SPREAD, "sum_now = tl.load(gradient_ptr"),
    ],
    "hidden_l2": [
        Order("_finish", hidden._finish, "tl.store(parts_ptr", hidden._finish, "tl.atomic_add("),
    ],
}


def lines_of(function: JITFunction, text: str) -> set[tuple[str, int]]:
    """The lines of a kernel's source that contain `text`, as an instruction names them."""
    source, first = inspect.getsourcelines(function.fn)
    file = Path(str(inspect.getsourcefile(function.fn))).name
    found = {(file, first + number) for number, line in enumerate(source) if text in line}
    assert found, f"{function.fn.__name__} has no {text!r}"
    return found


def out_of_order(order: Order, code: Code) -> list[Instruction]:
    """Accesses of `then` that one of `first` leads to by a way without a barrier."""
    late = lines_of(order.in_then, order.then)
    early = lines_of(order.in_first, order.first) if order.first else set()

    def is_then(i: Instruction) -> bool:
        return i.line in late and (i.reads or i.writes)

    def is_first(i: Instruction) -> bool:
        return i.line in early and (i.reads or i.writes) if early else i.writes and not is_then(i)

    return without_barrier(code.instructions, is_first, is_then)


@functools.cache
def ordered_codes(op: str) -> dict[Variant, Code]:
    """Variants with a gradient of each kernel in ORDERS and target, with their instructions: those
    whose instructions are there anyway, else the first of each student's dtype."""
    codes: dict[Variant, Code] = {}
    others: dict[tuple, Variant] = {}
    for found in found_for(op):
        variant, flags = found.variant, found.variant.constexprs
        names = ("PLAN.gradient", "PLAN.has_target", "WANT_GRADIENT", "OWN")
        if variant.kernel not in {order.kernel for order in ORDERS[op]}:
            continue
        if all(flags.get(name, True) for name in names):
            if found.code.instructions:
                codes[variant] = found.code
            dtype = dict(variant.signature).get("student_ptr")
            others.setdefault((variant.kernel, found.target, dtype), variant)
    left = [variant for variant in others.values() if variant not in codes]
    return codes | compile_all(left, disassemble=True)


@pytest.mark.parametrize("op", ORDERS)
def test_a_barrier_separates_accesses_of_different_lanes_to_the_same_memory(op):
    seen, wrong = set(), []
    for variant, code in ordered_codes(op).items():
        for order in ORDERS[op]:
            if order.kernel == variant.kernel and variant.target != order.not_on:
                seen.add((variant.target, order))
                wrong += [
                    f"{variant.kernel} on {variant.target}, {variant.short}: {late}"
                    for late in out_of_order(order, code)
                ]
    assert not wrong, "\n".join(wrong)
    assert seen == {
        (target, order) for target in TARGETS for order in ORDERS[op] if target != order.not_on
    }


def test_every_barrier_of_the_kernels_is_judged():
    in_source = {
        (path.name, number)
        for path in (ROOT / "kdkernels").glob("**/triton_*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "tl.debug_barrier(" in line
    }
    judged = {
        i.line
        for op in ORDERS
        for code in ordered_codes(op).values()
        for i in code.instructions
        if i.is_barrier
    }
    assert in_source
    assert in_source <= judged


def test_a_missing_barrier_is_found():
    twice = planted.label_written_twice
    order = Order("label_written_twice", twice, "gradient_ptr + at", twice, "+ label, -1.0")
    tensors = (torch.empty(1024), torch.zeros(1, dtype=torch.int64))
    variants = [
        variant_of(twice, *tensors, BARRIER=barrier, BLOCK=1024, target=target)
        for target in TARGETS
        for barrier in (True, False)
    ]
    for variant, code in compile_all(variants, disassemble=True).items():
        has_barrier = variant.constexprs["BARRIER"]
        assert bool(out_of_order(order, code)) is not has_barrier, variant.target


WAYS = """
        //## File "/some/where/kernel.py", line 3
        /*0000*/                   STG.E.128 desc[UR8][R4.64], R4 ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        //## File "/some/where/kernel.py", line 4
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   {branch} ;
.L_x_1:
        /*0040*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        //## File "/some/where/kernel.py", line 5
        /*0050*/                   STG.E desc[UR8][R4.64], R2 ;
        /*0060*/                   EXIT ;
"""
AMD_WAYS = """
\t.file\t1 "/some/where" "kernel.py"
\t.loc\t1 3 8 ; kernel.py:3:8
\tbuffer_store_dword v1, v2, s[4:7], 0 offen
\ts_cbranch_execz .LBB0_2
; %bb.1:
\t.loc\t1 4 8
\ts_barrier
.LBB0_2:                               ; %more
\t.loc\t1 5 8
\tglobal_store_dword v1, v0, s[2:3]
\ts_endpgm
.Lfunc_end0:
"""


def test_ways_around_a_barrier_read_by_hand():
    def first(i):
        return i.line == ("kernel.py", 3) and i.writes

    def then(i):
        return i.line == ("kernel.py", 5) and i.writes

    around = parse_sass(WAYS.format(branch="BRA `(.L_x_2)"))
    assert [i.address for i in without_barrier(around, first, then)] == [0x50]
    straight = WAYS.replace("@!P1 BRA `(.L_x_1)", "IADD3 R2, R2, 0x1, RZ").format(branch="NOP")
    assert without_barrier(parse_sass(straight), first, then) == []
    assert without_barrier(around, then, first) == []
    amd = parse_amd(AMD_WAYS)
    assert [i.opcode for i in amd][1:3] == ["s_cbranch_execz", "s_barrier"]
    assert len(without_barrier(amd, first, then)) == 1
    assert (
        without_barrier(parse_amd(AMD_WAYS.replace("\ts_cbranch_execz .LBB0_2", "")), first, then)
        == []
    )
    with pytest.raises(AssertionError, match="nothing to come then"):
        without_barrier(amd, first, lambda i: i.line == ("kernel.py", 6))
