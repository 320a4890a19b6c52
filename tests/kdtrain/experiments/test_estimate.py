"""What a run costs, before it: sizes, steps, memory, the clock, and that nothing else moves."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import tiny_config

from kdtrain.cli import main
from kdtrain.config import ConfigError, ModelConfig, settings
from kdtrain.data.run_data import RunData
from kdtrain.experiments import dryrun, estimate
from kdtrain.experiments.estimate import Counts, Estimate, Timing, network_size
from kdtrain.experiments.scheduler import longest_chain_first, wall_time
from kdtrain.models.network import FaceNetwork, count_parameters, multiply_adds
from kdtrain.objectives.task import Task

TEACHER = ModelConfig(depth=14, width=16, stem="small")
CONSTANT = Timing(
    images=4, batch_s=0.5, update_s=0.25, image_s=0.125, fixed_bytes=1000, batch_bytes=40
)


@pytest.fixture(autouse=True)
def _nothing_timed_before(monkeypatch):
    monkeypatch.setattr(estimate, "_timings", {})


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Replaces the timed steps by CONSTANT; the tasks that would have been timed."""
    tasks = []

    def measure(config, *_):
        tasks.append(config.task)
        return CONSTANT

    monkeypatch.setattr(estimate, "_measure", measure)
    return tasks


def _estimate(config, **options) -> Estimate:
    """The estimate with one thread; options: of Counts, teacher, and of estimate itself."""
    counts = {name: options.pop(name) for name in Counts._fields if name in options}
    teachers = [options.pop("teacher")] if "teacher" in options else []
    counts = Counts(**{"classes": 8, "train": 24, "test": 16, **counts})
    return estimate.estimate(config, counts, teachers, threads=1, **options)


def test_sizes_are_those_of_the_network_that_would_be_built():
    config = tiny_config("alignment", model__divide=2)
    network = FaceNetwork(config.model, 30, landmarks=True)
    size = network_size(config, config.model, 30)
    assert size.parameters == count_parameters(network)
    assert size.multiply_adds == multiply_adds(network, config.data.input_size)


def test_the_paper_s_teacher_has_resnet_50_s_known_size():
    config = settings.build(settings.read_recipe(settings.recipe_path("paper/cls_teacher")))
    size = network_size(config, config.model, 1000)
    assert size.parameters == 25_557_032 + 6  # and the two vectors of the input's normalisation
    assert size.multiply_adds == pytest.approx(4.09e9, rel=0.005)
    # 22 GB at batch 256 in float32 is what is known of ResNet-50
    assert 256 * size.activations == pytest.approx(22e9, rel=0.1)


@pytest.mark.parametrize("task", ["classification", "alignment", "verification"])
def test_a_timed_step_gives_positive_times_and_holds_its_weights(task):
    config = tiny_config(task, model__divide=2, target__beta=1.0, teacher="@t")
    cost = _estimate(config, teacher=TEACHER)
    assert cost.timed_batch == cost.batch
    assert min(cost.training_s, cost.evaluation_s) > 0
    # weight, gradient and momentum of each, and the frozen teacher's
    teacher = network_size(config, TEACHER, 8).parameters
    assert cost.memory_bytes > 4 * (3 * cost.size.parameters + teacher)


@pytest.mark.parametrize("cache", ["none", "float32"])
def test_a_head_that_needs_a_teacher_is_timed_with_one(cache):
    head = {"head__kind": "cosine", "head__margin": "distillation", "teacher__cache": cache}
    config = tiny_config(**head, teacher__run="@t")
    cost = _estimate(config, teacher=TEACHER)
    assert cost.memory_bytes > 4 * network_size(config, TEACHER, 8).parameters
    assert cost.training_s > 0


