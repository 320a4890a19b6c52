"""The three ways through the Triton row kernels: in the interpreter, or on a GPU if there is one.

`TRITON_INTERPRET=1 python -m pytest tests/gpu/test_kd_cross_entropy_triton.py` runs all of it.
"""

from dataclasses import replace

import pytest
import torch
from contract import IS_FULL, accuracy, find_op
from contract_device import paths_of_large_problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kd_cross_entropy import calls

from kdkernels import backends, kd_cross_entropy
from kdkernels.kd_cross_entropy.samples import make

pytest.importorskip("triton")
from kdkernels import triton_common
from kdkernels.kd_cross_entropy import triton_kernel
from kdkernels.kd_cross_entropy.triton_kernel import make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    "triton" not in backends("kd_cross_entropy", DEVICE),
    reason="no GPU, and Triton's interpreter is off: TRITON_INTERPRET=1 turns it on",
)
PATHS = ("a row in registers", "two sweeps", "split rows")


def take(path: str, monkeypatch) -> None:
    """Makes small problems take the path of large ones."""
    if path != "a row in registers":
        monkeypatch.setattr(triton_kernel, "ONE_TILE_CLASSES", 0)
    # down to a class a part: parts without any occur
    monkeypatch.setattr(triton_kernel, "PART_CLASSES", 1)
    monkeypatch.setattr(triton_kernel, "PROGRAMS_WANTED", 1)
    side_by_side = 1 if path == "two sweeps" else 10
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: side_by_side)


@runs
@pytest.mark.parametrize("path", PATHS[1:])
def test_every_sample_by_the_paths_of_large_rows(path, monkeypatch):
    take(path, monkeypatch)
    op = find_op("kd_cross_entropy", DEVICE)
    small = [s for s in op.samples if s.tensors["student"].numel() < 20_000]
    part = PATHS.index(path)  # of the longer rows a third per path, all with PROVE=1
    some = [
        s
        for number, s in enumerate(small)
        if IS_FULL or s.tensors["student"].numel() < 2_000 or number % 3 == part
    ]
    assert len(some) > 15
    accuracy(replace(op, samples=tuple(some)), "triton", torch.float32)


@runs
@pytest.mark.skipif(DEVICE != "cpu", reason="hypothesis draws CPU tensors of any stride")
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sample=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_call_by_any_path(path, sample, dtype):
    with pytest.MonkeyPatch.context() as monkeypatch:
        take(path, monkeypatch)
        accuracy(replace(find_op("kd_cross_entropy"), samples=(sample,)), "triton", dtype)


@runs
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bfloat16,) * 2],
    ids=str,
)
def test_networks_of_different_dtypes(dtypes, path, monkeypatch):
    take(path, monkeypatch)
    sample = make(5, 77, device=DEVICE)
    student, teacher = (
        sample.tensors[k].to(d) for k, d in zip(sample.tensors, dtypes, strict=False)
    )
    target = sample.tensors["target"]
    got, terms = kd_cross_entropy(student, teacher, target, return_terms=True, backend="triton")
    want, true_terms = kd_cross_entropy(
        student.double(), teacher.double(), target, return_terms=True, backend="eager"
    )
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    for term, true_term in zip(terms, true_terms, strict=True):
        assert float(term) == pytest.approx(float(true_term), rel=1e-5)


@runs
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("label", [0, 1, 3, 4, 5, 2045, 2046])
def test_the_labels_column_is_right_wherever_the_row_is_cut(label, path, monkeypatch):
    # rows of an odd pitch, so heads of every length; the column is written twice, in this order
    take(path, monkeypatch)
    student = torch.randn(8, 2047, generator=torch.Generator().manual_seed(label)).to(DEVICE)
    student.requires_grad_()
    teacher, target = student.detach().flip(0).contiguous(), torch.full((8,), label, device=DEVICE)
    found = []
    for backend in ("triton", "eager"):
        loss = kd_cross_entropy(student, teacher, target, reduction="sum", backend=backend)
        found.append(torch.autograd.grad(loss, student)[0][:, label])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@runs
@pytest.mark.parametrize("path", PATHS)
def test_ties_across_tiles_and_parts_hit_only_at_the_first(path, monkeypatch):
    take(path, monkeypatch)
    student = torch.zeros(4, 3000, device=DEVICE)
    student[:, [7, 1500, 2999]] = 5.0
    target = torch.tensor([7, 1500, 2999, 8], device=DEVICE)
    _, terms = kd_cross_entropy(student, None, target, return_terms=True, backend="triton")
    assert (float(terms.hits), float(terms.count)) == (1.0, 4.0)


