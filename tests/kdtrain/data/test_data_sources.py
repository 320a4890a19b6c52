"""CelebA's layout and ImageFolder: formats, bad lines and images, groups, splits."""

import dataclasses

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import read_celeba, read_folder

from kdtrain.config import DataConfig
from kdtrain.data import DataError, build_source, split
from kdtrain.data.counter import counter_permutation
from kdtrain.data.source import FaceSource
from kdtrain.data.split import split_indices, training_labels

HEADER = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y"
HEADER += " rightmouth_x rightmouth_y"
POINTS = [[20, 30, 40, 31, 30 + k, 45, 22, 60, 39, -1] for k in range(6)]
IDENTITIES = [2880, 2880, 17, 2880, 17, 9]


@pytest.fixture
def celeba(tmp_path):
    """Six images of three identities, lists with CRLF and runs of spaces as CelebA's own."""
    folder = tmp_path / "img_align_celeba"
    folder.mkdir()
    for k in range(6):
        pixels = np.full((72, 60, 3), 30 * k, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k + 1:06d}.jpg")
    write(
        tmp_path / "identity_CelebA.txt", [f"{k + 1:06d}.jpg {i}" for k, i in enumerate(IDENTITIES)]
    )
    rows = [f"{k + 1:06d}.jpg " + "".join(f"{v:5d}" for v in row) for k, row in enumerate(POINTS)]
    write(tmp_path / "list_landmarks_align_celeba.txt", ["6", HEADER, *rows])
    write(tmp_path / "list_eval_partition.txt", [f"{k + 1:06d}.jpg {k // 2}" for k in range(6)])
    return tmp_path


def write(path, lines, end="\r\n"):
    path.write_bytes((end.join(lines) + end).encode())


def edit_line(path, number, text):
    lines = path.read_bytes().split(b"\r\n")
    lines[number - 1] = text.encode()
    path.write_bytes(b"\r\n".join(lines))


def settings(**changes):
    return DataConfig(**({"kind": "celeba", "root": "images", "noise": 0.0} | changes))


def test_celeba_lists_are_read_with_gaps_in_the_identities_closed(celeba):
    source = read_celeba(celeba)
    assert source.names == [f"{k + 1:06d}.jpg" for k in range(6)]
    assert source.class_names == ["9", "17", "2880"]
    assert source.labels.tolist() == [2, 2, 1, 2, 1, 0]
    assert source.sizes.tolist() == [[60, 72]] * 6
    # the list's pixel indices are pixel centres: + 0.5 in continuous coordinates
    assert torch.equal(source.landmarks.reshape(6, 10), torch.tensor(POINTS) + 0.5)
    assert np.array(source.read(2)).shape == (72, 60, 3)
    assert abs(np.array(source.read(2)).mean() - 60) <= 2  # JPEG
    assert source.skipped == []


def test_csv_mirrors_give_the_same_source(celeba):
    reference = read_celeba(celeba).fingerprint()
    write(
        celeba / "identity_CelebA.csv",
        ["image_id,identity", *(f"{k + 1:06d}.jpg,{i}" for k, i in enumerate(IDENTITIES))],
    )
    columns = HEADER.split()
    shuffled = [9, 3, 1, 0, 2, 8, 7, 4, 6, 5]  # columns are found by name
    rows = [
        f"{k + 1:06d}.jpg," + ",".join(str(row[c]) for c in shuffled)
        for k, row in enumerate(POINTS)
    ]
    header = "image_id," + ",".join(columns[c] for c in shuffled)
    write(celeba / "list_landmarks_align_celeba.csv", [header, *rows], end="\n")
    (celeba / "identity_CelebA.txt").unlink()
    (celeba / "list_landmarks_align_celeba.txt").unlink()
    assert read_celeba(celeba).fingerprint() == reference


def test_fingerprint_notices_a_moved_landmark_and_a_changed_identity(celeba):
    reference = read_celeba(celeba).fingerprint()
    assert read_celeba(celeba).fingerprint() == reference
    edit_line(
        celeba / "list_landmarks_align_celeba.txt", 3, "000001.jpg 21 30 40 31 30 45 22 60 39 -1"
    )
    moved = read_celeba(celeba).fingerprint()
    edit_line(celeba / "identity_CelebA.txt", 3, "000003.jpg 9")
    assert len({reference, moved, read_celeba(celeba).fingerprint()}) == 3


