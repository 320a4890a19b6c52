"""Common parts of the Triton kernels: the GPUs they reject, and backward's hand-over. The
latter runs in the interpreter, or on a GPU if there is one."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdkernels
from kdkernels import backends
from kdkernels.backends import OPS

pytest.importorskip("triton")
from kdkernels import triton_common
from kdkernels.triton_common import give_gradient_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(
    "triton" not in backends("kd_cross_entropy", DEVICE),
    reason="no GPU, and Triton's interpreter is off: TRITON_INTERPRET=1 turns it on",
)


class FakeGpus:
    """torch.cuda as far as rows.on() uses it, with a GPU of each of these capabilities."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities
        self.asked = 0

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        self.asked += 1
        return self.capabilities[device.index]

    def get_device_name(self, device: torch.device) -> str:
        return f"GPU number {device.index}"

    def device(self, device: torch.device) -> str:
        return f"inside {device}"


def on_fake(index: int, op: str = "kd_cross_entropy") -> object:
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    return triton_common.on(tensor, op)


@pytest.fixture
def gpus(monkeypatch):
    fake = FakeGpus((7, 5), (8, 0), (12, 0))
    for name in ("get_device_capability", "get_device_name", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.version, "hip", None)
    triton_common.missing_on.cache_clear()
    yield fake
    triton_common.missing_on.cache_clear()


def test_a_gpu_below_sm_80_is_rejected_by_name(gpus):
    for _ in range(2):
        with pytest.raises(ValueError, match="kd_cross_entropy: ") as error:
            on_fake(0)
        for part in ("8.0 or newer", "cuda:0", "GPU number 0", "has 7.5", 'backend="eager"'):
            assert part in str(error.value)
    assert on_fake(1) == "inside cuda:1"
    assert on_fake(2) == "inside cuda:2"


def test_a_device_is_queried_once(gpus):
    for _ in range(5):
        on_fake(1)
        on_fake(2)
    assert gpus.asked == 2


def test_amds_numbers_are_not_taken_for_nvidias(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert on_fake(0) == "inside cuda:0"
    assert gpus.asked == 0


@pytest.mark.parametrize("op", OPS)
def test_every_op_checks_the_gpu_before_its_first_launch(op, monkeypatch):
    def refuse(tensor, name):
        raise ValueError(f"{name}: no such GPU here")

    def launch(*_, **__):
        raise AssertionError("launched")

    monkeypatch.setattr(triton_common, "on", refuse)
    monkeypatch.setattr(triton_common, "launch", launch)
    monkeypatch.setattr(
        sys.modules["kdkernels.backends"], "AVAILABLE", {(op, "cpu"): ("triton", "eager")}
    )
    x, labels = torch.randn(4, 6), torch.tensor([0, 0, 1, 1])
    arguments = {
        "kd_cross_entropy": (x, x, labels),
        "linear_kd_cross_entropy": (x, x, labels),
        "hidden_l2": ([x], [x]),
        "triplet_loss": (x, x, x),
        "batch_triplet_loss": (x, labels),
        "nearest_neighbor": (x, x),
    }
    with pytest.raises(ValueError, match=f"^{op}: no such GPU here"):
        getattr(kdkernels, op)(*arguments[op])


def scaled(gradient: torch.Tensor, incoming: torch.Tensor, post_scale: float) -> torch.Tensor:
    factor = incoming.float().reshape(-1, *[1] * (gradient.dim() - 1)) * post_scale
    return (gradient.float() * factor).to(gradient.dtype)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 101, 4096, 9001])
def test_rows_of_any_length_and_alignment_take_their_own_numbers(columns, dtype):
    # a pitch that is no multiple of 16 bytes begins rows at every offset
    memory = torch.randn(9, columns + 3, generator=torch.Generator().manual_seed(1))
    memory = memory.to(dtype).to(DEVICE)
    incoming = torch.linspace(-1.5, 2.0, 18, device=DEVICE)[::2]  # strided
    incoming[4] = 1.0
    for first in (0, 1, 3):
        gradient = memory.clone()
        part = gradient[:, first : first + columns]
        want = memory.clone()
        want[:, first : first + columns] = scaled(part, incoming, 0.5)
        give_gradient_(part, incoming, torch.tensor(0.5, device=DEVICE))
        assert torch.equal(gradient, want)  # nothing beside the part has changed


@runs
def test_an_expanded_number_and_a_vector_of_single_numbers():
    gradient = torch.randn(5, 70, device=DEVICE)
    one = torch.tensor(0.37, device=DEVICE).expand(5)
    want = scaled(gradient, one, 1.0)
    give_gradient_(gradient, one, torch.ones((), device=DEVICE))
    assert torch.equal(gradient, want)
    single, incoming = torch.randn(7, device=DEVICE), torch.randn(7, device=DEVICE)
    want = single * incoming
    give_gradient_(single, incoming, torch.ones((), device=DEVICE))
    assert torch.equal(single, want)


@runs
@pytest.mark.parametrize("shape", [(), (5,), (3, 5001)])
def test_one_number_for_all(shape):
    gradient = torch.randn(shape, device=DEVICE)
    want = gradient * 0.37
    give_gradient_(gradient, torch.tensor(0.37, device=DEVICE), torch.ones((), device=DEVICE))
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=0)


@runs
def test_rows_whose_number_is_1_are_left_alone_and_nan_goes_on():
    gradient = torch.ones(3, 40, device=DEVICE)
    incoming = torch.tensor([2.0, torch.nan, -1.0], device=DEVICE)
    give_gradient_(gradient, incoming, torch.tensor(0.5, device=DEVICE))
    assert bool((gradient[0] == 1.0).all())
    assert bool(gradient[1].isnan().all())
    assert bool((gradient[2] == -0.5).all())
