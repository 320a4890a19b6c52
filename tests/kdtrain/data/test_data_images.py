"""How each of Pillow's modes and suffixes is read, and what a run says about its images."""

import numpy as np
import pytest
from PIL import Image
from tiny_runs import TINY, quiet, read_celeba, read_folder, tiny_config, train

from kdtrain.cli import main
from kdtrain.config import build
from kdtrain.data import DataError
from kdtrain.data.build import _NOT_DECODED, _suffixes
from kdtrain.data.run_data import RunData
from kdtrain.data.source import decode_image

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
GREY = np.stack([RAMP.astype(np.uint8)] * 3, 2)


def saved(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.jp2", "a.pgm"])
def test_16_bit_grey_is_divided_by_257_and_rounded(tmp_path, name):
    values = (RAMP * 257).astype(">u2" if name == "big.tif" else np.uint16)
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + values.astype(">u2").tobytes())
    elif name == "big.tif":
        saved(tmp_path / name, Image.frombytes("I;16B", (16, 16), values.tobytes()))
    else:
        saved(tmp_path / name, Image.fromarray(values))
    assert np.array_equal(np.asarray(decode_image(tmp_path / name)), GREY)
    odd = np.array([[128, 129, 385, 386, 65535 - 128, 65535 - 129]], np.uint16)
    decoded = np.asarray(decode_image(saved(tmp_path / "odd.png", Image.fromarray(odd))))
    assert decoded[0, :, 0].tolist() == [0, 1, 1, 2, 255, 254]


def test_float_values_in_0_to_1_are_scaled_to_255_and_others_refused(tmp_path):
    ramp = (RAMP / 255).astype(np.float32)
    path = saved(tmp_path / "a.tif", Image.fromarray(ramp))
    assert np.array_equal(np.asarray(decode_image(path)), GREY)
    for value in (-0.01, 1.01, np.nan):
        ramp[3, 3] = value
        with pytest.raises(DataError, match="mode F"):
            decode_image(saved(tmp_path / "a.tif", Image.fromarray(ramp)))


@pytest.mark.parametrize(
    ("mode", "name", "message"),
    [
        ("F", "a.tif", "mode F"),
        ("I", "a.tif", "mode I"),
        ("F", "a.pfm", "mode F"),
    ],
)
def test_a_mode_without_a_range_of_values_is_refused_by_name(tmp_path, mode, name, message):
    image = Image.new(mode, (16, 16), 2)
    saved(tmp_path / "x" / "b.png", Image.new("L", (16, 16)))
    saved(tmp_path / "x" / name, image)
    with pytest.raises(DataError, match=rf"{name}: cannot read this image: {message} .* 8 or 16"):
        decode_image(tmp_path / "x" / name)
    source = read_folder(tmp_path, on_error="skip")
    assert (source.num_images, len(source.skipped)) == (1, 1)


def test_every_other_mode_of_pillow_is_pillows_own_conversion_or_composited_on_black(tmp_path):
    colour = Image.fromarray(np.random.RandomState(0).randint(0, 255, (16, 16, 3), np.uint8))
    for mode, suffix in (
        ("1", "png"),
        ("L", "bmp"),
        ("P", "gif"),
        ("RGB", "webp"),
        ("CMYK", "jpg"),
    ):
        path = saved(tmp_path / f"{mode}.{suffix}", colour.convert(mode))
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(decode_image(path)), np.asarray(image.convert("RGB")))
    for mode in ("YCbCr", "LAB"):
        path = saved(
            tmp_path / f"{mode}.tif",
            colour.convert("YCbCr")
            if mode == "YCbCr"
            else Image.frombytes("LAB", (16, 16), colour.tobytes()),
        )
        assert decode_image(path).mode == "RGB"
    half = Image.new("L", (16, 16), 128)
    half.paste(0, (0, 0, 8, 16))  # the left half is transparent
    for mode, suffix in (("RGBA", "png"), ("LA", "png"), ("RGBA", "tif"), ("RGBA", "webp")):
        image = Image.new(mode, (16, 16), "white")
        image.putalpha(half)
        options = {"lossless": True} if suffix == "webp" else {}
        decoded = np.asarray(decode_image(saved(tmp_path / f"{mode}a.{suffix}", image, **options)))
        assert decoded[:, :8].max() == 0
        assert (decoded[:, 8:] == 128).all()
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 255, 0, 255, 255, 255])
    palette.paste(0, (0, 0, 8, 16))
    decoded = np.asarray(decode_image(saved(tmp_path / "p.png", palette, transparency=0)))
    assert (decoded[:, :8].max(), decoded[:, 8:].min()) == (0, 255)


def test_every_suffix_that_pillow_decodes_is_read(tmp_path):
    assert {".jpg", ".jfif", ".pgm", ".tif", ".gif", ".jp2"} <= _suffixes()
    kinds = {Image.EXTENSION[suffix] for suffix in _suffixes()}
    assert kinds.isdisjoint(_NOT_DECODED)
    grey = Image.fromarray(GREY)
    for name in ("a.jfif", "b.pgm", "c.gif", "d.JPE"):
        saved(
            tmp_path / "p" / name,
            grey,
            format="PPM" if "pgm" in name else "GIF" if "gif" in name else "JPEG",
        )
    assert read_folder(tmp_path).names == ["p/a.jfif", "p/b.pgm", "p/c.gif", "p/d.JPE"]


