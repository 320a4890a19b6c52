"""`compare`: what it asks for, the table of planted runs, and one comparison that really trains."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from in_process import in_process
from rich.console import Console
from tiny_runs import TINY

from kdtrain.cli import main
from kdtrain.config import ConfigError
from kdtrain.experiments import campaign, cost, engine, pipeline
from kdtrain.experiments.campaign import groups_of, stages_of
from kdtrain.experiments.collect import Collection, _speed_up, read_all
from kdtrain.experiments.figure import _spread
from kdtrain.experiments.scheduler import Outcome
from kdtrain.experiments.study import At, Claim, Run, Study
from kdtrain.experiments.study_file import adjusted, comparison
from kdtrain.models.network import FaceNetwork, seeded
from kdtrain.reports import writing
from kdtrain.training import checkpoint

ONE = [{"epochs": 1, "lr": 0.05}]
RECIPES = {
    "teacher": {},
    "student": {"model.divide": 4},
    "soft": {"base": "student.yaml", "teacher.run": "@teacher", "target.alpha": 1.0},
    "hidden": {"base": "student.yaml", "teacher.run": "@teacher", "target.beta": 1.0,
               "optim.phases": [*ONE, *ONE]},
    "sh_teacher": {"init_from": "@teacher"},
    "sh_kd": {"base": "soft.yaml", "teacher.run": "@sh_teacher", "init_from": "@student"},
}  # fmt: skip


def write_recipe(path: Path, flat: dict) -> None:
    tree: dict = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    path.write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of recipes that take a second."""
    place = tmp_path_factory.mktemp("preset") / "systems"
    place.mkdir()
    common = {**TINY, "task": "verification", "triplet.weight": 0.0, "optim.phases": ONE}
    for name, own in RECIPES.items():
        write_recipe(place / f"{name}.yaml", own if "base" in own else {**common, **own})
    return place


def asked(folder: Path, *methods: str, second: dict | None = None, **options) -> Study:
    special = {} if second is None else {"second": second}
    found = comparison(methods, "two-cores", str(folder))
    return adjusted([found], options, {}, special)[0]


def groups(request: Study):
    return groups_of([request])


def stages(request: Study):
    return stages_of([request], (run for group in groups(request) for run in group.runs))


def test_a_method_brings_the_runs_that_it_needs_once_a_seed(folder):
    request = asked(folder, "student", "soft", "sh_kd", seeds=2)
    assert request.teachers == ("teacher", "sh_teacher")
    found = stages(request)
    names = [stage.name for stage in found.values()]
    assert len(names) == len(set(names)) == 10
    assert names.index("teacher_s1") < names.index("sh_teacher_s1") < names.index("sh_kd_s1")
    by_name = {stage.name: stage for stage in found.values()}
    assert by_name["sh_kd_s2"].inputs == ("student_s2", "sh_teacher_s2")
    assert by_name["sh_kd_s2"].config.init_from == "@student_s2"
    assert by_name["soft_s1"].config.seed == 1
    assert by_name["soft_s1"].config.teacher.cache == "float32"
    # a teacher: named by teacher.run or eval.gallery, or an input of that name
    assert asked(folder, "sh_teacher").teachers == ("teacher",)
    # the first arm brings the inputs; a run is in the first group that has it
    assert [len(group.runs) for group in groups(request)] == [2, 4, 4]


def test_a_control_comes_first_within_a_budget(folder):
    request = asked(folder, "soft", "sh_kd", "student", seeds=1)
    assert [group.label for group in groups(request)] == ["student", "soft", "sh_kd"]
    assert request.students == ("soft", "sh_kd", "student")
    found = stages(request)
    assert campaign.controls(found.values()) == {"student_s1"}
    by_name = {stage.name: stage for stage in found.values()}
    trained = pipeline.ordered(by_name, campaign.controls(found.values()))
    assert [stage.name for stage in trained][:2] == ["student_s1", "teacher_s1"]


def test_resolutions_are_of_the_methods_alone_and_of_the_same_crop(folder):
    request = asked(folder, "teacher", "student", "soft", seeds=1, resolutions="16,8")
    found = {stage.name: stage.config for stage in stages(request).values()}
    # 16 pixels are the recipes' own size: one run serves both
    assert set(found) == {"student_s1", "student_r8_s1", "soft_s1", "soft_r8_s1", "teacher_s1"}
    small = found["soft_r8_s1"]
    assert (small.data.input_size, small.data.crop_size, small.teacher.input_size) == (8, 16, 16)
    assert small.teacher.run == "@teacher_s1"
    assert found["soft_s1"].data.crop_size is None


