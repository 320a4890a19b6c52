"""The promises that every backend of every op keeps, as functions of (Op, backend).

Numbers are those of docs/architecture.md. `Op` is the subject of a promise; a wrong kernel is
an Op with another `function`, so that test_contract.py can show that its promise rejects it.
"""

import importlib
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from poison import poisoned_empty
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels.backends import backends
from kdkernels.sample import Argument, Sample

MULTIPLYING = ("linear_kd_cross_entropy",)
"""Ops whose results depend on the last bits of a product by the BLAS; others select exactly."""
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Op:
    """A public function, the calls that it is judged by, and the device of their tensors."""

    name: str
    function: Callable
    samples: tuple[Sample, ...]
    device: str = "cpu"


def find_op(name: str, device: str = "cpu") -> Op:
    """The op of that public name, with the samples of its folder."""
    module = importlib.import_module(f"kdkernels.{name}.samples")
    return Op(name, getattr(kdkernels, name), tuple(module.samples(device)), device)


def size_of(sample: Sample) -> int:
    """Elements of all its tensors."""
    return sum(t.numel() for t in flatten([v for v in sample.tensors.values() if v is not None]))


# Triton's interpreter takes tens of microseconds for an operation: there samples of more elements
# are judged for accuracy in float32 alone. A row of batch_triplet_loss meets all others.
INTERPRETED_ELEMENTS = {"batch_triplet_loss": 1_500, "linear_kd_cross_entropy": 1_500}
CACHED_ELEMENTS = 1_000_000  # samples of more are there for a processor's caches: not interpreted
# Whether the interpreter runs every sample in every dtype (`make prove`) or some (`make test`).
IS_FULL = os.environ.get("PROVE") == "1"


def is_interpreted(op: Op, backend: str) -> bool:
    """Whether these kernels run in Triton's interpreter."""
    return backend == "triton" and op.device == "cpu"


def samples_for_form(op: Op, backend: str) -> tuple[Sample, ...]:
    """Samples for promises about form: all, in Triton's interpreter the smaller ones."""
    if is_interpreted(op, backend):
        limit = INTERPRETED_ELEMENTS.get(op.name, CACHED_ELEMENTS)
        return tuple(s for s in op.samples if size_of(s) < limit)
    return op.samples


@dataclass(frozen=True)
class Result:
    outputs: list[Tensor]
    gradients: list[Tensor]


def flatten(value) -> list[Tensor]:
    """The tensors of a (nested) tuple or list."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in flatten(part)]


def incoming_for(loss: Tensor, kind: str) -> Tensor:
    """The gradient that arrives: 1, 0.37 (expanded on request), or another number for each row."""
    if kind == "one":
        return torch.ones_like(loss)
    form = {"dtype": loss.dtype, "device": loss.device}
    if loss.dim() == 0 or kind == "expanded":
        return torch.full((), 0.37, **form).expand(loss.shape)
    return torch.linspace(-1.5, 2.0, loss.numel(), **form).reshape(loss.shape)


def leaves(sample: Sample) -> tuple[dict[str, Argument], list[Tensor]]:
    """The sample's arguments with the differentiable ones as fresh leaves over the same memory."""
    arguments = dict(sample.tensors)
    found = []
    for name in sample.differentiable:
        value = sample.tensors[name]
        if isinstance(value, list):
            arguments[name] = [t.detach().requires_grad_() for t in value]
            found += arguments[name]
        elif value is not None:
            arguments[name] = value.detach().requires_grad_()
            found.append(arguments[name])
    return arguments, found


def run(
    op: Op, backend: str, sample: Sample, incoming: str = "rows", autocast: bool = False
) -> Result:
    """Outputs and, where there is something to differentiate, gradients of one call.

    autocast: whether the call, without its backward, is under autocast.
    """
    arguments, inputs = leaves(sample)
    with torch.autocast(op.device.split(":")[0], dtype=torch.bfloat16, enabled=autocast):
        outputs = flatten(op.function(**arguments, **sample.options, backend=backend))
    gradients: list[Tensor] = []
    if inputs:
        arrives = incoming_for(outputs[0], incoming)
        gradients = list(torch.autograd.grad(outputs[0], inputs, arrives))
    return Result([t.detach() for t in outputs], gradients)


