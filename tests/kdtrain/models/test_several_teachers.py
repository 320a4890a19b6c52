"""Several teachers: one soft target, the weighted mean of their softened predictions."""

from __future__ import annotations

import dataclasses
import io
import shutil

import pytest
import torch
from tiny_runs import assert_same_run, quiet, stop_after, tiny_config, train
from tiny_tasks import make_config

from kdtrain.config import ConfigError, ModelConfig, settings
from kdtrain.config.networks import HeadConfig
from kdtrain.data.run_data import RunData
from kdtrain.experiments import pipeline
from kdtrain.experiments.estimate import Counts, estimate
from kdtrain.models.mixture import TeacherMixture, mixed_logits
from kdtrain.models.network import FaceNetwork, count_parameters, multiply_adds, seeded
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, keys
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen
from kdtrain.training.preparation import prepare_cache, prepare_task

SHARES, TAU = [0.5, 0.3, 0.2], 3.0
SHORT = {"optim__phases": [{"epochs": 1, "lr": 0.05}, {"epochs": 1, "lr": 0.01}]}
RUNS = {"teacher__run": "@first", "teacher__more": ["@second"]}


def student(**keys):
    return tiny_config(**{**RUNS, "target__alpha": 1.0, "model__divide": 2, **SHORT, **keys})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with two teachers of different widths and a student's run that asked both."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config(seed=1, **SHORT), root / "first")
    train(tiny_config(model__width=4, seed=2, **SHORT), root / "second")
    train(student(), root / "student")
    return root


def teachers(count: int = 3, classes: int = 6) -> list[FaceNetwork]:
    made = []
    for seed in range(count):
        with seeded(seed):
            network = FaceNetwork(ModelConfig(depth=14, width=8, stem="small"), classes).eval()
            # untrained classifiers hardly tell identities apart
            torch.nn.init.normal_(network.classifier.weight, std=0.1)
            made.append(network)
    return made


