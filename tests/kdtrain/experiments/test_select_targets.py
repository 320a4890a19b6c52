"""select-targets on runs of two steps: its arms, what is reused, what an interruption leaves, and
what it refuses.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from in_process import in_process
from tiny_runs import TINY, tiny_config, train

from kdtrain.cli import main
from kdtrain.config import ConfigError, settings
from kdtrain.experiments import campaign, pipeline, select_targets
from kdtrain.experiments.collect import Collection, Result
from kdtrain.experiments.select_targets import plan
from kdtrain.training import checkpoint, engine

# two steps: 40 images of 8 identities, of which 24 are the training split and 19 train the arms
SHORT: dict[str, Any] = {**TINY, "optim.phases": [{"epochs": 1, "lr": 0.05}], "optim.batch_size": 9}
COMMAND = ["select-targets", "student.yaml", "--run-dir", "runs/chosen", "--seeds", "2"]
FILES = ("tables/select-targets.txt", "tables/select-targets.csv", "selected.yaml")


def stages_of(selection: select_targets.Selection) -> dict[str, Any]:
    """The configs of the arms' runs by name."""
    study = selection.study()
    runs = [run for group in campaign.groups_of([study]) for run in group.runs]
    return {s.name: s.config for s in campaign.stages_of([study], runs).values()}


def write_recipe(path: Path, **own: Any) -> Path:
    """The two-step run as a recipe, keys as section__key."""
    flat = {**SHORT, **{key.replace("__", "."): value for key, value in own.items()}}
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, leaf = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a trained teacher and its student's recipe."""
    folder = tmp_path_factory.mktemp("place")
    keys = {"model.width": 16, "data.validation_fraction": 0.2}
    teacher = settings.build({**SHORT, **keys})
    train(teacher, folder / "runs" / "teacher")
    write_recipe(folder / "student.yaml", teacher="@teacher", target__alpha=0.5)
    return folder


