"""Embedding, RKD and attention targets: their formulas by hand in float64, degenerate batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from relations_by_hand import angle_by_hand, distance_by_hand
from torch import nn

from kdtrain.models.backbones.base import attention_map
from kdtrain.objectives import relations
from kdtrain.objectives.relations import (
    attention_pairs,
    cosine_loss,
    embedding_sides,
    rkd_angle,
    rkd_distance,
    squared_distances,
    unit,
)
from kdtrain.objectives.targets import squared_objective

RELATIONS = {"rkd_distance": rkd_distance, "rkd_angle": rkd_angle}


@pytest.fixture(autouse=True)
def _one_thread():
    """On tensors this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "by_hand"), [(rkd_distance, distance_by_hand), (rkd_angle, angle_by_hand)]
)
def test_relations_are_those_of_the_paper(loss, by_hand):
    student, teacher = 10 * random(7, 4), random(7, 6, seed=1) ** 3  # both branches of huber
    teacher[5] = teacher[2]
    expected = by_hand(student.numpy(), teacher.numpy())
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-10)
    # float32 features: half the digits
    assert loss(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", RELATIONS.values())
def test_relations_have_the_gradient_of_their_formula(loss, monkeypatch):
    monkeypatch.setitem(relations.ANGLES, "cpu", 60)  # two vertices at a time, and one left
    student, teacher = random(5, 3).requires_grad_(), random(5, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", RELATIONS.values())
def test_relations_do_not_depend_on_scale_place_or_turn(loss):
    student, teacher = random(6, 4), random(6, 4, seed=1)
    turn = torch.linalg.qr(random(4, 4, seed=2))[0]
    moved = 1e-3 * (student @ turn) + 5
    assert loss(moved, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-6)
    assert loss(moved, student).item() == pytest.approx(0, abs=1e-9)


def test_angles_by_parts_are_the_angles_at_once(monkeypatch):
    student, teacher = random(9, 4).requires_grad_(), random(9, 4, seed=1)
    whole = torch.autograd.grad(rkd_angle(student, teacher), student)[0]
    monkeypatch.setitem(relations.ANGLES, "cpu", 1)
    torch.testing.assert_close(
        torch.autograd.grad(rkd_angle(student, teacher), student)[0], whole, rtol=1e-12, atol=1e-14
    )


def equal(count: int, width: int) -> torch.Tensor:
    return random(1, width).expand(count, -1).clone()


def degenerate() -> list:
    one, zero = random(4, 6), torch.zeros(4, 6, dtype=torch.float64)
    twins = one.clone()
    twins[3] = twins[0]
    half = one.clone()
    half[1] = 0
    return [
        pytest.param(equal(4, 6), one, id="all equal"),
        pytest.param(one, equal(4, 6), id="teacher all equal"),
        pytest.param(zero, zero, id="all zero"),
        pytest.param(half, zero, id="zero norms"),
        pytest.param(twins, one, id="twins"),
        pytest.param(1e-30 * one, 1e30 * one, id="tiny and huge"),
        pytest.param(one[:1], one[1:2], id="one image"),
        pytest.param(one[:2], one[1:3], id="two images"),
        pytest.param(one[:0], one[:0], id="no image"),
    ]


def embedding(distance):
    def loss(student, teacher):
        return distance(*embedding_sides(nn.Identity(), student, teacher))

    return loss


def attention(student, teacher):
    """Rows as maps of 2 x 3 places, of one stage."""
    pairs = attention_pairs([student.unflatten(1, (2, 3))], [teacher.unflatten(1, (2, 3))], 1.0)
    return squared_objective(pairs).loss


LOSSES = {
    **RELATIONS,
    "embedding_cosine": embedding(cosine_loss),
    "embedding_l2": embedding(lambda a, b: (a - b).square().sum()),
    "attention": attention,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("student", "teacher"), degenerate())
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_batches_give_a_finite_loss_and_gradient(name, student, teacher, dtype):
    student = student.to(dtype).requires_grad_()
    loss = LOSSES[name](student, teacher.to(dtype))
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    if name in RELATIONS:
        if len(student) < 3:
            assert loss.abs() < 1e-12
            assert (gradient.abs() < 1e-6).all()
        if len(student) and bool((student == student[0]).all()):
            assert (gradient == 0).all()
    else:
        assert (gradient[student.norm(dim=1) == 0] == 0).all()


def test_not_a_number_is_not_hidden():
    broken = random(4, 6)
    broken[1, 1] = float("nan")
    for name, loss in LOSSES.items():
        assert loss(broken.float(), random(4, 6, seed=1).float()).isnan(), name


def test_features_that_agree_to_their_last_bits_are_the_same():
    rows = (1000 + random(5, 64)).float()
    rows[4] = rows[1] * (1 + 3e-7)  # two or three units in the last place
    distances = squared_distances(rows)
    assert distances[4, 1] == distances[1, 4] == 0
    assert (distances.diagonal() == 0).all()
    exact = (rows.double()[:, None] - rows.double()[None]).square().sum(2)
    exact[4, 1] = exact[1, 4] = 0
    torch.testing.assert_close(distances, exact, rtol=1e-6, atol=0)


def test_embedding_l2_is_twice_the_cosine_loss_of_unit_vectors():
    student, teacher = random(5, 8), random(5, 8, seed=1)
    ours, theirs = embedding_sides(nn.Identity(), student, teacher)
    s, t = student.numpy(), teacher.numpy()
    cosines = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    assert cosine_loss(ours, theirs).item() == pytest.approx(1 - cosines.mean(), rel=1e-12)
    assert (ours - theirs).square().sum(1).mean().item() == pytest.approx(
        2 - 2 * cosines.mean(), rel=1e-12
    )


def test_attention_is_the_squared_distance_of_unit_maps_over_all_stages():
    stages = [(4, 3, 4, 4), (4, 5, 2, 2)]
    student = [random(*shape, seed=n) for n, shape in enumerate(stages)]
    teacher = [random(s[0], 2 * s[1], *s[2:], seed=n + 9) for n, s in enumerate(stages)]
    pairs = attention_pairs(
        [attention_map(m) for m in student], [attention_map(m) for m in teacher], 1000.0
    )
    part = squared_objective(pairs)
    expected = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        maps = [(m.numpy() ** 2).sum(1).reshape(len(m), -1) for m in (ours, theirs)]
        a, b = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps)
        expected += ((a - b) ** 2).mean()
    assert part is not None
    assert part.terms["attention"].item() == pytest.approx(expected, rel=1e-6)
    assert part.loss.item() == pytest.approx(1000 * expected, rel=1e-6)


def test_maps_of_different_size_are_averaged_to_the_smaller():
    large, small = random(2, 8, 8).abs(), random(2, 4, 4, seed=1).abs()
    (pair,) = attention_pairs([large], [small], 1.0)
    assert pair.student.shape == pair.teacher.shape == (2, 16)
    means = large.unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)).flatten(1)
    torch.testing.assert_close(pair.student, means / means.norm(dim=1, keepdim=True))


def test_a_row_without_direction_is_left_alone():
    rows = random(3, 4)
    rows[1] = 0
    rows.requires_grad_()
    scaled = unit(rows)
    torch.testing.assert_close(scaled[[0, 2]].norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert (scaled[1] == 0).all()
    scaled.sum().backward()
    assert rows.grad is not None
    assert (rows.grad[1] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_distances_are_float32_inside_autocast_and_of_16_bit_features(name):
    """bfloat16 features are taken as they are: the loss is that of their float32 copies."""
    torch.manual_seed(0)
    student, teacher = random(6, 6).bfloat16(), random(6, 6, seed=1).bfloat16()
    expected = LOSSES[name](student.float(), teacher.float())
    if name != "attention":  # its maps are float32 already, from attention_map
        with torch.autocast("cpu", torch.bfloat16):
            found = LOSSES[name](student, teacher)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    projection = nn.Linear(6, 5, bias=False)
    expected = embedding_sides(projection, student.float(), teacher[:, :5].float())
    maps = random(2, 3, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = embedding_sides(projection, student, teacher[:, :5])
        looks = attention_map(maps)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(looks, maps.float().square().sum(1), rtol=0, atol=0)
