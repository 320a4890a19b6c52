"""The mathematics of hidden_l2: values worked by hand, torch's own loss, layouts, float16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdkernels import HiddenL2Loss, hidden_l2
from kdkernels.backends import backends
from kdkernels.hidden_l2.samples import make

BACKENDS = backends("hidden_l2", "cpu")
both = pytest.mark.parametrize("backend", BACKENDS)
KERNELS = [name for name in BACKENDS if name != "eager"]
each_kernel = pytest.mark.parametrize("backend", KERNELS)
native = pytest.mark.skipif(
    "native" not in BACKENDS, reason="runs where kdkernels._native is built"
)
triton = pytest.mark.skipif("triton" not in BACKENDS, reason="runs under TRITON_INTERPRET=1")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pairs_of(sample) -> tuple[list[Tensor], list[Tensor]]:
    return [t.requires_grad_() for t in sample.tensors["students"]], sample.tensors["teachers"]


def gradients(students, teachers, incoming=None, **options) -> tuple[Tensor, ...]:
    return torch.autograd.grad(hidden_l2(students, teachers, **options), students, incoming)


@both
def test_two_pairs_worked_by_hand(backend):
    # ||(1, 2) - (0, 4)||^2 = 5 over one row of two numbers; ||(1, 0, 3) - (1, 2, 0)||^2 = 4 + 9
    # over three rows of one.
    students = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [0.0], [3.0]])]
    teachers = [torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0], [2.0], [0.0]])]
    for reduction, want in (("sum", (5, 13)), ("batchmean", (5, 13 / 3)), ("mean", (2.5, 13 / 3))):
        loss, terms = hidden_l2(
            students,
            teachers,
            weights=[2.0, 0.5],
            reduction=reduction,
            return_terms=True,
            backend=backend,
        )
        assert float(loss.detach()) == pytest.approx(2.0 * want[0] + 0.5 * want[1])
        assert terms.tolist() == pytest.approx(list(want))


@both
def test_gradient_worked_by_hand(backend):
    student = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    (got,) = gradients(
        [student],
        [teacher],
        torch.tensor(0.5),
        weights=[3.0],
        reduction="batchmean",
        backend=backend,
    )
    # incoming 1/2 times weight 3 times 2 (s - t) / 2 rows
    assert torch.equal(got, torch.tensor([[1.5, -3.0], [0.0, 6.0]]))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_equals_the_sum_of_torchs_mse_losses(backend, dtype):
    shapes = [(8, 16, 7, 7), (8, 33), (5,)]
    students, teachers = pairs_of(make(shapes, seed=2).to(dtype))
    wide = [s.detach().double().requires_grad_() for s in students]
    want = sum(F.mse_loss(s, t.double()) for s, t in zip(wide, teachers, strict=True))
    loss = hidden_l2(students, teachers, reduction="mean", backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
    got = torch.autograd.grad(loss, students)
    for g, w in zip(got, torch.autograd.grad(want, wide), strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, w.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-7)


@both
def test_terms_add_up_to_the_loss_and_carry_no_gradient(backend):
    students, teachers = pairs_of(make([(4, 9), (3, 5, 2), (7,)], seed=3))
    weights = [0.3, 0.0, 2.0]
    loss, terms = hidden_l2(students, teachers, weights=weights, return_terms=True, backend=backend)
    assert terms.shape == (3,)
    assert not terms.requires_grad
    assert float((terms * torch.tensor(weights)).sum()) == pytest.approx(
        float(loss.detach()), rel=1e-6
    )


@both
def test_a_weight_tensor_equals_the_numbers_in_it(backend):
    students, teachers = pairs_of(make([(4, 9), (3, 5)], seed=4))
    weights = torch.tensor([0.25, -3.0], requires_grad=True)
    a = hidden_l2(students, teachers, weights=weights, backend=backend)
    b = hidden_l2(students, teachers, weights=weights.tolist(), backend=backend)
    assert torch.equal(a, b)
    a.backward()
    assert weights.grad is None


@both
def test_a_pair_of_weight_zero_has_gradient_zero(backend):
    students, teachers = pairs_of(make([(4, 9), (3, 5)], seed=5))
    got = gradients(students, teachers, weights=[0.0, 1.0], backend=backend)
    assert not got[0].any()
    assert got[1].any()


@both
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pair_of_weight_zero_lets_no_nan_through(backend, dtype, as_tensor):
    students, teachers = pairs_of(make([(3, 5), (4, 20_000), (2, 3)], seed=6).to(dtype))
    with torch.no_grad():
        students[1][0, 3], teachers[1][2, 7], students[2][0] = torch.nan, torch.inf, torch.nan
    students[0], teachers[0] = students[0].t(), teachers[0].t()
    for weights in ([0.5, 0.0, 0.0], [0.0, 0.0, 0.0]):
        loss, terms = hidden_l2(
            students,
            teachers,
            weights=torch.tensor(weights) if as_tensor else weights,
            return_terms=True,
            backend=backend,
        )
        got = torch.autograd.grad(loss, students)
        assert float(loss.detach()) == pytest.approx(0.5 * float(terms[0]) if weights[0] else 0.0)
        assert terms[1:].tolist() == [0.0, 0.0]
        assert not got[1].any()
        assert not got[2].any()
        assert bool(got[0].any()) == bool(weights[0])


@both
def test_pairs_without_elements_give_zero(backend):
    students = [torch.zeros(0, 4, requires_grad=True), torch.zeros(3, 0, requires_grad=True)]
    teachers = [torch.zeros(0, 4), torch.zeros(3, 0)]
    for reduction in ("batchmean", "mean", "sum"):
        loss, terms = hidden_l2(
            students, teachers, reduction=reduction, return_terms=True, backend=backend
        )
        assert float(loss.detach()) == 0.0
        assert terms.tolist() == [0.0, 0.0]
        got = torch.autograd.grad(loss, students)
        assert [g.shape for g in got] == [(0, 4), (3, 0)]


@both
def test_one_tensor_is_a_list_of_one(backend):
    (student,), (teacher,) = pairs_of(make([(5, 6)], seed=6))
    alone = hidden_l2(student, teacher, backend=backend)
    assert torch.equal(alone, hidden_l2([student], [teacher], backend=backend))
    assert torch.equal(alone, hidden_l2((student,), (teacher,), backend=backend))


@both
def test_only_students_that_require_a_gradient_get_one(backend):
    students, teachers = pairs_of(make([(4, 9), (3, 5)], seed=7))
    students[0] = students[0].detach()
    teachers = [t.requires_grad_() for t in teachers]
    hidden_l2(students, teachers, backend=backend).backward()
    assert students[0].grad is None
    assert students[1].grad is not None
    assert all(t.grad is None for t in teachers)


@both
def test_a_student_in_two_pairs_gets_both_gradients(backend):
    (student,), (teacher,) = pairs_of(make([(5, 6)], seed=8))
    (got,) = torch.autograd.grad(
        hidden_l2([student, student], [teacher, -teacher], reduction="sum", backend=backend),
        student,
    )
    torch.testing.assert_close(got, 4 * student.detach())


@both
def test_mixed_dtypes_within_a_pair_and_between_pairs(backend):
    students, teachers = pairs_of(make([(6, 50), (6, 51), (6, 52)], seed=9))
    students = [
        s.detach().to(dtype).requires_grad_() for s, dtype in zip(students, DTYPES, strict=True)
    ]
    teachers = [t.to(dtype) for t, dtype in zip(teachers, reversed(DTYPES), strict=True)]
    got = gradients(students, teachers, reduction="mean", backend=backend)
    for g, s, t in zip(got, students, teachers, strict=True):
        assert g.dtype == s.dtype
        want = 2 * (s.detach().double() - t.double()) / s.numel()
        torch.testing.assert_close(
            g, want.to(s.dtype), rtol=2 * torch.finfo(s.dtype).eps, atol=1e-6
        )


@both
def test_gradients_keep_the_students_memory_format(backend):
    last = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    turned = torch.randn(7, 9).t()
    students = [last.requires_grad_(), turned.requires_grad_()]
    teachers = [torch.randn(2, 5, 4, 3), torch.randn(9, 7)]
    got = gradients(students, teachers, torch.tensor(0.37), reduction="sum", backend=backend)
    for g, s, t in zip(got, students, teachers, strict=True):
        assert g.stride() == s.stride()
        torch.testing.assert_close(g, 0.74 * (s.detach() - t))


@both
def test_memory_formats_change_no_number(backend):
    students, teachers = pairs_of(make([(4, 6, 5, 7)], seed=10))
    formats = (torch.contiguous_format, torch.channels_last)
    want = hidden_l2(students, teachers, backend=backend).detach()
    for student_format in formats:
        for teacher_format in formats:
            s = students[0].detach().contiguous(memory_format=student_format).requires_grad_()
            t = teachers[0].contiguous(memory_format=teacher_format)
            loss = hidden_l2([s], [t], backend=backend)
            torch.testing.assert_close(loss.detach(), want, rtol=1e-6, atol=0)
            (got,) = torch.autograd.grad(loss, s)
            torch.testing.assert_close(got, (s.detach() - t) / 2, rtol=1e-6, atol=1e-7)


@st.composite
def layouts(draw):
    """A shape and, for each of the two tensors, how it lies in memory."""
    dims = draw(st.integers(0, 4))
    shape = draw(st.tuples(*[st.integers(0, 7)] * dims))

    def one():
        return (
            draw(st.permutations(range(dims))),
            draw(st.tuples(*[st.integers(1, 3)] * dims)),  # steps
            draw(st.tuples(*[st.booleans()] * dims)),  # expanded
        )

    return shape, one(), one(), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))


def laid_out(shape, layout, dtype, seed: int) -> Tensor:
    """Normal numbers of `shape` in permuted memory, with steps and expanded dimensions."""
    order, steps, expanded = layout
    sizes = [1 if e else size for size, e in zip(shape, expanded, strict=True)]
    memory = [sizes[d] * steps[d] for d in order]
    t = torch.randn(memory, generator=torch.Generator().manual_seed(seed)).to(dtype)
    back = sorted(range(len(order)), key=lambda k: order[k])
    t = t.permute(back)[tuple(slice(None, None, step) for step in steps)]
    return t.expand(shape)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layouts(),
    st.sampled_from(["batchmean", "mean", "sum"]),
    st.floats(-4, 4, width=32, allow_subnormal=False),
    st.integers(0, 99),
)
def test_any_layout_agrees_with_float64(layout, reduction, weight, seed):
    shape, student_layout, teacher_layout, student_dtype, teacher_dtype = layout
    student = laid_out(shape, student_layout, student_dtype, seed).requires_grad_()
    teacher = laid_out(shape, teacher_layout, teacher_dtype, seed + 100)
    options = {"weights": [weight, 1.0], "reduction": reduction, "return_terms": True}
    other, fixed = torch.ones(3), torch.tensor([1.0, 2.0, 4.0])
    wide = student.detach().double().requires_grad_()
    want_loss, want_terms = hidden_l2(
        [wide, other], [teacher.double(), fixed], backend="eager", **options
    )
    (want,) = torch.autograd.grad(want_loss, wide)
    for backend in BACKENDS:
        loss, terms = hidden_l2([student, other], [teacher, fixed], backend=backend, **options)
        torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(terms.double(), want_terms, rtol=2e-6, atol=1e-6)
        (got,) = torch.autograd.grad(loss, student)
        eps = torch.finfo(student_dtype).eps
        torch.testing.assert_close(got, want.to(student_dtype), rtol=2 * eps, atol=2e-6)


@each_kernel
def test_many_pairs_are_bitwise_identical_to_each_alone(backend):
    # the summation order belongs to a pair, not to its place in the list or to the threads
    students, teachers = pairs_of(make([(3, 70_001), (200,), (2, 5, 7), (65_536,)] * 3, seed=12))
    _, terms = hidden_l2(students, teachers, return_terms=True, backend=backend)
    got = gradients(students, teachers, backend=backend)
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        _, alone = hidden_l2(s, t, return_terms=True, backend=backend)
        assert torch.equal(alone[0], terms[i])
        assert torch.equal(gradients([s], [t], backend=backend)[0], got[i])


@each_kernel
def test_float16_gradient_of_a_mean_survives(backend):
    # 2 (s - t) / n is around 1e-6 / 2 here, where float16 has 4 bits left, and arrives times 65,536
    students, teachers = pairs_of(make([(32, 64, 32, 32)], seed=13).to(torch.float16))
    (got,) = gradients(students, teachers, torch.tensor(65536.0), reduction="mean", backend=backend)
    want = 65536.0 * 2 * (students[0].detach().double() - teachers[0].double()) / got.numel()
    assert (got.double() - want).norm() / want.norm() < 5e-4


@each_kernel
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-5, 1e-3, 1.0, 3e4])
def test_float16_gradients_keep_their_digits_at_any_size(backend, size):
    # Where the stored power of two does not suit the largest difference, the pair is swept again.
    students, teachers = pairs_of(make([(8, 5000)], seed=14, spread=1.0))
    student = (students[0].detach().clamp(-2, 2) * size).half().requires_grad_()
    teacher = teachers[0].clamp(-2, 2) * size
    arrives = torch.tensor(8.0)
    (got,) = gradients([student], [teacher], arrives, weights=[1 / size], backend=backend)
    want = 8.0 * 2 * (student.detach().double() - teacher.double()) / 8 / size
    assert got.isfinite().all()
    assert (got.double() - want).norm() / want.norm() < 5e-4


@both
def test_a_loss_scale_saves_the_float16_gradients_of_all_pairs(backend):
    sizes = [1e-9, 2e-8, 1e-6, 1e-3, 0.25]
    students = [torch.zeros(3, 4, dtype=torch.float16, requires_grad=True) for _ in sizes]
    teachers = [torch.full((3, 4), -size) for size in sizes]
    arrives = torch.tensor(65536.0)
    got = gradients(students, teachers, arrives, reduction="sum", backend=backend)
    for gradient, size in zip(got, sizes, strict=True):
        want = torch.full((3, 4), 2.0 * size * 65536.0)
        torch.testing.assert_close(gradient.float(), want, rtol=2.0**-10, atol=0.0)


@both
@pytest.mark.parametrize(
    ("size", "weight", "arrives"),
    [(1e-19, 1e6, 1.0), (1.0, 1e-39, 65536.0), (1e-39, 1e6, 1.0)],
    ids=["square", "coefficient", "input"],
)
def test_numbers_that_float32_holds_as_denormals_count(backend, size, weight, arrives):
    student = torch.full((1000,), size, requires_grad=True)
    options = {"weights": [weight], "reduction": "sum", "backend": backend}
    loss = hidden_l2(student, torch.zeros(1000), **options)
    loss.backward(torch.tensor(arrives))
    exact = weight * float(student[0].detach().double()) ** 2 * 1000
    assert float(loss.detach()) == pytest.approx(exact, rel=1e-4, abs=1e-42)
    gradient = 2.0 * weight * float(student[0].detach().double()) * arrives
    assert student.grad.tolist() == pytest.approx([gradient] * 1000, rel=1e-4)


@each_kernel
def test_infinite_float16_features_stay_infinite_and_change_no_other(backend):
    student = torch.tensor([[1.0, torch.inf, 2.0]], dtype=torch.float16, requires_grad=True)
    (got,) = gradients([student], [torch.zeros(1, 3)], reduction="sum", backend=backend)
    assert got.tolist() == [[2.0, torch.inf, 4.0]]


@native
def test_a_large_call_takes_the_streaming_path_and_agrees():
    # above 8 MB of gradients they are stored past the caches; an odd size leaves a tail and
    # misaligned rows behind
    students, teachers = pairs_of(make([(3, 500_001), (1_000_003,)], seed=15))
    got = gradients(students, teachers, reduction="sum", backend="native")
    for g, s, t in zip(got, students, teachers, strict=True):
        assert torch.equal(g, 2 * (s.detach() - t))


@each_kernel
def test_offsets_beyond_two_to_the_31(backend):
    pitch = 2**30 + 8
    memory = torch.empty(2 * pitch + 40, dtype=torch.bfloat16)  # untouched pages cost nothing
    far = memory.as_strided((3, 40), (pitch, 1))
    near = torch.randn(3, 40).bfloat16()
    far.copy_(near)
    other = torch.randn(3, 40)
    for students, teachers in (((far, near), (other, other)), ((other, other), (far, near))):
        students = [s.detach().requires_grad_() for s in students]
        _, terms = hidden_l2(students, teachers, return_terms=True, backend=backend)
        # whole rows are added up in another order than the two-dimensional pair's
        torch.testing.assert_close(terms[0], terms[1], rtol=1e-6, atol=0)
        got = gradients(students, teachers, backend=backend)
        assert torch.equal(got[0], got[1])


@each_kernel
def test_a_second_backward_raises_and_names_eager(backend):
    students, teachers = pairs_of(make([(4, 9), (3, 5)], seed=16))
    loss = hidden_l2(students, teachers, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='hidden_l2: .*backend="eager"'):
        loss.backward()


@native
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_whole_with_mixed_layouts():
    last = torch.randn(2, 5, 4, 3).contiguous(memory_format=torch.channels_last)
    students = [last, torch.randn(6, 5).half(), torch.randn(4, 3)]
    teachers = [torch.randn(2, 5, 4, 3), torch.randn(6, 5), torch.randn(3, 4).t()]
    weights = torch.tensor([1.0, 0.5, 2.0])

    def loss_of(*leaves):
        loss, terms = hidden_l2(list(leaves), teachers, weights=weights, return_terms=True)
        return loss * 3.0, terms

    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for function in (loss_of, compiled):
        leaves = [s.clone().requires_grad_() for s in students]
        leaves[1].requires_grad_(False)
        loss, terms = function(*leaves)
        loss.backward()
        assert leaves[0].grad.stride() == last.stride()
        assert leaves[1].grad is None
        want = 3.0 * 2.0 * 2 * (students[2] - teachers[2]) / 4
        torch.testing.assert_close(leaves[2].grad, want)
        assert not terms.requires_grad
    torch._dynamo.reset()


@pytest.fixture
def launches(monkeypatch):
    """The names of the Triton kernels that were launched."""
    from kdkernels import triton_common

    names, launch = [], triton_common.launch

    def record(kernel, *arguments, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(triton_common, "launch", record)
    return names


@triton
def test_a_list_is_one_launch_and_its_sums(launches):
    students, teachers = pairs_of(make([(3, 500), (7,), (2, 5, 7), ()] * 5, seed=20))
    gradients(students, teachers, backend="triton")
    assert launches == ["_fill", "_sweep", "_finish", "_fill", "_give"]


@triton
def test_other_dtypes_and_layouts_are_launches_of_their_own(launches):
    students, teachers = pairs_of(make([(6, 50)] * 4, seed=21))
    teachers[1], teachers[2] = teachers[1].bfloat16(), torch.randn(50, 6).t()
    students[3] = students[3].detach().half().requires_grad_()
    gradients(students, teachers, backend="triton")
    # _again: float16 gradients that outgrew their scale; it leaves at once if none did
    assert launches.count("_sweep") == 4
    assert launches.count("_again") == 1
    assert launches.count("_give") == 2


@triton
def test_more_pairs_than_one_launch_of_arguments_holds(launches):
    students, teachers = pairs_of(make([(3, 5), (4,)] * 60, seed=22))
    got = gradients(students, teachers, backend="triton", reduction="sum")
    assert launches.count("_sweep") == 1
    assert launches.count("_fill") > 2
    for g, s, t in zip(got, students, teachers, strict=True):
        torch.testing.assert_close(g, 2 * (s.detach() - t))


@triton
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_chunks_and_their_tail(dtype, offset):
    elements = 2 * 16384 + 77
    student, teacher = torch.randn(2, elements + 16).to(dtype)[:, offset : elements + offset]
    student = student.detach().requires_grad_()
    loss, terms = hidden_l2(student, teacher, reduction="sum", return_terms=True, backend="triton")
    difference = student.detach().double() - teacher.double()
    torch.testing.assert_close(terms[0].double(), difference.square().sum(), rtol=1e-6, atol=0)
    (got,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(got, (2 * difference).to(dtype))


@triton
def test_indices_of_64_bits(monkeypatch):
    from kdkernels.hidden_l2 import triton_table

    student = torch.randn(6, 5, 8).permute(1, 0, 2).requires_grad_()
    teacher = torch.randn(5, 6, 16)[..., ::2]
    want = gradients([student], [teacher], backend="triton")[0]
    monkeypatch.setattr(triton_table, "NARROW", 0)
    triton_table.plan.cache_clear()
    assert torch.equal(gradients([student], [teacher], backend="triton")[0], want)
    triton_table.plan.cache_clear()


@triton
def test_rows_with_a_pitch_are_read_without_a_copy(launches):
    # 16-byte accesses where rows start on 16 bytes, single ones elsewhere
    for first in (0, 8, 3):
        student = torch.randn(40, 96).bfloat16()[:, first : first + 64].requires_grad_()
        teacher = torch.randn(40, 128).bfloat16()[:, 64:]
        (got,) = gradients([student], [teacher], reduction="sum", backend="triton")
        want = 2 * (student.detach().float() - teacher.float())
        # Triton's interpreter cuts a float32 off where a GPU rounds it to bfloat16
        torch.testing.assert_close(got, want.bfloat16(), rtol=2.0**-7, atol=0)
    assert launches.count("_sweep") == 3


def test_eager_passes_gradcheck():
    generator = torch.Generator().manual_seed(17)
    shapes = [(3, 4), (2, 3, 2)]
    students = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    teachers = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    for reduction in ("batchmean", "mean", "sum"):
        assert torch.autograd.gradcheck(
            lambda *s, r=reduction: hidden_l2(list(s), teachers, weights=[0.5, 2.0], reduction=r),
            [s.requires_grad_() for s in students],
        )


def test_module_moves_its_weight_tensor_and_passes_options():
    students, teachers = pairs_of(make([(4, 9), (3, 5)], seed=18))
    module = HiddenL2Loss(weights=torch.tensor([1.0, 2.0]), reduction="mean", return_terms=True)
    assert isinstance(module, nn.Module)
    assert list(module.state_dict()) == ["weights"]
    loss, terms = module(students, teachers)
    want = hidden_l2(students, teachers, weights=[1.0, 2.0], reduction="mean")
    assert float(loss.detach()) == pytest.approx(float(want.detach()))
    assert terms.shape == (2,)
    assert not HiddenL2Loss(weights=[1.0, 2.0]).state_dict()
    with pytest.raises(ValueError, match="reduction must be one of"):
        HiddenL2Loss(reduction="none")


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("students", "teachers", "options", "message"),
    [
        ([], [], {}, "students is empty"),
        ([ONE], [ONE, ONE], {}, "teachers must have 1 tensors"),
        ([ONE], [torch.ones(2, 4)], {}, r"teachers\[0\] must have students\[0\]'s shape \(2, 3\)"),
        ([ONE, ONE], [ONE, torch.ones(3)], {}, r"teachers\[1\] must have students\[1\]'s shape"),
        ([ONE.long()], [ONE], {}, r"students\[0\] must be one of float32"),
        ("logits", [ONE], {}, "students must be a list of tensors"),
        ([ONE], [None], {}, r"teachers\[0\] must be a torch.Tensor, got NoneType"),
        ([ONE], [ONE.to("meta")], {}, r"teachers\[0\] must be on cpu"),
        ([ONE, ONE.to("meta")], [ONE, ONE.to("meta")], {}, r"students\[1\] must be on cpu"),
        ([ONE], [ONE], {"weights": [1.0, 2.0]}, "weights must have 1 numbers"),
        ([ONE], [ONE], {"weights": [float("nan")]}, r"weights\[0\] must be finite"),
        ([ONE], [ONE], {"weights": ["1"]}, r"weights\[0\] must be a number"),
        ([ONE], [ONE], {"weights": 2.0}, "weights must be a list of 1 numbers"),
        ([ONE], [ONE], {"weights": torch.ones(2)}, r"weights must be a float32 tensor of shape"),
        ([ONE], [ONE], {"weights": torch.ones(1).double()}, "weights must be a float32 tensor"),
        ([ONE], [ONE], {"reduction": "none"}, "reduction must be one of batchmean, mean, sum"),
        ([ONE], [ONE], {"backend": "fast"}, "backend 'fast' has no kernel"),
    ],
)
def test_bad_arguments_are_one_clear_error(students, teachers, options, message):
    with pytest.raises(ValueError, match=f"^hidden_l2: {message}"):
        hidden_l2(students, teachers, **options)
