"""The mathematics of kd_cross_entropy: values worked by hand, identities, properties, torch's own
losses."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contract import accuracy, find_op
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdkernels
from kdkernels import CrossEntropyLoss, KDCrossEntropyLoss, kd_cross_entropy
from kdkernels.backends import backends
from kdkernels.checks import validates
from kdkernels.kd_cross_entropy import eager
from kdkernels.kd_cross_entropy.samples import make
from kdkernels.sample import Sample

BACKENDS = backends("kd_cross_entropy", "cpu")
both = pytest.mark.parametrize("backend", BACKENDS)


@both
def test_two_classes_worked_by_hand(backend):
    # softmax(0, ln 3) = (1/4, 3/4); at tau 2 the teacher (0, 2 ln 3) gives (1/4, 3/4) as well, the
    # student (0, ln 3) gives 1 : sqrt 3.
    student = torch.tensor([[0.0, math.log(3.0)]])
    teacher = torch.tensor([[0.0, 2 * math.log(3.0)]])
    loss = kd_cross_entropy(
        student, teacher, torch.tensor([1]), temperature=2.0, alpha=0.5, backend=backend
    )
    hard = math.log(4 / 3)
    total = 1 + math.sqrt(3)
    soft = -(0.25 * math.log(1 / total) + 0.75 * math.log(math.sqrt(3) / total))
    assert float(loss) == pytest.approx(hard + 0.5 * soft, rel=1e-6)


@both
def test_equals_the_two_torch_losses_it_replaces(backend):
    sample = make(17, 203, seed=3)
    s, t, y = (sample.tensors[k] for k in ("student", "teacher", "target"))
    want = F.cross_entropy(s, y) + 2.0 * F.cross_entropy(s / 3, torch.softmax(t / 3, dim=1))
    got = kd_cross_entropy(s, t, y, temperature=3.0, alpha=2.0, backend=backend)
    torch.testing.assert_close(got, want)


@both
@pytest.mark.parametrize("temperature", [1.0, 2.5, 3.0])
def test_gradient_rows_sum_to_zero(backend, temperature):
    sample = make(9, 2500, seed=4)
    s = sample.tensors["student"].requires_grad_()
    kd_cross_entropy(
        s, *list(sample.tensors.values())[1:], temperature=temperature, backend=backend
    ).backward()
    assert float(s.grad.sum(dim=1).abs().max()) < 1e-6


@both
def test_a_teacher_equal_to_the_student_leaves_the_hard_gradient(backend):
    sample = make(9, 333, seed=5)
    s, y = sample.tensors["student"].requires_grad_(), sample.tensors["target"]
    (both_terms,) = torch.autograd.grad(kd_cross_entropy(s, s.detach(), y, backend=backend), s)
    (hard,) = torch.autograd.grad(F.cross_entropy(s, y), s)
    torch.testing.assert_close(both_terms, hard, atol=1e-7, rtol=1e-4)


@both
def test_terms_add_up_to_the_loss_and_to_the_divergence(backend):
    sample = make(40, 50, seed=6, ignored=7)
    s, t, y = sample.tensors.values()
    s[10, y[10]] = 99.0
    loss, terms = kd_cross_entropy(s, t, y, alpha=0.5, return_terms=True, backend=backend)
    torch.testing.assert_close(loss, terms.hard + 0.5 * terms.soft)
    log_s = torch.log_softmax(s[7:] / 3, dim=1)
    divergence = F.kl_div(
        log_s, torch.log_softmax(t[7:] / 3, dim=1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(terms.soft - terms.entropy, divergence, rtol=1e-4, atol=1e-5)
    assert float(terms.hits) == int((s.argmax(1) == y)[7:].sum())
    assert float(terms.count) == 33
    assert not any(t.requires_grad for t in terms)


@both
def test_a_label_among_tied_maxima_is_a_hit_only_if_it_is_the_first(backend):
    s = torch.zeros(3, 5)
    _, terms = kd_cross_entropy(
        s, None, torch.tensor([0, 1, 4]), return_terms=True, backend=backend
    )
    assert float(terms.hits) == 1


@both
def test_no_counted_row_gives_zero_loss_and_zero_gradient(backend):
    s = torch.randn(3, 8, requires_grad=True)
    loss = kd_cross_entropy(s, torch.randn(3, 8), torch.full((3,), -100), backend=backend)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(s.grad, torch.zeros(3, 8))


@both
def test_a_row_of_only_minus_infinity_is_nan_and_changes_no_other_row(backend):
    sample = make(3, 40)
    s, t, y = sample.tensors.values()
    s[1] = -math.inf
    loss = kd_cross_entropy(s, t, y, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@both
def test_a_nan_in_an_ignored_row_reaches_nothing(backend):
    s, t, y = make(3, 40, ignored=1).tensors.values()
    s[0], t[0] = math.nan, math.nan
    s.requires_grad_()
    loss = kd_cross_entropy(s, t, y, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    assert s.grad[0].eq(0).all()


@both
def test_the_teacher_gets_no_gradient(backend):
    s, t, y = make(3, 40).tensors.values()
    s.requires_grad_()
    t.requires_grad_()
    kd_cross_entropy(s, t, y, backend=backend).backward()
    assert t.grad is None


def test_eager_passes_gradcheck_and_gradgradcheck():
    s = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    t = torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([1, -100, 5, 0])

    def loss(x):
        return kd_cross_entropy(
            x,
            t,
            y,
            temperature=2.5,
            alpha=0.7,
            label_smoothing=0.1,
            reduction="none",
            backend="eager",
        )

    assert torch.autograd.gradcheck(loss, s)
    assert torch.autograd.gradgradcheck(loss, s)


def test_float64_selects_eager_and_returns_float64():
    s = torch.randn(2, 5, dtype=torch.float64)
    assert kd_cross_entropy(s, s, torch.tensor([0, 1])).dtype == torch.float64


def test_the_gradient_is_given_away_without_a_copy():
    if "native" not in BACKENDS:
        pytest.skip("needs the native backend: make venv with a C++ compiler")
    s = torch.randn(4, 50, requires_grad=True)
    loss = kd_cross_entropy(s, s.detach(), torch.tensor([0, 1, 2, 3]))
    stored = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert s.grad.data_ptr() == stored


BAD = {
    "temperature must be greater than 0, got 0": {"temperature": 0},
    "temperature must be at least 1e-06, got 1e-39": {"temperature": 1e-39},
    "temperature must be at most 1e+06, got 1e+300": {"temperature": 1e300, "tau_squared": True},
    "alpha must be at most 1e+06, got 1e+300": {"alpha": 1e300},
    "temperature must be finite, got nan": {"temperature": math.nan},
    "temperature must be a number, got str": {"temperature": "3"},
    "alpha must be finite, got inf": {"alpha": math.inf},
    "label_smoothing must be at most 1, got 1.5": {"label_smoothing": 1.5},
    "reduction must be one of mean, sum, none, got 'avg'": {"reduction": "avg"},
    "ignore_index must be an int, got 1.0": {"ignore_index": 1.0},
    "backend 'fast' has no kernel for 'cpu' tensors": {"backend": "fast"},
    "teacher must have student's shape (3, 8), got (3, 7)": {"teacher": torch.zeros(3, 7)},
    "got torch.int64: teacher and target look swapped": {"teacher": torch.tensor([0, 1, 2])},
    "target must have shape (3,), got (2,)": {"target": torch.zeros(2, dtype=torch.long)},
    "target must be int32 or int64, got torch.float32": {"target": torch.zeros(3)},
    "student must have 2 dimensions, got shape (3,)": {"student": torch.zeros(3)},
    "student must have at least one class, got (3, 0)": {
        "student": torch.zeros(3, 0),
        "teacher": None,
    },
    "teacher and target are both None": {"teacher": None, "target": None},
    "got 8 in row 1": {"target": torch.tensor([0, 8, 1])},
    "got -1 in row 2": {"target": torch.tensor([0, 7, -1])},
}


@both
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message, backend):
    arguments = {
        "student": torch.zeros(3, 8),
        "teacher": torch.zeros(3, 8),
        "target": torch.zeros(3, dtype=torch.long),
        "backend": backend,
        **BAD[message],
    }
    with pytest.raises(ValueError, match="^kd_cross_entropy: ") as error:
        kd_cross_entropy(**arguments)
    assert message in str(error.value)


@st.composite
def calls(draw) -> Sample:
    """Any call: shapes around the block size, pitches, dtypes of both networks, every option."""
    rows = draw(st.integers(0, 6))
    classes = draw(st.one_of(st.integers(1, 70), st.sampled_from([2047, 2048, 2049, 4100])))
    sample = make(
        rows,
        classes,
        seed=draw(st.integers(0, 999)),
        spread=draw(st.sampled_from([0.0, 0.1, 2.0, 64.0, 1e4])),
        label_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        ignored=draw(st.integers(0, rows)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 20.0])),
        alpha=draw(st.sampled_from([0.0, 0.3, 1.0, -0.5])),
        tau_squared=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )
    tensors = dict(sample.tensors)
    for name in ("student", "teacher"):
        tensors[name] = draw(strided(tensors[name]))
    if draw(st.integers(0, 5)) == 0:
        tensors["teacher"] = None
    return replace(sample, tensors=tensors)


@st.composite
def strided(draw, value):
    """The same numbers behind another pitch, offset or order."""
    rows, classes = value.shape
    kind = draw(st.sampled_from(["plain", "pitch", "columns", "transposed"]))
    if kind == "pitch":
        offset = draw(st.integers(0, 5))
        memory = torch.zeros(rows, classes + 7)
        return memory[:, offset : offset + classes].copy_(value)
    if kind == "columns":
        return torch.zeros(rows, 2 * classes)[:, ::2].copy_(value)
    return value.t().contiguous().t() if kind == "transposed" else value


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(sample=calls(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_any_call_is_as_accurate_as_promised(sample, dtype):
    for backend in BACKENDS[:1]:
        accuracy(replace(find_op("kd_cross_entropy"), samples=(sample,)), backend, dtype)


@both
def test_networks_of_different_dtypes(backend):
    s, t, y = make(5, 77).tensors.values()
    got = kd_cross_entropy(s.bfloat16(), t.half(), y, backend=backend)
    want = kd_cross_entropy(s.bfloat16().double(), t.half().double(), y, backend="eager")
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_an_unchecked_bad_label_makes_only_its_row_nan():
    # what eager does off the CPU, where the functional does not look at the labels
    s = torch.randn(3, 8, requires_grad=True)
    options = {"temperature": 3.0, "alpha": 1.0, "tau_squared": False, "ignore_index": -100}
    loss, _ = eager.kd_cross_entropy(
        s,
        torch.randn(3, 8),
        torch.tensor([1, 9, -100]),
        **options,
        label_smoothing=0.1,
        reduction="none",
    )
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert s.grad.isnan().all(dim=1).tolist() == [False, True, False]
    assert s.grad[0].isfinite().all()
    assert s.grad[2].eq(0).all()


def test_validate_turns_the_label_check_on():
    assert not validates()
    kdkernels.validate(True)
    try:
        assert validates()
    finally:
        kdkernels.validate(False)


def test_another_default_dtype_changes_nothing():
    s, t, y = make(5, 77).tensors.values()
    want = kd_cross_entropy(s, t, y)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(kd_cross_entropy(s, t, y), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_module_passes_its_options_on():
    s, t, y = make(5, 77).tensors.values()
    module = KDCrossEntropyLoss(temperature=2.0, alpha=0.3, tau_squared=True, reduction="sum")
    want = kd_cross_entropy(s, t, y, temperature=2.0, alpha=0.3, tau_squared=True, reduction="sum")
    assert torch.equal(module(s, t, y), want)
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        KDCrossEntropyLoss(temperature=0.0)


class TestDropIn:
    """CrossEntropyLoss against torch.nn.CrossEntropyLoss."""

    def compare(self, s, y, **options):
        ours, theirs = s.detach().requires_grad_(), s.detach().requires_grad_()
        got, want = (
            CrossEntropyLoss(**options)(ours, y),
            torch.nn.CrossEntropyLoss(**options)(theirs, y),
        )
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, equal_nan=True, rtol=2e-5, atol=1e-6)
        got.sum().backward()
        want.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, rtol=2e-5, atol=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_options(self, reduction, smoothing):
        y = torch.tensor([3, -100, 0, 9])
        self.compare(torch.randn(4, 10), y, reduction=reduction, label_smoothing=smoothing)

    def test_torchs_documented_examples(self):
        # torch.nn.CrossEntropyLoss, "Examples": class indices, then class probabilities.
        s = torch.randn(3, 5, requires_grad=True)
        self.compare(s, torch.empty(3, dtype=torch.long).random_(5))
        self.compare(s, torch.randn(3, 5).softmax(dim=1))

    def test_what_the_kernel_does_not_cover(self):
        self.compare(torch.randn(4, 10), torch.tensor([1, 2, 3, 4]), weight=torch.rand(10))
        self.compare(torch.randn(10), torch.tensor(3))
        self.compare(torch.randn(2, 5, 7), torch.randint(5, (2, 7)))

    def test_nothing_counts_is_nan_as_in_torch(self):
        loss = CrossEntropyLoss()(torch.randn(2, 4), torch.tensor([-100, -100]))
        assert loss.isnan()

    def test_sixteen_bit_logits_give_a_sixteen_bit_loss(self):
        assert (
            CrossEntropyLoss()(torch.randn(2, 4).bfloat16(), torch.tensor([0, 1])).dtype
            == torch.bfloat16
        )

    def test_under_autocast_the_loss_is_float32_as_in_torch(self):
        s, y = torch.randn(2, 4).bfloat16(), torch.tensor([0, 1])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = CrossEntropyLoss()(s, y), torch.nn.CrossEntropyLoss()(s, y)
        assert got.dtype == want.dtype == torch.float32
        torch.testing.assert_close(got, want)

    def test_is_torchs_class(self):
        assert isinstance(CrossEntropyLoss(), torch.nn.CrossEntropyLoss)


@both
def test_a_term_that_is_not_computed_does_not_scale_float16_gradients(backend):
    s = torch.tensor([[0.0, -9.0, -11.0]], dtype=torch.float16, requires_grad=True)
    options = {"temperature": 1000.0, "alpha": 1000.0, "tau_squared": True, "backend": backend}
    kd_cross_entropy(s, None, torch.tensor([0]), **options).backward(torch.tensor(1024.0))
    exact = torch.softmax(s.detach().double(), 1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close(s.grad.double(), 1024.0 * exact, rtol=2.0**-10, atol=0.0)


@both
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    ("temperature", "alpha"), [(1e-3, 1e3), (1e-3, 1.0), (3.0, 1.0), (1e3, 1.0)]
)
def test_the_order_of_additions_costs_at_most_its_stated_bound(backend, temperature, alpha, same):
    # docs/ops.md: 2^-21 (1 + alpha / tau), the parts of the gradient being as large
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 52, generator=generator) for _ in range(2))
    if same:
        t = s.clone()
    else:  # a label that is certain
        s[:, 7] = 100.0
    options = {"alpha": alpha, "temperature": temperature, "reduction": "sum"}
    found = []
    for by, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        x = s.clone().to(dtype).requires_grad_()
        kd_cross_entropy(x, t.to(dtype), torch.full((4,), 7), backend=by, **options).backward()
        found.append(x.grad.double())
    assert float((found[0] - found[1]).abs().max()) <= 2.0**-21 * (1.0 + alpha / temperature)
