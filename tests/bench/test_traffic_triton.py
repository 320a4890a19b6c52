"""The counted traffic of the Triton kernels: the figures of bench.gpu.traffic and its method.

`TRITON_INTERPRET=1 python -m pytest tests/bench/test_traffic_triton.py`, as `make test` does.
"""

from dataclasses import replace

import pytest
import torch

from kdkernels.backends import is_interpreted

if not is_interpreted():
    pytest.skip("runs under TRITON_INTERPRET=1, as in make test", allow_module_level=True)

import triton
import triton.language as tl

from bench.gpu import traffic
from bench.gpu.meter import READ, WRITTEN, Case, Meter, count, extrapolate, measure
from kdkernels import triton_common

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_kd_cross_entropy_in_registers_moves_the_floor(dtype):
    result = count(traffic.kd(1024, 10_575, dtype))
    assert result.launches == 3
    assert result.over_floor <= 1.01


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_kd_cross_entropy_in_two_sweeps_moves_five_thirds(dtype):
    assert count(traffic.kd(1024, 17_003, dtype)).over_floor == pytest.approx(5 / 3, rel=5e-3)


def test_kd_cross_entropy_split_over_programs_moves_five_thirds():
    assert count(traffic.kd(64, 20_001, FP32)).over_floor == pytest.approx(5 / 3, rel=2e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_triplet_loss_moves_the_floor(dtype):
    assert count(traffic.triplets(8192, 512, dtype)).over_floor <= 1.01


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_hidden_l2_moves_the_floor(dtype):
    taps = [(64, 28), (256, 7), (2048, 1)]
    assert count(traffic.hidden(128, dtype, taps)).over_floor <= 1.01


def nearest_in_small_tiles() -> Case:
    return replace(traffic.nearest(4096, BF16, 64), constants=(), instances=(64, 128, 192))


@pytest.mark.parametrize(
    ("case", "rows"),
    [(nearest_in_small_tiles(), 256), (traffic.triplets(8192, 64, FP32), 256)],
    ids=["nearest_neighbor", "triplet_loss"],
)
def test_three_instances_predict_a_fourth(case, rows):
    counts = [measure(case, n) for n in case.instances]
    fourth = measure(case, rows)
    for key, size in fourth.moved.items():
        # data decides which rows are measured again; small grids read small tensors once each
        if key[0] in ("resolve", *case.proportional) or size < 100_000:
            continue
        predicted = extrapolate(case.instances, [c.moved[key] for c in counts], rows)
        assert predicted == pytest.approx(size, rel=0.01), key
    predicted = extrapolate(case.instances, [c.products for c in counts], rows)
    assert predicted == fourth.products


def test_products_of_matrices_are_counted():
    nearest, batch = nearest_in_small_tiles(), traffic.batch(4096, (128, 256, 384), 64)
    assert measure(nearest, 128).products == nearest.products(128)
    # three products of 16-bit halves
    assert measure(batch, 256).products == 3 * batch.products(256)


def test_small_instances_of_another_path_are_rejected():
    # the small instances mine by a Gram matrix, the full size by tiles
    threshold = ("kdkernels.batch_triplet_loss.triton_kernel", "TILED_ROWS", 2048)
    case = replace(traffic.batch(4096, (8, 12, 16), 64), constants=(threshold,))
    with pytest.raises((AssertionError, ValueError)):
        count(case)


@triton.jit
def _read_twice(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + at, mask=at < n, other=0.0) + tl.load(x_ptr + at, mask=at < n)
    one = tl.load(x_ptr + at * 0)  # a block of one address
    tl.store(y_ptr + at, total + one, mask=at < n)


def test_accesses_behind_masks_and_of_one_address_are_counted_once():
    x, y = torch.arange(100.0), torch.empty(100)
    with Meter(4) as meter:
        triton_common.launch(_read_twice, (2,), x, y, 100, BLOCK=64)
        y.add_(x)
    assert torch.equal(y, 3 * torch.arange(100.0))
    assert meter.count.moved["_read_twice", "x_ptr", READ] == 2 * 400 + 2 * 4
    assert meter.count.moved["_read_twice", "y_ptr", WRITTEN] == 400
    assert meter.count.moved["aten.add_", "written 0", WRITTEN] == 400
    assert meter.count.extent["_read_twice", "x_ptr"] == 400
    assert len(meter.count.launches) == 1


def test_extrapolation_by_hand():
    assert extrapolate((1, 2, 3), [6, 17, 34], 10) == 3 * 100 + 2 * 10 + 1
