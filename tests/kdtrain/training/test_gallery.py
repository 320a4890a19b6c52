"""Asymmetric evaluation: queries by one network, the gallery by another at its own view of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config, train

from kdtrain.cli import main
from kdtrain.config import ConfigError
from kdtrain.data.run_data import RunData
from kdtrain.objectives import evaluate, observe
from kdtrain.training import checkpoint, engine, keys
from kdtrain.training.input_runs import check_gallery, load_network

KEYS = {
    "data__identities": 24,
    "data__images_per_identity": 6,
    "data__test_fraction": 0.5,
    "data__split": "random",
    "optim__phases": [{"epochs": 1, "lr": 0.05}],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher at 20 of 24 pixels, its crops jittered; a student at 16 of 20 that queries it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    view = {"data__store_size": 24, "data__input_size": 20, "augment__crop": "jitter"}
    train(tiny_config("verification", **KEYS, **view), root / "teacher")
    student = tiny_config("verification", **KEYS, seed=1, eval__gallery="@teacher")
    return root, train(student, root / "student")


def test_a_run_measures_its_features_against_the_gallerys(runs):
    root, results = runs
    metrics = results["metrics"]
    assert {"asym_nn_top1", "asym_pair_accuracy", "asym_tar_at_far_0.01_all"} <= set(metrics)
    config = tiny_config("verification", **KEYS)
    data = RunData(config)
    ours = observe.look(load_network(root / "student"), data.evaluation(data.test), data.device)
    # what the teacher's own run sees of these images
    view = {"data__store_size": 24, "data__input_size": 20, "augment__crop": "jitter"}
    own = RunData(tiny_config("verification", **KEYS, **view))
    theirs = observe.look(load_network(root / "teacher"), own.evaluation(data.test), data.device)
    sides = (ours.hidden, ours.labels, None)
    told = observe.asymmetric(observe.verified(*sides, normalize=True, gallery=theirs.hidden))
    assert told.metrics == {k: v for k, v in metrics.items() if k.startswith("asym_")}
    with np.load(root / "student" / "items" / "phase0.npz") as items:
        for name in ("asym_nn_top1", "asym_pair_accuracy", "pair_accuracy", "nn_top1"):
            assert np.nanmean(items[name], dtype=np.float64) == pytest.approx(metrics[name])
        a, b, same = evaluate.make_pairs(ours.labels, seed=0)
        hits = evaluate.pair_hits(ours.hidden[a], theirs.hidden[b], same)
        assert items["asym_pair_accuracy"].tolist() == hits.float().tolist()


def test_the_gallery_is_an_input_of_the_key_and_its_folder_is_not(runs):
    root, results = runs
    config = tiny_config("verification", **KEYS, eval__gallery="@teacher")
    assert keys.input_folders(config, root / "student") == {"gallery": root / "teacher"}
    moved = tiny_config("verification", **KEYS, eval__gallery=str(root / "teacher"))
    assert keys.run_key(config, {"gallery": "a"}, "d") == keys.run_key(moved, {"gallery": "a"}, "d")
    assert keys.run_key(config, {"gallery": "a"}, "d") != keys.run_key(moved, {}, "d")
    assert results["key"] == checkpoint.read_json(root / "student" / "results.json")["key"]


def test_eval_takes_a_gallery_and_a_run_is_its_own_best_gallery(runs, capsys):
    root, _ = runs
    assert main(["eval", str(root / "teacher"), "--gallery", str(root / "teacher")]) == 0
    assert "asym_nn_top1" in capsys.readouterr().out
    config = tiny_config("verification", **KEYS, eval__gallery=str(root / "student"))
    metrics = engine.evaluate(config, root / "student")["metrics"]
    for name in ("nn_top1", "tar_at_far_0.01_all", "pair_accuracy"):
        assert metrics[f"asym_{name}"] == pytest.approx(metrics[name], abs=1e-3)


def test_features_of_another_width_are_refused(runs):
    root, _ = runs
    with pytest.raises(ConfigError, match="256 numbers and this network's 512.*model.embedding"):
        check_gallery(root / "teacher", 512)
    with pytest.raises(ConfigError, match="eval.gallery needs task verification"):
        tiny_config("classification", eval__gallery="@teacher")
