"""Metrics against values worked by hand, literal loops, and scikit-learn."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from sklearn.neighbors import NearestNeighbors

from kdtrain.objectives import evaluate


def features(*rows: float) -> torch.Tensor:
    return torch.tensor(rows)[:, None].float()


def nrmse(*arguments) -> float:
    return evaluate.nrmse_per_image(*arguments).mean().item()


def nn_top1(*arguments) -> dict[str, float]:
    return evaluate.nn_shares(evaluate.nn_hits(*arguments))


def pair_accuracy(a, b, same, folds=10) -> tuple[float, float]:
    return evaluate.over_folds(evaluate.pair_hits(a, b, same, folds), folds)


def grouped_set(seed: int, identities: int = 12, videos: int = 3, images: int = 2):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(identities).repeat_interleave(videos * images)
    groups = torch.arange(identities * videos).repeat_interleave(images)
    rows = torch.randn(len(labels), 6, generator=generator)
    rows += 1.5 * torch.randn(identities * videos, 6, generator=generator)[groups]
    rows += 1.0 * torch.randn(identities, 6, generator=generator)[labels]
    order = torch.randperm(len(labels), generator=generator)
    return rows[order], labels[order], groups[order]


def test_top1_counts_the_rows_whose_largest_score_is_the_labels():
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0], [1.0, 1.0], [float("nan"), 0.0]])
    # of the tie the lowest class wins, and a row with nan is wrong
    assert evaluate.hits(logits, torch.tensor([1, 1, 0, 0])).tolist() == [True, False, True, False]


def test_nrmse_of_one_image_worked_by_hand():
    true = torch.tensor([[[10.0, 10], [20, 10], [15, 15], [11, 20], [19, 20]]])
    predicted = true.clone()
    predicted[0, 0] += torch.tensor([3.0, 4.0])  # 5 pixels off
    predicted[0, 2, 0] -= 5.0
    sizes = torch.tensor([[40, 90]])
    expected = math.sqrt((25 + 25) / 5)
    assert nrmse(predicted, true, sizes) == pytest.approx(expected / 10)
    diagonal = math.hypot(10, 10)
    assert nrmse(predicted, true, sizes, "diagonal") == pytest.approx(expected / diagonal)
    assert nrmse(predicted, true, sizes, "side") == pytest.approx(expected / 60)
    assert evaluate.per_point_error(predicted, true).tolist() == [[5, 0, 5, 0, 0]]


def test_nrmse_is_the_mean_of_the_images_own_errors():
    true = torch.tensor([[[0.0, 0], [10, 0], [5, 5], [0, 10], [10, 10]]]).repeat(2, 1, 1)
    predicted = true + torch.tensor([1.0, 3.0])[:, None, None] * torch.tensor([1.0, 0.0])
    assert nrmse(predicted, true, torch.full((2, 2), 10)) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["interocular", "diagonal"])
def test_a_face_without_extent_is_an_error_that_names_the_image(kind):
    true = torch.rand(3, 5, 2)
    true[1] = 4.0
    with pytest.raises(ValueError, match=f"the {kind} length of image 1 is 0"):
        nrmse(true, true, torch.ones(3, 2), kind)


def test_failure_rate_counts_errors_above_the_limit_and_nan():
    assert evaluate.failure_rate(torch.tensor([0.05, 0.1, 0.11, float("nan")]), 0.1) == 0.5


def test_ced_is_the_share_of_errors_at_or_below_and_its_exact_area():
    thresholds, below, area = evaluate.ced(
        torch.tensor([0.0, 0.05, 0.2, float("nan")], dtype=torch.float64), 0.1, 11
    )
    assert thresholds[5].item() == pytest.approx(0.05)
    assert below[4].item() == 0.25
    assert below[5].item() == 0.5
    assert below[10].item() == 0.5
    assert area == pytest.approx((1 + 0.5) / 4)


def test_the_ced_area_agrees_with_a_fine_integral_of_the_curve():
    errors = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 0.2
    thresholds, below, area = evaluate.ced(errors, 0.1, 100_001)
    integral = torch.trapezoid(below, thresholds).item() / 0.1
    assert area == pytest.approx(integral, abs=1e-5)


def test_nearest_neighbour_top1_leaves_lone_queries_out_and_counts_them():
    # identity 7 at 1.0 is alone; everyone else has a nearest neighbour of their own
    rows, labels = features(0.0, 0.1, 1.0, 1.6, 1.5, 3.0), torch.tensor([4, 4, 7, 2, 2, 2])
    result = nn_top1(rows, labels)
    assert result == {"nn_top1": 1.0, "nn_queries": 5, "nn_lone": 1}
    labels = torch.tensor([4, 4, 7, 2, 5, 2])
    # now 1.5 is identity 5, alone too, and the one that 1.6 finds; 3.0 still finds 1.6
    result = nn_top1(rows, labels)
    assert result == {"nn_top1": 0.75, "nn_queries": 4, "nn_lone": 2}


def test_without_any_mate_there_is_no_accuracy():
    result = nn_top1(features(0.0, 1.0), torch.tensor([0, 1]))
    assert math.isnan(result["nn_top1"])
    assert result["nn_lone"] == 2


def test_images_of_the_querys_own_video_are_no_neighbours_there():
    rows = features(0.0, 0.1, 0.5, 2.0, 2.1, 9.0)
    labels = torch.tensor([0, 0, 1, 1, 1, 0])
    groups = torch.tensor([0, 0, 1, 2, 2, 3])
    result = nn_top1(rows, labels, groups)
    # plain: 0.0 and 0.1 find each other, as do 2.0 and 2.1; 0.5 finds 0.1, and 9.0 finds 2.1
    assert result["nn_top1"] == pytest.approx(4 / 6)
    # other videos: 0.0, 0.1 -> 0.5 wrong; 0.5 -> 0.1 wrong; 2.0, 2.1 -> 0.5 right; 9.0 -> 2.1 wrong
    assert result["nn_top1_other_video"] == pytest.approx(2 / 6)
    assert result["nn_lone_other_video"] == 0


def test_a_query_whose_mates_are_all_in_its_video_is_lone_there():
    result = nn_top1(
        features(0.0, 0.1, 1.0, 1.1), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    )
    assert result["nn_queries"] == 4
    assert result["nn_queries_other_video"] == 2
    assert result["nn_top1_other_video"] == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_nearest_neighbours_agree_with_scikit_learn_and_a_literal_loop(seed):
    rows, labels, groups = grouped_set(seed)
    result = nn_top1(rows, labels, groups)
    found = NearestNeighbors(n_neighbors=2).fit(rows.numpy()).kneighbors(rows.numpy())[1][:, 1]
    assert result["nn_top1"] == pytest.approx((labels[found] == labels).double().mean().item())
    right = 0
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if groups[j] != groups[i]]
        nearest = min(others, key=lambda j: (rows[i] - rows[j]).norm().item())
        right += bool(labels[nearest] == labels[i])
    assert result["nn_top1_other_video"] == pytest.approx(right / len(rows))


@pytest.mark.parametrize("count", [2, 3, 40, 41])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_both_nearest_neighbour_metrics_decide_near_ties_alike(count, offset, backend):
    """Two clusters of rows a few ulps apart, far from their mean, some equal: where every row is a
    video of its own, other videos are all other rows.
    """
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(3, (count, 5), generator=generator) * 2.0**-10 + offset
    rows[::2] *= -1
    labels = torch.randint(6, (count,), generator=generator)
    groups = torch.randperm(count, generator=generator)
    own = evaluate._nearest_other_group(rows, rows, groups, backend)
    assert torch.equal(own, evaluate.nearest_neighbor(rows, backend=backend)[1])
    hits = evaluate.nn_hits(rows, labels, groups, backend=backend)
    assert torch.equal(hits["nn_top1"].nan_to_num(9), hits["nn_top1_other_video"].nan_to_num(9))


def test_the_nearest_row_of_another_video_is_the_kernels_own():
    """Truth: one search per row among the rows of other videos, ties and NaN included."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, (60, 4), generator=generator).float() + 300
    rows[7] = float("nan")
    for videos in (1, 2, 9, 30):
        groups = torch.randint(videos, (60,), generator=generator)
        for row, found in enumerate(evaluate._nearest_other_group(rows, rows, groups, None)):
            others = (groups != groups[row]).nonzero()[:, 0]
            if len(others):
                nearest = evaluate.nearest_neighbor(rows[row, None], rows[others])[1]
                assert found == others[nearest]
            else:
                assert found == row


