"""The schema, the recipes, and the errors for wrong keys and values."""

from __future__ import annotations

import dataclasses

import pytest

from kdtrain.cli import main
from kdtrain.cli.arguments import UsageError, take_stage_keys
from kdtrain.config import (
    SETTINGS,
    Config,
    ConfigError,
    Phase,
    TeacherConfig,
    run_folder,
    settings,
)
from kdtrain.config.settings import build, nearest, read_recipe, recipe_path, to_flat, to_yaml
from kdtrain.experiments import dryrun

CHAINS = sorted(set(settings.preset_names()) - {"images"})


def _recipe(name: str) -> Config:
    return build(read_recipe(recipe_path(name)))


@pytest.mark.parametrize("name", settings.recipe_names())
def test_every_packaged_recipe_builds_and_contains_its_command(name):
    config = _recipe(name)
    comment = settings.head_comment(recipe_path(name))
    assert f"python -m kdtrain train {name}" in comment
    for word in ("Result:", "Time:"):
        assert word in comment
    assert build(to_flat(config)) == config


def test_every_chain_has_its_ten_stages():
    stages = {
        *("cls_teacher", "cls_student", "cls_control", "cls_distilled"),
        *("ali_teacher", "ali_scratch", "ali_distilled"),
        *("ver_teacher", "ver_scratch", "ver_distilled"),
    }
    for preset in CHAINS:
        names = {n.partition("/")[2] for n in settings.recipe_names() if n.startswith(preset)}
        assert {name for name in names if "/" not in name} == stages
        tables = {name for name in names if name.startswith("tables/")}
        assert tables == {"tables/cls_hint", "tables/cls_fitnet"}


def test_the_paper_preset_is_the_paper_s_setting():
    teacher, student = _recipe("paper/cls_teacher"), _recipe("paper/cls_distilled")
    assert (teacher.data.store_size, teacher.data.input_size) == (256, 224)
    assert (teacher.model.depth, teacher.model.width, teacher.model.stem) == (50, 64, "imagenet")
    assert [(p.epochs, p.lr) for p in teacher.optim.phases] == [(30, 0.1), (30, 0.01)]
    assert [(p.epochs, p.lr) for p in student.optim.phases] == [(30, 0.01)]
    assert student.model.divide == 8
    assert (student.target.alpha, student.target.beta, student.target.gamma) == (1, 0, 1)
    assert (student.target.temperature, student.target.tau_squared) == (3, False)
    alignment, verification = _recipe("paper/ali_distilled"), _recipe("paper/ver_distilled")
    assert (alignment.target.alpha, alignment.target.beta) == (0, 1)
    assert (verification.target.alpha, verification.target.beta) == (1, 0)
    assert verification.triplet.margin == 0.4
    assert verification.triplet.identities * verification.triplet.images_per_identity == 128
    assert [c.optim.batch_size for c in (teacher, alignment)] == [256, 64]


def test_the_two_cores_preset_is_the_measured_schedule():
    teacher, student = _recipe("two-cores/cls_teacher"), _recipe("two-cores/cls_student")
    assert (teacher.model.depth, teacher.model.width, teacher.model.stem) == (14, 32, "small")
    assert student.model.width // student.model.divide == 4
    assert [(p.epochs, p.lr) for p in teacher.optim.phases] == [(16, 0.1), (6, 0.01)]
    for name in ("ali_teacher", "ali_scratch", "ali_distilled"):
        config = _recipe(f"two-cores/{name}")
        assert [(p.epochs, p.lr) for p in config.optim.phases] == [(7, 0.1), (3, 0.01)]
        assert (config.optim.batch_size, config.optim.clip_norm) == (32, 1)
        assert (config.augment.scale_min, config.augment.scale_max) == (0.85, 0.95)
        assert config.target.hidden_reduction == "mean"
    config = _recipe("two-cores/ver_distilled")
    assert config.triplet.identities * config.triplet.images_per_identity == 64
    assert sum(p.epochs for p in config.optim.phases) == 12


@pytest.mark.parametrize("preset", CHAINS)
def test_the_control_differs_from_the_distilled_student_by_the_teacher_alone(preset):
    control, distilled = _recipe(f"{preset}/cls_control"), _recipe(f"{preset}/cls_distilled")
    target = dataclasses.replace(distilled.target, alpha=0.0)
    assert dataclasses.replace(distilled, teacher=TeacherConfig(), target=target) == control