def test_a_second_data_source_trains_everything_on_it_too(folder):
    request = asked(folder, "soft", seeds=1, second={"data.identities": 11})
    found = {stage.name: stage for stage in stages(request).values()}
    assert set(found) == {"teacher_s1", "soft_s1", "b_teacher_s1", "b_soft_s1"}
    assert found["b_soft_s1"].inputs == ("b_teacher_s1",)
    assert found["b_soft_s1"].config.data.identities == 11
    assert found["soft_s1"].config.data.identities == TINY["data.identities"]


def test_a_recipe_elsewhere_is_a_method_and_two_of_one_name_are_rejected(folder, tmp_path):
    own = tmp_path / "mine.yaml"
    write_recipe(own, {"base": str(folder / "soft.yaml"), "teacher.run": "@teacher"})
    with pytest.raises(
        ConfigError, match="mine: takes @teacher, and there is no arm of that name and no recipe"
    ):
        asked(folder, str(own))
    write_recipe(tmp_path / "teacher.yaml", {"base": str(folder / "teacher.yaml")})
    assert tuple(asked(folder, "soft", str(own)).arms) == ("soft", "mine")
    write_recipe(
        tmp_path / "teacher.yaml", {"base": str(folder / "teacher.yaml"), "model.width": 16}
    )
    with pytest.raises(ConfigError, match="teacher: .* differ and would be one run"):
        _ = asked(folder, "soft", str(own)).flat


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sofd"], "no method 'sofd'"),
        (["sofd"], "did you mean soft?"),
        (["soft", "--folder", "sistems"], "--folder sistems"),
        (["soft", "--seeds", "0"], "--seeds: at least 1"),
        (["soft", "--budget", "-1"], "--budget"),
        (["soft", "--resolutions", "16,big"], "--resolutions: expected pixels"),
        (["soft", "--resolutions", "99"], "data.crop_size"),
        (["soft", "--resolutions", "16", "--data.input_size", "16"], "--data.input_size: the arms"),
        (["soft", "--teacher", "somewhere"], "--teacher.run: the arms"),
        (["soft", "--second.seed", "4"], "--seed: the arms"),
        (["teacher", "soft", "sh_kd", "--jobs", "0"], "--jobs"),
    ],
)
def test_wrong_usage_names_the_option(arguments, words, folder, capsys, monkeypatch):
    monkeypatch.setattr(engine, "make_campaign", lambda *_, **__: pytest.fail("accepted"))
    known = [] if "--folder" in arguments else ["--folder", str(folder)]
    assert main(["compare", *arguments, *known]) == 2
    assert words in capsys.readouterr().err


# Right predictions of each method, of 200 test images and 100 pairs.
RIGHT = {"teacher": 150, "student": 90, "soft": 130, "hidden": 60, "sh_kd": 130, "sh_teacher": 150}