def test_pairs_have_lfws_layout_and_never_repeat():
    labels = torch.arange(60).repeat_interleave(5)[
        torch.randperm(300, generator=torch.Generator().manual_seed(0))
    ]
    a, b, same = evaluate.make_pairs(labels, seed=3, folds=10, per_fold=20)
    assert same.tolist() == ([True] * 20 + [False] * 20) * 10
    assert torch.equal(labels[a] == labels[b], same)
    assert bool((a != b).all())
    assert len({frozenset(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == len(a)


def test_identities_of_one_fold_are_in_no_other():
    labels = torch.arange(50).repeat_interleave(4)
    a, b, _ = evaluate.make_pairs(labels, seed=0, folds=5, per_fold=1000)
    identities = [
        set(labels[torch.cat([x, y])].tolist()) for x, y in zip(a.chunk(5), b.chunk(5), strict=True)
    ]
    assert len(a) == 5 * 2 * 60  # ten identities of six pairs each
    assert all(not identities[i] & identities[j] for i in range(5) for j in range(i))


def test_pairs_follow_from_the_seed_alone():
    labels = torch.arange(40).repeat_interleave(3)
    one, two = (evaluate.make_pairs(labels, seed=1) for _ in range(2))
    other = evaluate.make_pairs(labels, seed=2)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    # numpy promises this stream for ever, so the pairs of a published result can be drawn again
    assert one[0][:4].tolist() == [8, 23, 21, 89]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 7), min_size=8, max_size=30),
    folds=st.integers(2, 4),
    seed=st.integers(0, 99),
)
def test_pairs_of_any_split_with_two_identities_a_fold_are_sound(counts, folds, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assume(sum(count > 1 for count in counts) >= 2 * folds)
    a, b, same = evaluate.make_pairs(labels, seed, folds, per_fold=5)
    assert torch.equal(labels[a] == labels[b], same)
    assert Counter(same.tolist())[True] * 2 == len(same)
    assert len({frozenset(pair) for pair in zip(a.tolist(), b.tolist(), strict=True)}) == len(a)


def test_too_few_identities_for_the_folds_is_an_error():
    with pytest.raises(ValueError, match="each of 10 folds needs"):
        evaluate.make_pairs(torch.tensor([0, 0, 1, 1]), seed=0)


def test_the_best_threshold_sits_in_the_middle_of_the_best_gap():
    scores = torch.tensor([0.1, 0.2, 0.6, 0.8, 0.9])
    same = torch.tensor([False, False, True, False, True])
    assert evaluate.best_threshold(scores, same) == pytest.approx(0.4)
    assert evaluate.best_threshold(scores, torch.ones(5, dtype=torch.bool)) == -math.inf
    assert evaluate.best_threshold(scores, torch.zeros(5, dtype=torch.bool)) == math.inf


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25))
def test_no_threshold_is_better_than_the_best(items):
    scores = torch.tensor([float(score) for score, _ in items])
    same = torch.tensor([flag for _, flag in items])
    best = evaluate.best_threshold(scores, same)
    accuracy = ((scores >= best) == same).sum()
    tried = [((scores >= t - 0.5) == same).sum() for t in range(9)]
    assert accuracy == max(tried)


