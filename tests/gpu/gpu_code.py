"""The compiled code of the Triton kernels that a call launches, without a GPU.

    python tests/gpu/gpu_code.py [--op NAME] [--target sm_90] [--kernel PART_OF_A_NAME]

prints a row for each kernel variant of tests/gpu/gpu_cases.py: registers, spills, shared memory,
the widths of its global accesses, and for row kernels the instructions and exponentials per
element. Compiled kernels stay in Triton's own cache. TRITON_INTERPRET must be unset: it would leave
no kernel to compile.
"""

import argparse
import dataclasses
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest has these folders on its path
    ROOT = Path(__file__).resolve().parents[2]
    sys.path += [str(ROOT), str(ROOT / "tests" / "kernels")]

import machine_code
import torch
import triton
from contract import Op, run
from gpu_cases import MAKERS, Case, cases
from machine_code import Code, Cost
from torch.utils._python_dispatch import TorchDispatchMode
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import kdkernels
from kdkernels import triton_common
from kdkernels.backends import AVAILABLE, is_interpreted
from kdkernels.linear_kd_cross_entropy import triton_kernel as head
from kdkernels.nearest_neighbor import triton_kernel as nearest
from kdkernels.sample import Sample

KB = 1024
MULTIPROCESSORS = 132  # of the GPU that the launchers plan for, an H200
JOBS = int(os.environ.get("GPU_CODE_JOBS", "2"))  # processes that compile
# Whether every variant is compiled for every target (`make prove`); else the targets other than
# COUNTED have each kernel once; dtypes and options are compiled for COUNTED alone (`make test`).
IS_FULL = os.environ.get("PROVE") == "1"
COUNTED = "sm_90"  # the target whose instructions are counted
ROW_KERNELS = ("_one_tile", "two_sweeps", "split_statistics", "split_gradient")
DISASSEMBLED = (*ROW_KERNELS, "_give_rows", "scan")  # whose instructions are judged, on sm_90


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, the shared memory that a program may have on it, and its name among
    the architectures that launchers choose tiles for."""

    gpu: GPUTarget
    shared: int
    architecture: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KB, "8"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KB, "9"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KB, "10"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KB, "hip"),
}


@dataclass(frozen=True)
class Variant:
    """A kernel as Triton's JIT compiles it for one set of arguments; can go to another process."""

    module: str
    kernel: str
    target: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def function(self) -> Any:
        found = importlib.import_module(self.module)
        for name in self.kernel.split("."):
            found = getattr(found, name)
        return found

    @property
    def constexprs(self) -> dict[str, Any]:
        """The constants that are declared tl.constexpr, by name; fields of a plan as PLAN.field."""
        declared = {p.num: p.name for p in self.function.params if p.is_constexpr}
        found: dict[str, Any] = {}
        for path, value in self.constants:
            name = declared.get(path[0])
            if name and dataclasses.is_dataclass(value):
                found |= {f"{name}.{k}": v for k, v in vars(value).items()}
            elif name:
                found[name] = value
        return found

    @property
    def short(self) -> str:
        """Types, constants and options in a few words, for a table."""
        kinds = [str(kind)[1:] for _, kind in self.signature if str(kind).startswith("*")]
        constants = [
            f"{k.split('.')[-1].lower()}={int(v) if isinstance(v, bool) else v}"
            for k, v in self.constexprs.items()
        ]
        return " ".join([",".join(kinds), *constants, *(f"{k}={v}" for k, v in self.options)])


@dataclass(frozen=True)
class Launch:
    """One kernel launch that a call would have made."""

    kernel: str
    grid: tuple[int, ...]
    variant: Variant


def specialize(kernel: JITFunction, target: str, arguments: tuple, options: dict) -> Variant:
    """The variant that Triton's JIT looks up in its cache for these arguments.

    Triton's own binder decides which properties of the arguments are compiled in: dtypes, 16-byte
    alignment of addresses, divisibility by 16 and equality to 1 of integers, on AMD tensors below
    2 GB.
    """
    backend: Any = make_backend(TARGETS[target].gpu)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, rest = binder(*arguments, **options)
    kinds, hints = ([found[i] for found in special] for i in (0, 1))
    values = list(bound.values())
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    hints = ["" if kind == "constexpr" else hint for kind, hint in zip(kinds, hints, strict=True)]
    hinted = find_paths_if(hints, lambda _, hint: isinstance(hint, str))
    attributes = {path: backend.parse_attr(get_iterable_path(hints, path)) for path in hinted}
    return Variant(
        kernel.module,
        kernel.fn.__qualname__,
        target,
        tuple(zip((p.name for p in kernel.params), kinds, strict=True)),
        tuple((path, get_iterable_path(values, path)) for path in constants),
        tuple((path, tuple(map(tuple, pairs))) for path, pairs in attributes.items()),
        tuple(sorted(rest.items())),
    )


