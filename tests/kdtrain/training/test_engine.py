"""The training loop: exact resume, what is saved and logged, and how a run that cannot go on
ends.
"""

from __future__ import annotations

import functools
import io
import json

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.data import build_source
from kdtrain.data.run_data import RunData
from kdtrain.models.network import FaceNetwork, seeded
from kdtrain.objectives.task import Task
from kdtrain.training import checkpoint, engine
from kdtrain.training.engine import Interrupted
from kdtrain.training.environment import computing
from kdtrain.training.journal.journal import Screen, read_lines
from kdtrain.training.preparation import TrainingError


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """One uninterrupted run of each task."""
    folders = {}
    for task in ("classification", "alignment", "verification"):
        folders[task] = tmp_path_factory.mktemp(task)
        train(tiny_config(task), folders[task])
    return folders


@pytest.mark.parametrize(
    ("task", "steps"),
    [("classification", 1), ("classification", 8), ("alignment", 4), ("verification", 3)],
)
def test_interrupted_and_resumed_run_equals_uninterrupted_run(task, steps, tmp_path, wholes):
    config = tiny_config(task)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=stop_after(steps))
    assert not (tmp_path / "parts" / "results.json").exists()
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(wholes[task], tmp_path / "parts")


def test_run_interrupted_again_and_again_equals_uninterrupted_run(tmp_path, wholes):
    config = tiny_config("verification")
    resume, interrupts = False, 0
    while True:
        try:
            train(config, tmp_path / "parts", resume=resume, stop=stop_after(2))
            break
        except Interrupted:
            resume, interrupts = True, interrupts + 1
    assert interrupts >= 6
    assert_same_run(wholes["verification"], tmp_path / "parts")


def test_distilled_run_resumes_with_its_projection_and_its_teacher(tmp_path, wholes):
    teacher = wholes["alignment"]
    before = (teacher / "last" / checkpoint.WEIGHTS).read_bytes()
    config = tiny_config("alignment", teacher=str(teacher), target__beta=1.0, model__divide=2)
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=stop_after(5))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    state = checkpoint.load_state(tmp_path / "whole" / "last")
    assert list(state["extra"]) == ["hidden.projection.weight"]
    weights = checkpoint.load_weights(tmp_path / "whole" / "last")
    assert not any("projection" in name for name in weights)
    assert (teacher / "last" / checkpoint.WEIGHTS).read_bytes() == before


def test_the_hidden_target_alone_leaves_the_classifier_as_it_began(tmp_path, wholes):
    teacher = str(wholes["classification"])
    options = {"target__gamma": 0.0, "target__beta": 1.0, "target__hidden_reduction": "mean"}
    config = tiny_config(teacher=teacher, model__divide=2, **options)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=stop_after(5))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    weights = checkpoint.load_weights(tmp_path / "whole" / "last")
    with seeded(config.seed):
        fresh = FaceNetwork(config.model, len(weights["classifier.weight"])).state_dict()
    assert torch.equal(weights["classifier.weight"], fresh["classifier.weight"])
    assert not torch.equal(weights["backbone.stem.weight"], fresh["backbone.stem.weight"])
    assert engine.evaluate(config, tmp_path / "whole")["metrics"] == whole["metrics"]


def test_how_often_is_saved_changes_no_weight(tmp_path, wholes):
    train(tiny_config(train__save_every=1000), tmp_path)
    runs = (wholes["classification"], tmp_path)
    one, other = (checkpoint.load_weights(run / "last") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    metrics = [(run / "metrics.jsonl").read_bytes() for run in runs]
    assert metrics[0] == metrics[1]


def test_a_kill_between_evaluation_and_next_checkpoint_repeats_the_evaluation_only(
    tmp_path, wholes
):
    config = tiny_config()
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=stop_after(8))
    # what a kill leaves behind that came after the last save
    with open(tmp_path / "parts" / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "eval", "step": 99}\n{"kind": "tra')
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(wholes["classification"], tmp_path / "parts")


def test_init_from_takes_the_last_weights_and_lists_the_others(tmp_path, wholes):
    shown = io.StringIO()
    config = tiny_config(
        "alignment",
        init_from=str(wholes["classification"]),
        optim__phases=[{"epochs": 1, "lr": 1e-12}],
    )
    train(config, tmp_path, screen=Screen("second", shown))
    first, second = (
        checkpoint.load_weights(run / "last") for run in (wholes["classification"], tmp_path)
    )
    name = "backbone.stages.2.0.conv2.weight"
    torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-9)
    assert "regressor.weight: not offered" in shown.getvalue()
    assert "classifier.weight" not in shown.getvalue()


