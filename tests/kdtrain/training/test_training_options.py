"""Accumulation, schedules, averaged weights: what they compute, and that an interrupted run ends
with the same bits under them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_runs import assert_same_run, quiet, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.config.settings import build
from kdtrain.data.run_data import RunData
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, engine
from kdtrain.training.engine import Interrupted
from kdtrain.training.environment import computing
from kdtrain.training.journal.journal import read_lines
from kdtrain.training.optimization import Optimisation, learning_rate
from kdtrain.training.preparation import prepare_task

# 24 training images in batches of 5: five batches, the last of 4; steps of three and two
GROUPS = {"optim__batch_size": 5, "optim__accumulate": 3, "train__drop_last": False}
EVERYTHING = {
    **GROUPS,
    "optim__schedule": "cosine",
    "optim__warmup_epochs": 1.25,
    "optim__final_lr_fraction": 0.1,
    "optim__no_decay": "norm_and_bias",
    "optim__ema": 0.8,
    "optim__clip_norm": 1.0,
    "train__save_every": 1,
    "train__log_every": 2,
}


def interrupted_everywhere(config, folder) -> int:
    """Train, stopped after every step, until it is done; the number of interruptions."""
    resume, interrupts = False, 0
    while True:
        try:
            train(config, folder, resume=resume, stop=stop_after(1))
            return interrupts
        except Interrupted:
            resume, interrupts = True, interrupts + 1


def test_a_step_takes_the_mean_gradient_of_its_batches_by_images(tmp_path, monkeypatch):
    gradients, original = [], Optimisation.step

    def step(self, number):
        gradients.append([p.grad.clone() for p in self._network.parameters()])
        return original(self, number)

    monkeypatch.setattr(Optimisation, "step", step)
    config = tiny_config(**GROUPS, optim__phases=[{"epochs": 1, "lr": 1e-9}])
    results = train(config, tmp_path)
    assert results["steps"] == len(gradients) == 2
    with computing(config):
        data = RunData(config)
        task = build_task(config, data.source.num_classes)
        batches = data.epoch(0)
        assert [len(b) for b in batches] == [5, 5, 5, 5, 4]
        task.network.train()
        for group, found in ((batches[:3], gradients[0]), (batches[3:], gradients[1])):
            expected = [torch.zeros_like(p) for p in task.network.parameters()]
            for indices in group:
                batch = data.batch(indices, 0, 0, None)
                loss = task.step(batch.images, batch.labels, batch.points).loss
                weight = len(indices) / sum(map(len, group))
                for total, part in zip(
                    expected,
                    torch.autograd.grad(loss, list(task.network.parameters())),
                    strict=True,
                ):
                    total += weight * part
            for one, other in zip(found, expected, strict=True):
                # float32 sums in another order; equal weights of 5 and 4 images differ by 0.1
                assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6
    (line,) = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert line["step"] == 2


def test_every_step_is_taken_at_its_own_rate(tmp_path):
    config = tiny_config(**{**EVERYTHING, "train__log_every": 1})
    train(config, tmp_path)
    lines = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    places = [(0, 0), (0, 1), (1, 0)]
    steps = [(0.0, 0.6), (0.6, 0.4)]  # three of five batches, then two
    expected = [learning_rate(config.optim, *p, *s) for p in places for s in steps]
    assert [r["lr"] for r in lines] == pytest.approx(expected)
    assert len(set(expected)) == 6


@pytest.mark.parametrize("task", ["classification", "alignment", "verification"])
def test_a_run_with_every_option_that_was_interrupted_everywhere_ends_the_same(task, tmp_path):
    options = {**EVERYTHING, "data__validation_fraction": 0.2, "data__images_per_identity": 7}
    if task == "verification":  # batches of 6, four an epoch: steps of three and one
        options |= {"train__early_stop": 2}
    config = tiny_config(task, **options)
    train(config, tmp_path / "whole")
    assert interrupted_everywhere(config, tmp_path / "parts") >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_averaged_weights_are_measured_saved_and_inherited(tmp_path):
    config = tiny_config(optim__ema=0.9)
    results = train(config, tmp_path / "run")
    kept = checkpoint.load_weights(tmp_path / "run" / "last")
    trained = checkpoint.load_state(tmp_path / "run" / "last")["trained"]
    assert trained.keys() == kept.keys()
    parameters = {name for name in kept if "running" not in name and "num_batches" not in name}
    for name in kept:
        assert torch.equal(kept[name], trained[name]) != (name in parameters), name
    assert engine.evaluate(config, tmp_path / "run")["metrics"] == results["metrics"]
    plain = train(tiny_config(), tmp_path / "plain")
    # the same training: the average is beside it, not in it
    weights = checkpoint.load_weights(tmp_path / "plain" / "last")
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    assert plain["metrics"]["cross_entropy"] != results["metrics"]["cross_entropy"]
    best = checkpoint.load_weights(tmp_path / "run" / "best")
    if results["best"]["step"] == results["steps"]:
        assert all(torch.equal(best[name], kept[name]) for name in kept)
    still = tiny_config(init_from="@run", optim__phases=[{"epochs": 1, "lr": 1e-12}])
    train(still, tmp_path / "next")
    name = "classifier.weight"
    torch.testing.assert_close(
        checkpoint.load_weights(tmp_path / "next" / "last")[name], kept[name], rtol=0, atol=1e-9
    )


def test_a_loss_that_is_not_finite_names_the_images_of_the_whole_step(tmp_path, monkeypatch):
    original, count = Optimisation.backward, 0

    def backward(self, loss):
        nonlocal count
        count += 1
        original(self, loss * (float("inf") if count == 4 else 1))

    monkeypatch.setattr(Optimisation, "backward", backward)
    config = tiny_config(**GROUPS)
    with pytest.raises(engine.TrainingError, match="step 2") as caught:
        train(config, tmp_path)
    batches = RunData(config).epoch(0)
    assert RunData(config).names(torch.cat(batches[3:])) in str(caught.value)


def test_times_and_totals_are_in_the_results_and_survive_an_interruption(tmp_path):
    config = tiny_config(**GROUPS)
    with pytest.raises(Interrupted):
        train(config, tmp_path, stop=stop_after(3))
    before = checkpoint.load_state(tmp_path / "last")["spent"]
    assert before["samples"] == 24 + 15
    results = train(config, tmp_path, resume=True)
    spent = checkpoint.load_state(tmp_path / "last")["spent"]
    assert spent["samples"] == 3 * 24
    assert results["seconds"] >= before["seconds"] + before["apart_s"] - 0.01
    assert results["samples_per_s"] > 0
    assert 0 <= results["wait_share"] <= 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.accumulate", 0),
        ("optim.final_lr_fraction", 1.5),
        ("optim.warmup_epochs", 31),
        ("optim.ema", 1.0),
        ("optim.schedule", "linear"),
        ("optim.no_decay", "all"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        build({key: value})


def test_options_left_alone_are_those_of_a_plain_run(tmp_path):
    plain = tiny_config(optim__phases=[{"epochs": 1, "lr": 0.05}])
    spelled = replace(
        plain, optim=replace(plain.optim, accumulate=1, final_lr_fraction=0.5, no_decay="none")
    )
    train(plain, tmp_path / "plain")
    train(spelled, tmp_path / "spelled")
    runs = (checkpoint.load_weights(tmp_path / n / "last") for n in ("plain", "spelled"))
    one, other = runs
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", ["classification", "verification"])
def test_a_last_batch_of_one_is_refused_before_step_1_where_a_layer_cannot_train(task, tmp_path):
    keys = {"optim__batch_size": 23, "optim__accumulate": 2, "triplet__weight": 0.0}
    keys["train__drop_last"] = False
    message = r"optim\.batch_size 23, train\.drop_last false: the last of 24 training images"
    large = {"data__input_size": 32, "data__store_size": 32}  # maps of 2 x 2 at the end
    for refused in ({"model__embedding": 8, **large}, {}):
        with pytest.raises(ConfigError, match=message) as caught:
            train(tiny_config(task, **keys, **refused), tmp_path / "run")
        assert "Expected more than 1 value" not in str(caught.value)  # torch's own words
        assert not (tmp_path / "run").exists()
    for fine in ({**keys, **large}, {**keys, "train__drop_last": True}):
        config = tiny_config(task, **fine)
        prepare_task(config, RunData(config), tmp_path / "run", quiet())