@pytest.fixture
def inside(place, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    monkeypatch.setattr(pipeline, "run_all", in_process())
    return place


@pytest.fixture(scope="module")
def done(place) -> Path:
    """The place after the command has run once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(pipeline, "run_all", in_process())
        assert main(COMMAND) == 0
    return place / "runs" / "chosen"


def test_arms_differ_in_the_targets_and_the_seed_alone(inside):
    study = plan(Path("student.yaml"), {"target.beta": 1.0}, Path("runs/chosen"), seeds=2)
    assert study.weights == {"soft": 0.5, "hidden": 1.0}
    stages = stages_of(study)
    names = {f"{arm}_s{seed}" for seed in (1, 2) for arm in ("none", "soft", "hidden")}
    assert set(stages) == names
    targets = {n: (c.target.alpha, c.target.beta, c.target.logits) for n, c in stages.items()}
    assert targets["none_s1"] == targets["none_s2"] == (0, 0, 0)
    assert targets["soft_s1"] == (0.5, 0, 0)
    assert targets["hidden_s2"] == (0, 1, 0)
    assert {c.seed for n, c in stages.items() if n.endswith("_s2")} == {2}
    assert "teacher" not in select_targets.keys.input_folders(stages["none_s1"], Path("x/y"))
    teacher = select_targets.keys.input_folders(stages["soft_s1"], Path("x/y"))["teacher"]
    assert teacher == Path("runs/teacher")
    flat = [settings.to_flat(config) for config in stages.values()]
    differing = {key for key in flat[0] if any(f[key] != flat[0][key] for f in flat)}
    assert differing - {"teacher", "teacher.run"} == {"seed", "target.alpha", "target.beta"}


@pytest.mark.parametrize(
    ("own", "targets", "weights", "logits_of_none"),
    [
        ({}, None, {"soft": 1.0, "hidden": 1.0}, 0),
        ({"target.logits": 2.0}, None, {"logits": 2.0}, 0),
        ({"target.logits": 2.0}, "hidden", {"hidden": 1.0}, 2.0),
        ({"target.alpha": 3.0}, "logits, soft", {"soft": 3.0, "logits": 1.0}, 0),
    ],
)
def test_candidates_are_those_named_or_weighed_or_soft_and_hidden(
    own, targets, weights, logits_of_none, inside
):
    recipe = Path("plain.yaml")
    write_recipe(recipe, teacher="@teacher")
    study = plan(recipe, own, Path("runs/chosen"), targets=targets)
    assert study.weights == weights
    none = study.weighed(())
    assert none.target.logits == logits_of_none
    assert none.target.needs_teacher == bool(logits_of_none)
    assert list(study.seeds) == [1, 2, 3]


def test_held_out_training_images_judge_unless_the_key_is_given(inside):
    def held_out(recipe: Path, **own: Any) -> tuple[float, float, str]:
        study = plan(recipe, own, Path("runs/chosen"))
        return study.config.data.validation_fraction, study.final_validation, study.split

    key = "data.validation_fraction"
    recipe = Path("student.yaml")
    assert held_out(recipe) == (0.2, 0.0, "validation")
    assert held_out(recipe, **{key: 0.3}) == (0.3, 0.3, "validation")
    assert held_out(recipe, **{key: 0.0}) == (0.0, 0.0, "test")
    own = write_recipe(Path("own.yaml"), teacher="@teacher", data__validation_fraction=0.4)
    assert held_out(own) == (0.4, 0.4, "validation")


def test_the_command_trains_judges_and_writes(done, place, capsys):
    names = {f"{arm}_s{seed}" for arm in ("none", "soft") for seed in (1, 2)}
    assert names <= {path.parent.name for path in done.glob("*/results.json")}
    text = (done / FILES[0]).read_text()
    assert "accuracy: validation split" in text
    with open(done / FILES[1], newline="") as file:
        rows = {row["row"]: row for row in csv.DictReader(file) if row["metric"] != "weight"}
    for name in sorted(names):
        results = checkpoint.read_json(done / name / "results.json")
        assert results is not None
        assert results["data"]["validation"] == 5
        arm, seed = name.split("_s")
        told = float(rows[arm]["per_seed"].split(";")[int(seed) - 1])
        assert told == pytest.approx(100 * results["validation"]["top1"], abs=1e-3)
    assert "command: python -m kdtrain select-targets student.yaml" in text
    assert "Note: teacher" not in text  # it has seen none of the images that judge


def test_the_chosen_recipe_is_the_users_own_but_for_the_weights(done, inside, capsys):
    chosen = settings.build(settings.read_recipe(done / "selected.yaml"))
    ours = settings.build(settings.read_recipe(Path("student.yaml")))
    ours, flat = settings.to_flat(ours), settings.to_flat(chosen)
    changed = {key for key in flat if flat[key] != ours[key]}
    assert changed <= {"target.alpha", "teacher", "teacher.run"}
    assert flat["target.alpha"] in (0, 0.5)
    assert main(["train", str(done / "selected.yaml"), "--run-dir", "runs/final"]) == 0
    assert "runs/final: finished" in capsys.readouterr().out


def test_a_second_run_trains_nothing_and_ends_in_the_same_files(done, inside, monkeypatch, capsys):
    before = {name: (done / name).read_bytes() for name in FILES}
    trained: list[Any] = []

    def note(works, root, jobs, console, before, *_: Any) -> tuple[int, dict[str, Any]]:
        trained.extend(works)
        return 0, dict(before)

    monkeypatch.setattr(pipeline, "run_all", note)
    assert main(COMMAND) == 0
    assert trained == []
    assert {name: (done / name).read_bytes() for name in FILES} == before
    out = capsys.readouterr().out
    assert "4 of 4 runs were finished before" in out
    assert "recipe: runs/chosen/selected.yaml" in out


def test_an_interrupted_command_continues_and_ends_in_the_same_files(
    done, place, tmp_path, monkeypatch, capsys
):
    shutil.copytree(place / "runs" / "teacher", tmp_path / "runs" / "teacher")
    shutil.copy(place / "student.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return (
            asked == 7
        )  # in the second run: two steps, an evaluation of one batch, one of the test

    monkeypatch.setattr(pipeline, "run_all", in_process(stop))
    assert main(COMMAND) == 130
    root = tmp_path / "runs" / "chosen"
    finished = len(list(root.glob("*/results.json")))
    assert 0 < finished < 4
    assert not any((root / name).exists() for name in FILES)
    assert "stopped; to resume: python -m kdtrain select-targets" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "run_all", in_process())
    assert main(COMMAND) == 0
    assert f"{finished} of 4 runs were finished before" in capsys.readouterr().out
    for name in FILES:
        assert (root / name).read_bytes() == (done / name).read_bytes(), name


def test_helpful_targets_are_trained_together_and_all_kept(inside, monkeypatch):
    monkeypatch.setattr(select_targets, "judge", lambda *_: ("soft", "hidden"))
    command = ["select-targets", "student.yaml", "--run-dir", "runs/both", "--seeds", "1"]
    command += ["--targets", "soft,hidden"]
    assert main([*command, "--out", "both.yaml"]) == 0
    assert Path("runs/both/soft+hidden_s1/results.json").is_file()
    target = settings.build(settings.read_recipe(Path("both.yaml"))).target
    assert (target.alpha, target.beta) == (0.5, 1.0)
    assert "check    soft+hidden > soft, top-1" in Path("both.yaml").read_text()


def test_a_target_that_diverges_gets_weight_zero_and_a_row(inside):
    command = ["select-targets", "student.yaml", "--run-dir", "runs/wild", "--seeds", "1"]
    assert main([*command, "--targets", "hidden", "--target.beta", "1e30"]) == 0
    lines = Path("runs/wild/tables/select-targets.txt").read_text().splitlines()
    rows = [line.split() for line in lines if line.strip().startswith("hidden")]
    assert rows == [["hidden", "diverged"], ["hidden", "1e+30", "0"]]
    chosen = settings.build(settings.read_recipe(Path("runs/wild/selected.yaml")))
    assert (chosen.target.alpha, chosen.target.beta) == (0.5, 0.0)  # soft was no candidate


IMAGES = 200
# right of 200 images per seed, None diverged; the state of the verdict; the weight that follows
CASES = {
    "soft": ((140, 142, 138), "held", 1.0),
    "hidden": ((60, 62, 58), "reversed", 0.0),
    "logits": ((100, 102, 98), "inconclusive", 0.0),
    "attention": ((180, None, 180), "held", 0.0),
    "rkd_angle": ((None, None, None), "diverged", 0.0),
}


def judged(selection: select_targets.Selection, root: Path, *wanted: str) -> Any:
    """The kept targets and the table, from planted runs."""
    study = selection.study()
    runs = [run for group in campaign.groups_of([study]) for run in group.runs]
    for run in runs:
        right = {"none": (100, 100, 100), **{name: case[0] for name, case in CASES.items()}}
        count = right[run.arm][run.seed - 1]
        if count is None:
            record = {"key": "k", "message": "nan", "seconds": 1.0}
            checkpoint.write_json(root / run.name / "diverged.json", record)
            continue
        hit = np.roll((np.arange(IMAGES) < count).astype(np.float32), run.seed)
        items = {"top1": hit, "index": np.arange(IMAGES)}
        checkpoint.write_arrays(root / run.name / "items" / "validation_phase0.npz", items)
        results = {"key": "k", "validation": {"top1": float(hit.mean())}}
        checkpoint.write_json(root / run.name / "results.json", results)
    results = {run: Result.read(root / run.name, "k") for run in runs}
    found = Collection(study, results)
    kept = select_targets.judge(found, wanted)
    return kept, select_targets.evidence(selection, found, kept, [("command", "the command")])


def test_the_decision_follows_from_the_verdict(inside, tmp_path):
    recipe = write_recipe(Path("all.yaml"), teacher="@teacher")
    selection = plan(recipe, {}, Path("runs/chosen"), targets=",".join(CASES))
    kept, shown = judged(selection, tmp_path, "held")
    assert kept == ("soft",)
    states = {trend.claim.split()[0]: trend.verdict.state for trend in shown.trends}
    assert states == {name: state for name, (_, state, _) in CASES.items()}
    weights = {row.name: row.cells[1].value for row in shown.blocks[-1].rows}
    published = {name: select_targets.CANDIDATES[name].published for name in CASES}
    assert weights == {name: w * published[name] for name, (_, _, w) in CASES.items()}
    assert any("Chosen: target.alpha 1, target.beta 0," in note for note in shown.notes)
    kept, _ = judged(selection, tmp_path, "held", "inconclusive")
    assert kept == ("soft", "logits")


def test_arms_that_were_judged_on_other_images_are_rejected(inside, tmp_path):
    recipe = write_recipe(Path("all.yaml"), teacher="@teacher")
    selection = plan(recipe, {}, Path("runs/chosen"), targets=",".join(CASES))
    judged(selection, tmp_path, "held")
    file = tmp_path / "soft_s2" / "items" / "validation_phase0.npz"
    items = checkpoint.read_arrays(file)
    checkpoint.write_arrays(file, {**items, "index": items["index"] + 1})
    study = selection.study()
    runs = [run for group in campaign.groups_of([study]) for run in group.runs]
    found = Collection(study, {run: Result.read(tmp_path / run.name, "k") for run in runs})
    with pytest.raises(select_targets.SelectionError, match="judged on different images"):
        select_targets.judge(found, ("held",))


def test_a_baseline_that_diverges_is_an_error(inside, capsys):
    command = ["select-targets", "student.yaml", "--run-dir", "runs/none", "--seeds", "1"]
    assert main([*command, "--optim.phases", "[{epochs: 1, lr: 1e30}]"]) == 1
    assert "none_s1 diverged: without targets the recipe does not train" in capsys.readouterr().err
    assert not Path("runs/none/selected.yaml").exists()


def test_input_runs_that_saw_the_judging_images_are_named(inside):
    recipe = Path("student.yaml")
    study = plan(recipe, {}, Path("runs/chosen"))
    assert select_targets.leaks(study) == []
    (note,) = select_targets.leaks(plan(recipe, {"data.split_seed": 5}, Path("runs/chosen")))
    assert "teacher (teacher) was trained on images that judge here, which favours its" in note
    assert "--data.validation_fraction 0.2 to leave them out" in note
    other = plan(recipe, {"data.synthetic_seed": 5}, Path("runs/chosen"))
    assert select_targets.leaks(other) == []
    peeking = plan(recipe, {"data.validation_fraction": 0.0}, Path("runs/chosen"))
    (note,) = select_targets.leaks(peeking)
    assert "the test split chose" in note


def test_every_run_that_a_recipe_names_is_found_from_the_arms(inside):
    named = {"teacher": "@teacher", "eval__gallery": "@teacher", "head__run": "@teacher"}
    cosine = {"task": "verification", "triplet__weight": 0.0, "head__kind": "cosine"}
    write_recipe(
        Path("gallery.yaml"), **named, **cosine, head__update="adaptive", target__alpha=1.0
    )
    study = plan(Path("gallery.yaml"), {}, Path("runs/chosen"), seeds=1)
    for name, config in stages_of(study).items():
        found = select_targets.keys.input_folders(config, study.root / name)
        # centres that follow the teacher need it without any target
        assert found == dict.fromkeys(("teacher", "head", "gallery"), Path("runs/teacher"))
    shifted = plan(Path("gallery.yaml"), {"data.split_seed": 5}, Path("runs/chosen"), seeds=1)
    notes = select_targets.leaks(shifted)
    assert [note.split()[0] for note in notes] == ["teacher", "head"]


def test_missing_inputs_are_named_with_the_commands_that_train_them(inside):
    write_recipe(Path("coach.yaml"), init_from="@first")
    write_recipe(Path("first.yaml"))
    recipe = write_recipe(Path("pupil.yaml"), teacher="@coach", target__alpha=1.0)
    with pytest.raises(ConfigError) as caught:
        plan(recipe, {"data.noise": 0.1}, Path("runs/chosen"))
    message = str(caught.value)
    options = "--data.noise 0.1 --data.validation_fraction 0.2"
    first = f"python -m kdtrain train first.yaml --run-dir runs/first {options}"
    coach = f"python -m kdtrain train coach.yaml --run-dir runs/coach {options}"
    assert message == (
        f"teacher @coach: no finished run in runs/coach; train it first: {first}; then {coach}"
    )
    hint = "train two-cores/cls_teacher .*; then .* train two-cores/tables/cls_hint --run-dir"
    with pytest.raises(ConfigError, match=hint):
        plan(settings.recipe_path("two-cores/tables/cls_fitnet"), {}, Path("elsewhere/x"))
    with pytest.raises(ConfigError, match="train demo/ali_teacher --run-dir elsewhere/ali_teacher"):
        plan(settings.recipe_path("demo/ali_distilled"), {"init_from": None}, Path("elsewhere/x"))
    with pytest.raises(ConfigError, match="teacher: nowhere/run: no trained weights there"):
        plan(recipe, {"teacher": "nowhere/run"}, Path("runs/chosen"))


def test_an_input_that_stopped_halfway_is_to_be_resumed(inside):
    stopping = iter([False, True])
    with pytest.raises(engine.Interrupted):
        train(tiny_config(), Path("runs/half"), stop=lambda: next(stopping))
    with pytest.raises(ConfigError, match="first: python -m kdtrain train runs/half --resume$"):
        plan(Path("student.yaml"), {"teacher": "@half"}, Path("runs/chosen"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plain.yaml"], "plain: no teacher, so there is no target to choose: set --teacher"),
        (["student.yaml", "--targets", "soft,hiden"], "--targets: no 'hiden'; did you mean hidden"),
        (["student.yaml", "--seed", "3"], "--seeds N trains seeds 1 to N"),
        (["student.yaml", "--seeds", "0"], "--seeds: at least 1, got 0"),
        (["student.yaml", "--jobs", "0"], "--jobs: expected at least 1; got 0"),
        (
            ["student.yaml", "--out", "student.yaml"],
            "--out: expected a .yaml file other",
        ),
        (["student.yaml", "--out", "chosen"], "--out: expected a .yaml file other"),
        (
            ["student.yaml", "--target.gamma", "0", "--task", "classification"],
            "target.gamma: expected more than 0",
        ),
    ],
)
def test_wrong_usage_is_rejected_before_anything_trains(arguments, message, inside, capsys):
    write_recipe(Path("plain.yaml"))
    assert main(["select-targets", *arguments, "--run-dir", "runs/refused"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/refused").exists()
