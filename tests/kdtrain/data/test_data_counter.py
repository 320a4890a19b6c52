"""Counter-based random numbers: pure, keyed by every word, and uniform enough."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from kdtrain.data.counter import (
    counter_hash,
    counter_normal,
    counter_permutation,
    counter_uniform,
    mix,
)

WORDS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 63))
def test_every_bit_of_every_key_counts(keys, place, bit):
    place %= len(keys)
    changed = list(keys)
    changed[place] = ((keys[place] % 2**64) ^ (1 << bit)) - 2**63
    original = list(keys)
    original[place] = keys[place] % 2**64 - 2**63
    assert counter_hash(*changed).item() != counter_hash(*original).item()


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30), st.integers(0, 2**40))
def test_a_draw_does_not_depend_on_its_neighbours(indices, seed):
    together = counter_uniform(seed, torch.tensor(indices), draws=3)
    alone = torch.stack([counter_uniform(seed, index, draws=3) for index in indices])
    assert torch.equal(together, alone)


def test_mix_is_the_published_lowbias32():
    # worked in exact integer arithmetic
    def reference(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    words = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert mix(torch.tensor(words)).tolist() == [reference(word) for word in words]


def test_order_of_the_keys_counts():
    assert counter_hash(1, 2).item() != counter_hash(2, 1).item()


def test_uniform_numbers_fill_the_unit_interval():
    # 40 bins of 5,000 expected draws: chi-square with 39 degrees of freedom passes 100 once in 10^7
    draws = counter_uniform(3, torch.arange(50_000), draws=4).flatten()
    assert 0 <= draws.min() < draws.max() < 1
    counts = torch.histc(draws, 40, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 100


def test_draws_of_one_key_and_of_neighbouring_keys_are_uncorrelated():
    normal = counter_normal(0, torch.arange(20_000), draws=6)
    assert normal.mean().abs() < 5 / math.sqrt(normal.numel())
    assert abs(normal.std().item() - 1) < 0.01
    correlation = torch.corrcoef(torch.cat([normal[:-1], normal[1:]], 1).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


@given(st.integers(0, 300), st.integers(0, 2**40))
def test_permutation_holds_each_number_once(count, seed):
    assert counter_permutation(count, seed, 1).sort().values.tolist() == list(range(count))