def planted(folder: Path, config, key: str, method: str) -> None:
    """A finished run with made-up results and real weights."""
    random = np.random.RandomState(config.seed)
    folder.mkdir(parents=True)
    right = RIGHT[method] + random.randint(5)
    hit = (np.arange(200) < right).astype(np.float32)
    far = np.logspace(-3, -1, 20)
    with seeded(0):
        network = FaceNetwork(config.model, 8, input_size=config.data.input_size)
    checkpoint.save(folder / "last", network.state_dict())
    (folder / "config.yaml").write_text(pipeline.settings.to_yaml(config))
    metrics = {"nn_top1": float(hit.mean()), "tar_at_far_0.01_all": right / 250,
               "pair_accuracy": float(hit[:100].mean())}  # fmt: skip
    if config.eval.gallery is not None:
        metrics["asym_nn_top1"] = 0.25
    total = sum(p.numel() for p in network.parameters())
    checkpoint.write_arrays(folder / "items" / "phase0.npz", {
        "nn_top1": hit, "pair_accuracy": hit[:100], "index": np.arange(200)})  # fmt: skip
    checkpoint.write_arrays(folder / "samples.npz", {"all_far": far, "all_tar": far**0.2})
    checkpoint.write_json(folder / "results.json", {
        "key": key, "phases": [{"metrics": metrics}], "metrics": metrics, "seconds": 2.0,
        "floors": {"nn_top1": 0.4, "tar_at_far_0.01_all": 0.05}, "untrained": {"nn_top1": 0.3},
        "parameters": {"student": total, "teacher": 5}, "environment": {"torch": "2"},
        "data": {"name": "drawn", "images": 400, "classes": 8, "train": 200, "test": 200},
    })  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    """Stages are planted in place of trained; those named in `diverging` diverge."""
    trained: list[str] = []
    diverging: set[str] = set()

    def run(order, root, *, jobs, overwrite, overview):
        keys = pipeline.stage_keys(order, root)
        outcomes = {}
        for stage in order:
            if pipeline.stage_state(root / stage.name, keys[stage.name]) == "reused":
                outcomes[stage.name] = Outcome("reused", "", 1.0)
            elif stage.name in diverging:
                (root / stage.name).mkdir()
                record = {"key": keys[stage.name], "message": "the loss is nan.", "seconds": 1.0}
                checkpoint.write_json(root / stage.name / "diverged.json", record)
                outcomes[stage.name] = Outcome("diverged", "the loss is nan.", 1.0)
            else:
                method = stage.name.removeprefix("b_").rpartition("_s")[0].removesuffix("_r8")
                planted(root / stage.name, stage.config, keys[stage.name], method)
                trained.append(stage.name)
                outcomes[stage.name] = Outcome("done", "", 1.0)
        return 0, outcomes

    monkeypatch.setattr(campaign.pipeline, "run", run)
    monkeypatch.setattr(campaign, "seconds_of", lambda runs, stages, *_: {
        stages[run].name: 60.0 for run in runs})  # fmt: skip
    monkeypatch.setattr(cost, "ROUNDS", 2)
    monkeypatch.setattr(cost, "CALL_S", 1e-4)
    torch.set_num_threads(1)
    return trained, diverging