def test_settings_that_cannot_change_a_number_or_a_step_are_marked():
    assert {setting.key for setting in SETTINGS if not setting.counted} == {
        *("init_from", "teacher.run", "teacher.more", "head.run", "eval.gallery"),
        *("teacher.cache_dir", "data.root", "data.cache", "data.workers"),
        *("train.threads", "train.log_every", "train.save_every", "train.tensorboard"),
    }
    costs = {setting.key: setting.cost for setting in SETTINGS}
    sizes = {key for key in costs if key.startswith(("data.", "teacher.")) and costs[key] != "none"}
    assert sizes == {"data.store_size", "data.crop_size", "data.input_size", "teacher.input_size"}
    assert (costs["model.width"], costs["seed"], costs["optim.ema"]) == ("value", "none", "switch")
    assert costs["target.alpha"] == "switch"


def test_a_resolved_config_is_a_recipe(tmp_path):
    config = _recipe("two-cores/ali_distilled")
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config))
    assert build(read_recipe(path)) == config


def test_a_later_base_wins_and_the_recipe_itself_wins_over_both(tmp_path):
    (tmp_path / "one.yaml").write_text("seed: 1\noptim: {batch_size: 8, momentum: 0.5}\n")
    (tmp_path / "two.yaml").write_text("optim: {batch_size: 16}\n")
    (tmp_path / "own.yaml").write_text("base: [one.yaml, two.yaml]\nseed: 2\n")
    config = build(read_recipe(tmp_path / "own.yaml"))
    assert (config.seed, config.optim.batch_size, config.optim.momentum) == (2, 16, 0.5)


def test_bases_in_a_circle_are_an_error(tmp_path):
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        read_recipe(tmp_path / "one.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {batchsize: 8}", "unknown key 'optim.batchsize'; did you mean optim.batch_size"),
        ("batch_size: 8", "unknown key 'batch_size'; did you mean optim.batch_size"),
        ("- 1", "expected a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe_file_is_named_with_its_mistake(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"optim.batch_size": "many"}, "optim.batch_size"),
        ({"model.depth": 18}, "model.depth"),
        ({"optim.phases": []}, "optim.phases"),
        ({"optim.phases": [{"epochs": 0, "lr": 0.1}]}, "epochs"),
        ({"optim.phases": [{"epochs": 1, "lr": float("nan")}]}, "lr"),
        ({"optim.phases": [{"epoch": 1, "lr": 0.1}]}, "epoch"),
        ({"target.temperature": 0.0}, "target.temperature"),
        ({"target.alpha": 1.0}, "need a teacher"),
        ({"teacher": "runs/x"}, "teacher is set but"),
        ({"teacher.cache": "float64"}, "teacher.cache"),
        ({"data.kind": "celeba"}, "data.root"),
        ({"data.split": "half"}, "data.split"),
        ({"data.split": "identity"}, "identity:random"),
        ({"data.store_size": 16}, "data.store_size"),
        ({"model.width": 12, "model.divide": 8}, "model.width"),
        ({"target.gamma": 0.0}, "target.gamma"),
        ({"optim.momentum": 0.0}, "optim.momentum"),
    ],
)
def test_impossible_values_are_rejected_by_name(flat, message):
    with pytest.raises(ConfigError, match=message):
        build(flat)


@pytest.mark.parametrize("target", ["alpha", "beta", "logits"])
def test_classification_may_omit_its_hard_term_for_a_target(target):
    config = build({"target.gamma": 0.0, f"target.{target}": 1.0, "teacher": "runs/x"})
    assert config.target.gamma == 0


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        build({}).seed = 3  # type: ignore[misc]


def test_at_names_the_run_beside_this_one(tmp_path):
    assert run_folder("@cls_teacher", tmp_path / "ali") == tmp_path / "cls_teacher"
    assert run_folder("runs/x", tmp_path / "ali").as_posix() == "runs/x"


def test_a_teacher_alone_is_its_run(tmp_path, shown):
    for text in ('teacher: "@big"', 'teacher: {run: "@big"}'):
        (tmp_path / "base.yaml").write_text(f"{text}\ntarget: {{alpha: 1}}\n")
        config = build(read_recipe(tmp_path / "base.yaml"))
        assert config.teacher == TeacherConfig(run="@big")
        (tmp_path / "own.yaml").write_text("base: base.yaml\nteacher: {cache: float32}\n")
        config = build(read_recipe(tmp_path / "own.yaml"))
        assert config.teacher == TeacherConfig(run="@big", cache="float32")
        assert build({**to_flat(config), "teacher": "x"}).teacher.run == "x"
    (tmp_path / "none.yaml").write_text("teacher: null\n")
    assert build(read_recipe(tmp_path / "none.yaml")).teacher == TeacherConfig()
    for words in (["--teacher", "runs/x"], ["--teacher=runs/x"], ["--teacher.run", "runs/x"]):
        arguments = ["train", "two-cores/cls_distilled", "--dry-run", *words]
        assert main([*arguments, "--teacher.cache", "float16"]) == 0
        assert shown.pop().teacher == TeacherConfig(run="runs/x", cache="float16")
    argv = ["--one.teacher", "x", "--one.teacher.cache=float32", "--teacher", "y"]
    special = take_stage_keys(argv, ["one"])
    assert special == {"one": {"teacher.run": "x", "teacher.cache": "float32"}}


