"""The row kernels of kd_cross_entropy under linear_kd_cross_entropy: in place, with a margin at the
label."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from contract import accuracy, find_op

import kdkernels
from kdkernels import ArcFace
from kdkernels.linear_kd_cross_entropy.driver import Call, Chunk
from kdkernels.linear_kd_cross_entropy.samples import make

NAME = "linear_kd_cross_entropy"
BACKENDS = kdkernels.backends(NAME, "cpu")
KERNELS = [b for b in BACKENDS if b != "eager"]
each_kernel = pytest.mark.parametrize("backend", KERNELS)


def rows_of(backend: str, chunk: Chunk) -> None:
    """A backend's row kernel on a chunk."""
    module = f"kdkernels.{NAME}." + ("native" if backend == "native" else "triton_kernel")
    importlib.import_module(module)._rows(chunk)


def chunk_of(
    logits: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor, margin: torch.Tensor,
    gradient: torch.Tensor, *, temperature: float = 3.0, smoothing: float = 0.0,
) -> Chunk:  # fmt: skip
    nothing = dict.fromkeys(Call.__dataclass_fields__)
    call = Call(**{
        **nothing, "temperature": temperature, "alpha": 1.0, "ignore_index": -100,
        "label_smoothing": smoothing,
    })  # fmt: skip
    rows = len(logits)
    loss, terms = torch.empty(rows), torch.empty(rows, 4)
    return Chunk(logits, teacher, label, margin, gradient, loss, terms, None, call)


def by_hand(logits, teacher, label, margin, temperature, smoothing):
    """Loss and gradient of a chunk's rows in float64, with no 1 - p."""
    classes = logits.shape[1]
    s, t, added = logits.double(), teacher.double(), margin.double()
    one_hot = torch.nn.functional.one_hot(label, classes).double()
    h = s + added[:, :1] * one_hot
    q = (1 - smoothing) * one_hot + smoothing / classes
    p_s, p_t = (torch.softmax(x / temperature, dim=1) for x in (s, t))
    loss = -(q * torch.log_softmax(h, dim=1)).sum(1)
    loss -= (p_t * torch.log_softmax(s / temperature, dim=1)).sum(1)
    p = torch.softmax(h, dim=1)
    rest = (p * (1 - one_hot)).sum(dim=1, keepdim=True)
    hard = p * (1 - one_hot) - rest * one_hot + smoothing * one_hot - smoothing / classes
    hard = hard * torch.where(one_hot == 1, added[:, 1:], 1.0)
    return loss, hard + (p_s - p_t) / temperature


def check_rows(backend: str, classes: int, temperature: float, smoothing: float) -> None:
    """Labels far below, among and far above the other classes, with large margins too."""
    generator = torch.Generator().manual_seed(classes)
    s, t = (4 * torch.randn(8, classes, generator=generator) for _ in range(2))
    label = torch.randint(classes, (8,), generator=generator)
    ahead = torch.tensor([-120.0, -30, -5, 0, 5, 30, 120, 200])  # of the others
    s[torch.arange(8), label] = s.amax(dim=1) + ahead
    margin = torch.stack((torch.linspace(-150.0, 10.0, 8).flip(0), torch.linspace(0, 2, 8)), dim=1)
    loss, gradient = by_hand(s, t, label, margin, temperature, smoothing)
    results = []
    for in_place in (False, True) if backend == "native" or classes < 100 else (True,):
        logits = s.clone()
        chunk = chunk_of(
            *(logits, t, label, margin, logits if in_place else torch.empty_like(s)),
            temperature=temperature,
            smoothing=smoothing,
        )
        rows_of(backend, chunk)
        torch.testing.assert_close(chunk.loss.double(), loss, rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(chunk.gradient.double(), gradient, rtol=1e-4, atol=2e-7)
        results.append(chunk.gradient.clone())
        hits = (s.argmax(dim=1) == label).float()
        assert torch.equal(chunk.terms[:, 3], hits)
    assert torch.equal(results[0], results[-1])


@each_kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 2.5])
@pytest.mark.parametrize("classes", [1, 2, 50, 2100])
def test_rows_with_a_margin_are_exact_wherever_the_label_lies(
    classes, temperature, smoothing, backend
):
    check_rows(backend, classes, temperature, smoothing)


@pytest.mark.skipif("triton" not in BACKENDS, reason="TRITON_INTERPRET=1 runs it")
@pytest.mark.parametrize("path", ["two sweeps", "split rows"])
def test_every_triton_row_kernel_takes_margins_in_place(path, monkeypatch):
    importlib.import_module("test_kd_cross_entropy_triton").take(path, monkeypatch)
    check_rows("triton", 31, 2.5, 0.2)
    head_and_margin = {"normalize": True, "scale": 16.0, "margin": ArcFace(0.4)}
    sample = make(3, 27, 8, **head_and_margin, ignored=1, return_terms=True)
    accuracy(replace(find_op(NAME), samples=(sample,)), "triton", torch.float32)


@each_kernel
def test_nothing_cancels_at_a_label_that_is_nearly_certain(backend):
    s = torch.zeros(1, 60)
    s[0, 7] = 40.0
    label, margin = torch.tensor([7]), torch.tensor([[-6.0, 0.8]])
    teacher = s.clone()
    chunk = chunk_of(s, teacher, label, margin, torch.empty_like(s))
    rows_of(backend, chunk)
    want = -0.8 * 59 * math.exp(-34.0) / (1 + 59 * math.exp(-34.0))
    # the soft term is 0 but for its own rounding, as student and teacher agree
    assert float(chunk.gradient[0, 7]) == pytest.approx(want, rel=1e-4)