def test_landmark_file_is_selectable_and_must_exist(celeba):
    rows = [f"{k + 1:06d}.jpg," + ",".join(f"{v + 0.25}" for v in r) for k, r in enumerate(POINTS)]
    write(celeba / "float.csv", ["image_id," + ",".join(HEADER.split()), *rows])
    source = read_celeba(celeba, landmark_file="float.csv")
    assert torch.equal(source.landmarks.reshape(6, 10), torch.tensor(POINTS) + 0.75)
    with pytest.raises(DataError, match=r"absent\.csv: no such landmark file"):
        read_celeba(celeba, landmark_file="absent.csv")


def test_without_a_landmark_list_there_are_no_landmarks(celeba):
    (celeba / "list_landmarks_align_celeba.txt").unlink()
    assert read_celeba(celeba).landmarks is None


MALFORMED = [
    ("identity_CelebA.txt", 2, "000002.jpg", "expected an image and 1 field"),
    ("identity_CelebA.txt", 2, "000002.jpg abc", "integer identity"),
    ("identity_CelebA.txt", 2, "000001.jpg 3", "already on line 1"),
    ("identity_CelebA.txt", 2, "000099.jpg 3", "no such image"),
    ("list_landmarks_align_celeba.txt", 4, "000002.jpg 1 2 3", "10 field"),
    ("list_landmarks_align_celeba.txt", 4, "000002.jpg 1 2 3 4 x 6 7 8 9 10", "finite"),
    ("list_landmarks_align_celeba.txt", 4, "000002.jpg 1 2 3 4 nan 6 7 8 9 10", "finite"),
]


@pytest.mark.parametrize(("file", "line", "text", "reason"), MALFORMED)
def test_a_malformed_line_is_named_with_file_and_line(celeba, file, line, text, reason):
    edit_line(celeba / file, line, text)
    with pytest.raises(DataError, match=reason) as caught:
        read_celeba(celeba)
    assert f"{file}:{line}" in str(caught.value)


@pytest.mark.parametrize(("file", "line", "text", "reason"), MALFORMED)
def test_skip_leaves_the_malformed_image_out_and_reports_it(celeba, file, line, text, reason):
    edit_line(celeba / file, line, text)
    source = read_celeba(celeba, on_error="skip")
    assert source.names == [f"{k + 1:06d}.jpg" for k in (0, 2, 3, 4, 5)]
    assert any(reason in message and f"{file}:{line}" in message for message in source.skipped)


def test_a_row_missing_from_the_landmark_list_is_an_error(celeba):
    edit_line(celeba / "list_landmarks_align_celeba.txt", 1, "5")
    edit_line(celeba / "list_landmarks_align_celeba.txt", 4, "")
    with pytest.raises(DataError, match=r"no row for 000002\.jpg.*identity_CelebA\.txt:2"):
        read_celeba(celeba)


def test_a_list_cut_short_is_noticed_by_its_row_count(celeba):
    edit_line(celeba / "list_landmarks_align_celeba.txt", 1, "7")
    with pytest.raises(DataError, match=r"txt:1: announces 7 rows, the file has 6"):
        read_celeba(celeba)


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_skipped_and_counted(celeba, damage, workers):
    damage_image(celeba / "img_align_celeba" / "000006.jpg", damage)
    source = read_celeba(celeba, on_error="skip", workers=workers)
    assert source.num_images == 5
    assert source.class_names == ["17", "2880"]  # the class that became empty is gone
    assert len(source.skipped) == 1
    assert "000006.jpg" in source.skipped[0]
    assert "identity_CelebA.txt:6" in source.skipped[0]


@pytest.mark.parametrize("damage", ["empty", "text"])
def test_a_image_without_a_readable_header_stops_the_reading(celeba, damage):
    damage_image(celeba / "img_align_celeba" / "000006.jpg", damage)
    with pytest.raises(DataError, match=r"identity_CelebA\.txt:6: .*000006\.jpg: cannot read"):
        read_celeba(celeba)