class _NoProducts(TorchDispatchMode):
    """Matrix products return uninitialized memory: only the launches matter here."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "kdkernels":  # the mode has to stay on inside our own ops
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            if name.endswith("_") or "out" in kwargs:
                return kwargs.get("out", args[0])
            return args[-1].new_empty((*args[-2].shape[:-1], args[-1].shape[-1]))
        return func(*args, **kwargs)


@contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Collects the launches of everything that runs on CPU tensors inside, as on a GPU of that
    kind; none is executed."""
    assert not is_interpreted(), "unset TRITON_INTERPRET: it leaves nothing to compile"
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        assert isinstance(kernel, JITFunction), f"{kernel}: a wrapped kernel cannot be recorded"
        variant = specialize(kernel, target, arguments, options)
        launches.append(Launch(kernel.fn.__name__, tuple(grid), variant))

    table = importlib.import_module("kdkernels.backends")  # kdkernels.backends is the function
    chosen = TARGETS[target]
    changes: list[tuple[Any, str, Any]] = [
        (triton_common, "launch", record),
        (triton_common, "multiprocessors", lambda _: MULTIPROCESSORS),
        (head, "multiplies_bf16", lambda _: True),
        (nearest, "architecture_of", lambda _: chosen.architecture),
        (torch.version, "hip", "6.4" if chosen.gpu.backend == "hip" else None),
        (table, "AVAILABLE", {key: (*v, "triton") for key, v in AVAILABLE.items()}),
    ]
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(_NoProducts())
        yield launches


def variant_of(
    kernel: Any, *arguments: object, target: str = "sm_90", **options: object
) -> Variant:
    """The variant that a launch of `kernel` compiles."""
    with recording(target) as launches:
        triton_common.launch(kernel, (1,), *arguments, **options)
    return launches[0].variant


def launches_of(op: str, sample: Sample, incoming: str, target: str) -> list[Launch]:
    """The launches of a call, and of its backward where it has gradients.

    Tensors may be as large as the address space allows: their memory is never accessed.
    """
    with recording(target) as launches:
        run(Op(op, getattr(kdkernels, op), ()), "triton", sample, incoming)
    return launches


def _with_causes(error: BaseException | None) -> str:
    """The messages of an error and of its causes, the innermost last."""
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def compile_variant(variant: Variant, disassemble: bool) -> Code:
    """The variant's code on its target; with its instructions if `disassemble`."""
    target = TARGETS[variant.target]
    source = ASTSource(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={path: [list(pair) for pair in pairs] for path, pairs in variant.attributes},
    )
    try:
        compiled: Any = triton.compile(source, target=target.gpu, options=dict(variant.options))
    except Exception as error:  # any error is the result for this kernel
        return Code(error=_with_causes(error))
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        return machine_code.read_amd(compiled.asm["amdgcn"], shared, disassemble)
    return machine_code.read_nvidia(compiled.asm["cubin"], compiled.asm["ptx"], shared, disassemble)


def compile_all(variants: Iterable[Variant], disassemble: bool = False) -> dict[Variant, Code]:
    """The code of every distinct variant, compiled in a few processes. Instructions, which take as
    long again, come with the kernels that are judged by them, or with all."""
    distinct = list(dict.fromkeys(variants))
    judged = [disassemble or (v.target == COUNTED and v.kernel in DISASSEMBLED) for v in distinct]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(JOBS, os.cpu_count() or 1), mp_context=context) as pool:
        return dict(zip(distinct, pool.map(compile_variant, distinct, judged), strict=True))