def test_nearest_suggests_similar_names_alone():
    assert nearest("lerning", ["learning", "other"]) == "did you mean learning?"
    assert nearest("qqq", ["learning", "other"]) == "known: learning, other"
    assert nearest("5x", map(str, range(99))) == "no known name is similar"
    assert nearest("margin", ["a.margin", "b.margin"]) in (
        "did you mean a.margin or b.margin?",
        "did you mean b.margin or a.margin?",
    )
    assert nearest("a.identites", ["data.identities", "b"]) == "did you mean data.identities?"


def test_the_error_for_a_missing_run_directory_does_not_list_all_recipes(tmp_path):
    with pytest.raises(ConfigError) as caught:
        settings.recipe_path("zzz")
    assert len(str(caught.value)) < 160
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.yaml").touch()
    with pytest.raises(ConfigError, match=rf"did you mean {tmp_path}/second\?"):
        settings.recipe_path(f"{tmp_path}/secnod")


@pytest.fixture
def shown(monkeypatch):
    """The configs of `train --dry-run`, whose estimates take seconds."""
    configs = []
    monkeypatch.setattr(dryrun, "show_run", lambda config, *_: configs.append(config) or 0)
    return configs


def test_the_command_line_wins_over_the_recipe(shown):
    arguments = ["train", "two-cores/cls_teacher", "--dry-run", "--optim.batch_size", "8"]
    assert main([*arguments, "--optim.phases=[{epochs: 2, lr: 0.5}]", "--seed=7"]) == 0
    (config,) = shown
    assert config.optim.batch_size == 8
    assert config.optim.phases == [Phase(epochs=2, lr=0.5)]
    assert (config.seed, config.model.width) == (7, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train"], "missing: RECIPE"),
        (["train", "two-cores/cls_techer"], "did you mean two-cores/cls_teacher?"),
        (["train", "two-cores/cls_teacher", "--modle.depth", "50"], "did you mean --model.depth?"),
        (["train", "two-cores/cls_teacher", "--model.dep", "50"], "did you mean --model.depth?"),
        (["train", "two-cores/cls_teacher", "--model.depth", "51"], "model.depth"),
        (["train", "two-cores/cls_teacher", "--target.alpha", "1"], "teacher"),
        (
            ["train", "nosuch-run", "--resume"],
            "error: no run directory and no recipe 'nosuch-run'; ",
        ),
        (["train", "nowhere.yaml"], "no recipe file"),
        (["pipeline", "--preset", "two-core"], "did you mean two-cores?"),
        (["pipeline", "--task", "alignment"], "task is each stage's own"),
        (["pipeline", "--teacher", "x"], "teacher.run is each stage's own"),
        (["pipeline", "--cls_teacher.optim.batchsize", "3"], "did you mean --optim.batch_size?"),
        (["pipeline", "--cls_teecher.seed", "3"], "did you mean --cls_teacher.KEY?"),
        (["eval", "nowhere"], "no run directory"),
    ],
)
def test_wrong_usage_exits_with_status_2_and_names_a_similar_word(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert "--help" in shown
    assert list(tmp_path.iterdir()) == []


def test_stage_keys_are_removed_from_the_command_line():
    argv = ["--seed", "1", "--one.seed", "2", "--two.model.depth=50", "--data.kind", "folder"]
    special = take_stage_keys(argv, ["one", "two"])
    assert special == {"one": {"seed": 2}, "two": {"model.depth": 50}}
    assert argv == ["--seed", "1", "--data.kind", "folder"]
    with pytest.raises(UsageError, match="value is missing"):
        take_stage_keys(["--one.seed"], ["one"])


def test_an_empty_value_of_an_option_is_a_usage_error(capsys):
    assert main(["train", "demo/cls_student", "--run-dir", ""]) == 2
    assert "--run-dir: expected a value; got an empty one" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "data"])
def test_a_directory_of_images_needs_a_kind_that_reads_it(command, tmp_path, capsys):
    assert main([command, "demo/cls_student", "--data.root", str(tmp_path)]) == 2
    assert (
        "data.root: expected null with data.kind synthetic (folder and celeba"
        in capsys.readouterr().err
    )