@pytest.mark.parametrize(
    ("method", "late"),
    [("saved_bytes", 0), ("saved_bytes", 1), *[("step", n) for n in range(4)],
     *[("evaluation", n) for n in range(3)]],
)  # fmt: skip
@pytest.mark.parametrize("each_s", [0.01, 1.0])  # a whole batch is timed, or the smallest alone
def test_one_timing_that_other_work_delays_changes_no_estimate(method, late, each_s, monkeypatch):
    def timed(_, most: int) -> tuple[float, float]:
        return most * each_s, 0.5

    planted = {
        "step": timed,
        "saved_bytes": lambda trial, most: (most, 40, timed(trial, most)),
        "evaluation": lambda _, images: images * each_s / 4,
    }
    calls = []

    def delayed(trial, most):
        calls.append(most)
        result = planted[method](trial, most)
        if len(calls) - 1 != late:
            return result
        if method == "evaluation":
            return result + 3000
        seconds = result if method == "step" else result[-1]
        seconds = (seconds[0] + 3000, seconds[1])
        return seconds if method == "step" else (*result[:-1], seconds)

    for name, function in (planted | {method: delayed}).items():
        monkeypatch.setattr(estimate._Trial, name, function)
    cost = _estimate(tiny_config(optim__batch_size=8))
    assert cost.training_s == pytest.approx(3 * 3 * (8 * each_s + 0.5))
    assert cost.evaluation_s == pytest.approx(3 * 16 * each_s / 4)


def test_steps_and_evaluations_follow_the_schedule(measured):
    config = tiny_config()  # 2 + 1 epochs in batches of 4
    cost = _estimate(config, train=26)
    assert (cost.steps, cost.batch) == (3 * 6, 4)
    assert cost.training_s == 18 * 0.75
    assert cost.evaluation_s == 3 * 16 * 0.125
    assert cost.total_s == cost.training_s + cost.evaluation_s
    kept = tiny_config(train__drop_last=False, train__eval_every=2)
    cost = _estimate(kept, train=26)
    assert (cost.steps, cost.evaluation_s) == (3 * 7, 2 * 16 * 0.125)
    cost = _estimate(tiny_config("verification"), train=26)
    assert (cost.steps, cost.batch) == (3 * 4, 6)
    assert _estimate(tiny_config("verification"), epoch_batches=5).steps == 15


def test_a_step_of_several_batches_costs_their_sum_and_one_update(measured):
    cost = _estimate(tiny_config(optim__accumulate=4), train=26)  # 6 batches: 4 and 2
    assert cost.steps == 3 * 2
    assert cost.training_s == 3 * 6 * 0.5 + 6 * 0.25


def test_with_a_validation_part_the_test_split_is_seen_at_the_ends_of_phases(measured):
    cost = _estimate(tiny_config(data__validation_fraction=0.2), validation=8)
    # and the test split at the end of both phases
    assert cost.evaluation_s == (3 * 8 + 2 * 16) * 0.125


def test_a_batch_larger_than_was_timed_is_scaled_and_says_so(measured):
    cost = _estimate(tiny_config(optim__batch_size=12))
    assert (cost.timed_batch, cost.batch) == (4, 12)
    assert cost.training_s / cost.steps == 3 * 0.5 + 0.25
    assert cost.memory_bytes == 1000 + 3 * 40


def test_memory_grows_with_batch_width_and_teacher():
    config = tiny_config(optim__batch_size=8)
    base = _estimate(config).memory_bytes
    assert _estimate(tiny_config(optim__batch_size=16)).memory_bytes > base
    assert _estimate(tiny_config(optim__batch_size=8, model__width=16)).memory_bytes > base
    distilled = tiny_config(optim__batch_size=8, target__alpha=1.0, teacher="@t")
    assert _estimate(distilled, teacher=TEACHER).memory_bytes > base


def test_a_batch_that_would_not_fit_is_timed_on_fewer_images(monkeypatch):
    config = tiny_config(optim__batch_size=16)
    whole = _estimate(config, train=40)
    monkeypatch.setattr(estimate, "_timings", {})
    monkeypatch.setattr(
        estimate, "TIMED_BYTES", 6 * network_size(config, config.model, 8).activations
    )
    part = _estimate(config, train=40)
    assert (whole.timed_batch, part.timed_batch) == (16, 4)
    assert part.memory_bytes == pytest.approx(whole.memory_bytes, rel=0.02)


