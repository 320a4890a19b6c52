"""Counts the memory traffic of Triton kernels in the interpreter (`python -m bench.gpu.traffic`).

The kernels run in Triton's interpreter on three scaled-down instances of a case, all of whose loads
and stores are counted: the bytes of the distinct addresses that an access touches behind its mask.
The counts of each kernel argument are polynomials of degree two in the number of rows (rows times
classes is linear; all pairs are quadratic; so are labels that every row counts again), so three
instances determine them, and the full size is extrapolated, not sampled. PyTorch's own operations
between kernels (matrix products, zero fills) count with the bytes of their tensors.

What is counted: a call and its backward at an incoming gradient of 1. `moved` has every access to a
tensor of a MiB or more at full size, and smaller tensors once: reading those again is served by the
caches and stands under `again`. Nothing is assumed about the L2 for larger tensors, so a second
sweep counts in full. The floor is every input read once and every output and gradient written once.
Where an op is a product of matrices, `moved` counts the bytes that its programs request from the
L2, beside the arithmetic. It is a model: nothing is timed.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdkernels
from kdkernels.kd_cross_entropy import op as kd_op

MULTIPROCESSORS = 132  # of the GPU that the full-size call is planned for
CACHED = 2**20  # bytes: smaller tensors stay in the caches
READ, WRITTEN = "read", "written"

Inputs = dict[str, Any]
Make = Callable[..., Tensor]  # a tensor of the given sizes: normal numbers, or uninitialized


@dataclass(frozen=True)
class Case:
    """A call at full size `rows`, and three smaller ones that are run."""

    op: str
    name: str
    rows: int
    instances: tuple[int, int, int]
    make: Callable[[int, Make], Inputs]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    products: Callable[[int], float] | None = None  # floor of the floating-point operations
    constants: tuple[tuple[str, str, Any], ...] = ()  # (module, name, value): the full-size choice
    proportional: tuple[str, ...] = ()  # kernels whose work depends on the data: scaled by rows
    same_constants: bool = True  # of the instances' kernels; else some blocks are as large as N


@dataclass
class Count:
    """The traffic of one call: bytes by (kernel, argument, direction), and the sizes of tensors."""

    moved: Counter = field(default_factory=Counter)
    extent: dict = field(default_factory=dict)
    products: int = 0
    launches: list[tuple] = field(default_factory=list)  # kernels, constants and options
    floor: int = 0


@dataclass(frozen=True)
class Result:
    """A case at full size, in bytes and operations."""

    case: Case
    floor: int
    moved: int
    again: int
    launches: int
    products: int
    parts: tuple[tuple[tuple[str, str, str], int], ...]  # (kernel, argument, direction), bytes

    @property
    def over_floor(self) -> float:
        return self.moved / self.floor


class Meter:
    """Counts all accesses while it is entered, and makes launchers plan for `multiprocessors`."""

    def __init__(self, multiprocessors: int, planning: bool = False) -> None:
        self.planning = planning  # launches are noted, not run
        self.count = Count()
        self.multiprocessors = multiprocessors
        self.arguments: list[tuple[str, int, int]] = []  # name, first address, end
        self.launching = ""
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "Meter":
        from triton.runtime.interpreter import InterpreterBuilder

        from kdkernels import triton_common

        builder: Any = InterpreterBuilder
        load, store, dot = (
            getattr(builder, f"create_{n}") for n in ("masked_load", "masked_store", "dot")
        )
        rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas
        launch = triton_common.launch

        def counted_load(own, ptrs, mask, *rest, **named):
            self.access(ptrs, mask, READ)
            return load(own, ptrs, mask, *rest, **named)

        def counted_store(own, ptrs, value, mask, *rest, **named):
            self.access(ptrs, mask, WRITTEN)
            return store(own, ptrs, value, mask, *rest, **named)

        def counted_rmw(own, op, ptr, value, mask, *rest):
            self.access(ptr, mask, READ)
            self.access(ptr, mask, WRITTEN)
            return rmw(own, op, ptr, value, mask, *rest)

        def counted_cas(own, ptr, *rest):
            self.access(ptr, None, READ)
            self.access(ptr, None, WRITTEN)
            return cas(own, ptr, *rest)

        def counted_dot(own, a, b, *rest):
            self.count.products += 2 * a.data.size * b.data.shape[-1]
            return dot(own, a, b, *rest)

        def counted_launch(kernel, grid, *arguments, **options):
            names = [*kernel.arg_names]
            memory = ((n, getattr(v, "base", v)) for n, v in zip(names, arguments, strict=False))
            self.arguments = [(n, *_extent(v)) for n, v in memory if isinstance(v, Tensor)]
            self.launching = kernel.fn.__name__
            for name, first, end in self.arguments:
                self.count.extent[self.launching, name] = end - first
            self.count.launches.append(_launched(kernel, arguments, options))
            if self.planning:
                return
            try:
                launch(kernel, grid, *arguments, **options)
            finally:
                self.launching = ""

        planned = lambda device: self.multiprocessors  # noqa: E731
        for owner, name, new in (
            (builder, "create_masked_load", counted_load),
            (builder, "create_masked_store", counted_store),
            (builder, "create_atomic_rmw", counted_rmw),
            (builder, "create_atomic_cas", counted_cas),
            (builder, "create_dot", counted_dot),
            (triton_common, "launch", counted_launch),
            (triton_common, "multiprocessors", planned),
        ):
            self.patches.enter_context(patched(owner, name, new))
        self.patches.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self.patches.close()

    def access(self, ptrs: Any, mask: Any, direction: str) -> None:
        """One load or store of the interpreter."""
        addresses = ptrs.data.reshape(-1)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, ptrs.data.shape).reshape(-1)]
        if addresses.size == 0:
            return
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        name = self.owner(int(addresses[0]))
        self.count.moved[self.launching, name, direction] += size * np.unique(addresses).size

    def owner(self, address: int) -> str:
        """The argument whose memory an address lies in; others come out of an address table."""
        for name, first, end in self.arguments:
            if first <= address < end:
                return name
        return "elsewhere"

    def torch_operation(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """An operation of PyTorch between kernels: its inputs read, its outputs written."""
        name = str(func.overloadpacket)
        flat = tree_leaves((args, kwargs))
        outputs = {id(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
        sources = [t for t in flat if isinstance(t, Tensor) and id(t) not in outputs]
        for direction, tensors in (
            (READ, sources),
            (WRITTEN, [t for t in tree_leaves(result)
                       if isinstance(t, Tensor)]),
        ):  # fmt: skip
            for number, t in enumerate(tensors):
                role = f"{direction} {number}"
                self.count.moved[name, role, direction] += t.numel() * t.itemsize
                self.count.extent[name, role] = t.numel() * t.itemsize
        if name in ("aten.mm", "aten.addmm"):
            a, b = [t for t in flat if isinstance(t, Tensor) and t.dim() == 2][-2:]
            self.count.products += 2 * a.numel() * b.shape[1]


class _Operations(TorchDispatchMode):
    """Reports PyTorch's operations to the meter, also those inside our own ops."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "kdkernels":  # the mode has to stay on inside our own ops
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        result = func(*args, **kwargs)
        if not self.meter.launching and not _moves_nothing(func):
            self.meter.torch_operation(func, args, kwargs, result)
        return result


