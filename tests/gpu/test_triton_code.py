"""Every Triton kernel that the ops launch, compiled for four GPUs without having one: no spilled
registers, shared memory within the limit, wide accesses and few instructions where it matters.

`python tests/gpu/gpu_code.py` prints what is judged here. Numbers and their reasons: docs/ops.md.
"""

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from kdkernels.backends import OPS, is_interpreted

pytest.importorskip("triton", reason="needs the package triton (Linux)")
if is_interpreted():
    pytest.skip("compiles: runs without TRITON_INTERPRET", allow_module_level=True)

import planted_gpu_kernels as planted
from gpu_cases import cases
from gpu_code import (
    COUNTED,
    IS_FULL,
    TARGETS,
    Found,
    compile_all,
    faults,
    found_for,
    row_costs,
    variant_of,
)
from machine_code import Code, Instruction, cost_of_sweeps, parse_sass, wide_bytes
from triton.runtime.jit import JITFunction

each_op = pytest.mark.parametrize("op", OPS)


@each_op
def test_no_variant_spills_registers_or_overflows_shared_memory(op):
    wrong = [
        f"{found.case.name}: {fault}"
        for found in found_for(op)
        for fault in faults(found.variant, found.code)
    ]
    assert not wrong, "\n".join(wrong)


@each_op
def test_every_case_is_compiled_for_sm_90_and_every_kernel_for_every_target(op):
    """With PROVE=1 (`make prove`) every case for every target."""
    compiled: dict[str, set[str]] = {}
    kernels: dict[str, set[str]] = {}
    for found in found_for(op):
        compiled.setdefault(found.case.name, set()).add(found.target)
        kernels.setdefault(found.launch.kernel, set()).add(found.target)
    assert {case.name for case in cases(op)} == set(compiled)
    wanted = set(TARGETS) if IS_FULL else {COUNTED}
    assert all(wanted <= targets for targets in compiled.values())
    assert all(targets == set(TARGETS) for targets in kernels.values())


def launched_by(module: ModuleType) -> set[tuple[str, str]]:
    """The kernels that a module's plain functions name, as (module, name): its launchers pass them
    to launch()."""
    found = set()
    for function in ast.parse(Path(str(module.__file__)).read_text()).body:
        if not isinstance(function, ast.FunctionDef) or isinstance(
            getattr(module, function.name), JITFunction
        ):
            continue
        for node in ast.walk(function):
            value = None
            if isinstance(node, ast.Name):
                value = getattr(module, node.id, None)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(getattr(module, node.value.id, None), node.attr, None)
            if isinstance(value, JITFunction):
                found.add((value.module, value.fn.__qualname__))
    return found


def test_every_kernel_and_both_values_of_every_flag_are_compiled():
    paths = [*(ROOT / "kdkernels").glob("*/triton_*.py"), ROOT / "kdkernels" / "triton_common.py"]
    launched = set()
    for path in paths:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        launched |= launched_by(importlib.import_module(name))
    values: dict[tuple, set] = {}
    for variant in {found.variant for op in OPS for found in found_for(op)}:
        for name, value in variant.constexprs.items():
            values.setdefault((variant.module, variant.kernel, name), set()).add(value)
    missing = launched - {key[:2] for key in values}
    assert not missing, f"no case of gpu_cases.py launches {sorted(missing)}"
    one_sided = [
        key
        for key, seen in values.items()
        if seen in ({True}, {False}) and isinstance(next(iter(seen)), bool)
    ]
    one_sided = [key for key in one_sided if key[2] != "INTERPRETED"]  # True in the interpreter
    assert not one_sided, f"flags that are never compiled the other way: {sorted(one_sided)}"


