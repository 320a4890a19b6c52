"""The chain: order of stages, what is reused, what a failure or an interruption leaves, the
table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from in_process import in_process
from PIL import Image
from rich.console import Console
from rich.table import Table
from tiny_runs import TASK_KEYS, TINY, environment, tiny_config

from kdtrain import __main__
from kdtrain.cli import main
from kdtrain.config import ConfigError, program, settings
from kdtrain.experiments import campaign, estimate, pipeline, scheduler
from kdtrain.experiments.study import Run
from kdtrain.reports import chain_table
from kdtrain.training import checkpoint, keys

CONSTANT = estimate.Timing(
    images=4, batch_s=0.5, update_s=0.25, image_s=0.125, fixed_bytes=1000, batch_bytes=40
)
FLOOR = chain_table.FLOOR


def _preset(folder: Path, **stages: dict) -> Path:
    """A preset folder; each stage is the tiny run with its own keys (section__key)."""
    folder.mkdir(exist_ok=True)
    for name, own in stages.items():
        flat = {**TINY, "optim.phases": [{"epochs": 1, "lr": 0.05}]}
        own = {key.replace("__", "."): value for key, value in own.items()}
        flat |= {"task": "classification", **TASK_KEYS[own.get("task", "classification")], **own}
        tree: dict = {}
        for key, value in flat.items():
            section, _, leaf = key.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[leaf] = value
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return folder


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kdtrain", *map(str, arguments)]


def _run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_stage_comes_after_its_inputs():
    for preset in ("demo", "paper", "two-cores"):
        stages = pipeline.plan(preset, {}, {})
        names = [stage.name for stage in stages]
        assert len(names) == 10
        for stage in stages:
            assert all(names.index(n) < names.index(stage.name) for n in stage.inputs)
        inputs = {stage.name: set(stage.inputs) for stage in stages}
        assert inputs["cls_distilled"] == {"cls_student", "cls_teacher"}
        assert inputs["cls_control"] == {"cls_student"}
        assert inputs["ali_distilled"] == {"cls_distilled", "ali_teacher"}
        assert inputs["ver_distilled"] == {"cls_distilled", "ver_teacher"}
        assert inputs["ver_teacher"] == {"cls_teacher"}
        assert inputs["ali_scratch"] == inputs["ver_scratch"] == set()


def test_common_keys_reach_every_stage_and_special_keys_one():
    special = {"ali_teacher": {"seed": 9}, "ver_distilled": {"teacher": "@cls_teacher"}}
    common = {"seed": 3, "data.identities": 50, "teacher.cache": "float32"}
    stages = pipeline.plan("two-cores", common, special)
    seeds = {stage.name: stage.config.seed for stage in stages}
    assert seeds.pop("ali_teacher") == 9
    assert set(seeds.values()) == {3}
    assert {stage.config.data.identities for stage in stages} == {50}
    assert {stage.config.teacher.cache for stage in stages} == {"float32"}
    inputs = {stage.name: stage.inputs for stage in stages}
    assert set(inputs["ver_distilled"]) == {"cls_distilled", "cls_teacher"}


def test_divide_reaches_the_students_only():
    stages = pipeline.plan("two-cores", {}, {}, divide=4)
    for stage in stages:
        assert stage.config.model.divide == (1 if stage.name.endswith("_teacher") else 4)


def test_identity_split_keeps_classification_among_the_training_identities():
    stages = pipeline.plan("two-cores", {"data.split": "identity"}, {})
    for stage in stages:
        expected = "identity:random" if stage.name.startswith("cls") else "identity"
        assert stage.config.data.split == expected


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a": {"init_from": "@b"}, "b": {"init_from": "@a"}}, "wait for each other"),
        ({"a": {"init_from": "@c"}}, "no stage 'c'"),
        ({"a": {"optim__batch_size": 0}}, "stage a: optim.batch_size"),
    ],
)
def test_a_preset_that_cannot_be_run_is_rejected(stages, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        pipeline.plan(str(_preset(tmp_path / "p", **stages)), {}, {})


def test_the_key_changes_with_what_counts_and_with_nothing_else():
    config = tiny_config(data__kind="folder", data__root="here")
    key = keys.run_key(config, {"teacher": "x"}, "data")
    train = dataclasses.replace(config.train, threads=4, log_every=1, save_every=1)
    data = dataclasses.replace(config.data, root="elsewhere", workers=3, cache="none")
    moved = dataclasses.replace(config, train=train, data=data, init_from="@other")
    assert keys.run_key(moved, {"teacher": "x"}, "data") == key
    assert keys.run_key(config, {"teacher": "y"}, "data") != key
    assert keys.run_key(config, {"teacher": "x"}, "other data") != key
    reseeded = dataclasses.replace(config, seed=1)
    assert keys.run_key(reseeded, {"teacher": "x"}, "data") != key
    assert keys.differences(reseeded, config) == ["seed: 1 here, 0 there"]


def test_the_keys_worked_out_beforehand_are_those_of_the_runs(chain):
    root, preset = chain
    stages = pipeline.plan(str(preset), {}, {})
    for name, key in pipeline.stage_keys(stages, root).items():
        results = checkpoint.read_json(root / name / "results.json")
        assert results is not None
        assert results["key"] == key


@pytest.mark.parametrize(
    ("results", "diverged", "begun", "state"),
    [
        ("k", None, "k", "reused"),
        ("other", None, "other", "changed"),
        (None, "k", "k", "diverged"),
        (None, "other", "other", "changed"),
        (None, None, "k", "resume"),
        (None, None, "other", "changed"),
        (None, None, None, "new"),
    ],
)
def test_the_state_of_a_stage_follows_from_its_folder(results, diverged, begun, state, tmp_path):
    if results:
        checkpoint.write_json(tmp_path / "results.json", {"key": results})
    if diverged:
        checkpoint.write_json(tmp_path / "diverged.json", {"key": diverged})
    if begun:
        checkpoint.write_json(tmp_path / "run.json", {"key": begun})
    assert pipeline.stage_state(tmp_path, "k") == state


def test_an_earlier_run_is_kept_aside_not_destroyed(tmp_path):
    folder, place = tmp_path / "stage", tmp_path / "previous" / "stage"
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "results.json").write_text(content)
        pipeline.set_aside(folder, place, Console(file=io.StringIO()))
        assert not folder.exists()
        assert (place / "results.json").read_text() == content


def test_the_table_has_teacher_student_control_distilled_and_floor(tmp_path):
    def stage(name: str, task: str, floor: float, **metrics: float) -> None:
        (tmp_path / name).mkdir()
        results = {"task": task, "metrics": metrics, "floors": {m: floor for m in metrics}}
        results["untrained"] = {m: floor / 2 for m in metrics if m != "top1"}
        checkpoint.write_json(tmp_path / name / "results.json", results)

    stage("cls_teacher", "classification", 0.2, top1=0.931)
    stage("cls_student", "classification", 0.2, top1=0.5)
    stage("cls_control", "classification", 0.2, top1=0.61)
    stage("cls_distilled", "classification", 0.2, top1=0.62)
    stage("ver_teacher", "verification", 0.1, nn_top1=0.4, pair_accuracy=0.7)
    (tmp_path / "recipes").mkdir()
    for name in ("ali_teacher", "ali_distilled"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text("task: alignment\n")
    names = ("cls_teacher", "cls_student", "cls_control", "cls_distilled", "ver_teacher")
    states = dict.fromkeys(names, "done")
    states["ali_teacher"] = "diverged"
    states["ali_distilled"] = "skipped"
    rows = _rows(tmp_path, states)
    assert rows["teacher"] == ["93.1", "diverged", "40.0", "70.0"]
    assert rows["scratch student"] == ["50.0", "-", "-", "-"]
    assert rows["control student, no teacher"] == ["61.0", "-", "-", "-"]
    assert rows["distilled student"] == ["62.0", "-", "-", "-"]
    assert rows[FLOOR] == ["20.0", "-", "10.0", "10.0"]
    assert rows[chain_table.UNTRAINED] == ["-", "-", "5.0", "5.0"]
    # of images from videos, and the student's untrained network before its teacher's
    stage("ver_scratch", "verification", 0.2, nn_top1=0.3, nn_top1_other_video=0.12)
    states["ver_scratch"] = "done"
    rows = _rows(tmp_path, states)
    assert rows["scratch student"] == ["50.0", "-", "30.0", "12.0", "-"]
    assert rows[FLOOR] == ["20.0", "-", "10.0", "20.0", "10.0"]
    assert rows[chain_table.UNTRAINED] == ["-", "-", "10.0", "10.0", "5.0"]


@pytest.mark.parametrize("preset", ["images", "two-cores/systems", "two-cores/resolutions"])
def test_every_stage_outside_the_chain_has_a_row_of_its_own(preset, tmp_path):
    names = [stage.name for stage in pipeline.plan(preset, {}, {})]
    numbers = {name: 0.3 + 0.01 * place for place, name in enumerate(names)}
    for name, value in numbers.items():
        (tmp_path / name).mkdir()
        results = {"task": "classification", "metrics": {"top1": value, "pair_accuracy": 0.9}}
        results |= {"floors": {"top1": 0.2}, "untrained": {"top1": value / 10}}
        checkpoint.write_json(tmp_path / name / "results.json", results)
    table = chain_table.result_table(tmp_path, dict.fromkeys(names, "done")).renderables[0]
    assert isinstance(table, Table)
    assert [column.header for column in table.columns] == ["", "classification\ntop-1"]
    titles = [str(cell) for cell in table.columns[0].cells]
    assert titles == [*names, FLOOR, chain_table.UNTRAINED]
    student = next(name for name in names if not name.endswith("teacher"))
    expected = [*numbers.values(), 0.2, numbers[student] / 10]
    assert list(table.columns[1].cells) == [f"{100 * value:.1f}" for value in expected]


def test_a_failed_stage_outside_the_chain_keeps_its_row_and_its_tasks_columns(tmp_path):
    (tmp_path / "recipes").mkdir()
    for name, task in (("teacher", "verification"), ("sh_teacher", "alignment")):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(f"task: {task}\n")
    states = dict.fromkeys(("teacher", "sh_teacher"), "failed")
    rows = _rows(tmp_path, states)
    assert rows["teacher"] == ["-", "failed", "failed"]
    assert rows["sh_teacher"] == ["failed", "-", "-"]
    assert rows[FLOOR] == ["-", "-", "-"]


def _rows(root: Path, states: dict[str, str]) -> dict[str, list[str]]:
    """The cells of the result table by the row's title."""
    stream = io.StringIO()
    Console(file=stream, width=120).print(chain_table.result_table(root, states))
    rows = {}
    for line in stream.getvalue().splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        rows[cells[0] if cells else ""] = cells[1:]
    return rows


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A preset of five tiny stages of all three tasks, run once by the command."""
    folder = tmp_path_factory.mktemp("chain")
    preset = _preset(
        folder / "preset",
        cls_teacher={"model__width": 16},
        cls_distilled={"teacher": "@cls_teacher", "target__alpha": 1.0},
        ali_distilled={
            **{"task": "alignment", "init_from": "@cls_distilled", "teacher": "@cls_teacher"},
            "target__beta": 1.0,
        },
        ver_distilled={
            **{"task": "verification", "init_from": "@cls_distilled", "teacher": "@cls_teacher"},
            "target__alpha": 1.0,
        },
    )
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pipeline, "run_all", in_process())
        words = ["pipeline", "--preset", str(preset), "--run-dir", str(folder / "root")]
        assert main([*words, "--jobs", "2"]) == 0, printed.getvalue()
    assert "distilled student" in printed.getvalue()
    assert (folder / "root" / "report.html").stat().st_size > 10_000
    return folder / "root", preset


def test_a_second_run_reuses_every_stage_and_touches_none(chain, capsys):
    root, preset = chain
    weights = sorted(root.glob("*/last/*"))
    before = {path: path.stat().st_mtime_ns for path in weights}
    assert main(["pipeline", "--preset", str(preset), "--run-dir", str(root)]) == 0
    assert capsys.readouterr().out.count(": reused, ") == 4
    assert {path: path.stat().st_mtime_ns for path in sorted(root.glob("*/last/*"))} == before


def test_train_refuses_to_destroy_what_is_in_the_run_folder(chain, capsys):
    root, _ = chain
    recipe, folder = root / "recipes" / "cls_teacher.yaml", root / "cls_teacher"
    before = (folder / "last" / checkpoint.WEIGHTS).read_bytes()
    words = ["train", str(recipe), "--run-dir"]
    assert main([*words, str(folder)]) == 0
    assert "already finished, reused" in capsys.readouterr().out
    assert main([*words, str(folder), "--seed", "5"]) == 2
    told = capsys.readouterr().err
    assert "seed: 5 here, 0 there" in told
    assert "--overwrite" in told
    assert main([*words, str(root), "--overwrite"]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert (folder / "last" / checkpoint.WEIGHTS).read_bytes() == before


def test_a_stage_that_diverges_is_a_result_and_leaves_the_others(tmp_path, capsys, monkeypatch):
    preset = _preset(
        tmp_path / "preset",
        cls_teacher={"optim__phases": [{"epochs": 1, "lr": 1e30}]},
        cls_distilled={"teacher": "@cls_teacher", "target__alpha": 1.0},
        cls_student={},
        cls_control={"optim__batch_size": 5000},
    )
    monkeypatch.chdir(tmp_path)
    command = ["pipeline", "--preset", str(preset), "--run-dir", "root", "--jobs", "2"]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "error: cls_teacher diverged: diverged at step " in err
    assert "error: cls_distilled skipped: needs cls_teacher, which diverged" in err
    assert "error: cls_control failed: " in err
    assert "cls_teacher: diverged: diverged at step " in out
    assert "cls_student: done" in out
    written = (tmp_path / "root" / "cls_teacher" / "diverged.json").stat().st_mtime_ns
    (tmp_path / "preset" / "cls_control.yaml").unlink()  # it would fail again, in a process
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert "cls_teacher: diverged before: diverged at step " in out
    assert "cls_student: reused, " in out
    assert "error: cls_distilled skipped: needs cls_teacher, which diverged" in err
    assert (tmp_path / "root" / "cls_teacher" / "diverged.json").stat().st_mtime_ns == written
    lines = [line.split() for line in out.splitlines()]
    assert [line[1:] for line in lines if line[:1] == ["teacher"]] == [["diverged"]]


def test_ctrl_c_stops_the_children_cleanly_and_the_same_command_continues(tmp_path):
    phases = [{"epochs": 3, "lr": 0.05}]
    # many identities make the epochs long enough to be interrupted in
    slow = {"optim__phases": phases, "data__identities": 60, "data__images_per_identity": 8}
    preset = _preset(tmp_path / "preset", cls_teacher=slow)
    arguments = ("pipeline", "--preset", preset, "--run-dir", "root", "--jobs", "2")
    process = subprocess.Popen(
        _command(*arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "root" / "cls_teacher"
    deadline = time.monotonic() + 60
    while not (folder / "last").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped; to resume: python -m kdtrain pipeline --preset" in err
    assert "Traceback" not in err
    assert not (folder / "results.json").exists()
    result = _run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (folder / "results.json").exists()
    assert "resumed in epoch" in (tmp_path / "root" / "logs" / "cls_teacher.txt").read_text()


def test_overwrite_is_printed_again_until_a_stage_has_begun(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    preset = _preset(tmp_path / "preset", cls_teacher={}, cls_student={})
    words = ["pipeline", "--preset", str(preset), "--run-dir", str(tmp_path / "root")]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "stage_keys", interrupted)
        assert main([*words, "--overwrite"]) == 130
    assert capsys.readouterr().err.endswith(" --overwrite\n")
    monkeypatch.setattr(scheduler, "_start", interrupted)  # the second Ctrl-C
    assert main([*words, "--overwrite"]) == 130
    told = capsys.readouterr().err
    assert "stopped; to resume: python -m kdtrain pipeline" in told
    assert "--overwrite" not in told


def test_a_signal_after_the_command_does_not_change_its_status(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("kdtrain.cli.main", lambda: 0)
    try:
        assert __main__.main() == 0
        for number in before:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_failure_is_named_from_this_sessions_lines_of_the_log(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "a.txt"
    stage = pipeline.Stage("a", tiny_config(), resume=True)
    monkeypatch.setattr(scheduler.subprocess, "Popen", lambda *_, **__: None)
    notes = []
    for said in ("error: the first cause\n", "", "a: epoch 2\nkilled\n", "error: the next\n"):
        child = scheduler._start(stage, tmp_path, 1)
        child.log.write(said.encode())
        child.log.close()
        notes.append(scheduler._outcome(child, 1).note)
    assert notes == ["the first cause", "exit status 1", "killed", "the next"]
    assert log.read_text().count("error: ") == 2


@pytest.mark.parametrize(
    ("given", "jobs", "threads"),
    [
        (None, 1, 8),
        (None, 3, 2),
        (None, 99, 1),
        ("3", 1, 3),
        ("5,2", 2, 5),
        ("", 2, 4),
        ("x", 2, 4),
    ],
)
def test_threads_are_the_users_or_an_equal_share(given, jobs, threads, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    works = []
    monkeypatch.setattr(pipeline, "run_all", lambda given, *_: (works.extend(given), (0, {}))[1])
    config = tiny_config(train__threads=0)
    with contextlib.suppress(KeyError):  # as nothing has run
        pipeline.run([pipeline.Stage("a", config)], tmp_path / "root", jobs=jobs)
    assert [work.config.train.threads for work in works] == [threads]
    recipe = settings.read_recipe(tmp_path / "root" / "recipes" / "a.yaml")
    assert recipe["train.threads"] == threads


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder of identities without landmarks."""
    for place in range(40):
        file = tmp_path / "faces" / f"p{place // 5}" / f"{place % 5}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 20), 50).convert("RGB").save(file)
    return tmp_path / "faces"


