"""TAR at FAR over every pair, against scikit-learn's ROC and literal loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from kdtrain.objectives import all_pairs, evaluate


def a_set(seed: int, images: int = 90, identities: int = 11):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(identities, (images,), generator=generator)
    rows = torch.randn(images, 8, generator=generator)
    rows += torch.randn(identities, 8, generator=generator)[labels]
    groups = 4 * labels + torch.randint(4, (images,), generator=generator)
    return rows, labels, groups


def literal(rows, labels, groups=None, gallery=None):
    """Scores and kinds of every pair that counts, by two loops."""
    theirs = rows if gallery is None else gallery
    cosines = torch.nn.functional.normalize(rows, dim=1) @ (
        torch.nn.functional.normalize(theirs, dim=1).T
    )
    scores, same = [], []
    for i, j in itertools.product(range(len(rows)), repeat=2):
        if i == j or (gallery is None and i > j):
            continue
        alike = bool(labels[i] == labels[j])
        if alike and groups is not None and bool(groups[i] == groups[j]):
            continue
        scores.append(cosines[i, j].item())
        same.append(alike)
    return torch.tensor(scores), torch.tensor(same)


@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
def test_rates_are_those_of_scikit_learns_roc_over_all_pairs(videos, crossed):
    rows, labels, groups = a_set(0)
    gallery = rows + torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    groups, gallery = groups if videos else None, gallery if crossed else None
    found = all_pairs.pair_scores(rows, labels, groups, gallery=gallery, part=1000)
    scores, same = literal(rows, labels, groups, gallery)
    assert found.num_impostors == int((~same).sum())
    assert len(found.genuine) == int(same.sum())
    far, tar, _ = roc_curve(same.numpy(), scores.numpy(), drop_intermediate=False)
    for target in (0.1, 0.03, 0.01, 0.004):
        expected = tar[far <= target].max()
        assert all_pairs.tar(found, all_pairs.accepted(target, found.num_impostors)) == expected
    told = all_pairs.metrics(found)
    assert told["tar_at_far_0.01_all"] == tar[far <= 0.01].max()
    assert told["pairs_genuine_all"] == int(same.sum())


def test_a_rate_without_ten_impostors_is_not_reported():
    rows, labels, _ = a_set(1)
    found = all_pairs.pair_scores(rows, labels)
    assert 1000 <= found.num_impostors < 10_000
    names = set(all_pairs.metrics(found))
    assert names == {"tar_at_far_0.01_all", "pairs_genuine_all", "pairs_impostor_all"}
    few = all_pairs.pair_scores(rows[:12], labels[:12])
    assert all_pairs.metrics(few) == {}
    assert [len(part) for part in all_pairs.curve(few)] == [0, 0]
    # not one pair of one identity: nothing to accept
    alone = all_pairs.pair_scores(rows, torch.arange(len(rows)))
    assert all_pairs.metrics(alone) == {}


def test_parts_and_pruning_change_nothing(monkeypatch):
    rows, labels, groups = a_set(2, images=150)
    whole = all_pairs.pair_scores(rows.double().float(), labels, groups)
    monkeypatch.setattr(all_pairs, "MOST", 50)
    short = all_pairs.pair_scores(rows, labels, groups, part=151)  # a row at a time
    assert len(short.impostors) < len(whole.impostors)
    assert torch.allclose(short.impostors, whole.impostors[: len(short.impostors)], atol=1e-6)
    assert torch.allclose(short.genuine, whole.genuine, atol=1e-6)
    assert all_pairs.metrics(short) == all_pairs.metrics(whole)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=40))
def test_ties_with_the_next_impostor_are_refused(pairs):
    kinds = torch.tensor([same for _, same in pairs])
    values = torch.tensor([float(value) for value, _ in pairs])
    genuine, impostors = values[kinds], values[~kinds]
    if not len(genuine) or not len(impostors):
        return
    falling = [part.sort(descending=True).values for part in (genuine, impostors)]
    found = all_pairs.Scores(falling[0], falling[1], len(impostors))
    rates, accepts = evaluate.roc(values, kinds)
    for far in (0.0, 0.1, 0.29, 0.5, 1.0):
        expected = accepts[rates <= far].max().item()
        assert all_pairs.tar(found, all_pairs.accepted(far, found.num_impostors)) == expected


def test_as_many_are_accepted_as_the_rate_allows_in_exact_arithmetic():
    for count in (1, 7, 29, 700, 2900, 30_000):
        for far in (1e-4, 1e-3, 1e-2, 0.29, 1.0):
            k = all_pairs.accepted(far, count)
            assert k / count <= far
            assert k == count or (k + 1) / count > far


def test_the_curve_is_the_rate_at_each_of_its_places():
    rows, labels, groups = a_set(3, images=150)
    found = all_pairs.pair_scores(rows, labels, groups)
    far, tar = all_pairs.curve(found)
    assert far[0] == all_pairs.LEAST / found.num_impostors
    assert 0.09 < far[-1] <= all_pairs.CURVE_FAR
    counts = (far * found.num_impostors).round().long().tolist()
    assert [all_pairs.tar(found, k) for k in counts] == tar.tolist()
    assert bool((tar.diff() >= 0).all())
    other = all_pairs.curve(all_pairs.pair_scores(rows.flip(1) ** 3, labels, groups))
    assert torch.equal(other[0], far)


def test_features_that_are_not_finite_are_refused():
    rows, labels, _ = a_set(4)
    rows[3, 1] = float("nan")
    with pytest.raises(ValueError, match="pair_scores: features must be finite"):
        all_pairs.pair_scores(rows, labels)


def test_a_network_across_another_finds_what_two_loops_find():
    rows, labels, groups = a_set(6)
    gallery = rows + torch.randn(rows.shape, generator=torch.Generator().manual_seed(7))
    found = evaluate.nn_hits(rows, labels, groups, gallery=gallery)
    distance = torch.cdist(rows.double(), gallery.double()).numpy()
    for name, barred in (
        ("nn_top1", np.eye(len(rows), dtype=bool)),
        ("nn_top1_other_video", (groups[:, None] == groups).numpy()),
    ):
        for i in range(len(rows)):
            free = np.flatnonzero(~barred[i])
            mates = [j for j in free if labels[j] == labels[i]]
            nearest = free[distance[i, free].argmin()]
            told = found[name][i].item()
            assert (told == float(labels[nearest] == labels[i])) if mates else np.isnan(told)


def test_across_itself_a_network_finds_what_it_finds_alone():
    rows, labels, groups = a_set(8)
    alone = evaluate.nn_hits(rows, labels, groups)
    across = evaluate.nn_hits(rows, labels, groups, gallery=rows.clone())
    assert all(torch.equal(alone[k].nan_to_num(9), across[k].nan_to_num(9)) for k in alone)
