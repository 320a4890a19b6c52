"""The pool of gradient memory: buffers come back, hold nothing of their past, and can be freed."""

import gc
import threading

import pytest
import torch

import kdkernels
from kdkernels.kd_cross_entropy.samples import make
from kdkernels.native import extension, new_gradient

pytestmark = pytest.mark.skipif(extension is None, reason="needs the native backend")
MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    kdkernels.empty_cache()
    yield
    kdkernels.empty_cache()


def gradient_of(sample, backend="native"):
    s, t, y = sample.tensors.values()
    leaf = s.detach().requires_grad_()
    kdkernels.kd_cross_entropy(leaf, t, y, backend=backend).backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_gradient_reuses_the_memory_of_the_last_one(dtype):
    sample = make(120, 10575).to(dtype)
    first = gradient_of(sample)
    address = first.data_ptr()
    first.fill_(torch.nan)  # what a reused buffer holds must not matter
    del first
    assert extension.idle_pool() >= MEGABYTE
    second = gradient_of(sample)
    assert second.data_ptr() == address
    assert extension.idle_pool() == 0
    assert second.dtype == dtype
    assert second.is_contiguous()
    want = gradient_of(sample, "eager").float()
    torch.testing.assert_close(second.float(), want, rtol=2e-2, atol=1e-6)


def test_memory_of_a_gradient_in_use_is_not_reused():
    sample = make(60, 10575)
    held = gradient_of(sample)
    copy = held.clone()
    other = gradient_of(make(60, 10575, seed=1))
    assert other.data_ptr() != held.data_ptr()
    assert torch.equal(held, copy)


def test_a_view_keeps_its_memory():
    row = gradient_of(make(60, 10575))[3]
    copy = row.clone()
    gradient_of(make(60, 10575, seed=1)).fill_(7.0)
    assert torch.equal(row, copy)


def test_empty_cache_frees_what_is_idle():
    del_me = gradient_of(make(60, 10575))
    size = del_me.numel() * 4
    del del_me
    assert kdkernels.empty_cache() >= size
    assert kdkernels.empty_cache() == 0


def test_small_gradients_stay_out_of_the_pool():
    gradient_of(make(4, 100))
    assert extension.idle_pool() == 0


def test_an_unused_capsule_returns_its_buffer():
    capsule = extension.pooled([MEGABYTE], [1], 0)
    del capsule
    gc.collect()
    assert extension.idle_pool() >= MEGABYTE


def test_threads_may_allocate_and_free_concurrently():
    sample = make(40, 10575)
    want = gradient_of(sample)
    wrong = []

    def work():
        for _ in range(5):
            if not torch.equal(gradient_of(sample), want):
                wrong.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_strides_without_gaps_are_kept():
    strided = new_gradient((4, 300, 40, 40), torch.float32, (480000, 1, 12000, 300))
    assert strided.stride() == (480000, 1, 12000, 300)
    assert strided.is_contiguous(memory_format=torch.channels_last)
