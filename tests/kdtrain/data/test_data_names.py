"""Names of any bytes, things with an image's name that are no files, and control characters."""

import hashlib
import io
import os
import stat
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY, quiet, read_celeba, read_folder

from kdtrain.cli import main
from kdtrain.config import build, settings
from kdtrain.config.program import printable
from kdtrain.data import DataError
from kdtrain.data.run_data import identities_key
from kdtrain.reports.report import report
from kdtrain.training import checkpoint, engine
from kdtrain.training.published import import_weights

GBK = "明星".encode("gbk")
LATIN = b"caf\xe9"
SHOWN = {name: printable(os.fsdecode(name)) for name in (GBK, LATIN)}


def save(path, side=20, shade=0):
    pixels = np.full((side, side, 3), shade, np.uint8)
    Image.fromarray(pixels).save(os.fsdecode(path), "PNG")


@pytest.fixture
def folder(tmp_path):
    """Three identities, two of them not UTF-8, with four images each, one of those not either."""
    root = tmp_path / os.fsdecode(b"faces-" + LATIN)
    for shade, identity in enumerate((b"a", GBK, LATIN)):
        own = os.fsencode(root) + b"/" + identity
        os.makedirs(own)
        for k, image in enumerate((b"1.png", b"2.png", b"3.png", LATIN + b".png")):
            save(own + b"/" + image, shade=60 * shade + k)
    return root


def test_names_that_are_not_utf_8_are_hashed_as_their_bytes(folder):
    source = read_folder(folder)
    assert source.num_classes == 3
    assert source.fingerprint() == read_folder(folder, on_error="skip").fingerprint()
    names = [os.fsencode(name) for name in ["folder", *source.names, *source.class_names]]
    digest = hashlib.sha256(b"\n".join(names))
    for array in (source.sizes, source.labels):
        digest.update(array.numpy().tobytes())
    digest.update(b"nonenone")
    assert source.fingerprint() == digest.hexdigest()
    data = build({"data.kind": "folder", "data.root": str(folder)}).data
    key = hashlib.sha256(b"\n".join(map(os.fsencode, source.class_names))).hexdigest()[:16]
    assert identities_key(source.class_names, data) == key


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_data_command_shows_names_on_a_terminal_of_any_encoding(folder, encoding, monkeypatch):
    damaged = folder / os.fsdecode(GBK) / os.fsdecode(b"\xff\x1b[31m.png")
    damaged.write_bytes(b"no image")
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    keys = ["--data.kind", "folder", "--data.root", str(folder), "--data.split", "random"]
    keys += ["--data.on_error", "skip", "--data.store_size", "32"]
    assert main(["data", "--grid", str(folder / "grid.png"), *keys]) == 0
    stream.flush()
    shown = stream.buffer.getvalue()
    assert b"1 skipped: " in shown
    assert SHOWN[LATIN].encode() in shown.splitlines()[-1]  # the grid's path
    assert b"\x1b" not in shown


def test_a_run_on_such_names_trains_caches_and_reports(folder, tmp_path):
    root = tmp_path / os.fsdecode(b"runs-" + GBK)
    keys = {**TINY, "data.kind": "folder", "data.root": str(folder), "data.split": "random"}
    keys |= {"optim.phases": [{"epochs": 1, "lr": 0.01}]}
    teacher, student = root / "teacher", root / os.fsdecode(LATIN)
    engine.train(build(keys), teacher, screen=quiet())
    more = {"teacher": "@teacher", "target.alpha": 1.0, "teacher.cache": "float32"}
    config = build({**keys, **more, "teacher.cache_dir": str(root / os.fsdecode(LATIN + b"2"))})
    engine.train(config, student, screen=quiet())
    assert build(settings.read_recipe(student / "config.yaml")) == config
    page = report(root).read_text(encoding="utf-8")
    assert SHOWN[LATIN] in page
    checkpoint.write_text(tmp_path / "table.csv", f"{os.fsdecode(GBK)},1")
    assert (tmp_path / "table.csv").read_text() == f"{SHOWN[GBK]},1"


