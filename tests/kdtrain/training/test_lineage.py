"""What the runs that a run reads were trained on: other identities are rejected, known images
named.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.training.journal.journal import Screen

FOLDER = {"data__kind": "folder", "optim__phases": [{"epochs": 1, "lr": 0.05}]}


def images(root: Path, names: str) -> Path:
    """A folder of five images for each of the named identities, who differ by colour."""
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(5):
            colour = (40 * place, 255 - 40 * place, 20 * number)
            Image.new("RGB", (20, 20), colour).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lineage")
    config = tiny_config(**FOLDER, data__root=str(images(root / "ours", "abcd")))
    train(config, root / "teacher")
    return root


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("teacher.run", {"target__alpha": 1.0}),
        ("teacher.run", {"target__logits": 1.0, "target__logits_reduction": "mean"}),
        ("teacher.run", {"target__teacher_head": 1.0}),
        ("head.run", {"head__update": "none"}),
    ],
)
def test_as_many_other_identities_are_refused_where_classes_are_compared(
    setting, options, teacher, tmp_path
):
    other = images(tmp_path / "theirs", "bxyz")
    named = {setting.replace(".", "__"): str(teacher / "teacher")}
    config = tiny_config(**FOLDER, data__root=str(other), **named, **options)
    with pytest.raises(ConfigError, match=rf"{setting} .*other identities than those of"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    again = tiny_config(**FOLDER, data__root=str(teacher / "ours"), **named, **options)
    train(again, tmp_path / "same")


def test_features_of_other_identities_are_compared_all_the_same(teacher, tmp_path):
    other = images(tmp_path / "theirs", "wxyz")
    named = {"teacher__run": str(teacher / "teacher"), "target__embedding_l2": 1.0}
    train(tiny_config(**FOLDER, data__root=str(other), **named), tmp_path / "run")
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert 0 < json.loads(first)["embedding_l2"] <= 4  # of unit rows


@pytest.mark.parametrize("name", ["teacher__run", "init_from", "head__run"])
def test_test_images_that_an_input_was_trained_on_are_warned_of(name, teacher, tmp_path):
    options = {name: str(teacher / "teacher")}
    if name == "teacher__run":
        options["target__embedding_l2"] = 1.0
    said = {}
    for seed in (0, 3):
        stream = io.StringIO()
        config = tiny_config(
            **FOLDER, data__root=str(teacher / "ours"), data__split_seed=seed, **options
        )
        train(config, tmp_path / str(seed), screen=Screen("run", stream))
        said[seed] = stream.getvalue()
    assert "test images here" not in said[0]
    assert f"warning: {name.replace('__', '.')} teacher was trained on" in said[3]


def test_a_copy_of_a_run_elsewhere_gives_the_same_error(teacher, tmp_path):
    shutil.copytree(teacher / "teacher", tmp_path / "copy")
    other = images(tmp_path / "theirs", "bxyz")
    named = {"teacher__run": str(tmp_path / "copy" / "best"), "target__alpha": 1.0}
    with pytest.raises(ConfigError, match="other identities"):
        train(tiny_config(**FOLDER, data__root=str(other), **named), tmp_path / "run")