def faults(variant: Variant, code: Code) -> list[str]:
    """The faults of a compiled kernel: spilled registers, more shared memory than the target has,
    or no code at all."""
    if code.error:
        return [f"{variant.kernel} on {variant.target} does not compile: {code.error}"]
    found = []
    if code.spills or code.stack:
        found.append(f"{code.spills} spills, {code.stack} bytes of stack per thread")
    if code.shared > TARGETS[variant.target].shared:
        found.append(f"{code.shared} bytes of shared memory of {TARGETS[variant.target].shared}")
    return [f"{variant.kernel} on {variant.target}: {fault}" for fault in found]


def row_costs(variant: Variant, code: Code) -> list[Cost]:
    """The cost per element of a row kernel of kd_cross_entropy: a single entry where the row stays
    in registers, else one for each steady loop, backward's `_give_rows` among them; nothing for
    other kernels."""
    if variant.kernel not in (*ROW_KERNELS, "_give_rows") or not code.instructions:
        return []
    sizes = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
    kinds = dict(variant.signature)
    if variant.kernel == "_give_rows":
        return machine_code.cost_of_sweeps(code, sizes[kinds["gradient_ptr"]])
    inputs = (
        ["student_ptr", "teacher_ptr"]
        if variant.constexprs["PLAN.has_teacher"]
        else ["student_ptr"]
    )
    element_bytes = sum(sizes[kinds[name]] for name in inputs)
    if variant.kernel == "_one_tile":
        return [machine_code.cost_of_one_tile(code, element_bytes)]
    return machine_code.cost_of_sweeps(code, element_bytes)


@dataclass(frozen=True)
class Found:
    """One launch of a case on a target, and its code."""

    case: Case
    target: str
    launch: Launch
    code: Code

    @property
    def variant(self) -> Variant:
        return self.launch.variant


def first_of_each_kernel(variants: Iterable[Variant]) -> set[Variant]:
    """The first variant of each kernel: cases begin with the shapes of the speed targets, which
    take most registers and shared memory."""
    first: dict[str, Variant] = {}
    for variant in variants:
        first.setdefault(variant.kernel, variant)
    return set(first.values())


@functools.cache
def found_for(op: str, targets: tuple[str, ...] = tuple(TARGETS)) -> tuple[Found, ...]:
    """Every launch of every case of an op on those targets, compiled; where not IS_FULL, on other
    targets than COUNTED those of first_of_each_kernel alone."""
    launches = []
    for target in targets:
        all_launches = [
            (case, target, launch)
            for case in cases(op)
            for launch in launches_of(op, case.sample, case.incoming, target)
        ]
        if not (IS_FULL or target == COUNTED):
            chosen = first_of_each_kernel(launch.variant for _, _, launch in all_launches)
            all_launches = [found for found in all_launches if found[2].variant in chosen]
        launches += all_launches
    codes = compile_all(launch.variant for _, _, launch in launches)
    return tuple(Found(*found, codes[found[2].variant]) for found in launches)


def rows_of(op: str, targets: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """A table's rows: each variant once, with the first case that launches it."""
    seen = set()
    for found in found_for(op, targets):
        variant, code = found.variant, found.code
        if variant in seen:
            continue
        seen.add(variant)
        try:
            costs = row_costs(variant, code)
            each = " + ".join(f"{c.instructions:.1f}/{c.exponentials:.2f}" for c in costs)
        except AssertionError as error:
            each = str(error)
        yield {
            "case": found.case.name,
            "kernel": variant.kernel,
            "target": found.target,
            "grid": "x".join(map(str, found.launch.grid)),
            "regs": str(code.registers),
            "spills": f"{code.spills} ({code.stack} B)" if code.stack else "0",
            "shared": str(code.shared),
            "code": str(len(code.instructions) or ""),
            "instr/ex2": each,
            "accesses": " ".join(f"{name}:{n}" for name, n in code.ptx_widths),
            "variant": variant.short,
            "error": code.error.strip().splitlines()[-1] if code.error else "",
        }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python tests/gpu/gpu_code.py", description=__doc__)
    parser.add_argument("--op", choices=sorted(MAKERS), action="append", help="default: all")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="default: sm_90")
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    options = parser.parse_args()
    for op in options.op or MAKERS:
        print(op)
        for row in rows_of(op, tuple(options.target or ["sm_90"])):
            if options.kernel in row["kernel"]:
                print("  " + ", ".join(f"{k} {v}" for k, v in row.items() if v))


if __name__ == "__main__":
    main()