@pytest.fixture
def celeba(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    names = [b"1.png", LATIN + b".png"]
    for name in names:
        save(os.fsencode(tmp_path / "img_align_celeba") + b"/" + name)
    (tmp_path / "identity_CelebA.txt").write_bytes(b"".join(name + b" 7\n" for name in names))
    return tmp_path


def points(value, names=(b"1.png", LATIN + b".png")):
    rows = [name + b"," + b",".join([value] * 10) for name in names]
    return b"\n".join(
        [b"image_id," + b",".join(b"abcdefghij"[k : k + 1] for k in range(10)), *rows]
    )


def test_lists_name_the_same_files_as_the_folder_has(celeba):
    (celeba / "list_landmarks_align_celeba.csv").write_bytes(points(b"1"))
    source = read_celeba(celeba)
    assert [os.fsencode(name) for name in source.names] == [b"1.png", LATIN + b".png"]
    assert np.array(source.read(1)).shape == (20, 20, 3)
    (celeba / "list_landmarks_align_celeba.csv").write_bytes(points(b"1") + b"\n" + GBK + b",1")
    with pytest.raises(DataError, match="celeba.csv:4: expected an image and 10 field") as caught:
        read_celeba(celeba)
    assert SHOWN[GBK] in printable(str(caught.value))


@pytest.mark.parametrize("value", [b"1e39", b"-1e308", b"3.5e38", b"nan", b"inf"])
def test_a_landmark_that_float32_cannot_hold_is_named_with_its_line(celeba, value):
    (celeba / "list_landmarks_align_celeba.csv").write_bytes(points(value))
    with pytest.raises(DataError, match=r"celeba.csv:2: expected 10 finite numbers of float32"):
        read_celeba(celeba)
    (celeba / "list_landmarks_align_celeba.csv").write_bytes(points(b"3.4e38"))
    assert bool(read_celeba(celeba).landmarks.isfinite().all())


def test_a_csv_line_that_cannot_be_read_is_named(celeba):
    (celeba / "list_landmarks_align_celeba.csv").write_bytes(b"a" * 200_000 + b",1")
    with pytest.raises(DataError, match=r"celeba.csv:1: cannot read this line: field larger"):
        read_celeba(celeba)


NO_FILES = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_has_an_images_name_and_is_no_file_is_an_issue_and_never_opened(folder, make):
    make(folder / "a" / "x.png")
    with pytest.raises(DataError, match=r"x.png: cannot read this image: expected a file, got"):
        read_folder(folder)
    source = read_folder(folder, on_error="skip", workers=2)
    assert source.num_images == 12
    assert "a/x.png: cannot read this image: expected a file" in source.skipped[0]


def test_an_image_that_became_a_fifo_is_an_issue_when_it_is_loaded(folder):
    source = read_folder(folder)
    (folder / "a" / "1.png").unlink()
    os.mkfifo(folder / "a" / "1.png")
    with pytest.raises(DataError, match=r"1.png: cannot read this image: expected a file"):
        source.read(source.names.index("a/1.png"))


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize(
    "name",
    ["identity_CelebA.txt", "list_landmarks_align_celeba.txt", "index.csv", "l.csv", "s.csv"],
)
def test_a_list_that_is_no_file_is_an_error_and_never_opened(celeba, name, make):
    (celeba / name).unlink(missing_ok=True)
    make(celeba / name)
    asked = {"l.csv": {"landmark_file": name}, "s.csv": {"split": f"file:{name}:half"}}.get(
        name, {}
    )
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match=f"{name}: cannot read this list: expected a file"):
            read_celeba(celeba, on_error=on_error, **asked)


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path, capsys):
    evil = tmp_path / "\x1b]0;title\x07\x9b31m"
    (evil / "empty\x1b[2J").mkdir(parents=True)
    for argv in (
        ["data", "--data.kind", "folder", "--data.root", str(evil)],
        ["report", str(evil)],
    ):
        assert main(argv) == 1
    assert main(["train", str(evil)]) == 2
    assert main(["train", str(evil / "x.yaml")]) == 2
    engine.train(build({**TINY, "optim.phases": [{"epochs": 1, "lr": 0.1}]}), evil / "run")
    assert main(["train", str(evil / "run")]) == 0
    assert main(["report", str(evil)]) == 0
    told = capsys.readouterr()
    assert not set(told.out + told.err) & {"\x1b", "\x07", "\x9b"}
    assert told.err.count(r"\x1b]0;title\x07\x9b31m") >= 4


def test_control_characters_in_the_lines_of_import_do_not_reach_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(import_weights, "write_run", lambda *_, **__: ["written: \x1b[2J"])
    assert main(["import", "w.pt", "--layout", "adaface", "--out", "run"]) == 0
    assert capsys.readouterr().out == "written: \\x1b[2J\n"


def test_printable_leaves_printable_text_unchanged():
    for text in ("plain", "naïve 明星 →", ""):
        assert printable(text) == text
    assert printable("a\tb\nc\u202e\udce9") == r"a\tb\nc\u202e\udce9"


def test_ordinary_names_keep_their_fingerprint(celeba):
    (celeba / "identity_CelebA.txt").write_text("1.png 7\n")
    digest = hashlib.sha256(b"celeba\n1.png\n7")
    digest.update(torch.tensor([[20, 20]]).numpy().tobytes() + torch.tensor([0]).numpy().tobytes())
    digest.update(b"nonenone")
    assert read_celeba(celeba).fingerprint() == digest.hexdigest()
