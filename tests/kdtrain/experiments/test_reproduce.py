"""`reproduce` on two-step runs: the plan, the budget, what is shared and reused, a kill in the
middle, and the files that it ends in.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from in_process import in_process
from rich.console import Console
from tiny_runs import TASK_KEYS, TINY, environment

from kdtrain.cli import main
from kdtrain.experiments import campaign, engine, pipeline, study_file
from kdtrain.experiments.campaign import Campaign, Order

ONE = [{"epochs": 1, "lr": 0.05}]
RECIPES = {
    "cls_teacher": ("classification", {"model.divide": 1}),
    "cls_student": ("classification", {}),
    "ali_teacher": ("alignment", {"init_from": "@cls_teacher"}),
    "ali_scratch": ("alignment", {}),
    "ver_teacher": ("verification", {"init_from": "@cls_teacher"}),
    "ver_scratch": ("verification", {}),
    "tables/cls_hint": ("classification", {"target.gamma": 0.0, "target.hint": 1.0,
                                           "teacher.run": "@cls_teacher"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def scale(tmp_path_factory) -> Path:
    """A preset whose runs take a second, process start included."""
    folder = tmp_path_factory.mktemp("preset") / "tiny"
    (folder / "tables").mkdir(parents=True)
    for name, (task, own) in RECIPES.items():
        flat = {**TINY, **TASK_KEYS[task], "task": task, "optim.phases": ONE, **own}
        tree: dict = {}
        for key, value in flat.items():
            section, _, leaf = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[leaf] = value
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    schedules = {
        "classification": dict.fromkeys(("scratch", "initialised", "hint", "fitnet"), ONE),
        "alignment": dict.fromkeys(("scratch", "initialised"), ONE),
        "verification": dict.fromkeys(("scratch", "initialised"), ONE),
    }
    (folder / "_tables.yaml").write_text(yaml.safe_dump(schedules))
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kdtrain", "reproduce", *map(str, arguments)]


@pytest.fixture(scope="module")
def table3(scale, tmp_path_factory) -> tuple[Path, str]:
    """The runs of table 3 for one seed, and what was printed."""
    root = tmp_path_factory.mktemp("runs") / "tables"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pipeline, "run_all", in_process())
        patch.setattr(campaign, "seconds_of", lambda *_: {})
        assert main(["reproduce", "table3", "--scale", str(scale), "--seeds", "1", "--jobs", "2",
                     "--run-dir", str(root)]) == 0, printed.getvalue()  # fmt: skip
    return root, printed.getvalue()


def cells(root: Path) -> list[dict[str, str]]:
    with open(root / "tables" / "table3.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_cell_of_the_table_has_a_number_beside_the_papers(table3):
    root, printed = table3
    shown = [row for row in cells(root) if row["state"] != "none"]
    assert {row["state"] for row in shown} == {"done"}
    paper = [row for row in shown if row["kind"] == "paper"]
    assert len(paper) == 6
    assert all(float(row["mean"]) > 0 and 3 < float(row["paper"]) < 4 for row in paper)
    for name in ("table3.txt", "table3.md", "table3.png", "table3.html"):
        assert (root / "tables" / name).stat().st_size > 200
    assert "T4" in printed
    assert "mean shape" in printed


def test_given_again_it_trains_nothing_and_writes_the_same_table(table3, scale, capsys):
    root, _ = table3
    before = {f: f.stat().st_mtime_ns for f in root.glob("*/results.json")}
    table = (root / "tables" / "table3.csv").read_bytes()
    assert main(["reproduce", "table3", "--scale", str(scale), "--seeds", "1", "--jobs", "2",
                 "--run-dir", str(root)]) == 0  # fmt: skip
    assert before == {f: f.stat().st_mtime_ns for f in root.glob("*/results.json")}
    assert (root / "tables" / "table3.csv").read_bytes() == table
    assert "13 runs in all, 13 finished before" in capsys.readouterr().out


@pytest.mark.prove
def test_killed_in_the_middle_and_started_again_it_ends_in_the_same_table(table3, scale, tmp_path):
    root, _ = table3
    copy = tmp_path / "tables"
    shutil.copytree(root, copy)
    lost = ["ali_distill_soft_8_s1", "ali_scratch_8_s1"]
    for name in lost:
        shutil.rmtree(copy / name)
    arguments = command("table3", "--scale", scale, "--seeds", "1", "--jobs", "1",
                        "--run-dir", copy)  # fmt: skip
    child = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL)
    waited = time.monotonic() + 60
    while not list((copy / "ali_scratch_8_s1").glob("last")) and time.monotonic() < waited:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert any(not (copy / name / "results.json").exists() for name in lost)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "tables" / "table3.csv").read_bytes() == (
        root / "tables" / "table3.csv"
    ).read_bytes()


def planned(scale: Path, root: Path, budget: float | None, seeds: int = 1) -> Campaign:
    options = {"scale": str(scale), "seeds": seeds}
    studies = [study_file.load(name) for name in ("table3", "table1")]
    studies = study_file.adjusted(studies, options, {}, {})
    return engine.make_plan(studies, Order(root, 2, budget, console=Console(quiet=True)))


def test_a_budget_takes_the_first_groups_and_says_what_it_leaves(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "seconds_of", lambda runs, stages, threads, sources: {
        stages[run].name: 60.0 for run in runs})  # fmt: skip
    whole = planned(scale, tmp_path, None)
    assert whole.taken == whole.groups
    part = planned(scale, tmp_path, 0.8 * whole.clock_s / 60)
    assert part.groups == whole.groups
    assert part.taken[0] == whole.groups[0]
    assert 0 < len(part.taken) < len(part.groups)
    assert part.clock_s <= 0.8 * whole.clock_s
    console = Console(width=100, record=True, file=io.StringIO())
    campaign.show_campaign(part, console)
    text = console.export_text()
    assert "not run: over the budget" in text
    assert "taken" in text


def test_a_group_without_its_inputs_is_not_taken(scale, tmp_path, monkeypatch):
    # the distilled students of table 3 are in its own group; a budget that has only room for
    # groups behind it must not take those that start from its runs
    costs = {"table1": 1.0, "ali": 1e6}
    monkeypatch.setattr(campaign, "seconds_of", lambda runs, stages, threads, sources: {
        stages[run].name: costs["ali" if run.arm.startswith(("ali", "cls_teacher")) else "table1"]
        for run in runs})  # fmt: skip
    plan = planned(scale, tmp_path, 10.0)
    names = {plan.stages[run].name for group in plan.taken for run in group.runs}
    for group in plan.taken:
        for run in group.runs:
            assert set(plan.stages[run].inputs) <= names


def test_the_overview_marks_each_run(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "seconds_of", lambda runs, stages, threads, sources: {})
    plan = planned(scale, tmp_path, None, seeds=2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(engine.overview(plan, {"cls_soft_8_s1": "done", "cls_soft_8_s2": "running"}))
    assert re.search(r"soft +■▶", console.export_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table6"], "no table 'table6'; did you mean table"),
        (["table1", "--seeds", "0"], "--seeds"),
        (["table1", "--widths", "3"], "--widths: expected some of [8, 4, 2]"),
        (["table1", "--teachers", "two"], "each or one"),
        (["table1", "--budget", "-1"], "--budget"),
        (["table1", "--seed", "4"], "--seed: the arms"),
        (["table1", "--scale", "huge"], "--scale huge"),
        (["table1", "--jobs", "0"], "--jobs"),
        (["table3", "--widths", "4"], "--widths: table3 has no cell of 4"),
        (["table5", "--verification.target.gamma", "0"], "--target.gamma: the arms"),
        (["table1", "--optim.phases", "[{epochs: 1, lr: 0.1}]"], "copy the study"),
        (
            ["table3", "--second.data.identities", "9"],
            "no second data source in table3; table2 has one",
        ),
    ],
)
def test_wrong_usage_names_the_option(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(engine, "make_campaign", lambda *_, **__: pytest.fail("accepted"))
    assert main(["reproduce", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_prints_runs_costs_and_plan_and_writes_nothing(scale, tmp_path, capsys):
    root = tmp_path / "nothing"
    arguments = ["reproduce", "table3", "--scale", str(scale), "--run-dir", str(root), "--dry-run"]
    assert main([*arguments, "--seeds", "2", "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert not root.exists()
    documents = [d for d in yaml.safe_load_all(printed.split("\n# stage")[0]) if d]
    assert len(documents) == 13
    assert {document["seed"] for document in documents} == {1}
    assert "# ali_distill_soft_8_s1" in printed
    assert re.search(r"table3, 1/8 +26 +0", printed)


def test_a_dry_run_does_without_the_images(scale, tmp_path, capsys):
    away = ["--data.kind", "folder", "--data.root", str(tmp_path / "casia-webface")]
    assert main(["reproduce", "table1", "--scale", str(scale), "--seeds", "1", "--jobs", "1",
                 "--run-dir", str(tmp_path / "runs"), "--dry-run", *away]) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "10,575" in printed or "CASIA-WebFace" in printed
    assert "no plan of all seeds without the images" in printed


def test_a_dry_run_is_no_excuse_for_images_that_cannot_serve(scale, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    away = ["--data.kind", "folder", "--data.root", str(tmp_path / "empty")]
    assert main(["reproduce", "table1", "--scale", str(scale), "--seeds", "1", "--jobs", "1",
                 "--run-dir", str(tmp_path / "runs"), "--dry-run", *away]) == 1  # fmt: skip
    printed = capsys.readouterr()
    assert "without the images" not in printed.out
    assert printed.err.splitlines()[-1].startswith("error: ")