def row_kernels(kernel: str, name: str) -> list[Found]:
    """The launches of a row kernel in cases that begin so, on sm_90."""
    return [
        found
        for found in found_for("kd_cross_entropy")
        if (found.launch.kernel, found.target) == (kernel, "sm_90")
        and found.case.name.startswith(name)
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("classes", "tau", "limit"), [(10575, "", 40), (16384, " any tau, sum", 42)]
)
def test_a_row_in_registers_stays_within_its_instructions(classes, dtype, tau, limit):
    # At the memory limit of bf16 an H200 has 41 issue slots and 5.2 ex2 for an element. Any tau is
    # held to it where a thread has 32 elements and no labels to count: at 10,575 classes it has 24,
    # too few for edges and exchanges to fit (docs/ops.md).
    (found,) = row_kernels("_one_tile", f"1024x{classes} {dtype}{tau}")[:1]
    (cost,) = row_costs(found.variant, found.code)
    assert cost.instructions <= limit
    assert cost.exponentials <= 3.5
    assert cost.stores_wide


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tau", ["", " any tau"])
def test_two_sweeps_stay_within_their_instructions(dtype, tau):
    (found,) = row_kernels("two_sweeps", f"1024x93431 {dtype}{tau}")[:1]
    costs = row_costs(found.variant, found.code)
    assert len(costs) == 2
    assert sum(c.instructions for c in costs) <= 55
    assert sum(c.exponentials for c in costs) <= 6.5
    assert all(c.stores_wide for c in costs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_number_per_row_costs_backward_no_division(dtype):
    for classes in (10575, 93431):
        (found,) = row_kernels("_give_rows", f"1024x{classes} {dtype} none")
        (cost,) = row_costs(found.variant, found.code)
        assert cost.instructions <= 5
        assert cost.stores_wide
        assert found.code.count("CALL") == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nearest_neighbor_uses_the_tensor_cores(dtype):
    # float32 through three TF32 products is still HGMMA
    assert any(
        found.code.count("HGMMA")
        for found in found_for("nearest_neighbor")
        if found.case.name == f"100000x100000x512 {dtype}" and found.target == "sm_90"
    )


def launch_planted(kernel, *arguments, **options):
    variant = variant_of(kernel, *arguments, **options)
    (code,) = compile_all([variant], disassemble=True).values()
    return variant, code


class TestPlanted:
    """The checks find the faults that they look for."""

    def test_narrow_accesses(self):
        x = torch.empty(4, 93_431)
        _, code = launch_planted(planted.masked_everywhere, x, x, x, 93_431, BLOCK=4096)
        assert cost_of_sweeps(code, 8) == []
        _, code = launch_planted(planted.masked_everywhere, x, x, x, 93_440, BLOCK=4096)
        assert len(cost_of_sweeps(code, 8)) == 1

    def test_exponentials_are_counted(self):
        x = torch.empty(4096)
        _, code = launch_planted(planted.exponentials_twice, x, x, x, 7, BLOCK=1024)
        (cost,) = cost_of_sweeps(code, 8)
        assert cost.exponentials == 8.0
        assert cost.stores_wide

    def test_spills(self):
        x = torch.empty(16 * 4096)
        variant, code = launch_planted(planted.too_much_in_registers, x, x, SIZE=4096, num_warps=4)
        assert code.spills > 0
        assert "spills" in faults(variant, code)[0]

    def test_shared_memory(self):
        x = torch.empty(512, 512)
        variant, code = launch_planted(
            planted.too_much_shared, x, x, x, 512, M=128, N=128, K=64, num_stages=5, num_warps=8
        )
        assert any("shared memory" in fault for fault in faults(variant, code))

    def test_no_code_at_all(self):
        x = torch.empty(64)
        variant, code = launch_planted(planted.does_not_compile, x, x, SIZE=64)
        assert "does not compile" in faults(variant, code)[0]


class TestSpecialization:
    """The properties of arguments that the JIT compiles in, and those that it does not."""

    def variant(self, *arguments, target="sm_90"):
        return variant_of(planted.masked_everywhere, *arguments, BLOCK=64, target=target)

    def test_addresses_and_integers(self):
        x = torch.empty(64)
        aligned = self.variant(x, x, x, 48)
        assert ((3,), (("tt.divisibility", 16),)) in aligned.attributes
        assert ((0,), ()) in self.variant(x[1:], x, x, 48).attributes
        assert ((3,), ()) in self.variant(x, x, x, 47).attributes
        assert dict(self.variant(x, x, x, 1).signature)["classes"] == "constexpr"
        assert dict(aligned.signature)["student_ptr"] == "*fp32"
        assert dict(self.variant(x.bfloat16(), x, x, 3).signature)["student_ptr"] == "*bf16"
        assert dict(self.variant(x, x, x, 2**31).signature)["classes"] == "i64"
        assert aligned == self.variant(x, x, x, 96)
        amd = self.variant(x, x, x, 48, target="gfx942")
        assert ((0,), (("tt.divisibility", 16), ("tt.pointer_range", 32))) in amd.attributes


SASS = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P2 LDG.E.128 R36, desc[UR8][R54.64+0xa000] ;
.L_x_1:
        /*0020*/                   BSSY B0, `(.L_x_3) ;
.L_x_2:
        /*0030*/                   LDG.E.U16 R2, desc[UR8][R4.64] ;
        /*0040*/                   LDG.E.128 R8, desc[UR8][R4.64] ;
        /*0050*/                   MUFU.EX2 R3, R2 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   STG.E.64 desc[UR8][R4.64], R2 ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
        /*00b0*/                   NOP;
"""


def test_sass_read_by_hand():
    instructions = parse_sass(SASS)
    assert [i.address for i in instructions] == list(range(0, 0xA0, 16))
    assert instructions[6] == Instruction(0x60, "BRA", 0x30)
    assert instructions[2].jump is None  # names a label without going there
    assert [i.always for i in instructions[-3:]] == [False, False, True]
    assert [i.loaded for i in instructions if i.loaded] == [16, 2, 16]
    assert [i.stored for i in instructions if i.stored] == [8]
    assert wide_bytes(instructions) == 32


def test_inner_loops_read_by_hand():
    code = Code(instructions=parse_sass(SASS))
    (body,) = code.loops
    assert [i.address for i in body] == [0x30, 0x40, 0x50, 0x60]
    (cost,) = cost_of_sweeps(code, 4)  # four elements
    assert (cost.instructions, cost.exponentials) == (1.0, 0.25)
