"""Promises about addresses, labels on a device, and CUDA: the promises that only a GPU can break.

Functions of (Op, backend) like those of contract.py. Those that need a GPU are run where there is
one; they are written for kernels, not for eager.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from contract import (
    Op,
    Result,
    accuracy,
    compare,
    compare_bits,
    flatten,
    incoming_for,
    leaves,
    run,
    size_of,
    small_first,
)
from torch import Tensor

import kdkernels
from kdkernels.batch_triplet_loss.samples import make as make_batch
from kdkernels.kd_cross_entropy.samples import make as make_kd
from kdkernels.registration import raw
from kdkernels.sample import Argument, Sample, keep_strides

GB = 2**30


def with_pitch(value: Tensor, pitch: int) -> Tensor:
    """A bfloat16 copy of a matrix whose rows lie `pitch` elements apart."""
    memory = torch.empty(
        (len(value) - 1) * pitch + value.shape[1], dtype=torch.bfloat16, device=value.device
    )
    return memory.as_strided(value.shape, (pitch, 1)).copy_(value)


def _has_three_rows(sample: Sample) -> bool:
    tensors = flatten([v for v in sample.tensors.values() if v is not None])
    return all(t.dim() <= 2 and t.shape[:1] >= (3,) for t in tensors)


def wide_strides(op: Op, backend: str) -> None:
    """11: row offsets beyond 2^31 elements are right (the pages between stay untouched)."""
    sample = next(s for s in small_first(op, len(op.samples)) if _has_three_rows(s))

    def spread(pitch: int) -> Sample:
        def one(value: Tensor) -> Tensor:
            is_matrix = value.dim() == 2 and value.is_floating_point()
            return with_pitch(value[:3], pitch) if is_matrix else value[:3]

        tensors = {
            name: [one(t) for t in value]
            if isinstance(value, list)
            else None
            if value is None
            else one(value)
            for name, value in sample.tensors.items()
        }
        return replace(sample, tensors=tensors)

    # both pitches are whole vectors: rows are cut, and sums ordered, in the same way
    far, near = run(op, backend, spread(2**30 + 8)), run(op, backend, spread(4096))
    compare_bits(op, sample, near, far, "wrong address")


def bad_labels_are_caught(op: Op, backend: str) -> None:
    """7: a label that is no class raises on the CPU; elsewhere it makes its row NaN, alone, and
    raises under kdkernels.validate(True)."""
    for rows, classes in ((9, 101), (7, 20_001), (2, 70_001)):
        generator = torch.Generator().manual_seed(2)
        student = torch.randn(rows, classes, generator=generator).to(op.device).requires_grad_()
        teacher = torch.randn(rows, classes, generator=generator).to(op.device)
        bad = torch.zeros(rows, dtype=torch.int64, device=op.device)
        bad[0], bad[-1] = classes, -7
        options = {"reduction": "none", "backend": backend}
        off_cpu = op.device != "cpu"
        kdkernels.validate(off_cpu)
        try:
            op.function(student, teacher, bad, **options)
        except ValueError as error:
            named = str(error).startswith(f"{op.name}: target")
        else:
            raise AssertionError(f"{op.name}: a bad label passed silently")
        finally:
            kdkernels.validate(False)
        assert named
        if off_cpu:
            loss = op.function(student, teacher, bad, **options)
            (gradient,) = torch.autograd.grad(loss.sum(), student)
        elif backend == "triton":  # the kernel itself, as a GPU runs it
            with torch.no_grad():
                loss, _, gradient, _ = raw(op.name, backend)(
                    student, teacher, bad, 3.0, 1.0, -100, 0.0, "none", True, False
                )
        else:
            continue
        want = [row in (0, rows - 1) for row in range(rows)]
        assert loss.isnan().tolist() == want
        assert gradient.isnan().all(dim=1).tolist() == want
        assert gradient.isnan().any(dim=1).tolist() == want


def past_two_to_the_31(op: Op, backend: str, elements: int = 2**31) -> None:
    """11: tensors of more than `elements` elements give right results at their far end."""
    LARGE[op.name](op, backend, elements)


def memory_for(elements: int) -> int:
    """Bytes that past_two_to_the_31 needs at most: seven bfloat16 tensors."""
    return 7 * 2 * elements + 4 * GB


def _normal(op: Op, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    generator = torch.Generator(device=op.device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=op.device).normal_(generator=generator)


def _same_as_last_rows(op: Op, backend: str, sample: Sample, rows: int = 3) -> None:
    """The last rows' losses and gradients are those of a call of these rows alone, on eager."""
    far = run(op, backend, sample)
    last = {name: None if v is None else v[-rows:].clone()
            for name, v in sample.tensors.items() if not isinstance(v, list)}  # fmt: skip
    arguments, inputs = leaves(replace(sample, tensors=last))
    wide = {
        name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for name, v in arguments.items()
    }
    arrives = incoming_for(far.outputs[0], "rows")[-rows:]

    def on_eager(given: dict[str, Argument]) -> Result:
        loss = op.function(**given, **sample.options, backend="eager")
        return Result([loss.detach()], list(torch.autograd.grad(loss, inputs, arrives.to(loss))))

    eager, truth = on_eager(arguments), on_eager(wide)
    compare(op.name, far.outputs[0][-rows:], eager.outputs[0], truth.outputs[0])
    for got, by_eager, true in zip(far.gradients, eager.gradients, truth.gradients, strict=True):
        compare(f"{op.name} gradient", got[-rows:], by_eager, true)


