"""The image store: one image in every mode, errors with names, landmark scaling."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import read_folder, synthetic

from kdtrain.data import DataError
from kdtrain.data.store import ImageStore


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0)
    for identity in "ab":
        (tmp_path / identity).mkdir()
        for k in range(4):
            pixels = noise.integers(0, 256, (40 + k, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / identity / f"{k}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("cache", "workers"), [("memory", 2), ("auto", 0), ("none", 0), ("none", 2)]
)
def test_every_mode_gives_pillows_antialiased_resize(folder, cache, workers):
    source = read_folder(folder)
    store = ImageStore(source, 16, cache, workers)
    indices = torch.tensor([6, 0, 3, 0])
    store.prefetch(indices)
    got = store.get(indices)
    expected = [
        np.asarray(source.read(k).resize((16, 16), Image.Resampling.BILINEAR))
        for k in indices.tolist()
    ]
    assert got.dtype == torch.uint8
    assert np.array_equal(got.permute(0, 2, 3, 1).numpy(), np.stack(expected))
    assert (store._images is not None) == (cache != "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_several_parts_keeps_its_order(folder, workers):
    source = read_folder(folder)
    indices = torch.tensor([6, 0, 3, 0, 5, 1, 7, 2, 4] * 5)  # more than twice what a thread takes
    whole = ImageStore(source, 16, "memory").get(indices)
    store = ImageStore(source, 16, "none", workers)
    assert torch.equal(store.get(indices), whole)
    store.prefetch(indices)
    assert torch.equal(store.get(indices), whole)


def test_batches_read_ahead_are_found_in_any_order_and_once(folder):
    source = read_folder(folder)
    reads = []
    original = source.read

    def counted(image):
        reads.append(image)
        return original(image)

    source.read = counted
    store = ImageStore(source, 16, "none", 2)
    first, second, third = torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4])
    store.prefetch(first)
    store.prefetch(second)
    assert torch.equal(store.get(second), ImageStore(source, 16, "memory").get(second))
    reads.clear()
    store.get(first)
    assert reads == []  # decoded before it was asked for
    store.prefetch(first)
    store.prefetch(second)
    store.prefetch(third)  # the batch that nobody fetched makes room
    assert len(store.get(first)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_by_both_modes(folder, workers):
    path = folder / "b" / "1.png"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    source = read_folder(folder)
    with pytest.raises(DataError, match=r"b/1\.png: cannot read"):
        ImageStore(source, 16, "memory", workers)
    store = ImageStore(source, 16, "none", workers)
    assert len(store.get(torch.tensor([0, 7]))) == 2
    store.prefetch(torch.tensor([5]))
    with pytest.raises(DataError, match=r"b/1\.png: cannot read"):
        store.get(torch.tensor([5]))


def test_landmarks_are_scaled_by_width_and_height(folder):
    source = read_folder(folder)
    store = ImageStore(source, 16)
    assert store.landmarks_in_store() is None
    source.landmarks = torch.tensor([15.0, 10.0]).expand(8, 5, 2)
    scaled = store.landmarks_in_store()
    assert torch.allclose(scaled[1, 0], torch.tensor([8.0, 16 * 10 / 41]))  # image 1 is 30 x 41


def test_synthetic_faces_of_another_size_are_resized():
    source = synthetic(identities=2, images_per_identity=2, synthetic_seed=0, size=48)
    small, whole = ImageStore(source, 24), ImageStore(source, 48, "none")
    indices = torch.tensor([3, 1])
    assert small.get(indices).shape == (2, 3, 24, 24)
    halved = torch.nn.functional.avg_pool2d(whole.get(indices).float(), 2)
    assert (small.get(indices).float() - halved).abs().mean() < 4  # triangle against box filter