def test_pair_accuracy_agrees_with_a_literal_version_over_scikit_learns_folds():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(103, 5, generator=generator)
    same = torch.rand(103, generator=generator) < 0.5
    noise = torch.randn(103, 5, generator=generator)
    b = torch.where(same[:, None], a + 0.9 * noise, noise)
    scores = torch.cosine_similarity(a.double(), b.double()).numpy()
    accuracies = []
    for others, fold in KFold(10, shuffle=False).split(scores):
        ordered = np.sort(scores[others])
        cuts = np.concatenate([[-2], (ordered[1:] + ordered[:-1]) / 2, [2]])
        right = [((scores[others] >= cut) == same[others].numpy()).sum() for cut in cuts]
        cut = cuts[int(np.argmax(right))]
        accuracies.append(((scores[fold] >= cut) == same[fold].numpy()).mean())
    mean, spread = pair_accuracy(a, b, same)
    assert mean == pytest.approx(np.mean(accuracies))
    assert spread == pytest.approx(np.std(accuracies))


def test_the_threshold_never_comes_from_the_fold_that_it_judges():
    # the first fold alone has its cut at 0.95; by the other folds' cut, near 0, its same pairs are
    # told right and its different pairs wrong
    same = torch.tensor([True, False] * 10)
    scores = torch.where(same, 0.5, -0.5)
    scores[:2] = torch.tensor([0.99, 0.9])
    a = torch.tensor([1.0, 0.0]).expand(20, 2)
    b = torch.stack([scores, (1 - scores**2).sqrt()], 1)
    mean, spread = pair_accuracy(a, b, same)
    assert mean == pytest.approx((9 + 0.5) / 10)
    assert spread == pytest.approx(0.15)


def test_pair_accuracy_rejects_features_that_are_not_finite():
    rows, same = torch.rand(4, 2), torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match="must be finite"):
        pair_accuracy(rows * float("nan"), rows, same, folds=2)


@pytest.mark.parametrize("levels", [1000, 7])
def test_roc_agrees_with_scikit_learn_also_with_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    same = torch.rand(200, generator=generator) < 0.4
    scores = torch.randn(200, generator=generator) + same
    scores = (scores * levels / 4).round() / levels
    far, tar = evaluate.roc(scores, same)
    expected = roc_curve(same.numpy(), scores.double().numpy(), drop_intermediate=False)
    np.testing.assert_allclose(far, expected[0], atol=1e-12)
    np.testing.assert_allclose(tar, expected[1], atol=1e-12)


def test_gallery_top1_does_not_depend_on_how_the_gallery_is_cut():
    rows, labels, _ = grouped_set(8)
    queries, gallery = rows[:30], rows[30:]
    parts = zip(gallery.split(4), labels[30:].split(4), strict=True)
    whole = evaluate.gallery_top1(queries, labels[:30], [(gallery, labels[30:])])
    found = NearestNeighbors(n_neighbors=1).fit(gallery.numpy()).kneighbors(queries.numpy())[1]
    expected = (labels[30:][found[:, 0]] == labels[:30]).double().mean().item()
    assert whole == evaluate.gallery_top1(queries, labels[:30], parts) == pytest.approx(expected)
    assert 0 < whole < 1


def test_raw_pixels_are_the_pixels_and_averages_of_larger_images():
    small = torch.rand(2, 3, 8, 8)
    assert torch.equal(evaluate.raw_pixels(small), small.flatten(1))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(evaluate.raw_pixels(large, side=8), small.flatten(1))
