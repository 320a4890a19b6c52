"""16-bit gradients of kernels: what storing them before the incoming gradient is known may cost."""

import pytest
import torch
from contract import find_op, oracle, run
from torch import Tensor

from kdkernels.backends import backends

OPS = (
    "kd_cross_entropy",
    "linear_kd_cross_entropy",
    "hidden_l2",
    "triplet_loss",
    "batch_triplet_loss",
)
CASES = [(op, backend) for op in OPS for backend in backends(op, "cpu")]


def units(got: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place, beside the float32 rounding of sums."""
    eps, least = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).smallest_normal
    exact = exact.double()
    spacing = eps * 2.0 ** exact.abs().clamp(min=least).log2().floor()
    error = (got.double() - exact).abs() - 2e-6 * exact.abs().max()
    return float((error.clamp(min=0.0) / spacing).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_gradient_is_within_one_and_a_half_units_of_the_last_place(name, backend, dtype):
    op = find_op(name)
    small = [s for s in op.samples if 100 < sum(t.numel() for t in tensors_of(s)) < 4000]
    for sample in small[:6]:
        cast = sample.to(dtype)
        got, exact = run(op, backend, cast, "expanded"), oracle(op, cast, "expanded")
        for gradient, truth in zip(got.gradients, exact.gradients, strict=True):
            if gradient.dtype != dtype or not truth.isfinite().all() or gradient.numel() == 0:
                continue
            assert units(gradient, truth) <= 1.51, f"{name} [{sample.name}]"


def tensors_of(sample) -> list[Tensor]:
    values = sample.tensors.values()
    return [t for v in values if v is not None for t in (v if isinstance(v, list) else [v])]