def test_learning_rate_follows_the_phases(wholes):
    records = read_lines(wholes["classification"] / "metrics.jsonl")
    lines = [r for r in records if r["kind"] == "train"]
    assert {(r["phase"], r["lr"]) for r in lines} == {(0, 0.05), (1, 0.01)}
    # 24 training images in batches of 4: the last line of each epoch stands at its end
    assert [r["step"] for r in lines] == [4, 6, 8, 12, 16, 18]


def test_every_phase_end_is_evaluated_and_in_the_results(tmp_path):
    results = train(tiny_config(train__eval_every=100), tmp_path)
    assert [(e["phase"], e["epoch"]) for e in results["phases"]] == [(0, 1), (1, 0)]
    assert results["metrics"] == results["phases"][-1]["metrics"]
    assert results["units"]["top1"] == "fraction"
    assert results["units"]["cross_entropy"] == "nats"
    assert results["data"]["train"] == 24
    assert results["data"]["test"] == 16
    assert results["parameters"]["network"] > 1000
    assert results["multiply_adds"]["network"] > results["parameters"]["network"]
    assert results["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("task", "names"),
    [("classification", {"top1"}), ("alignment", {"nrmse"}), ("verification", {"nn_top1"})],
)
def test_the_images_results_average_to_the_metrics_of_every_phase(task, names, wholes):
    results = checkpoint.read_json(wholes[task] / "results.json")
    assert results is not None
    test = RunData(tiny_config(task)).test
    for phase in results["phases"]:
        with np.load(wholes[task] / "items" / f"phase{phase['phase']}.npz") as arrays:
            items = dict(arrays)
        index = items.pop("index")
        assert index.dtype == np.int64
        assert index.tolist() == test.tolist()
        assert set(items) == names
        for name, values in items.items():
            assert values.dtype == np.float32
            assert values.shape == index.shape
            # stored as float32: relative 6e-8 an image
            mean = np.nanmean(values, dtype=np.float64)
            assert mean == pytest.approx(phase["metrics"][name], rel=1e-6)
    assert len(list((wholes[task] / "items").iterdir())) == len(results["phases"]) == 2


@pytest.mark.parametrize(("task", "pick"), [("classification", max), ("alignment", min)])
def test_best_is_the_best_in_the_metric_s_own_direction(task, pick, tmp_path, monkeypatch):
    scores = iter([0.5, 0.1, 0.9])
    original = Task.evaluate

    def scored(self, batches):
        return {**original(self, batches), self.metric[0]: next(scores)}

    monkeypatch.setattr(Task, "evaluate", scored)
    results = train(tiny_config(task), tmp_path)
    name = results["metric"]["name"]
    assert results["best"]["metrics"][name] == pick(0.5, 0.1, 0.9)
    assert results["metrics"][name] == 0.9


def _poisoned(monkeypatch, at, poison):
    """Task.step that spoils one step's result."""
    original, count = Task.step, 0

    def step(self, *batch):
        nonlocal count
        count += 1
        result = original(self, *batch)
        return poison(result) if count == at else result

    monkeypatch.setattr(Task, "step", step)


def test_a_loss_that_is_not_finite_names_step_term_and_images(tmp_path, monkeypatch):
    def poison(result):
        return result._replace(
            loss=result.loss * float("nan"),
            terms={**result.terms, "hard": torch.tensor(float("nan"))},
        )

    _poisoned(monkeypatch, 5, poison)
    with pytest.raises(TrainingError) as caught:
        train(tiny_config(), tmp_path)
    message = str(caught.value)
    assert "step 5" in message
    assert "'hard' is nan" in message
    names = build_source(tiny_config().data).names
    assert any(name in message for name in names)
    weights = checkpoint.load_weights(tmp_path / "last")
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert checkpoint.load_state(tmp_path / "last")["at"]["steps"] == 3


