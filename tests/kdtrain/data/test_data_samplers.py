"""Samplers: every image once, balanced identities, pure functions of seed and epoch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtrain.data.samplers import balanced_batches, left_out, random_batches


@given(
    count=st.integers(1, 80),
    size=st.integers(1, 90),
    seed=st.integers(0, 2**40),
    drop=st.booleans(),
)
def test_random_batches_hold_every_image_once(count, size, seed, drop):
    indices = torch.arange(count) * 3 + 1
    if drop and size > count:
        with pytest.raises(ValueError, match="batch_size"):
            random_batches(indices, size, seed, 0, drop)
        return
    batches = random_batches(indices, size, seed, 0, drop)
    together = torch.cat(batches)
    assert len(together) == (count // size * size if drop else count)
    assert len(set(together.tolist())) == len(together)
    assert set(together.tolist()) <= set(indices.tolist())
    assert all(len(batch) == size for batch in batches[:-1])


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    indices = torch.arange(100)
    first = torch.cat(random_batches(indices, 10, 0, 0, True))
    assert torch.equal(first, torch.cat(random_batches(indices, 10, 0, 0, True)))
    assert not torch.equal(first, torch.cat(random_batches(indices, 10, 0, 1, True)))
    assert not torch.equal(first, torch.cat(random_batches(indices, 10, 1, 0, True)))


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=6, max_size=20),
    identities=st.integers(2, 6),
    images=st.integers(2, 5),
    seed=st.integers(0, 2**40),
)
def test_balanced_batches_hold_different_identities_with_as_many_images_each(
    counts, identities, images, seed
):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    indices = torch.arange(len(labels))
    usable = sum(count >= 2 for count in counts)
    if usable < identities:
        with pytest.raises(ValueError, match=f"has {usable}"):
            balanced_batches(indices, labels, identities, images, seed, 0)
        return
    batches = balanced_batches(indices, labels, identities, images, seed, 0)
    assert batches
    for batch in batches:
        hands = batch.reshape(identities, images)
        assert (labels[hands] == labels[hands[:, :1]]).all()
        assert len(set(labels[hands[:, 0]].tolist())) == identities
        for hand in hands.tolist():
            # an image is repeated within a hand only when the identity has too few
            assert len(set(hand)) == min(images, counts[labels[hand[0]]])
    lone = left_out(indices, labels).tolist()
    assert len(lone) == counts.count(1)
    assert set(torch.cat(batches).tolist()).isdisjoint(lone)


def test_every_image_of_a_balanced_set_is_seen_each_epoch():
    labels = torch.arange(8).repeat_interleave(10)
    batches = balanced_batches(torch.arange(80), labels, 4, 4, seed=0, epoch=2)
    assert set(torch.cat(batches).tolist()) == set(range(80))
    assert len(batches) == 8 * 3 // 4  # 10 images are three hands of 4, the last filled up


def test_only_the_given_images_are_drawn_and_epochs_differ():
    labels = torch.arange(10).repeat(12)
    train = torch.arange(120)[torch.arange(120) % 5 != 0]
    first = torch.cat(balanced_batches(train, labels, 3, 4, 0, 0))
    assert set(first.tolist()) <= set(train.tolist())
    assert torch.equal(first, torch.cat(balanced_batches(train, labels, 3, 4, 0, 0)))
    assert not torch.equal(first, torch.cat(balanced_batches(train, labels, 3, 4, 0, 1)))
