"""Classifier sharing on plain images: the recipes of preset `images`, on digits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_runs import train

from kdtrain.experiments import pipeline
from kdtrain.training import checkpoint

DIGITS = 40  # of each class
SMALL = {
    "data.store_size": 18,
    "data.input_size": 16,
    "augment.flip": False,
    "model.width": 8,
    "model.embedding": 16,
    "optim.batch_size": 16,
    "optim.phases": [{"epochs": 4, "lr": 0.1}, {"epochs": 1, "lr": 0.01}],
    "train.threads": 1,
    "train.eval_every": 100,
    "train.save_every": 1000,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every stage of the preset, trained on an ImageFolder of digits."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    counts = dict.fromkeys(range(10), 0)
    for image, label in zip(digits.images, digits.target.tolist(), strict=True):
        if counts[label] < DIGITS:
            folder = root / "images" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((image * 15.9).astype("uint8")).resize((18, 18))
            grey.save(folder / f"{counts[label]:03d}.png")
            counts[label] += 1
    torch.set_num_threads(1)
    common = {**SMALL, "data.root": str(root / "images")}
    stages = pipeline.plan("images", common, {}, divide=2)
    return root, {s.name: train(s.config, root / s.name) for s in stages}


def test_every_stage_learns_the_digits(runs):
    _, results = runs
    assert set(results) == {"teacher", "student", "soft", "th_kd", "sh_teacher", "sh_kd"}
    shares = {name: result["metrics"]["top1"] for name, result in results.items()}
    assert min(shares.values()) > 0.5, shares  # a tenth is chance
    assert min(shares["teacher"], shares["sh_teacher"]) > 0.85, shares


def test_the_second_teacher_keeps_the_students_classifier_and_no_second_head_is_saved(runs):
    root, results = runs
    weights = {name: checkpoint.load_weights(root / name / "last") for name in results}
    for part in ("weight", "bias"):
        name = f"classifier.{part}"
        assert torch.equal(weights["sh_teacher"][name], weights["student"][name])
        assert not torch.equal(weights["teacher"][name], weights["student"][name])
    assert weights["th_kd"].keys() == weights["student"].keys()
    terms = (root / "th_kd" / "metrics.jsonl").read_text()
    assert '"teacher_head"' in terms