def oracle(op: Op, sample: Sample, incoming: str = "rows") -> Result:
    """The same call on eager in float64, on the very numbers that the dtype holds."""
    truth = replace(op, function=getattr(kdkernels, op.name))
    return run(truth, "eager", sample.to(torch.float64), incoming)


def compare(what: str, kernel: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Promise 1: no worse than twice eager's own error in this dtype, plus its resolution."""
    if not truth.is_floating_point():
        assert torch.equal(kernel, truth), f"{what}: {kernel} is not {truth}"
        return
    kernel64, eager64, truth = kernel.double(), eager.double(), truth.double()
    same_special = torch.equal(kernel64.isnan(), truth.isnan()) and torch.equal(
        kernel64.isinf(), truth.isinf()
    )
    assert same_special, f"{what}: NaN or inf in other places"
    special = truth.isnan() | truth.isinf()
    assert torch.equal(kernel64[truth.isinf()], truth[truth.isinf()]), (
        f"{what}: inf of another sign"
    )
    error = (kernel64 - truth).masked_fill(special, 0.0).abs()
    eager_error = (eager64 - truth).nan_to_num(0.0, 0.0, 0.0).masked_fill(special, 0.0).abs()
    size = truth.masked_fill(special, 0.0).abs()
    if error.numel() == 0:
        return
    # 16-bit outputs may be off by one unit in the last place; float32 by 1e-6 of the largest value.
    if kernel.dtype == torch.float32:
        unit = 1e-6 * size.max().clamp(min=1.0)
    else:
        unit = EPS[kernel.dtype] * size + 6e-8
    bound = 2.0 * eager_error.max() + unit
    assert bool((error <= bound).all()), (
        f"{what}: error {float(error.max()):.3g}, eager's own {float(eager_error.max()):.3g}, "
        f"allowed {float((bound + 0 * error).max()):.3g}"
    )
    norm = size.norm()
    if norm > 0 and kernel.dim() > 0:
        relative, eager_relative = error.norm() / norm, eager_error.norm() / norm
        slack = 2e-6 if kernel.dtype == torch.float32 else EPS[kernel.dtype]
        floor = 6e-8 * size.numel() ** 0.5 / norm if kernel.dtype == torch.float16 else 0.0
        assert relative <= 2.0 * eager_relative + slack + floor, (
            f"{what}: relative L2 error {float(relative):.3g}, "
            f"eager's own {float(eager_relative):.3g}"
        )


def small_first(op: Op, count: int) -> tuple[Sample, ...]:
    """The `count` smallest samples that have something in them, for promises about form."""
    return tuple(sorted((s for s in op.samples if size_of(s) > 20), key=size_of)[:count])


def compare_all(op: Op, where: str, result: Result, eager: Result, truth: Result) -> None:
    """Promise 1 for every output and gradient."""
    for kind in ("outputs", "gradients"):
        triples = zip(*(getattr(r, kind) for r in (result, eager, truth)), strict=True)
        for number, (got, by_eager, true) in enumerate(triples):
            compare(f"{op.name} [{where}] {kind[:-1]} {number}", got, by_eager, true)


def compare_form(op: Op, sample: Sample, result: Result, eager: Result) -> None:
    """Promise 4 for one result."""
    _, inputs = leaves(sample)
    for got, want in zip(result.outputs, eager.outputs, strict=True):
        form = (got.shape, got.dtype, got.device)
        assert form == (want.shape, want.dtype, want.device), f"{op.name} [{sample.name}]"
    for got, source in zip(result.gradients, inputs, strict=True):
        form = (got.shape, got.dtype, got.device)
        assert form == (source.shape, source.dtype, source.device), f"{op.name} [{sample.name}]"


def compare_bits(op: Op, sample: Sample, first: Result, again: Result, what: str) -> None:
    """Every output and gradient is bitwise identical."""
    pairs = zip(first.outputs + first.gradients, again.outputs + again.gradients, strict=True)
    for was, now in pairs:
        same = torch.equal(was.nan_to_num(), now.nan_to_num())
        same = same and torch.equal(was.isnan(), now.isnan())
        assert same, f"{op.name} [{sample.name}]: {what}"


@contextmanager
def unmodified(op: Op, sample: Sample):
    """Promise 5 for what runs inside on the sample's tensors."""
    tensors = flatten([v for v in sample.tensors.values() if v is not None])
    before = [t.clone() for t in tensors]
    versions = [t._version for t in tensors]
    yield
    for number, (was, now) in enumerate(zip(before, tensors, strict=True)):
        same = torch.equal(was.nan_to_num(), now.nan_to_num())
        assert same, f"{op.name} [{sample.name}]: input {number} was changed"
    bumped = versions != [t._version for t in tensors]
    assert not bumped, f"{op.name} [{sample.name}]: version bumped"


def accuracy(op: Op, backend: str, dtype: torch.dtype, incoming: str = "rows") -> None:
    """1, 2, 3, 7: outputs and gradients of every sample against eager in float64; at another
    incoming gradient, which backward alone sees, in the interpreter of ten samples."""
    plain = replace(op, function=getattr(kdkernels, op.name))
    samples = op.samples
    if incoming != "rows":
        samples = samples_for_form(op, backend)
        if is_interpreted(op, backend) and not IS_FULL:
            samples = small_first(op, 10)
    for sample in samples:
        cast = sample.to(dtype)
        result = run(op, backend, cast, incoming)
        eager, truth = run(plain, "eager", cast, incoming), oracle(op, cast, incoming)
        compare_all(op, f"{sample.name}, {dtype}, {backend}", result, eager, truth)


def strides_change_no_bit(op: Op) -> None:
    """The specification alone: matrices stored by columns, and tensors whose elements lie apart,
    give the same bits."""

    def by_columns(t: Tensor) -> Tensor:
        return t.movedim(-1, 0).contiguous().movedim(0, -1) if t.dim() > 1 else t

    def apart(t: Tensor) -> Tensor:
        return t.new_zeros(*t.shape, 2).copy_(t[..., None])[..., 1] if t.dim() > 0 else t

    def each(value: Argument, change: Callable[[Tensor], Tensor]) -> Argument:
        if isinstance(value, Tensor):
            return change(value)
        return value if value is None else [change(t) for t in value]

    for sample in (s for s in op.samples if size_of(s) < 20_000):
        sample = replace(
            sample, tensors={k: each(v, Tensor.contiguous) for k, v in sample.tensors.items()}
        )
        plain = run(op, "eager", sample)
        for change in (by_columns, apart):
            tensors = {k: each(v, change) for k, v in sample.tensors.items()}
            moved = run(op, "eager", replace(sample, tensors=tensors))
            compare_bits(
                op, sample, plain, moved, f"other bits where tensors are {change.__name__}"
            )


def output_form(op: Op, backend: str, dtype: torch.dtype) -> None:
    """4: dtype, shape and device of outputs and gradients."""
    plain = replace(op, function=getattr(kdkernels, op.name))
    for sample in op.samples:
        cast = sample.to(dtype)
        compare_form(op, cast, run(op, backend, cast), run(plain, "eager", cast))


def inputs_unmodified(op: Op, backend: str, dtype: torch.dtype) -> None:
    """5: no input changes, neither in forward nor in backward."""
    for sample in op.samples:
        cast = sample.to(dtype)
        with unmodified(op, cast):
            run(op, backend, cast)


def numbers_and_form(op: Op, backend: str, dtype: torch.dtype) -> None:
    """1 to 7 and 10 with one or two runs per sample: accuracy, form, inputs unmodified; in the
    second run every element written and the same bits.

    float32 runs every sample. The 16-bit dtypes run the smaller samples: with IS_FULL all, else
    each dtype its own third. Second runs: with IS_FULL float32 of all smaller samples and of each
    16-bit dtype every other one, else each dtype of its own third.
    """
    small = {sample.name for sample in samples_for_form(op, backend)}
    part = [torch.bfloat16, torch.float16, torch.float32].index(dtype)
    for number, sample in enumerate(op.samples):
        if sample.name not in small and dtype != torch.float32:
            continue
        if size_of(sample) > CACHED_ELEMENTS:
            continue
        is_own = number % 3 == part
        if dtype != torch.float32 and not (IS_FULL or is_own):
            continue
        cast = sample.to(dtype)
        with unmodified(op, cast):
            result = run(op, backend, cast)
        eager = run(op, "eager", cast)
        compare_all(op, f"{sample.name}, {dtype}, {backend}", result, eager, oracle(op, cast))
        compare_form(op, cast, result, eager)
        again = dtype == torch.float32 or number % 2 == part if IS_FULL else is_own
        if sample.name in small and again:
            with poisoned_empty():
                second = run(op, backend, cast)
            compare_bits(op, cast, result, second, "other bits in other memory")


def second_backward_raises(op: Op, backend: str) -> None:
    """5: a second backward, and a double one, raise an error that names eager."""
    if backend == "eager":
        return
    for sample in small_first(op, 3):
        if not sample.differentiable:
            continue
        for again in ({"retain_graph": True}, {"create_graph": True}):
            arguments, inputs = leaves(sample)
            loss = flatten(op.function(**arguments, **sample.options, backend=backend))[0].sum()
            try:
                first = torch.autograd.grad(loss, inputs, **again)
                kept = [g.clone() for g in first]
                torch.autograd.grad(loss, inputs)
            except RuntimeError as error:
                assert 'backend="eager"' in str(error), f"{op.name}: {error}"
                continue
            same = all(map(torch.equal, kept, first))
            raise AssertionError(f"{op.name}: a second backward ran (results unchanged: {same})")


def every_element_written(op: Op, backend: str, dtype: torch.dtype) -> None:
    """6: with every allocation poisoned the result is the same, bit for bit."""
    for sample in op.samples:
        cast = sample.to(dtype)
        clean = run(op, backend, cast)
        with poisoned_empty():
            poisoned = run(op, backend, cast)
        compare_bits(op, cast, clean, poisoned, "an element was left as it was allocated")


def nan_in_nan_out(op: Op, backend: str) -> None:
    """7: a NaN in any floating-point input makes the loss, or an output of its row, NaN."""
    for sample in small_first(op, 4):
        for name, value in sample.tensors.items():
            if value is None or (isinstance(value, Tensor) and not value.is_floating_point()):
                continue
            spoiled = dict(sample.tensors)
            if isinstance(value, list):
                # a sparse teacher's first tensor holds integers
                number = next(i for i, t in enumerate(value) if t.is_floating_point())
                first = value[number].clone()
                first.view(-1)[0] = torch.nan
                spoiled[name] = [*value[:number], first, *value[number + 1 :]]
            else:
                spoiled[name] = value.clone()
                spoiled[name].reshape(-1)[:] = torch.nan
            outputs = run(op, backend, replace(sample, tensors=spoiled)).outputs
            seen = any(bool(t.isnan().any()) for t in outputs if t.is_floating_point())
            assert seen, f"{op.name} [{sample.name}]: NaN in {name} passed silently"


class _Recorder(TorchDispatchMode):
    """Remembers the calls of our own ops, for opcheck."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdkernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def passes_opcheck(op: Op, backend: str) -> None:
    """8: torch.library.opcheck of every raw op that a call dispatches."""
    if backend == "eager":
        return

    def detached(value):
        if isinstance(value, Tensor):
            return value.detach().clone()
        return [detached(v) for v in value] if isinstance(value, list) else value

    seen = 0
    for sample in small_first(op, 3):
        recorder = _Recorder()
        with recorder:
            run(op, backend, sample)
        for func, args, kwargs in recorder.calls:
            torch.library.opcheck(func, tuple(map(detached, args)), kwargs)
            seen += 1
    assert seen > 0, f"{op.name}: no op of ours was dispatched on backend {backend}"


def compiles_whole(op: Op, backend: str, compiler: str = "aot_eager") -> None:
    """9: torch.compile(fullgraph=True), forward and backward, gives the same numbers."""
    torch._dynamo.reset()
    for sample in small_first(op, 2):
        plain = run(op, backend, sample)
        compiled = torch.compile(op.function, fullgraph=True, backend=compiler)
        result = run(replace(op, function=compiled), backend, sample)
        pairs = zip(plain.outputs + plain.gradients, result.outputs + result.gradients, strict=True)
        for want, got in pairs:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch._dynamo.reset()


@cache
def products_depend_on_threads() -> bool:
    """True where the BLAS gives a deep product other last bits at another number of threads, as MKL
    does on Intel's processors.
    """
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    left, right = (torch.randn(*shape, generator=generator) for shape in ((16, 8192), (8192, 16)))
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        found.append(left @ right)
    torch.set_num_threads(threads)
    return not all(torch.equal(found[0], other) for other in found[1:])


def compare_rounded(op: Op, sample: Sample, first: Result, again: Result, what: str) -> None:
    """Outputs and gradients that differ by the order of a product's additions at most."""
    pairs = zip(first.outputs + first.gradients, again.outputs + again.gradients, strict=True)
    for was, now in pairs:
        bits = torch.finfo(was.dtype).eps if was.is_floating_point() else 0.0
        largest = was.nan_to_num(0, 0, 0).abs().max().item() if was.numel() else 0.0
        torch.testing.assert_close(
            now,
            was,
            rtol=16 * bits,
            atol=64 * bits * largest,
            equal_nan=True,
            msg=lambda found: f"{op.name} [{sample.name}]: {what}: {found}",
        )


def same_bits_twice(op: Op, backend: str, dtype: torch.dtype) -> None:
    """10: the same bits on every run, and at any number of threads where the BLAS allows it."""
    threads = torch.get_num_threads()
    for sample in op.samples:
        cast = sample.to(dtype)
        first = run(op, backend, cast)
        for number in (threads, 1, 3) if backend == "native" else (threads,):
            torch.set_num_threads(number)
            try:
                again = run(op, backend, cast)
            finally:
                torch.set_num_threads(threads)
            rounded = number != threads and op.name in MULTIPLYING and products_depend_on_threads()
            compare = compare_rounded if rounded else compare_bits
            compare(op, cast, first, again, f"other bits with {number} threads")


def no_gradient_without_asking(op: Op, backend: str) -> None:
    """Under no_grad, and where no input needs one, the outputs are the same and carry no graph."""
    for sample in small_first(op, 3):
        arguments, _ = leaves(sample)
        with_graph = flatten(op.function(**arguments, **sample.options, backend=backend))
        with torch.no_grad():
            without = flatten(op.function(**arguments, **sample.options, backend=backend))
        for want, got in zip(with_graph, without, strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)


def refuses_forward_mode(op: Op, backend: str) -> None:
    """A forward-mode derivative or a torch.func transform is refused by kernels, not dropped."""
    if backend == "eager":
        return
    for sample in small_first(op, 1):
        for name in sample.differentiable:
            value = sample.tensors[name]
            first = value[0] if isinstance(value, list) else value

            def call(x, name=name, value=value, sample=sample):
                new = [x, *value[1:]] if isinstance(value, list) else x
                arguments = {**sample.tensors, name: new}
                return flatten(op.function(**arguments, **sample.options, backend=backend))[0].sum()

            for transform in (
                lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
                lambda f, x: torch.func.grad(f)(x),
            ):
                try:
                    transform(call, first)
                except RuntimeError as error:
                    assert 'backend="eager"' in str(error), f"{op.name}: {error}"
                else:
                    raise AssertionError(f"{op.name}: a transform passed silently")


def unmoved_by_the_default_dtype(op: Op, backend: str) -> None:
    """With another default dtype the outputs have the same dtypes and the same bits."""
    for sample in small_first(op, 3):
        plain = run(op, backend, sample)
        torch.set_default_dtype(torch.float64)
        try:
            again = run(op, backend, sample)
        finally:
            torch.set_default_dtype(torch.float32)
        pairs = zip(plain.outputs + plain.gradients, again.outputs + again.gradients, strict=True)
        for want, got in pairs:
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def unmoved_by_autocast(op: Op, backend: str) -> None:
    """Under autocast inputs are taken as given: the same numbers. For kernels in backward too;
    torch differentiates eager's products by the autocast mode of backward."""
    for sample in small_first(op, 3):
        plain = run(op, backend, sample)
        with torch.autocast(op.device, dtype=torch.bfloat16, enabled=backend != "eager"):
            cast = run(op, backend, sample, autocast=True)
        pairs = zip(plain.outputs + plain.gradients, cast.outputs + cast.gradients, strict=True)
        for want, got in pairs:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


def rejects_bad_arguments(op: Op, backend: str) -> None:
    """12: an unknown backend, a dtype, a device and a shape that are wrong: ValueError, named."""
    sample = small_first(op, 1)[0]
    first = next(k for k, v in sample.tensors.items() if v is not None)
    value = sample.tensors[first]

    def broken(change) -> dict[str, Argument]:
        new = [change(t) for t in value] if isinstance(value, list) else change(value)
        return {**sample.tensors, first: new}

    calls = {
        "unknown backend": (sample.tensors, {"backend": "fast"}),
        "integers": (broken(lambda t: t.long()), {"backend": backend}),
        "other shape": (broken(lambda t: t.reshape(-1)[None, None, :-1]), {"backend": backend}),
        "no tensor": ({**sample.tensors, first: "logits"}, {"backend": backend}),
        "sparse": (broken(lambda t: t.to_sparse()), {"backend": backend}),
    }
    if len([v for v in sample.tensors.values() if v is not None]) > 1:
        calls["other device"] = (broken(lambda t: t.to("meta")), {"backend": backend})
    for what, (tensors, extra) in calls.items():
        try:
            op.function(**tensors, **sample.options, **extra)
        except ValueError as error:
            assert str(error).startswith(f"{op.name}: "), f"{op.name} [{what}]: {error}"
        else:
            raise AssertionError(f"{op.name}: {what} passed silently")


def half_survives_loss_scale(op: Op, backend: str | None = None) -> None:
    """13: float16 soft gradient at C=93,431, loss scale 65,536: relative L2 error at most 1e-3."""
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(8, 93431, generator=generator).half().to(op.device).requires_grad_()
    teacher = torch.randn(8, 93431, generator=generator).half().to(op.device)
    target = torch.randint(93431, (8,), generator=generator).to(op.device)
    loss = op.function(student, teacher, target, backend=backend)
    (got,) = torch.autograd.grad(loss, student, torch.full_like(loss, 65536.0))
    wide = student.detach().double().requires_grad_()
    truth = kdkernels.kd_cross_entropy(wide, teacher.double(), target, backend="eager")
    (want,) = torch.autograd.grad(truth, wide, torch.full_like(truth, 65536.0))
    others = torch.ones_like(want).scatter_(1, target[:, None], 0.0)
    relative = ((got.double() - want) * others).norm() / (want * others).norm()
    assert relative <= 1e-3, f"{op.name}: {float(relative):.2e} of the soft gradient is lost"


def available_backends(name: str, device: str = "cpu") -> tuple[str, ...]:
    """The backends to judge on a device, those of the interpreter on the CPU among them."""
    return backends(name, device.split(":")[0])