def test_a_shape_is_timed_once(measured):
    student = tiny_config(target__alpha=1.0, teacher="@t")
    for config in (
        student,
        dataclasses.replace(student, seed=5, init_from="@s"),
        tiny_config(
            target__alpha=2.0,
            teacher="@u",
            data__identities=20,
            optim__phases=[{"epochs": 9, "lr": 1.0}],
        ),
    ):
        _estimate(config, teacher=TEACHER)
    assert len(measured) == 1
    _estimate(student, teacher=dataclasses.replace(TEACHER, width=32))
    _estimate(student, teacher=TEACHER, classes=9)
    _estimate(tiny_config(target__alpha=1.0, teacher="@t", optim__batch_size=5), teacher=TEACHER)
    _estimate(tiny_config(target__beta=1.0, teacher="@t"), teacher=TEACHER)
    _estimate(tiny_config())
    _estimate(tiny_config("verification"))
    train = dataclasses.replace(student.train, threads=2)
    _estimate(dataclasses.replace(student, train=train), teacher=TEACHER)
    assert len(measured) == 8


def test_a_teacher_whose_outputs_are_cached_does_not_run(monkeypatch):
    calls = []
    config = tiny_config(
        target__alpha=1.0, target__beta=1.0, teacher="@t", teacher__cache="float32"
    )
    guide = Task.guide
    monkeypatch.setattr(Task, "guide", lambda *given: calls.append("run") or guide(*given))
    _estimate(config, teacher=TEACHER, outputs_cached=True)
    assert calls == []
    _estimate(config, teacher=TEACHER)
    assert calls


def test_threads_random_state_and_settings_are_as_before():
    torch.set_num_threads(2)
    state, python = torch.get_rng_state(), random.getstate()
    _estimate(tiny_config(seed=3))
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_teacher_too_few_or_too_many_and_a_short_data_set_are_named():
    with pytest.raises(ConfigError, match="estimate: teachers must be"):
        _estimate(tiny_config(target__alpha=1.0, teacher="@t"))
    with pytest.raises(ConfigError, match="estimate: teachers must be"):
        _estimate(tiny_config(), teacher=TEACHER)
    with pytest.raises(ConfigError, match="3 training images fill no batch of 4"):
        _estimate(tiny_config(), train=3)


def test_the_longest_chain_of_followers_runs_first():
    costs = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 3.0}
    assert longest_chain_first(costs, {}) == ["c", "d", "b", "a"]
    assert longest_chain_first(costs, {"c": ("a",), "d": ("a", "elsewhere")}) == [
        "a",
        "c",
        "d",
        "b",
    ]
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        longest_chain_first(costs, {"a": ("b",), "b": ("a",)})


def test_wall_time_of_graphs_worked_by_hand():
    alone = {"a": 3.0, "b": 2.0, "c": 1.0}
    assert wall_time(alone, {}, 1) == 6
    assert wall_time(alone, {}, 2) == 3
    assert wall_time(alone, {}, 9) == 3
    assert wall_time(alone, {"b": ("a",), "c": ("b",)}, 2) == 6
    # the long chain first: begun last, d and e would end at 9
    chain = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0, "e": 3.0}
    assert wall_time(chain, {"e": ("d",)}, 2) == 6
    # both inputs are waited for, and a free job waits with them
    assert wall_time({"a": 2.0, "b": 5.0, "c": 1.0}, {"c": ("a", "b")}, 2) == 6
    # an input that is no stage here is done already
    assert wall_time({"a": 2.0}, {"a": ("earlier",)}, 1) == 2
    assert wall_time({}, {}, 2) == 0
    with pytest.raises(ValueError, match="wait for each other"):
        wall_time({"a": 1.0, "b": 1.0}, {"a": ("b",), "b": ("a",)}, 1)


def test_images_that_are_not_there_count_as_published_or_as_stated():
    recipe = settings.read_recipe(settings.recipe_path("paper/cls_teacher"))
    counts = dryrun.count(settings.build(recipe), None, {})
    assert (counts.classes, counts.train, counts.test) == (10575, 395531, 98883)
    assert "no folder casia-webface: counted as published" in counts.note
    counts = dryrun.count(settings.build({**recipe, "data.root": "x/MS_Celeb_1M"}), None, {})
    assert counts.classes == 100_000
    alignment = settings.read_recipe(settings.recipe_path("paper/ali_teacher"))
    counts = dryrun.count(settings.build({**alignment, "data.root": "elsewhere"}), None, {})
    assert counts.classes == 10177
    own = settings.build({**recipe, "data.root": "own-images"})
    with pytest.raises(ConfigError, match="no folder own-images .*--classes N --images N"):
        dryrun.count(own, None, {})
    counts = dryrun.count(own, dryrun.Published("given", 50, 1000), {})
    assert (counts.classes, counts.train, counts.test) == (50, 800, 200)