def _large_kd(op: Op, backend: str, elements: int) -> None:
    classes = min(93_431, elements // 8 + 1)
    rows = elements // classes + 4
    tensors: dict[str, Argument] = {
        "student": _normal(op, rows, classes),
        "teacher": _normal(op, rows, classes, seed=2),
        "target": torch.arange(rows, device=op.device) % classes,
    }
    _same_as_last_rows(op, backend, Sample("", tensors, {"reduction": "none"}, ("student",)))


def _large_head(op: Op, backend: str, elements: int) -> None:
    """Logits of 0 but for the last classes, which the far end of the weight makes 1, 2 and 3."""
    features = min(512, elements // 8 + 1)
    classes = elements // features + 4
    weight = torch.zeros(classes, features, dtype=torch.bfloat16, device=op.device)
    weight[-3:, -1] = torch.arange(1, 4, device=op.device)
    weight.requires_grad_()
    x = torch.ones(3, features, dtype=torch.bfloat16, device=op.device)
    target = torch.arange(classes - 3, classes, device=op.device)
    loss = op.function(x, weight, target, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss, weight)
    far = torch.arange(1, 4, device=op.device, dtype=torch.float64)
    total = far.exp().sum() + (classes - 3)
    torch.testing.assert_close(loss.double(), 3 * total.log() - far.sum(), rtol=1e-5, atol=0)
    want = (3 * far.exp() / total - 1)[:, None].expand(3, features)
    torch.testing.assert_close(gradient[-3:].double(), want, rtol=1e-2, atol=0)
    assert float(gradient[-4, 0]) > 0


def _large_triplets(op: Op, backend: str, elements: int) -> None:
    features = min(4099, elements // 8 + 1)
    rows = elements // features + 4
    names = ("anchor", "positive", "negative")
    tensors: dict[str, Argument] = {
        name: _normal(op, rows, features, seed=seed) for seed, name in enumerate(names)
    }
    sample = Sample("", tensors, {"reduction": "none", "margin": 90.0}, names)
    _same_as_last_rows(op, backend, sample)


def _large_pair(op: Op, backend: str, elements: int) -> None:
    student = torch.zeros(elements + 9, dtype=torch.bfloat16, device=op.device)
    student[-5:] = 1.0
    tensors: dict[str, Argument] = {"students": [student], "teachers": [torch.zeros_like(student)]}
    sample = Sample("", tensors, {"reduction": "sum"}, ("students",))
    result = run(op, backend, sample, "one")
    assert float(result.outputs[0]) == 5.0
    (gradient,) = result.gradients
    assert gradient[-6:].tolist() == [0.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert float(gradient.sum(dtype=torch.float32)) == 10.0


def _large_gallery(op: Op, backend: str, elements: int) -> None:
    features = min(512, elements // 8 + 1)
    gallery = _normal(op, elements // features + 4, features)
    queries = gallery[-3:].clone()
    distance, index = op.function(queries, gallery, backend=backend)
    assert index.tolist() == list(range(len(gallery) - 3, len(gallery)))
    assert distance.tolist() == [0.0, 0.0, 0.0]


def _large_batch(op: Op, backend: str, elements: int) -> None:
    rows = int(elements**0.5) // 2 * 2 + 4  # pairs of rows are what there are many of
    x = _normal(op, rows, 16, dtype=torch.float32)
    labels = torch.arange(rows, device=op.device) // 2
    options = {"reduction": "none", "margin": 40.0}
    sample = Sample("", {"embeddings": x, "labels": labels}, options, ("embeddings",))
    result = run(op, backend, sample, "one")
    distance = (x[-4:, None].double() - x[None].double()).square().sum(dim=2)
    same = labels[-4:, None] == labels
    hardest = distance.masked_fill(~same, -1.0).amax(1) + 40.0
    want = hardest - distance.masked_fill(same, torch.inf).amin(1)
    torch.testing.assert_close(result.outputs[0][-4:].double(), want.clamp(min=0.0))
    # a common shift of all rows changes no distance
    total = result.gradients[0].double().sum(dim=0)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-3 * rows**0.5)


LARGE: dict[str, Callable[[Op, str, int], None]] = {
    "kd_cross_entropy": _large_kd,
    "linear_kd_cross_entropy": _large_head,
    "hidden_l2": _large_pair,
    "triplet_loss": _large_triplets,
    "batch_triplet_loss": _large_batch,
    "nearest_neighbor": _large_gallery,
}


def _classes_by_every_path(op: Op) -> list[Sample]:
    """Rows in two sweeps, rows split over programs, and more rows than a program counts itself."""
    rows_of = importlib.import_module("kdkernels.triton_common")
    kernel = importlib.import_module("kdkernels.kd_cross_entropy.triton_kernel")
    many = rows_of.multiprocessors(torch.empty(0, device=op.device).device) + 1
    wide = kernel.ONE_TILE_CLASSES + 27
    split = 2 * kernel.PART_CLASSES + 5  # two parts at least, the last one short
    anything = {"temperature": 2.5, "label_smoothing": 0.1, "return_terms": True}
    each = {"reduction": "none", "ignored": 1}
    return [
        make_kd(rows, max(wide, classes), device=op.device, **options)
        for rows, classes in ((many, wide), (2, split))
        for options in ({}, anything, each)
    ] + [make_kd(kernel.COUNTED_HERE + 2, 37, device=op.device, ignored=3)]


def _batches_by_every_path(op: Op) -> list[Sample]:
    """More rows than lie in one chunk of anchors, so tiles for "hard"."""
    batch = importlib.import_module("kdkernels.batch_triplet_loss.triton_kernel")
    identities = int(batch.CHUNK_ELEMENTS**0.5) // 4 + 2
    found = []
    for mining in ("hard", "semihard", "all"):
        for reduction in ("mean", "none"):
            options = {"mining": mining, "reduction": reduction, "margin": 1.0}
            found.append(make_batch([4] * identities, 12, device=op.device, **options))
    return found


LARGE_PATHS = {
    "kd_cross_entropy": _classes_by_every_path,
    "batch_triplet_loss": _batches_by_every_path,
}


def paths_of_large_problems(op: Op, backend: str) -> None:
    """1: shapes just above what a kernel takes in one go, against eager in float64."""
    samples = LARGE_PATHS[op.name](op)
    assert samples
    accuracy(replace(op, samples=tuple(samples)), backend, torch.float32)


def no_host_synchronization(op: Op, backend: str) -> None:
    """10: nothing in forward or backward waits for the GPU."""
    for sample in op.samples:
        run(op, backend, sample)  # compiles and loads
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(op, backend, sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _own_copy(sample: Sample) -> Sample:
    """The sample over memory of its own, strides kept, so that values may change."""

    def copy(value: Tensor) -> Tensor:
        return value if 0 in value.stride() else keep_strides(value, value.dtype)

    tensors: dict[str, Argument] = {}
    for name, value in sample.tensors.items():
        if isinstance(value, list):
            tensors[name] = [copy(t) for t in value]
        else:
            tensors[name] = None if value is None else copy(value)
    return replace(sample, tensors=tensors)


def _change(sample: Sample) -> None:
    """Other values in the same memory."""
    for value in flatten([v for v in sample.tensors.values() if v is not None]):
        if 0 not in value.stride() and value.numel() > 1:
            value.copy_(value.flip(0) * (1 if not value.is_floating_point() else 0.75))


def same_bits_from_a_graph(op: Op, backend: str) -> None:
    """10: forward and backward captured in a CUDA graph; replays give the bits of a direct call,
    also after the inputs have changed."""
    for sample in op.samples:
        if size_of(sample) == 0:
            continue  # nothing to launch
        sample = _own_copy(sample)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(op, backend, sample)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(op, backend, sample)
        for when in ("a replay", "a replay with other inputs"):
            for t in captured.outputs + captured.gradients:
                t.fill_(torch.nan if t.is_floating_point() else -1)
            graph.replay()
            direct = run(op, backend, sample)
            compare_bits(op, sample, direct, captured, f"{when} gives other bits")
            _change(sample)


def same_bits_on_another_stream(op: Op, backend: str) -> None:
    """14: kernels run on the current stream, after what was put there before them."""
    for sample in small_first(op, 8):
        want = run(op, backend, sample)
        late = _own_copy(sample)
        right = flatten([v for v in sample.tensors.values() if v is not None])
        memory = flatten([v for v in late.tensors.values() if v is not None])
        fresh = [(m, r) for m, r in zip(memory, right, strict=True) if m is not r]
        for there, _ in fresh:
            there.zero_()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # about 30 ms
            for there, value in fresh:
                there.copy_(value)
            got = run(op, backend, late)
        side.synchronize()
        compare_bits(op, sample, want, got, "another stream gives other bits")
