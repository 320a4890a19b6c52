"""Augmentation is a pure function; landmarks follow the pixels; frames lead back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdtrain.data.transforms import augment, center, to_original

SIDE = 36


def config(crop="random", flip=True, scale_min=0.75, scale_max=0.95):
    return SimpleNamespace(crop=crop, flip=flip, scale_min=scale_min, scale_max=scale_max)


def run_config(how, size, seed=0):
    return SimpleNamespace(seed=seed, augment=how, data=SimpleNamespace(crop_side=size))


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    points = 4 + (SIDE - 8) * torch.rand(count, 5, 2, generator=generator)
    return images, points


def run(images, points, indices, settings_, size=32, **keys):
    whole = run_config(settings_, size, keys.pop("seed", 0))
    return augment(images, points, indices, whole, **{"phase": 0, "epoch": 0} | keys)


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(range(9)),
    cut=st.integers(1, 8),
    crop=st.sampled_from(["random", "jitter"]),
    seed=st.integers(0, 2**40),
)
def test_a_crop_does_not_depend_on_batch_or_order(order, cut, crop, seed):
    images, points = batch(9)
    indices = torch.arange(100, 109)
    whole = run(images, points, indices, config(crop), seed=seed, epoch=3)
    order = torch.tensor(order)
    for part in (order[:cut], order[cut:]):
        got = run(images[part], points[part], indices[part], config(crop), seed=seed, epoch=3)
        assert torch.equal(got[0], whole[0][part])
        assert torch.equal(got[1], whole[1][part])
        assert torch.equal(got[2].offset, whole[2].offset[part])


@pytest.mark.parametrize("key", ["seed", "phase", "epoch"])
def test_every_key_changes_the_crops(key):
    images, points = batch(32)
    first = run(images, points, torch.arange(32), config())
    second = run(images, points, torch.arange(32), config(), **{key: 1})
    moved = (first[2].offset != second[2].offset).any(1) | (first[2].flipped != second[2].flipped)
    assert moved.float().mean() > 0.8  # 1 in 50 draws is the same by chance


@pytest.mark.parametrize("crop", ["random", "jitter"])
def test_landmarks_follow_marked_pixels(crop):
    # the image is a bright blot at one landmark: its centroid must move as the landmark does
    count = 40
    points = 10 + 16 * torch.rand(count, 5, 2, generator=torch.Generator().manual_seed(1))
    ticks = torch.arange(SIDE) + 0.5
    for point in range(5):
        square = (ticks - points[:, point, 0, None])[:, None, :] ** 2
        square = square + (ticks - points[:, point, 1, None])[:, :, None] ** 2
        blot = (250 * torch.exp(-square / 2 / 1.5**2)).round().to(torch.uint8)
        images = blot.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
        crops, moved, frame = run(images, points, torch.arange(count), config(crop))
        assert frame.flipped.any()
        assert not frame.flipped.all()
        name = torch.where(frame.flipped, torch.tensor((1, 0, 2, 4, 3)[point]), torch.tensor(point))
        target = moved[torch.arange(count), name]  # (B, 2)
        inside = ((target > 5) & (target < 27)).all(
            1
        )  # blots cut by the border have another centroid
        weight = crops[:, 0]
        places = torch.arange(32) + 0.5
        mass = weight.sum((1, 2))
        found_x = (weight.sum(1) * places).sum(1) / mass
        found_y = (weight.sum(2) * places).sum(1) / mass
        found = torch.stack([found_x, found_y], 1)
        assert inside.sum() > 10
        # rounding to uint8 and the blot's tails move a centroid by a few hundredths of a pixel
        assert (found - target)[inside].abs().max() < 0.06


def test_flip_mirrors_the_crop_and_swaps_the_sides():
    images, points = batch(64)
    indices = torch.arange(64)
    crops, moved, frame = run(images, points, indices, config())
    plain, still, unflipped = run(images, points, indices, config(flip=False))
    assert not unflipped.flipped.any()
    assert 16 < frame.flipped.sum() < 48
    for k in indices.tolist():
        if not frame.flipped[k]:
            assert torch.equal(crops[k], plain[k])
            assert torch.equal(moved[k], still[k])
            continue
        assert torch.equal(crops[k], plain[k].flip(-1))
        assert torch.equal(moved[k, 0, 0], 32 - still[k, 1, 0])  # left eye was the right one
        assert torch.equal(moved[k, 3, 1], still[k, 4, 1])
        assert torch.equal(moved[k, 2, 0], 32 - still[k, 2, 0])


@settings(deadline=None, max_examples=25)
@given(
    crop=st.sampled_from(["random", "jitter"]), seed=st.integers(0, 2**32), size=st.integers(8, 36)
)
def test_to_original_inverts_augment(crop, seed, size):
    images, points = batch(16, seed % 1000)
    stored = torch.full((16, 2), SIDE)
    _, moved, frame = run(images, points, torch.arange(16), config(crop), size, seed=seed)
    # float32 at coordinates up to 36 * 36 / 8
    assert torch.allclose(to_original(moved, frame, stored, SIDE), points, atol=1e-4)
    _, moved, frame = center(images, points, size, config(crop))
    assert torch.allclose(to_original(moved, frame, stored, SIDE), points, atol=1e-4)
    sizes = torch.tensor([[178, 218]]).expand(16, 2)
    original = to_original(moved, frame, sizes, SIDE)
    assert torch.allclose(original, points * torch.tensor([178 / 36, 218 / 36]), atol=1e-3)


def test_random_crops_are_windows_at_every_place():
    images, _ = batch(400)
    crops, none, frame = run(images, None, torch.arange(400), config(flip=False))
    assert none is None
    assert crops.dtype == torch.float32
    assert torch.equal(frame.scale, torch.ones(400))
    assert sorted(set(frame.offset.flatten().tolist())) == [0.0, 1.0, 2.0, 3.0, 4.0]
    for k in range(0, 400, 50):
        x, y = frame.offset[k].int().tolist()
        assert torch.equal(crops[k], images[k, :, y : y + 32, x : x + 32].float())


def test_jittered_crops_stay_inside_and_use_the_whole_scale_range():
    images, _ = batch(1)
    _, _, frame = run(images.expand(2000, -1, -1, -1), None, torch.arange(2000), config("jitter"))
    side = frame.scale * 32 / SIDE
    assert 0.75 <= side.min() < 0.76
    assert 0.94 < side.max() <= 0.95
    assert frame.offset.min() >= 0
    assert (frame.offset + (frame.scale * 32).unsqueeze(1)).max() <= SIDE + 1e-4


def test_jitter_of_a_linear_ramp_is_exact():
    # bilinear resampling reproduces a ramp away from the border
    ramp = (torch.arange(SIDE) * 7).to(torch.uint8).expand(4, 3, SIDE, SIDE).contiguous()
    crops, _, frame = run(ramp, None, torch.arange(4), config("jitter", flip=False))
    places = (torch.arange(32) + 0.5) * frame.scale[:, None] + frame.offset[:, :1]
    expected = ((places - 0.5) * 7).clamp(0, 7.0 * (SIDE - 1))
    assert torch.allclose(crops[:, 1, 5], expected, atol=1e-3)


def test_center_crop_is_the_middle_and_never_flipped():
    images, points = batch(3)
    crops, moved, frame = center(images, points, 32, config())
    assert torch.equal(crops, images[:, :, 2:34, 2:34].float())
    assert torch.equal(moved, points - 2)
    _, _, frame = center(images, points, 32, config("jitter", scale_min=0.5, scale_max=1.0))
    assert torch.allclose(frame.offset, torch.tensor(SIDE / 8))
    assert torch.allclose(frame.scale, torch.tensor(0.75 * SIDE / 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": run_config(config(), 37)}, "input_size"),
        ({"landmarks": torch.zeros(2, 4, 2)}, "landmarks"),
        ({"images": torch.zeros(2, 3, 36, 30, dtype=torch.uint8)}, "images"),
        ({"indices": torch.arange(3)}, "indices"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "images": torch.zeros(2, 3, 36, 36, dtype=torch.uint8),
        "landmarks": None,
        "indices": torch.arange(2),
        "config": run_config(config(), 32),
    }
    with pytest.raises(ValueError, match=message):
        augment(**(arguments | change), phase=0, epoch=0)