def test_everything_beside_images_in_a_folder_is_counted_and_named(tmp_path):
    grey = Image.fromarray(GREY)
    for name in ("p/a.jpg", "p/video/b.jpg", "q/a.jpg", "c.jpg", "q/.hidden.jpg"):
        saved(tmp_path / name, grey)
    (tmp_path / "p" / "x.heic").write_bytes(b"")
    (tmp_path / "index.csv").write_text("image_id,video\np/a.jpg,1\nq/a.jpg,1\n")
    source = read_folder(tmp_path)
    assert source.names == ["p/a.jpg", "q/a.jpg"]
    left = sorted(line.partition(": ")[0] for line in source.skipped)
    assert left == [str(tmp_path / name) for name in ("c.jpg", "p/video", "p/x.heic")]


def test_a_flat_folder_is_named_as_the_problem(tmp_path):
    saved(tmp_path / "a.jpg", Image.fromarray(GREY))
    with pytest.raises(
        DataError, match=r"no usable image.*a\.jpg: expected root/<identity>/<image>"
    ):
        read_folder(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"no usable image; first problem: .* lists no image"):
        read_folder(tmp_path)


@pytest.fixture
def celeba(tmp_path):
    """Twelve images of 20 x 24 pixels with landmarks and the official partition, none of
    identities.
    """
    rows = []
    for k in range(12):
        image = Image.fromarray(np.random.RandomState(k).randint(0, 255, (24, 20, 3), np.uint8))
        saved(tmp_path / "img_align_celeba" / f"{k}.png", image)
        rows.append(f"{k}.png 5 8 15 8 10 {12 + k % 3} 6 18 14 18")
    (tmp_path / "list_landmarks_align_celeba.txt").write_text("\n".join(rows))
    partition = "".join(f"{k}.png {0 if k < 8 else 2}\n" for k in range(12))
    (tmp_path / "list_eval_partition.txt").write_text(partition)
    return tmp_path


def keys(root, **more):
    dotted = {name.replace("__", "."): value for name, value in more.items()}
    return {**TINY, "data.kind": "celeba", "data.root": str(root), **dotted}


def test_alignment_trains_on_celebas_layout_without_identities_and_notes_its_images(celeba):
    phases = [{"epochs": 1, "lr": 0.01}]
    more = {"target__gamma": 0.0, "augment__crop": "jitter", "optim__phases": phases}
    results = train(build(keys(celeba, task="alignment", **more)), celeba / "run")
    assert results["data"]["images"] == 12
    squeezed, partition = results["data"]["notes"]
    assert "12 of 12 images are not square (the first is 20 x 24)" in squeezed
    assert "file:list_eval_partition.txt:partition" in partition
    split = "file:list_eval_partition.txt:partition"
    assert len(RunData(build(keys(celeba, task="alignment", data__split=split))).notes()) == 1


@pytest.mark.parametrize("task", ["classification", "verification"])
def test_other_tasks_need_the_identities(celeba, task):
    with pytest.raises(RuntimeError, match=f"{task} needs at least 2 .* no identity_CelebA"):
        train(build(keys(celeba, task=task)), celeba / "run")


def test_images_that_no_list_names_are_counted(celeba):
    (celeba / "identity_CelebA.txt").write_text("".join(f"{k}.png {k // 3}\n" for k in range(9)))
    assert len(read_celeba(celeba).skipped) == 3
    assert "11.png: not in" in read_celeba(celeba).skipped[1]


def test_an_identity_with_most_genuine_pairs_is_named(tmp_path):
    for identity, count in (("a", 12), ("b", 3), ("c", 3)):
        for k in range(count):
            saved(tmp_path / identity / f"{k}.png", Image.fromarray(GREY))
    flat = {"data__kind": "folder", "data__root": str(tmp_path), "data__split": "identity"}
    config = tiny_config("verification", **flat, data__test_fraction=0.67, data__split_seed=1)
    (line,) = RunData(config).notes()  # of a and one of the others
    assert line.startswith("identity a has 80 % of the test images and 96 % of their genuine pairs")


def test_eval_names_its_pairs_and_warns_of_identities_seen_in_training(tmp_path, capsys):
    config = tiny_config(
        "verification",
        data__identities=50,
        data__images_per_identity=4,
        optim__phases=[{"epochs": 1, "lr": 0.01}],
    )
    train(config, tmp_path / "run", screen=quiet())
    words = ["--data.split", "identity", "--data.test_fraction", "0.6"]
    assert main(["eval", str(tmp_path / "run"), *words]) == 0
    told = capsys.readouterr().out
    pairs = next(line for line in told.splitlines() if line.startswith("  pair_accuracy "))
    assert pairs.endswith("pairs drawn from this test split)")
    assert "was trained on 120 of the 120 test images' identities" in told
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert "warning" not in capsys.readouterr().out
