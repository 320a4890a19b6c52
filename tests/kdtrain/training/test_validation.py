"""The held-out part of the training images, the evaluations on it, and early stopping."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.config.settings import build
from kdtrain.data import DataError
from kdtrain.data.run_data import RunData
from kdtrain.experiments import pipeline
from kdtrain.objectives.task import Task
from kdtrain.training import checkpoint, engine
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen, read_lines
from kdtrain.training.outcome import History


@pytest.mark.parametrize("split", ["random", "identity", "identity:random"])
def test_the_test_images_stay_and_the_training_images_are_divided(split):
    config = tiny_config("verification", data__split=split, data__identities=20)
    plain = RunData(config)
    held = RunData(replace(config, data=replace(config.data, validation_fraction=0.25)))
    assert torch.equal(held.test, plain.test)
    assert len(plain.validation) == 0
    assert torch.equal(plain.held_out, plain.test)
    assert torch.equal(held.held_out, held.validation)
    # an identity whose images were all chosen gave one back
    assert len(held.validation) == pytest.approx(0.25 * len(plain.train), abs=2)
    both = torch.cat([held.train, held.validation]).sort().values
    assert torch.equal(both, plain.train)
    labels = plain.source.labels
    shared = torch.isin(labels[held.validation], labels[held.train])
    assert not shared.any() if split == "identity" else shared.all()
    assert held.key != plain.key


def test_what_is_held_out_follows_the_split_s_seed_alone():
    config = tiny_config(data__validation_fraction=0.3)
    first = RunData(config).validation
    assert torch.equal(RunData(replace(config, seed=7)).validation, first)
    other = RunData(replace(config, data=replace(config.data, split_seed=1)))
    assert not torch.equal(other.validation, first)


def test_every_identity_keeps_a_training_image_and_an_empty_part_is_refused():
    labels = RunData(tiny_config(data__validation_fraction=0.99)).source.labels
    data = RunData(tiny_config(data__validation_fraction=0.99, optim__batch_size=2))
    assert labels[data.train].unique().tolist() == list(range(8))
    with pytest.raises(DataError, match="0.001 of 24 training images of 8 identities leaves 24"):
        RunData(tiny_config(data__validation_fraction=0.001))


def test_no_training_image_s_wrong_label_changes_when_images_are_held_out():
    keys = {"data__noise": 0.3}
    plain, held = (RunData(tiny_config(data__validation_fraction=f, **keys)) for f in (0.0, 0.25))
    assert torch.equal(plain.labels[held.train], held.labels[held.train])
    assert torch.equal(held.labels[held.validation], held.source.labels[held.validation])


@pytest.fixture(scope="module")
def held_out_run(tmp_path_factory):
    """A run with a validation part, the images of every evaluation, and its results."""
    folder, asked = tmp_path_factory.mktemp("held"), []
    original = RunData.evaluation

    def evaluation(self, indices):
        asked.append(indices)
        return original(self, indices)

    config = tiny_config(data__validation_fraction=0.25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunData, "evaluation", evaluation)
        results = train(config, folder)
    return config, folder, asked, results


def test_evaluations_see_the_validation_part_and_ends_of_phases_the_test_split_too(held_out_run):
    config, folder, asked, results = held_out_run
    data = RunData(config)
    # two phases of two epochs and one; the floors: training images and test split; the network
    # before its first step
    expected = [data.validation, data.validation, data.test, data.validation, data.test]
    expected += [data.train, data.test, data.test]
    assert len(asked) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(asked, expected, strict=True))
    lines = read_lines(folder / "metrics.jsonl")
    evals = [r for r in lines if r["kind"] == "eval"]
    assert {r["split"] for r in evals} == {"validation"}
    assert results["validation"]["top1"] == evals[-1]["top1"]
    tests = [r for r in lines if r["kind"] == "test"]
    assert [r["step"] for r in tests] == [8, 12]
    assert {"kind": "test", "step": 12, **results["metrics"]} == tests[-1]
    assert results["best"]["metrics"]["top1"] == max(r["top1"] for r in evals)
    assert (results["data"]["validation"], results["data"]["train"]) == (6, 18)
    assert results["ended"] == {"by": "schedule", "epoch": 3, "why": "all 3 epochs trained"}


def test_the_results_are_those_of_the_saved_weights_on_the_test_split(held_out_run):
    config, folder, _, results = held_out_run
    assert engine.evaluate(config, folder)["metrics"] == results["metrics"]
    data = RunData(config)
    assert len(results["phases"]) == 2
    for phase in results["phases"]:
        parts = {"": (data.test, phase["test"]), "validation_": (data.validation, phase["metrics"])}
        for part, (indices, metrics) in parts.items():
            with np.load(folder / "items" / f"{part}phase{phase['phase']}.npz") as arrays:
                assert arrays["index"].tolist() == indices.tolist()
                assert arrays["top1"].mean() == pytest.approx(metrics["top1"])
    assert len(list((folder / "items").iterdir())) == 4
    assert results["phases"][-1]["test"] == results["metrics"]


def test_a_pipeline_has_the_run_s_key_before_training(held_out_run):
    config, folder, _, results = held_out_run
    stage = pipeline.Stage(folder.name, config)
    assert pipeline.stage_keys([stage], folder.parent) == {folder.name: results["key"]}


def _scored(monkeypatch, scores):
    """Task.evaluate with given values of the judging metric."""
    original, left = Task.evaluate, iter(scores)

    def evaluate(self, batches):
        return {**original(self, batches), self.metric[0]: next(left)}

    monkeypatch.setattr(Task, "evaluate", evaluate)


STOPPING = {
    "data__validation_fraction": 0.25,
    "train__early_stop": 2,
    "optim__phases": [{"epochs": 6, "lr": 0.05}],
}


@pytest.mark.parametrize(
    ("task", "scores"),
    [("classification", (0.2, 0.4, 0.4, 0.3)), ("alignment", (0.4, 0.2, 0.2, 0.3))],
)
def test_a_run_stops_without_improvement_and_reports_it(task, scores, tmp_path, monkeypatch):
    _scored(monkeypatch, [*scores, 0.9])  # the last is the test split's
    shown = io.StringIO()
    results = train(tiny_config(task, **STOPPING), tmp_path, screen=Screen("run", shown))
    name = results["metric"]["name"]
    assert results["ended"]["by"] == "early_stop"
    why = f"stopped early in epoch 4 of 6: no better validation {name} in 2 evaluations"
    assert results["ended"]["why"] == why
    assert why in shown.getvalue()
    assert results["best"]["metrics"][name] == scores[1]
    assert results["metrics"][name] == 0.9
    kept = {f.name for f in (tmp_path / "items").iterdir()}
    assert kept == {"phase0.npz", "validation_phase0.npz"}
    assert checkpoint.load_state(tmp_path / "last")["at"]["epoch"] == 3
    assert checkpoint.read_json(tmp_path / "progress.json")["share"] == 1.0  # type: ignore[index]


def test_a_run_that_still_improves_is_trained_to_its_end(tmp_path, monkeypatch):
    _scored(monkeypatch, [0.1, 0.2, 0.15, 0.3, 0.2, 0.25, 0.9])
    results = train(tiny_config(**STOPPING), tmp_path)
    # stale only at the very end: there was nothing left to stop
    assert results["ended"] == {"by": "schedule", "epoch": 6, "why": "all 6 epochs trained"}


def test_a_stopped_run_that_was_interrupted_everywhere_ends_the_same(tmp_path):
    config = tiny_config("verification", **{**STOPPING, "train__early_stop": 1})
    whole = train(config, tmp_path / "whole")
    assert whole["ended"]["by"] == "early_stop"  # else the case does not show what it should
    resume, interrupts = False, 0
    while True:
        try:
            train(config, tmp_path / "parts", resume=resume, stop=stop_after(2))
            break
        except Interrupted:
            resume, interrupts = True, interrupts + 1
    assert interrupts >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # the last evaluation is kept image by image though the phase did not end
    with np.load(tmp_path / "parts" / "items" / "validation_phase0.npz") as arrays:
        mean = np.nanmean(arrays["nn_top1"])
    assert mean == pytest.approx(whole["validation"]["nn_top1"], rel=1e-6)


def test_early_stopping_needs_held_out_images_and_a_metric():
    with pytest.raises(ConfigError, match="data.validation_fraction"):
        build({"train.early_stop": 3})
    history = History("nn_top1", +1, 1)
    history.add({"step": 1, "metrics": {"pair_accuracy": 0.5}, "phase_ends": False})
    with pytest.raises(ValueError, match="nn_top1 cannot be measured"):
        history.is_stale()


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.validation_fraction", 1.0), ("train.early_stop", 0), ("data.validation_fraction", -1)],
)
def test_values_that_cannot_be_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        build({key: value})