def test_images_that_are_there_are_counted_batches_included():
    config = tiny_config("verification", data__identities=8, data__images_per_identity=5)
    counts = dryrun.count(config, None, {})
    assert (counts.classes, counts.train, counts.test) == (8, 24, 16)
    data = RunData(config)
    assert counts.epoch_batches == len(data.epoch(0))
    counts = dryrun.count(tiny_config(data__validation_fraction=0.25), None, {})
    assert (counts.train, counts.validation) == (18, 6)


def test_the_teacher_s_network_is_found_or_its_guess_is_stated(tmp_path):
    config = tiny_config(target__alpha=1.0, teacher="@t", model__divide=4)
    assert dryrun.teachers_of(tiny_config(), tmp_path / "s", {}) == ([], [])
    found, note = dryrun.network_of(
        "@t", config, tmp_path / "s", {"t": tiny_config(model__width=16)}
    )
    assert (found, note) == (tiny_config(model__width=16).model, "")
    found, note = dryrun.network_of("@t", config, tmp_path / "s", tmp_path)
    assert found == dataclasses.replace(config.model, divide=1)
    assert "no run @t yet" in note
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.yaml").write_text(settings.to_yaml(tiny_config(model__width=24)))
    found, note = dryrun.network_of("@t", config, tmp_path / "s", tmp_path)
    assert (found, note) == (tiny_config(model__width=24).model, "")


def test_a_dry_run_of_one_recipe_is_a_recipe_with_its_cost(measured, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "two-cores/cls_distilled", "--dry-run", "--data.identities", "20"]) == 0
    shown = capsys.readouterr().out
    recipe = tmp_path / "again.yaml"
    recipe.write_text(shown)
    again = settings.build(settings.read_recipe(recipe))
    assert (again.data.identities, again.teacher.run) == (20, "@cls_teacher")
    comments = [line for line in shown.splitlines() if line.startswith("#")]
    assert comments[0].split()[:4] == ["#", "stage", "network", "input"]
    assert "ResNet-14 w32/8" in comments[1]
    assert "timed on 4 of 64 images" in comments[-1]
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_dry_run_of_the_paper_s_chain_needs_no_images(measured, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pipeline", "--preset", "paper", "--dry-run", "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    stages = list(yaml.safe_load_all(shown))
    assert len(stages) == 10
    roots = {stage["task"]: stage["data"]["root"] for stage in stages}
    assert roots["alignment"] == "celeba"
    assert roots["classification"] == roots["verification"] == "casia-webface"
    table = [line.split() for line in shown.splitlines() if line.startswith("# ")]
    rows = {line[1]: line for line in table}
    assert rows["cls_distilled"][2:4] == ["cls_student,", "cls_teacher"]
    # 395,531 // 256 = 1,545 steps an epoch
    assert "92,700" in rows["cls_teacher"]
    assert "46,350" in rows["cls_student"]
    assert "on the clock with --jobs 2" in shown
    assert "CelebA with 10,177 identities" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_is_missing_and_goes_on(measured, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "paper/cls_teacher", "--dry-run", "--data.root", "own"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "no folder own (data.root)" in shown
    assert "nothing could be timed" in shown
    assert main([*arguments, "--classes", "1000", "--images", "5000"]) == 0
    assert "4.09 G" in capsys.readouterr().out
    sized = ["--classes", "1000", "--images", "5000"]
    assert main([*arguments, *sized, "--train.device", "cuda:99"]) == 0
    shown = capsys.readouterr().out
    assert "train.device cuda:99: cannot be used here" in shown
    assert "25.6 M parameters" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "5"], "--classes needs --dry-run"),
        (["--dry-run", "--classes", "5"], "--classes and --images: both or neither"),
        (["--dry-run", "--images", "1"], "--images: expected at least 2; got 1"),
    ],
)
def test_sizes_that_cannot_be_are_wrong_usage(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "two-cores/cls_teacher", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_long_times_are_days():
    assert dryrun.long_duration(4000) == "1:06:40"
    assert dryrun.long_duration(86400 * 12.25) == "12.2 days"