@contextlib.contextmanager
def patched(owner: Any, name: str, new: Any) -> Iterator[None]:
    """`owner.name` is `new` inside."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _extent(t: Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _moves_nothing(func: Any) -> bool:
    """Whether an operation is a view or only allocates."""
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    allocates = func.overloadpacket.__name__ in ("empty", "empty_like", "new_empty",
                                                 "empty_strided", "detach", "set_")  # fmt: skip
    return is_view or allocates


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _launched(kernel: Any, arguments: tuple, options: dict[str, Any]) -> tuple:
    """A launch's kernel and constants, which identify the path of a call."""
    constants = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    return kernel.fn.__name__, tuple(sorted((k, str(v)) for k, v in constants.items()))


def measure(case: Case, rows: int, *, planning: bool = False) -> Count:
    """The counts of one instance; with `planning` only its launches."""
    inputs = case.make(rows, _uninitialized if planning else _normal)
    for name in case.differentiable:
        for t in _tensors(inputs[name]):
            t.requires_grad_()
    function = getattr(kdkernels, case.op)
    with contextlib.ExitStack() as stack:
        for module, name, value in case.constants:
            stack.enter_context(patched(importlib.import_module(module), name, value))
        # reads the labels on the CPU only
        stack.enter_context(patched(kd_op, "check_label_range", lambda *_: None))
        multiprocessors = -(-MULTIPROCESSORS * rows // case.rows)
        meter = stack.enter_context(Meter(multiprocessors, planning))
        outputs = _tensors(function(**inputs, **case.options, backend="triton"))
        wanted = [t for name in case.differentiable for t in _tensors(inputs[name])]
        one = torch.ones(())
        gradients = torch.autograd.grad(outputs[0], wanted, one) if wanted else ()
    moved = [*_tensors(inputs), *outputs, *gradients]
    meter.count.floor = sum(t.numel() * t.itemsize for t in moved)
    return meter.count


def extrapolate(instances: tuple[int, ...], values: list[int], rows: int) -> int:
    """The polynomial of degree two through three counts, at `rows`."""
    total = Fraction(0)
    for i, (at, value) in enumerate(zip(instances, values, strict=True)):
        term = Fraction(value)
        for j, other in enumerate(instances):
            if i != j:
                term *= Fraction(rows - other, at - other)
        total += term
    return round(total)


def count(case: Case) -> Result:
    """A case at full size."""
    counts = [measure(case, rows) for rows in case.instances]
    planned = measure(case, case.rows, planning=True).launches
    for c in counts:
        pairs = zip(c.launches, planned, strict=True)
        same = all(a == b if case.same_constants else a[0] == b[0] for a, b in pairs)
        assert same, f"{case.op} {case.name}: instances take another path:\n{c.launches}\n{planned}"

    def full(values: list[int]) -> int:
        return max(0, extrapolate(case.instances, values, case.rows))

    moved = again = 0
    parts = []
    for key in sorted({key for c in counts for key in c.moved}):
        kernel, argument, _ = key
        if kernel in case.proportional:
            bytes_here = counts[-1].moved[key] * case.rows // case.instances[-1]
        else:
            bytes_here = full([c.moved[key] for c in counts])
        extent = full([c.extent.get((kernel, argument), 0) for c in counts])
        is_large = extent >= CACHED or argument == "elsewhere"
        once = bytes_here if is_large else min(bytes_here, extent)
        parts.append((key, bytes_here))
        moved += once
        again += bytes_here - once
    products = full([c.products for c in counts])
    floor = full([c.floor for c in counts])
    return Result(case, floor, moved, again, len(planned), products, tuple(parts))


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _uninitialized(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.empty(shape, dtype=dtype)