def mean_prediction(logits, weights, temperature) -> torch.Tensor:
    """The soft target by its definition, float64."""
    parts = [
        w * (t.double() / temperature).softmax(1) for t, w in zip(logits, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def test_mixed_logits_soften_to_the_mean_prediction():
    generator = torch.Generator().manual_seed(0)
    logits = [8 * torch.randn(20, 50, generator=generator) for _ in SHARES]
    logits[0][0] += 1e4  # a constant and a large spread change nothing
    logits[1][0] *= 1e3
    want = mean_prediction(logits, SHARES, TAU)
    mixed = mixed_logits(logits, SHARES, TAU)
    assert mixed.dtype == torch.float32
    found = (mixed.double() / TAU).softmax(1)
    # float32 logits of size up to 1e4 hold log-probabilities to 1e-3 there, 1e-6 elsewhere
    torch.testing.assert_close(found[1:], want[1:], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(found[:1], want[:1], rtol=2e-3, atol=1e-12)


def test_one_teacher_with_the_whole_share_is_that_teacher():
    logits = 5 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    found = (mixed_logits([logits], [1.0], TAU) / TAU).softmax(1)
    torch.testing.assert_close(found, (logits / TAU).softmax(1))


def soft_term(want: torch.Tensor, task, images) -> float:
    ours = (task.network(images).logits.double() / TAU).log_softmax(1)
    return -(want * ours).sum(1).mean().item()


def test_the_soft_term_is_the_cross_entropy_with_the_mean_prediction():
    networks = teachers()
    config = make_config("classification", alpha=1.0, temperature=TAU)
    task = build_task(config, 6, TeacherMixture(networks, SHARES, TAU))
    with seeded(7):  # an untrained classifier says the same of everyone, and hears no difference
        torch.nn.init.normal_(task.network.classifier.weight, std=1.0)
    images = 255 * torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        answers = [network(images).logits for network in networks]
        term = task.step(images, torch.arange(10) % 6).terms["soft"].item()
        right = soft_term(mean_prediction(answers, SHARES, TAU), task, images)
        assert term == pytest.approx(right, rel=1e-5)
        # what one might have averaged instead lies well apart
        for wrong in (
            (sum(w * a for w, a in zip(SHARES, answers, strict=True)).double() / TAU).softmax(1),
            mean_prediction(answers, SHARES[::-1], TAU),
            mean_prediction(answers, [1 / 3] * 3, TAU),
            mean_prediction(answers, SHARES, 1.0),
        ):
            assert abs(soft_term(wrong, task, images) - right) > 1e-3 * right


def test_a_streamed_head_learns_the_same_mean_prediction():
    networks = teachers()
    images = 255 * torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    terms = []
    for streamed in (False, True):
        config = make_config("classification", alpha=1.0, temperature=TAU)
        config = dataclasses.replace(config, head=HeadConfig(streamed=streamed))
        task = build_task(config, 6, TeacherMixture(networks, SHARES, TAU))
        assert set(task.guide_widths) == {"logits"}
        terms.append(task.step(images, torch.arange(10) % 6).terms["soft"].item())
    assert terms[0] == pytest.approx(terms[1], rel=1e-6)


def test_the_mixture_is_as_large_as_its_networks_together():
    networks = teachers()
    mixture = TeacherMixture(networks, SHARES, TAU)
    assert count_parameters(mixture) == sum(map(count_parameters, networks))
    assert multiply_adds(mixture, 16) == sum(multiply_adds(n, 16) for n in networks)


def test_teachers_of_other_identities_are_refused():
    message = "teacher.more: the teachers have 6, 7 identities"
    with pytest.raises(ValueError, match=message):
        TeacherMixture([*teachers(1), *teachers(1, classes=7)], [0.5, 0.5], TAU)


def test_a_run_with_two_teachers_resumes_bitwise_identical_online_and_from_cached_outputs(
    root, tmp_path
):
    kept = {"teacher__cache": "float32", "teacher__cache_dir": str(tmp_path)}
    with pytest.raises(Interrupted):
        train(student(), root / "parts", stop=stop_after(5))
    train(student(**kept), root / "parts", resume=True)
    assert_same_run(root / "student", root / "parts")
    screen = Screen("run", io.StringIO())
    train(student(**kept), root / "kept", screen=screen)
    # the first five batches were asked online
    assert "7 batches read, 5 computed" in screen._console.file.getvalue()
    assert_same_run(root / "student", root / "kept")
    sizes = checkpoint.read_json(root / "student" / "results.json")["parameters"]
    alone = [checkpoint.read_json(root / n / "results.json") for n in ("first", "second")]
    assert sizes["teacher"] == sum(result["parameters"]["network"] for result in alone)


def test_weights_change_what_is_learnt_and_the_run_s_key_and_equal_ones_do_not(root):
    def key(**own):
        config = student(**own)
        inputs = {k: keys.input_key(f) for k, f in keys.input_folders(config, root / "x").items()}
        return keys.run_key(config, inputs, "data")

    found = [key(), key(teacher__weights=[2.0, 1.0]), key(teacher__weights=[1.0, 2.0])]
    found += [key(teacher__run="@second", teacher__more=["@first"])]
    found += [key(teacher__more=[]), key(teacher__more=["@first"])]
    assert len(set(found)) == len(found)
    assert key(teacher__weights=[2.0, 2.0]) == key()
    train(student(teacher__weights=[9.0, 1.0]), root / "weighed")
    weights = [checkpoint.load_weights(root / n / "last") for n in ("student", "weighed")]
    assert any(not torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_cached_outputs_belong_to_every_teacher_its_weight_and_the_temperature(root, tmp_path):
    folders = []
    changes = ({}, {"teacher__weights": [2.0, 1.0]}, {"target__temperature": 2.0})
    for change in (*changes, {"teacher__more": ["@first"]}, {"teacher__more": []}):
        config = student(teacher__cache="float32", **change)
        data = RunData(config)
        task = prepare_task(config, data, root / "x", quiet())
        cache = prepare_cache(config, data, task, tmp_path / "x", quiet())
        folders.append(cache.files.folder)
    assert len(set(folders)) == len(folders)


def test_every_teacher_is_an_input_of_its_stage_and_has_to_be_there(root, tmp_path):
    assert pipeline.Stage("student", student()).inputs == ("first", "second")
    shutil.copytree(root / "first", tmp_path / "first")
    with pytest.raises(checkpoint.CheckpointError, match="second"):
        train(student(), tmp_path / "student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target__beta": 1.0}, "target.beta has a weight: set others to 0"),
        ({"target__alpha": 0.0, "target__logits": 1.0}, "target.logits has a weight"),
        ({"head__kind": "cosine", "head__update": "adaptive"}, "head.update reads the teacher's"),
        ({"teacher__run": None, "target__alpha": 0.0}, "needs teacher.run, the first teacher"),
        ({"teacher__weights": [1.0]}, "teacher.weights: expected null, or a number above 0"),
        ({"teacher__weights": [1.0, 0.0]}, "for each of the 2 teachers"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        student(**change)


def test_a_recipe_with_several_teachers_is_read_back_as_it_was_written(tmp_path):
    config = student(teacher__weights=[2.0, 1.0])
    (tmp_path / "config.yaml").write_text(settings.to_yaml(config))
    assert settings.build(settings.read_recipe(tmp_path / "config.yaml")) == config


def test_the_estimate_counts_every_teacher(root):
    first, second = tiny_config().model, tiny_config(model__width=4).model
    cost = estimate(student(), Counts(8, 16, 8), [first, second], threads=1)
    results = checkpoint.read_json(root / "student" / "results.json")
    assert cost.memory_bytes > 4 * sum(results["parameters"].values())
    with pytest.raises(ConfigError, match="teachers must be the ModelConfigs of the 2 runs"):
        estimate(student(), Counts(8, 16, 8), [first], threads=1)