def test_a_cut_off_image_is_named_when_it_is_loaded(celeba):
    damage_image(celeba / "img_align_celeba" / "000006.jpg", "cut")
    source = read_celeba(celeba)  # its header is sound
    with pytest.raises(DataError, match=r"000006\.jpg: cannot read this image"):
        source.read(5)


def damage_image(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not an image", "cut": content[:-30]}[how])


def test_missing_lists_and_folders_are_named(celeba, tmp_path):
    with pytest.raises(DataError, match=r"identity_CelebA\.txt"):
        read_celeba(tmp_path / "nowhere")
    (celeba / "img_align_celeba").rename(celeba / "images")
    with pytest.raises(DataError, match="img_align_celeba"):
        read_celeba(celeba)
    with pytest.raises(ValueError, match="raise.*skip"):
        read_celeba(celeba, on_error="ignore")


def test_index_gives_video_groups_and_split_columns(celeba):
    rows = [
        f"{k + 1:06d}.jpg,{v},{s}" for k, (v, s) in enumerate(zip("001020", "abcdef", strict=True))
    ]
    write(celeba / "index.csv", ["image_id,video,half", *rows])
    source = read_celeba(celeba)
    # (identity, video) pairs in order of appearance: 2880/0, 2880/0, 17/1, 2880/0, 17/2, 9/0
    assert source.groups.tolist() == [0, 0, 1, 0, 2, 3]
    assert source.splits["index.csv"]["half"] == list("abcdef")


def test_file_split_reads_train_and_test_from_the_column(celeba):
    values = ["train", "test", "train", "train", "test", "val"]
    write(
        celeba / "index.csv",
        ["image_id,half", *(f"{k + 1:06d}.jpg,{v}" for k, v in enumerate(values))],
    )
    config = settings(root=str(celeba), split="file:index.csv:half")
    train, test = split_indices(build_source(config), config)
    assert (train.tolist(), test.tolist()) == ([0, 2, 3], [1, 4])
    for name, message in [
        ("file:index.csv:other", "this source has: index.csv:half"),
        ("file:index.csv:half:more", "file:NAME:COLUMN"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_indices(build_source(config), settings(split=name))


def test_celebas_own_partition_is_a_file_split(celeba):
    config = settings(root=str(celeba), split="file:list_eval_partition.txt:partition")
    train, test = split_indices(build_source(config), config)
    assert (train.tolist(), test.tolist()) == ([0, 1], [4, 5])


def test_a_split_value_that_is_neither_side_is_an_error(celeba):
    write(celeba / "index.csv", ["image_id,half", *(f"{k + 1:06d}.jpg,x" for k in range(6))])
    config = settings(root=str(celeba), split="file:index.csv:half")
    with pytest.raises(DataError, match=r"half of 000001\.jpg: expected train or test, got 'x'"):
        split_indices(build_source(config), config)


def test_folder_takes_each_subfolder_as_a_identity(tmp_path):
    for identity, count in (("Bea", 2), ("Al", 3)):
        (tmp_path / identity).mkdir()
        for k in range(count):
            Image.new("L", (20, 10 + k), 9).save(tmp_path / identity / f"{k}.png")
    (tmp_path / "Al" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    source = read_folder(tmp_path)
    assert source.class_names == ["Al", "Bea"]
    assert source.names == ["Al/0.png", "Al/1.png", "Al/2.png", "Bea/0.png", "Bea/1.png"]
    assert np.array(source.read(4)).shape == (11, 20, 3)  # grey becomes RGB
    assert source.landmarks is None

    (tmp_path / "Cy").mkdir()
    with pytest.raises(DataError, match="Cy: no image"):
        read_folder(tmp_path)
    assert any("Cy: no image" in line for line in read_folder(tmp_path, on_error="skip").skipped)
    with pytest.raises(DataError, match="no such folder"):
        read_folder(tmp_path / "absent")


def fake_source(labels):
    count = len(labels)
    return FaceSource(
        name="fake",
        names=[str(k) for k in range(count)],
        labels=torch.tensor(labels),
        class_names=[str(k) for k in range(max(labels) + 1)],
        landmarks=None,
        sizes=torch.ones(count, 2, dtype=torch.int64),
        read=lambda image: Image.new("RGB", (1, 1)),
    )


def test_random_split_takes_a_fifth_and_leaves_every_class_a_training_image():
    labels = [k for k in range(50) for _ in range(10)] + list(range(50, 90))  # 40 lone images
    source = fake_source(labels)
    train, test = split_indices(source, settings(split="random"))
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(540))
    assert set(source.labels[train].tolist()) == set(range(90))
    assert not (test >= 500).any()  # a lone image is never tested
    assert 0.2 * 500 - 15 < len(test) <= 108
    again = split_indices(source, settings(split="random"))
    assert torch.equal(train, again[0])
    other = split_indices(source, settings(split="random", split_seed=1))
    assert not torch.equal(test, other[1])


@given(st.lists(st.integers(0, 12), min_size=1), st.floats(0.01, 0.99), st.integers(0, 9))
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_split_gives_each_emptied_class_its_first_image_in_hash_order(ids, share, seed):
    labels = torch.unique(torch.tensor(ids), return_inverse=True)[1]
    found = split._random_split(labels, int(labels.max()) + 1, share, seed)
    order = counter_permutation(len(labels), seed, split._STREAM_RANDOM).tolist()
    expected = set(order[: round(share * len(labels))])
    for label in range(int(labels.max()) + 1):
        own = [k for k in order if labels[k] == label]
        if expected >= set(own):
            expected.remove(own[0])
    assert set(found.nonzero()[:, 0].tolist()) == expected


def test_random_split_of_200_000_identities_with_one_image_each():
    """A pass over all images per class would take 4e10 comparisons here."""
    found = split._random_split(torch.arange(200_000), 200_000, 0.5, seed=0)
    assert not found.any()  # each class keeps its only image for training


def test_identity_split_has_disjoint_identities():
    source = fake_source([k for k in range(50) for _ in range(4)])
    train, test = split_indices(source, settings(split="identity"))
    assert set(source.labels[train].tolist()).isdisjoint(source.labels[test].tolist())
    assert (len(train), len(test)) == (160, 40)
    with pytest.raises(DataError, match="both parts"):
        split_indices(fake_source([0, 0, 0]), settings(split="identity"))


def test_label_noise_reaches_a_share_of_the_training_labels_only():
    config = settings(
        kind="synthetic",
        root=None,
        identities=100,
        images_per_identity=20,
        synthetic_seed=0,
        store_size=16,
        input_size=16,
        noise=0.05,
    )
    source = build_source(config)
    before = source.labels.clone()
    train, test = split_indices(source, config)
    noisy = training_labels(source, train, config)
    assert torch.equal(source.labels, before)
    assert torch.equal(noisy[test], source.labels[test])
    wrong = (noisy != source.labels).sum().item()
    assert abs(wrong - 80) < 5 * 80**0.5  # binomial(1600, 0.05)
    assert 0 <= noisy.min() <= noisy.max() < 100
    config = dataclasses.replace(config, noise=0.0)
    assert torch.equal(training_labels(source, train, config), source.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mxnet"}, r"data\.kind: expected one of synthetic, celeba, folder"),
        ({"kind": "folder", "root": None}, r"data\.root"),
        ({"kind": "folder", "root": ""}, r"data\.root: expected a directory for folder"),
        ({"kind": "synthetic", "root": None, "split": "file:a.csv:b"}, "no split file"),
    ],
)
def test_build_source_names_the_bad_setting(change, message):
    with pytest.raises(ValueError, match=message):
        build_source(settings(**change))


def test_the_real_photographs_are_read(faces):
    config = settings(
        root=str(faces), landmark_file="landmarks5_float.csv", split="file:index.csv:split_by_video"
    )
    source = build_source(config)
    assert (source.num_images, source.num_classes) == (4226, 347)
    train, test = split_indices(source, config)
    assert (len(train), len(test)) == (2876, 1350)
    assert set(source.groups[train].tolist()).isdisjoint(source.groups[test].tolist())
    rounded = read_celeba(faces).landmarks
    assert (rounded - source.landmarks).abs().max() <= 0.501
    partition = settings(split="file:list_eval_partition.txt:partition", root=str(faces))
    train, test = split_indices(build_source(partition), partition)
    assert (len(train), len(test)) == (3243, 601)