def test_an_infinite_gradient_under_a_finite_loss_is_caught_before_it_is_saved(
    tmp_path, monkeypatch
):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    # step 6 ends an epoch, so no later loss could show what its gradient did
    _poisoned(monkeypatch, 6, lambda result: result._replace(loss=Explode.apply(result.loss)))
    with pytest.raises(TrainingError, match="step 6.*no longer finite though the loss was"):
        train(tiny_config(), tmp_path)
    weights = checkpoint.load_weights(tmp_path / "last")
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_a_task_without_landmarks_in_the_data_is_refused(tmp_path, monkeypatch):
    from kdtrain.data import run_data as batches

    def without(config):
        source = build_source(config)
        source.landmarks = None
        return source

    monkeypatch.setattr(batches, "build_source", without)
    with pytest.raises(TrainingError, match="needs landmarks"):
        train(tiny_config("alignment"), tmp_path)


def test_images_that_fill_no_batch_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="batch"):
        train(tiny_config(optim__batch_size=64), tmp_path)


def test_resume_under_other_threads_or_versions_warns(tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train(tiny_config(), tmp_path, stop=stop_after(2))
    original = engine.environment
    elsewhere = {"threads": 2, "torch": "9.9"}
    monkeypatch.setattr(engine, "environment", lambda c: {**original(c), **elsewhere})
    shown = io.StringIO()
    train(tiny_config(), tmp_path, resume=True, screen=Screen("run", shown))
    assert "threads was 1, is 2" in shown.getvalue()
    assert f"torch was {torch.__version__}, is 9.9" in shown.getvalue()
    assert "python was" not in shown.getvalue()


def test_a_run_folder_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "lock", functools.partial(checkpoint.lock, wait_s=0.1))
    with (
        checkpoint.lock(tmp_path),
        pytest.raises(checkpoint.CheckpointError, match="in use by process"),
    ):
        train(tiny_config(), tmp_path)


def test_a_teacher_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(tiny_config(), tmp_path / "teacher", stop=stop_after(4))
    config = tiny_config(teacher="@teacher", target__alpha=1.0)
    with pytest.raises(checkpoint.CheckpointError, match="not finished"):
        train(config, tmp_path / "student")


def test_evaluate_repeats_the_run_s_own_measurement(wholes):
    results = checkpoint.read_json(wholes["verification"] / "results.json")
    assert results is not None
    again = engine.evaluate(tiny_config("verification"), wholes["verification"])
    assert again["metrics"] == results["metrics"]
    assert again["floors"] == results["floors"]
    assert again["untrained"] == results["untrained"]
    assert set(again["untrained"]) == set(again["metrics"])


def test_evaluation_on_other_identities_omits_the_classifier_s_metrics(wholes):
    other = tiny_config(data__identities=60)
    metrics = engine.evaluate(other, wholes["classification"])["metrics"]
    assert "top1" not in metrics
    assert "pair_accuracy" in metrics


@pytest.mark.parametrize("flushing", [False, True])
def test_computing_gives_torch_its_settings_back(flushing):
    torch.set_flush_denormal(flushing)
    threads = torch.get_num_threads()
    with computing(tiny_config(train__threads=threads + 1)):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.tensor(1e-40) * 0.5).item() == 0.0  # denormals are flushed
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    flushes = (torch.tensor(1e-40) * 0.5).item() == 0.0
    torch.set_flush_denormal(False)
    assert flushes == flushing


def test_progress_is_there_for_a_watcher(wholes):
    progress = json.loads((wholes["classification"] / "progress.json").read_text())
    assert progress["share"] == 1.0
    assert (progress["epoch"], progress["epochs"]) == (3, 3)
    assert progress["metric"] == "top1"


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_refused_before_anything_is_written(device, tmp_path):
    with pytest.raises(ConfigError, match=rf"train.device {device}: .* there is: cpu"):
        train(tiny_config(train__device=device), tmp_path / "run")
    assert not (tmp_path / "run").exists()
