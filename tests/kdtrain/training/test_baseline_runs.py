"""Embedding, RKD and attention targets in the tasks, in runs, in a cache, and in a config."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from relations_by_hand import angle_by_hand, distance_by_hand
from tiny_runs import TINY, assert_same_run, quiet, stop_after, tiny_config, train
from tiny_tasks import IDENTITIES, NAMES, make_batch, make_config, make_task, make_teacher
from torch.nn import functional as F

from kdtrain.config import ConfigError, ModelConfig
from kdtrain.config.settings import build, read_recipe, recipe_path
from kdtrain.data.run_data import RunData
from kdtrain.experiments import estimate as costs
from kdtrain.experiments import select_targets
from kdtrain.experiments.estimate import Counts, estimate
from kdtrain.experiments.select_targets import plan
from kdtrain.objectives.tasks import build_task
from kdtrain.reports import runs
from kdtrain.reports.report import report
from kdtrain.training import keys, preparation
from kdtrain.training.checkpoint import load_weights
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import read_lines
from kdtrain.training.preparation import prepare_cache, prepare_task, without_teacher

WEIGHTS = {
    "embedding_l2": 2.0,
    "embedding_cosine": 128.0,
    "rkd_distance": 25.0,
    "rkd_angle": 50.0,
    "attention": 1000.0,
}


@pytest.fixture(autouse=True)
def _one_thread():
    """On networks this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