ALIGNMENT = {"task": "alignment", "init_from": "@cls_teacher"}


def _of(folder: Path, *arguments: str | Path) -> list[str]:
    words = ("pipeline", "--data.kind", "folder", "--data.root", folder, "--jobs", "1", *arguments)
    return [str(word) for word in words]


def test_stages_that_need_landmarks_are_left_out_and_named(
    photographs, tmp_path, monkeypatch, capsys
):
    preset = _preset(
        tmp_path / "preset",
        cls_teacher={},
        ali_teacher=ALIGNMENT,
        ver_after={"task": "verification", "init_from": "@ali_teacher"},
        ver_teacher={"task": "verification", "init_from": "@cls_teacher"},
    )
    line = f"omitted, as {pipeline.NO_LANDMARKS}: ali_teacher, ver_after\n"
    monkeypatch.setattr(estimate, "_measure", lambda *_: CONSTANT)
    words = _of(photographs, "--preset", preset, "--run-dir", tmp_path / "root")
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {line}")
    assert len(list(yaml.safe_load_all(printed))) == 2
    trained = []
    monkeypatch.setattr(
        pipeline, "run", lambda stages, *_, **__: (trained.extend(stages), (0, {}))[1]
    )
    monkeypatch.setattr(pipeline, "finish", lambda *_: None)
    assert main(words) == 0
    assert [stage.name for stage in trained] == ["cls_teacher", "ver_teacher"]
    assert capsys.readouterr().out == line
    alone = _preset(tmp_path / "alone", ali_teacher={"task": "alignment"})
    assert main(_of(photographs, "--preset", alone, "--run-dir", tmp_path / "root")) == 2
    assert f"every stage is omitted, as {pipeline.NO_LANDMARKS}" in capsys.readouterr().err


