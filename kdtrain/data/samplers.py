"""Batches of image indices for one epoch, as pure functions of (seed, epoch)."""

from collections import defaultdict, deque

import torch
from torch import Tensor

from kdtrain.data.counter import counter_hash, counter_permutation

_STREAM_RANDOM, _STREAM_IDENTITIES, _STREAM_IMAGES = 31, 32, 33


def random_batches(
    indices: Tensor, batch_size: int, seed: int, epoch: int, drop_last: bool
) -> list[Tensor]:
    """Returns `indices` (N,) shuffled, in batches of batch_size.

    A smaller last batch is left out with drop_last. Raises ValueError if no batch is left.
    """
    order = indices[counter_permutation(len(indices), seed, _STREAM_RANDOM, epoch)]
    batches = list(order.split(batch_size))
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    if not batches or not len(batches[0]):
        raise ValueError(
            f"random_batches: {len(indices)} images fill no batch of {batch_size}; "
            "lower optim.batch_size"
        )
    return batches


def left_out(indices: Tensor, labels: Tensor) -> Tensor:
    """Returns those of `indices` whose identity has no second one; balanced_batches omits them."""
    counts = torch.bincount(labels[indices])
    return indices[counts[labels[indices]] < 2]


def balanced_batches(
    indices: Tensor, labels: Tensor, identities: int, images: int, seed: int, epoch: int
) -> list[Tensor]:
    """Returns batches of `identities` identities x `images` images each, identity by identity.

    indices: (N,); labels: of the whole source. Each epoch an identity's images are shuffled and
    dealt in hands of `images`, the last one filled up from the first images. Identities with one
    image are left out. Hands are dealt in rounds, so that identities with few images appear as
    often as possible; fewer than `identities` identities at the end of the epoch are dropped.
    Raises ValueError if fewer than `identities` identities have two images.
    """
    order = indices[counter_permutation(len(indices), seed, _STREAM_IMAGES, epoch)]
    order = order[torch.argsort(labels[order], stable=True)]  # by identity, shuffled within
    present, counts = torch.unique_consecutive(labels[order], return_counts=True)
    hands: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)  # by round: (identity, images)
    for identity, own in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        if len(own) < 2:
            continue
        rounds = max(1, -(-len(own) // images))
        dealt = own[torch.arange(rounds * images) % len(own)].reshape(rounds, images)
        for number, hand in enumerate(dealt):
            hands[number].append((identity, hand))
    if len(hands[0]) < identities:
        raise ValueError(
            f"balanced_batches: a batch needs {identities} identities with at least 2 images, "
            f"the training set has {len(hands[0])}; lower triplet.identities"
        )

    queue: deque[tuple[int, Tensor]] = deque()
    for number, round_ in hands.items():
        dealt_to = torch.tensor([identity for identity, _ in round_])
        key = counter_hash(seed, _STREAM_IDENTITIES, epoch, number, dealt_to)
        queue.extend(round_[k] for k in torch.argsort(key, stable=True).tolist())
    batches: list[Tensor] = []
    while True:
        taken: dict[int, Tensor] = {}
        waiting: list[tuple[int, Tensor]] = []
        while queue and len(taken) < identities:
            identity, hand = queue.popleft()
            if identity in taken:  # its next hand goes to a later batch
                waiting.append((identity, hand))
            else:
                taken[identity] = hand
        if len(taken) < identities:
            return batches
        queue.extendleft(reversed(waiting))
        batches.append(torch.cat(list(taken.values())))