def test_a_step_in_bfloat16_keeps_float32_terms_near_those_of_float32():
    results = []
    for precision in ("float32", "bfloat16"):
        config = make_config("verification", **WEIGHTS)
        train = dataclasses.replace(config.train, precision=precision)
        task = build_task(dataclasses.replace(config, train=train), IDENTITIES, make_teacher())
        results.append(task.step(*make_batch()[:2]))
    for name in WEIGHTS:
        exact, found = (result.terms[name] for result in results)
        assert found.dtype == torch.float32
        # 8 bits of bfloat16 through 14 normalised layers, in both networks
        torch.testing.assert_close(found, exact, rtol=0.3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fused", [True, False])
def test_every_task_adds_its_weighed_targets_and_logs_them_by_name(name, fused):
    task, plain = make_task(name, fused=fused, **WEIGHTS), make_task(name, fused=fused)
    images, labels, points = make_batch()
    with torch.no_grad():
        state = {n: t.clone() for n, t in task.network.state_dict().items()}
        ours = task.network.train().attend(images)
        task.network.load_state_dict(state)
        assert task.teacher is not None
        theirs = task.teacher.attend(images)
        plainly = task.teacher(images)
    for one, other in zip(theirs[:2], plainly[:2], strict=True):
        assert torch.equal(one, other)
    projected = ours.hidden @ task.extra["embedding"].projection.weight.detach().T
    cosine = F.cosine_similarity(projected, theirs.hidden).mean()
    stages = [
        [F.normalize(maps.flatten(1)) for maps in outputs.attention] for outputs in (ours, theirs)
    ]
    maps = sum((a - b).square().mean() for a, b in zip(*stages, strict=True))
    expected = {
        "embedding_l2": 2 - 2 * cosine,
        "embedding_cosine": 1 - cosine,
        "rkd_distance": distance_by_hand(ours.hidden.numpy(), theirs.hidden.numpy()),
        "rkd_angle": angle_by_hand(ours.hidden.numpy(), theirs.hidden.numpy()),
        "attention": maps,
    }
    result, base = task.step(images, labels, points), plain.step(images, labels, points)
    assert set(result.terms) == set(base.terms) | set(WEIGHTS)
    for term, value in expected.items():
        assert float(result.terms[term]) == pytest.approx(float(value), rel=1e-4), term
    added = sum(weight * float(expected[term]) for term, weight in WEIGHTS.items())
    assert result.loss.item() == pytest.approx(base.loss.item() + added, rel=1e-4)
    result.loss.backward()
    grads = [p.grad for p in task.network.backbone.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert all(p.grad is None for p in task.teacher.parameters())


@pytest.mark.parametrize("target", WEIGHTS)
def test_each_target_alone_teaches_from_a_teacher_of_other_identities(target):
    config = make_config("classification", **{target: WEIGHTS[target], "gamma": 0.0})
    task = build_task(config, IDENTITIES, make_teacher(9))
    parameters = [*task.network.parameters(), *task.extra.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05 / WEIGHTS[target])
    steps = []
    task.network.train()
    for _ in range(6):
        result = task.step(*make_batch()[:2])
        assert list(result.terms) == [target]
        steps.append(result.loss.item())
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    assert steps[-1] < steps[0]


def test_a_projection_is_learnt_where_widths_differ_and_dropped_afterwards():
    task = make_task("classification", embedding_cosine=128.0)
    (projection,) = task.extra.parameters()
    assert projection.shape == (256, 128)
    assert not any("projection" in name for name in task.network.state_dict())
    message = r"embedding_proj none: the student has 128 features, the teacher 256; set target"
    with pytest.raises(ConfigError, match=message):
        make_task("classification", embedding_l2=1.0, embedding_proj="none")
    assert not len(make_task("classification", rkd_angle=50.0).extra)


def test_a_cached_output_teaches_as_the_teacher_does():
    targets = {name: weight for name, weight in WEIGHTS.items() if name != "attention"}
    for name, weight in targets.items():
        task = make_task("verification", **{name: weight})
        assert set(task.guide_widths) == {"hidden"}
        images, labels, _ = make_batch()
        guide = task.guide(images)
        kept = guide._replace(logits=None)
        state = {n: t.clone() for n, t in task.network.state_dict().items()}
        online = task.step(images, labels).loss
        task.network.load_state_dict(state)
        assert torch.equal(task.step(images, labels, guide=kept).loss, online)


def test_attention_is_not_cached_and_logs_that_the_teacher_runs_per_step(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(preparation, "load_network", lambda _: make_teacher(8))
    monkeypatch.setattr(preparation, "run_config", lambda _: config)
    options = {"target__attention": 1000.0, "target__beta": 1.0, "teacher__cache": "float32"}
    config = tiny_config(teacher="@teacher", **options)
    data, screen = RunData(config), quiet()
    task = prepare_task(config, data, tmp_path / "run", screen)
    monkeypatch.setattr(screen, "say", said.append)
    assert prepare_cache(config, data, task, tmp_path / "run", screen) is None
    assert "are not cached; the teacher runs per step" in said[0]


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        *(
            ({f"target.{name}": -1.0}, f"target.{name}: expected a number, 0 or more")
            for name in WEIGHTS
        ),
        *(({f"target.{name}": 1.0, "teacher": None}, "need a teacher") for name in WEIGHTS),
        ({"target.embedding_proj": "conv", "target.embedding_l2": 1.0}, "embedding_proj"),
        (
            {"target.rkd_distance": 1.0, "optim.batch_size": 2},
            "at least 3, as target.rkd_distance compares",
        ),
        ({"target.rkd_angle": 1.0, "optim.batch_size": 2}, "compares so many images; got 2"),
        ({"target.hint": 1.0, "target.gamma": 0.0, "target.attention": 5.0}, "attention is 5"),
        ({"target.gamma": 0.0}, "teacher is set but"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(flat, message):
    with pytest.raises(ConfigError, match=message):
        build({"teacher": "runs/x", **flat})


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_makes_another_run_and_is_named(name):
    config = build({"teacher": "runs/x", f"target.{name}": 7.0})
    other = build({"teacher": "runs/x", f"target.{name}": 8.0})
    ours, theirs = (keys.run_key(c, {"teacher": "x"}, "data") for c in (config, other))
    assert ours != theirs
    bare = without_teacher(config)
    assert not bare.target.needs_teacher
    stage = runs.Stage("run", Path(), dataclasses.asdict(config), {}, [], {})
    assert "7 " + {"r": "RKD", "e": "embedding", "a": "attention"}[name[0]] in runs.loss_text(stage)
    assert select_targets.CANDIDATES[name].key == name


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("embedding_l2", {"embedding_l2": 1.0}),
        ("embedding_cosine", {"embedding_cosine": 128.0}),
        ("rkd", {"rkd_distance": 25.0, "rkd_angle": 50.0}),
        ("attention", {"attention": 1000.0}),
    ],
)
def test_the_recipes_weigh_what_they_are_named_after(recipe, weights):
    config = build(read_recipe(recipe_path(f"two-cores/baselines/cls_{recipe}")))
    assert {n: getattr(config.target, n) for n in WEIGHTS if getattr(config.target, n)} == weights
    assert config.target.gamma == 1
    assert config.teacher.run == "@cls_teacher"


SHORT = {"teacher": "@teacher", "optim__phases": [{"epochs": 1, "lr": 0.05}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained teacher."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("baselines")
    train(tiny_config(model__width=16, optim__phases=SHORT["optim__phases"]), root / "teacher")
    return root


def test_an_interrupted_run_with_every_target_ends_bitwise_identical(place):
    weights = {f"target__{name}": 0.01 * weight for name, weight in WEIGHTS.items()}
    config = tiny_config(**SHORT, **weights)
    results = train(config, place / "whole")
    with pytest.raises(Interrupted):
        train(config, place / "parts", stop=stop_after(4))
    train(config, place / "parts", resume=True)
    assert_same_run(place / "whole", place / "parts")
    assert "top1" in results["metrics"]
    lines = read_lines(place / "whole" / "metrics.jsonl")
    assert all(WEIGHTS.keys() <= line.keys() for line in lines if line["kind"] == "train")
    assert not any("embedding" in name for name in load_weights(place / "whole" / "last"))
    assert "RKD angle" in report(place / "whole").read_text()


def test_cached_embeddings_train_bitwise_identical_to_a_forward_pass(place):
    weights = {f"target__{n}": 0.01 * w for n, w in WEIGHTS.items() if n != "attention"}
    config = tiny_config(**SHORT, **weights)
    train(config, place / "online")
    kept = tiny_config(**SHORT, teacher__cache="float32", **weights)
    for name in ("fills", "reads"):
        train(kept, place / name)
        assert_same_run(place / "online", place / name)
    assert {f.suffixes[0] for f in (place / "teacher_cache").rglob("phase*")} == {".hidden"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_estimate_times_each_target_once(name, monkeypatch):
    asked = []
    monkeypatch.setattr(costs, "_timings", {})
    original = costs._measure
    monkeypatch.setattr(costs, "_measure", lambda *a: asked.append(a[1]) or original(*a))
    teacher = ModelConfig(depth=14, width=16, stem="small")
    for weight in (1.0, 2.0):
        options = {f"target__{name}": weight, "teacher__cache": "float32"}
        config = tiny_config(teacher="@t", optim__batch_size=8, **options)
        counts = Counts(8, 24, 16)
        cost = estimate(config, counts, [teacher], threads=1, outputs_cached=True)
        assert cost.training_s > 0
    soft = tiny_config(teacher="@t", optim__batch_size=8, target__alpha=1.0)
    estimate(soft, counts, [teacher], threads=1)
    assert len(asked) == 2


def test_select_targets_takes_them_with_their_published_weights(place, monkeypatch):
    monkeypatch.chdir(place)
    recipe = place / "student.yaml"
    recipe.write_text(
        yaml.safe_dump({**TINY, "teacher": "@teacher", "target.rkd_angle": 3.0}, sort_keys=False)
    )
    study = plan(recipe, {}, place / "chosen", targets=",".join(WEIGHTS))
    assert study.weights == {**WEIGHTS, "embedding_l2": 1.0, "rkd_angle": 3.0}
    assert study.weighed(("attention",)).target.attention == 1000
    assert not study.weighed(()).target.needs_teacher