def test_runs_of_tables_and_methods_that_need_landmarks_are_rejected(photographs, tmp_path):
    config = tiny_config("alignment", data__kind="folder", data__root=str(photographs))
    run = Run("ali", 1)
    group, stages = campaign.Group("table3", (run,)), {run: pipeline.Stage("ali_s1", config)}
    with pytest.raises(ConfigError, match="ali_s1: the images have no landmarks"):
        campaign.make_campaign([group], stages, campaign.Order(tmp_path, 1))


def test_a_dry_run_ends_as_the_run_would(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_measure", lambda *_: CONSTANT)
    preset = _preset(tmp_path / "preset", a={}, b={"optim__batch_size": 5000})
    words = ("--preset", preset, "--run-dir", tmp_path / "root", "--dry-run")
    assert main(_of(photographs, *words)) == 1
    printed = capsys.readouterr()
    assert "1 of 2 runs would fail, as said above: b" in printed.err
    assert "fill no batch of 5000" in printed.out
    (tmp_path / "empty").mkdir()
    assert main(_of(tmp_path / "empty", *words)) == 1
    assert "2 of 2 runs would fail" in capsys.readouterr().err
    assert main(_of(tmp_path / "nowhere", *words)) == 0


@pytest.mark.parametrize("jobs", ["0", "-3"])
def test_no_jobs_at_all_is_wrong_usage(jobs, capsys):
    assert main(["pipeline", "--jobs", jobs, "--dry-run"]) == 2
    assert f"--jobs: expected at least 1; got {jobs}" in capsys.readouterr().err
