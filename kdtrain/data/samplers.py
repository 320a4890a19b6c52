"""Batches of picture numbers for one epoch, as pure functions of (seed, epoch)."""

from collections import defaultdict, deque

import torch
from torch import Tensor

from kdtrain.data.counter import counter_hash, counter_permutation

_STREAM_RANDOM, _STREAM_PEOPLE, _STREAM_PICTURES = 31, 32, 33


def random_batches(
    indices: Tensor, batch_size: int, seed: int, epoch: int, drop_last: bool
) -> list[Tensor]:
    """Returns the pictures `indices` (N,) once each, shuffled, in batches of batch_size.

    The last batch may be smaller; drop_last leaves it out then. Raises ValueError when that would
    leave no batch.
    """
    order = indices[counter_permutation(len(indices), seed, _STREAM_RANDOM, epoch)]
    batches = list(order.split(batch_size))
    if drop_last and batches and len(batches[-1]) < batch_size:
        batches.pop()
    if not batches or not len(batches[0]):
        raise ValueError(
            f"random_batches: {len(indices)} pictures fill no batch of {batch_size}; "
            "lower optim.batch_size"
        )
    return batches


def left_out(indices: Tensor, labels: Tensor) -> Tensor:
    """Returns the pictures among `indices` whose person has no second one there: balanced_batches
    leaves them out.
    """
    counts = torch.bincount(labels[indices])
    return indices[counts[labels[indices]] < 2]


def balanced_batches(
    indices: Tensor, labels: Tensor, people: int, pictures: int, seed: int, epoch: int
) -> list[Tensor]:
    """Returns batches of `people` different people x `pictures` pictures each; pictures of a person
    lie side by side.

    indices: (N,) picture numbers; labels: labels of the whole source, indexed by them. Each epoch a
    person's pictures are shuffled and dealt in hands of `pictures`; the last hand is filled up from
    the start of the deal, so a picture is repeated within a hand only when the person has fewer
    than `pictures`. People with one picture are left out (`left_out` gives them). Hands are dealt
    round by round, so people with few pictures come as often as they can; a rest of fewer than
    `people` different people at the end of the epoch is dropped. Raises ValueError when fewer than
    `people` people have two pictures.
    """
    order = indices[counter_permutation(len(indices), seed, _STREAM_PICTURES, epoch)]
    order = order[torch.argsort(labels[order], stable=True)]  # by person, shuffled within
    present, counts = torch.unique_consecutive(labels[order], return_counts=True)
    hands: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)  # by round: (person, pictures)
    for person, own in zip(present.tolist(), order.split(counts.tolist()), strict=True):
        if len(own) < 2:
            continue
        rounds = max(1, -(-len(own) // pictures))
        dealt = own[torch.arange(rounds * pictures) % len(own)].reshape(rounds, pictures)
        for number, hand in enumerate(dealt):
            hands[number].append((person, hand))
    if len(hands[0]) < people:
        raise ValueError(
            f"balanced_batches: a batch needs {people} people with at least 2 pictures, "
            f"the training set has {len(hands[0])}; lower triplet.identities"
        )

    queue: deque[tuple[int, Tensor]] = deque()
    for number, round_ in hands.items():
        dealt_to = torch.tensor([person for person, _ in round_])
        key = counter_hash(seed, _STREAM_PEOPLE, epoch, number, dealt_to)
        queue.extend(round_[k] for k in torch.argsort(key, stable=True).tolist())
    batches: list[Tensor] = []
    while True:
        taken: dict[int, Tensor] = {}
        waiting: list[tuple[int, Tensor]] = []
        while queue and len(taken) < people:
            person, hand = queue.popleft()
            if person in taken:  # its next hand goes to a later batch
                waiting.append((person, hand))
            else:
                taken[person] = hand
        if len(taken) < people:
            return batches
        queue.extendleft(reversed(waiting))
        batches.append(torch.cat(list(taken.values())))