@runs
@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_contract.py runs it, at full size")
def test_the_devices_own_check_takes_every_path(monkeypatch):
    for name, value in {"ONE_TILE_CLASSES": 32, "PART_CLASSES": 40, "COUNTED_HERE": 12}.items():
        monkeypatch.setattr(triton_kernel, name, value)
    launched = set()
    launch = triton_common.launch

    def see(kernel, *arguments, **options):
        launched.add(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", see)
    paths_of_large_problems(find_op("kd_cross_entropy"), "triton")
    paths = {"two_sweeps", "split_statistics", "split_gradient", "_count_rows", "_give_rows"}
    assert paths <= launched


@runs
def test_more_rows_than_a_program_counts_itself(monkeypatch):
    monkeypatch.setattr(triton_kernel, "COUNTED_HERE", 3)
    op = find_op("kd_cross_entropy", DEVICE)
    named = [s for s in op.samples if "rows" in s.name or "ignore" in s.name or "101" in s.name]
    assert len(named) > 4
    accuracy(replace(op, samples=tuple(named)), "triton", torch.float32)


@runs
@pytest.mark.parametrize("path", PATHS)
def test_extreme_ratios_of_logit_and_temperature_stay_finite(path, monkeypatch):
    take(path, monkeypatch)
    for scale, temperature in ((1e9, 3.0), (1e4, 1e-5), (3e38, 3.0)):
        student = torch.tensor([[1.0, 0, -1], [-1, 1, 0.5]], device=DEVICE) * scale
        student.requires_grad_()
        target = torch.tensor([0, 1], device=DEVICE)
        loss = kd_cross_entropy(
            student, student.detach(), target, temperature=temperature, backend="triton"
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(loss.detach()) == 0.0
        assert gradient.abs().max() == 0.0


@runs
def test_alpha_0_takes_a_teacher_of_nan_out_of_the_gradient():
    student = torch.randn(2, 9, device=DEVICE, requires_grad=True)
    teacher, target = torch.full((2, 9), torch.nan, device=DEVICE), torch.tensor([1, 8]).to(DEVICE)
    loss = kd_cross_entropy(student, teacher, target, alpha=0.0, backend="triton")
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def plan_of(student, teacher=None, temperature=3.0, parts=0, gradient=None):
    return make_plan(
        student,
        teacher,
        gradient,
        has_target=True,
        temperature=temperature,
        smoothing=False,
        terms=False,
        divisor="one",
        parts=parts,
    )


@pytest.mark.parametrize("classes", [10575, 85742, 93431])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_class_count_of_the_field_costs_the_16_byte_accesses(classes, dtype):
    logits = [torch.empty(4, classes, dtype=dtype) for _ in range(3)]
    plan = plan_of(*logits[:2], parts=int(classes > 16384), gradient=logits[2])
    assert plan.wide_student
    assert plan.wide_teacher
    assert plan.wide_gradient


def test_rows_that_are_aligned_unlike_are_not_taken_for_aligned():
    wide, other = torch.empty(4, 1004), torch.empty(4, 1005)
    assert plan_of(wide[:, 1:1001], wide[:, 1:1001]).wide_teacher
    assert plan_of(wide[:, 1:1001], wide[:, :1000]).wide_student
    assert not plan_of(wide[:, 1:1001], wide[:, :1000]).wide_teacher
    assert not plan_of(wide[:, :1000], other[:, :1000]).wide_teacher
    assert plan_of(wide[:1, :1000], other[:1, :1000]).wide_teacher  # one row has no pitch
    narrow = torch.empty(4, 1004, dtype=torch.bfloat16)
    assert plan_of(wide[:, :1000], narrow[:, :1000]).pivot_is_teacher
    assert plan_of(wide[:, :1000], narrow[:, :1000]).wide_student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 8, 100, 128, 129, 1000, 5000, 10575, 16384])
def test_tiles_cover_the_row_and_unmasked_ones_lie_within_it(classes, dtype):
    logits = torch.empty(4, classes, dtype=dtype)
    for temperature in (3.0, 2.5):
        plan = plan_of(logits, logits, temperature)
        tile = plan.lanes * plan.vec
        assert plan.tiles * tile >= classes
        # the longest head leaves the shortest body
        assert plan.full * tile <= max(0, (classes - (plan.vec - 1)) // plan.vec * plan.vec)
        assert plan.tiles * plan.vec * (2 if plan.power else 3) <= 96
        assert plan.lanes in (32, 64, 128, 256, 512, 1024)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 8.0, 9.0, 2.5, 0.5])
def test_any_temperature_takes_the_same_kernel(temperature):
    logits = torch.empty(4, 100)
    power = plan_of(logits, logits, temperature).power
    assert power == (temperature if temperature in (1.0, 3.0, 8.0) else 0)


def test_a_plan_depends_neither_on_rows_nor_on_the_exact_class_count():
    a, b = torch.empty(4, 10575), torch.empty(1000, 10577)
    assert plan_of(a, a) == plan_of(b, b)