def cells(root: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(root / "tables" / "comparison.csv", newline="") as file:
        return {(r["block"], r["row"], r["column"]): r for r in csv.DictReader(file)}


def verdicts_of(root: Path) -> dict[str, str]:
    with open(root / "tables" / "comparison-trends.csv", newline="") as file:
        return {row["claim"]: row["state"] for row in csv.DictReader(file)}


def test_the_table_has_every_method_with_what_it_reaches_and_costs(folder, fake, tmp_path, capsys):
    trained, _ = fake
    root = tmp_path / "runs"
    words = ["compare", "student", "soft", "hidden", "sh_kd", "--folder", str(folder), "--seeds",
             "3", "--jobs", "1", "--run-dir", str(root)]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert len(trained) == 18
    table = cells(root)
    soft = table["accuracy", "soft", "NN top-1"]
    wanted = [(RIGHT["soft"] + np.random.RandomState(s).randint(5)) / 2 for s in (1, 2, 3)]
    assert float(soft["mean"]) == pytest.approx(np.mean(wanted))
    assert [float(v) for v in soft["per_seed"].split(";")] == pytest.approx(wanted)
    assert table["accuracy", "teacher", "TAR@1e-2"]["kind"] == "teacher"
    assert table["accuracy", "student", "NN top-1"]["kind"] == "control"
    assert float(table["accuracy", "raw pixels", "NN top-1"]["mean"]) == 40
    assert float(table["accuracy", "untrained network", "NN top-1"]["mean"]) == 30
    with seeded(0):
        network = FaceNetwork(stages(asked(folder, "soft"))[Run("soft", 1)].config.model, 8)
    backbone = sum(p.numel() for p in network.backbone.parameters())
    head = sum(p.numel() for p in network.classifier.parameters())
    assert float(table["cost", "soft", "backbone"]["mean"]) == backbone
    assert float(table["cost", "soft", "head, dropped"]["mean"]) == head
    assert float(table["cost", "soft", "images/s, 64"]["mean"]) > 0
    assert float(table["cost", "teacher", "speed-up, 64"]["mean"]) == 1
    assert float(table["cost", "hidden", "epochs"]["mean"]) == 2
    assert float(table["cost", "sh_kd", "start epochs"]["mean"]) == 1
    # th_kd and the others are not compared, so they have no claim
    assert verdicts_of(root) == {
        "sh_kd > soft, NN top-1": "inconclusive",
        "sh_kd > soft, pairs": "inconclusive",
        "soft > student, NN top-1": "held",
        "soft > student, pairs": "held",
    }
    assert "hidden: longer training: 2 epochs, most have 1" in printed
    for name in ("txt", "md", "html", "png"):
        assert (root / "tables" / f"comparison.{name}").stat().st_size > 500
    text = (root / "tables" / "comparison.html").read_text()
    assert "Methods: comparison" in text
    assert "higher is better" in text
    before = {f.name: f.read_bytes() for f in (root / "tables").iterdir()}
    assert main(words) == 0
    assert len(trained) == 18
    assert before == {f.name: f.read_bytes() for f in (root / "tables").iterdir()}


def test_a_run_that_diverged_is_a_result(folder, fake, tmp_path):
    _, diverging = fake
    diverging |= {"soft_s1", "hidden_s1", "hidden_s2"}
    root = tmp_path / "runs"
    assert main(["compare", "student", "soft", "hidden", "--folder", str(folder), "--seeds", "2",
                 "--jobs", "1", "--run-dir", str(root)]) == 0  # fmt: skip
    table = cells(root)
    assert table["accuracy", "hidden", "NN top-1"]["state"] == "diverged"
    soft = table["accuracy", "soft", "NN top-1"]
    assert (soft["state"], soft["seeds"], soft["note"]) == ("done", "1", "diverged")
    assert verdicts_of(root)["soft > student, NN top-1"] == "one seed: no verdict"


def test_resolutions_and_a_second_source_have_columns_and_blocks(folder, fake, tmp_path):
    root = tmp_path / "runs"
    assert main(["compare", "student", "soft", "--folder", str(folder), "--seeds", "1", "--jobs",
                 "1", "--resolutions", "16,8", "--second.data.identities", "12", "--run-dir",
                 str(root)]) == 0  # fmt: skip
    blocks = {block for block, _, _ in cells(root)}
    assert blocks == {
        f"{name}{size}{where}"
        for where in ("", ", second data source")
        for name, sizes in (
            ("resolutions side by side", ("",)),
            ("accuracy", (", 16 pixels", ", 8 pixels")),
            ("cost", (", 16 pixels", ", 8 pixels")),
        )
        for size in sizes
    }
    side = cells(root)["resolutions side by side", "soft", "8 pixels: NN top-1"]
    assert side["state"] == "done"
    assert cells(root)["cost, 8 pixels", "soft", "network"]["mean"] == "8.0"
    # a teacher is not asked at another size for its own row
    assert cells(root)["cost, 8 pixels", "teacher", "network"]["mean"] == "16.0"
    assert "soft > student, NN top-1, 8 pixels, second data source" in verdicts_of(root)


def test_a_budget_leaves_the_last_methods(folder, fake, tmp_path, capsys):
    root = tmp_path / "runs"
    assert main(["compare", "student", "soft", "--folder", str(folder), "--seeds", "1", "--jobs",
                 "1", "--budget", "1.5", "--run-dir", str(root)]) == 0  # fmt: skip
    table = cells(root)
    assert table["accuracy", "student", "NN top-1"]["state"] == "done"
    assert table["accuracy", "soft", "NN top-1"]["state"] == "not run"
    assert set(verdicts_of(root).values()) == {"not run"}
    assert "not run: over the budget" in capsys.readouterr().out


def test_a_spent_budget_still_writes_the_table_of_what_is_finished(folder, fake, tmp_path, capsys):
    words = ["--folder", str(folder), "--seeds", "1", "--jobs", "1", "--run-dir", str(tmp_path)]
    assert main(["compare", "student", *words]) == 0
    assert main(["compare", "student", "soft", *words, "--budget", "1.5"]) == 1
    assert "the smallest, soft, needs about 2 minutes" in capsys.readouterr().err
    assert cells(tmp_path)["accuracy", "student", "NN top-1"]["state"] == "done"
    assert cells(tmp_path)["accuracy", "soft", "NN top-1"]["state"] == "not run"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_budget_that_takes_nothing_says_how_much_is_needed(dry, folder, fake, tmp_path, capsys):
    root = tmp_path / "runs"
    assert main(["compare", "soft", "--folder", str(folder), "--seeds", "3", "--jobs", "1",
                 "--budget", "2", "--run-dir", str(root), *dry]) == 1  # fmt: skip
    # teacher and soft, three seeds, a minute each
    needs = "--budget takes none of the groups: the smallest, soft, needs about 6 minutes"
    assert needs in capsys.readouterr().err
    assert not (root / "tables").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, fake, tmp_path, capsys):
    root = tmp_path / "nothing"
    assert main(["compare", "soft", "--folder", str(folder), "--seeds", "2", "--jobs", "1",
                 "--run-dir", str(root), "--dry-run"]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert not root.exists()
    assert "# soft_s1 after teacher_s1" in printed
    assert re.search(r"soft +4 +0", printed)


def test_not_worse_is_held_by_a_method_that_is_level(folder, fake, tmp_path):
    root = tmp_path / "runs"
    request = asked(folder, "soft", "sh_kd", "hidden", seeds=3)
    plan = engine.make_plan([request], campaign.Order(root, 1, console=Console(quiet=True)))
    _, outcomes = campaign.carry_out(plan)
    found = Collection(request, read_all(plan, outcomes), plan.stages)

    def trend(better: str, worse: str):
        claim = Claim("C", "", (At(better),), (At(worse),), kind="at_least")
        return found.trend(claim, "nn_top1")

    level = trend("sh_kd", "soft")
    assert (level.verdict.state, level.verdict.margin) == ("held", 2.0)
    assert trend("hidden", "soft").verdict.state == "reversed"
    shown = Console(width=80, record=True, file=io.StringIO())
    states = {name: outcome.state for name, outcome in outcomes.items()}
    shown.print(engine.overview(plan, states))
    assert "sh_kd        ■■■" in shown.export_text()


def test_names_beside_a_plot_keep_their_order_and_distance():
    found = _spread([0.1, 0.11, 0.12, 0.97, 0.99], 0.05)
    assert found == pytest.approx([0.1, 0.15, 0.2, 0.95, 1.0])
    assert [writing.count(n) for n in (999, 77_300, 25_557_032)] == ["999", "77.3 k", "25.6 M"]


def test_networks_take_turns_and_are_timed_without_their_heads(folder, monkeypatch):
    torch.set_num_threads(1)
    config = stages(asked(folder, "student"))[Run("student", 1)].config
    with seeded(0):
        network = FaceNetwork(config.model, 8, input_size=16)
    order = []
    real = cost._timed
    monkeypatch.setattr(cost, "_timed", lambda n, p, c: order.append(len(p)) or real(n, p, c))
    monkeypatch.setattr(cost, "CALL_S", 1e-4)
    network.classifier.forward = lambda *_: pytest.fail("the head was asked")
    monkeypatch.setattr(cost, "BATCHES", (1, 4))
    monkeypatch.setattr(cost, "ROUNDS", 3)
    found = cost.measure({"a": (network, 16)}, torch.device("cpu"))
    assert order[-6:] == [1, 4, 1, 4, 1, 4]
    assert all(one.low <= one.median <= one.high for one in found["a"].values())


def test_a_speed_up_within_the_quartiles_is_no_number():
    base = cost.Quartiles(90.0, 100.0, 110.0)
    assert _speed_up(base, base).shown == "1x"
    assert _speed_up(cost.Quartiles(180.0, 200.0, 220.0), base).shown == "2x"
    for low, high in ((105.0, 140.0), (60.0, 92.0), (95.0, 105.0)):
        cell = _speed_up(cost.Quartiles(low, (low + high) / 2, high), base)
        assert (cell.state, cell.value) == ("no difference", None)
    assert _speed_up(None, base).state == "none"


def test_it_trains_and_ends_in_a_table(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "run_all", in_process())
    monkeypatch.setattr(cost, "CALL_S", 1e-4)
    root = tmp_path / "runs"
    assert main(["compare", "soft", "--folder", str(folder), "--seeds", "1", "--jobs", "2",
                 "--run-dir", str(root)]) == 0  # fmt: skip
    table = cells(root)
    assert table["accuracy", "soft", "NN top-1"]["state"] == "done"
    assert table["cost", "soft", "speed-up, 64"]["state"] in ("done", "no difference")
