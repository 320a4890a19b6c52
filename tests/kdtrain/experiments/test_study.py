"""The tables of the paper as data: every cell has a run, runs come after their inputs, the paper's
numbers and differences are the paper's, and run directories become the right cells.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from in_process import in_process
from tiny_runs import TINY

from kdtrain.cli import main
from kdtrain.config import ConfigError, settings
from kdtrain.experiments import campaign, pipeline
from kdtrain.experiments.campaign import controls, groups_of, stages_of
from kdtrain.experiments.collect import Collection, Result, table
from kdtrain.experiments.study import SCHEDULES, At, Run, Study
from kdtrain.experiments.study_file import adjusted, load, names

ALL = ("table1", "table2", "table3", "table4", "table5")
SCALES = [f.parent.name for f in sorted(settings.RECIPES.glob(f"*/{SCHEDULES}"))]
ARMS = load("table1").arms


def studies(*names: str, common=None, special=None, **options) -> list[Study]:
    """Packaged studies with the options of a command line."""
    return adjusted([load(name) for name in names], options, common or {}, special or {})


def runs_of(found: list[Study]) -> list[Run]:
    return [run for group in groups_of(found) for run in group.runs]


def every_place():
    for name in ALL:
        for block in load(name).blocks:
            for line in block.lines:
                yield from ((name, block, line, at) for at in line.places if at is not None)


def test_every_arm_has_a_cell_and_every_claim_speaks_of_cells():
    unseen = set(ARMS) - {at.arm for *_, at in every_place()}
    assert unseen == {"cls_hint"}  # an input alone
    shown = {(at.arm, at.width, at.phase) for *_, at in every_place()}
    for name in ALL:
        for claim in load(name).claims:
            assert len(claim.better) == len(claim.worse)
            for at in (*claim.better, *claim.worse):
                assert (at.arm, at.width, at.phase) in shown, (name, claim.text)


def test_every_run_of_a_claim_is_planned_with_its_table():
    for name in ALL:
        (study,) = studies(name, seeds=1)
        runs = set(runs_of([study]))
        for claim in study.claims:
            for at in (*claim.better, *claim.worse):
                assert study.run_of(at, 1, claim.second) in runs, (name, claim.text)


def test_the_papers_differences_are_what_its_text_says():
    found = {
        claim.text: sum(a.paper - b.paper for a, b in zip(claim.better, claim.worse, strict=True))
        for claim in load("table1").claims
        if all(at.paper for at in (*claim.better, *claim.worse))
    }
    # section 5.2: "10% and 5% higher than the Scratch and Fitnet"
    assert found["full initialisation > scratch"] == pytest.approx(10.57)
    assert found["full initialisation > FitNet"] == pytest.approx(5.18)
    papers = {(b.title, line.name, at.width): at.paper for _, b, line, at in every_place()}
    numbers = [v for v in papers.values() if v is not None]
    assert len(numbers) > 40
    assert all(3 < v < 100 for v in numbers)


@pytest.mark.parametrize("scale", SCALES)
def test_runs_come_after_what_they_read_and_build(scale):
    seeds, widths = (2, "4,8") if scale == "two-cores" else (1, "8")
    common = {"data.kind": "synthetic", "data.root": None}
    asked = studies(*ALL, scale=scale, seeds=seeds, widths=widths, common=common,
                    special={"second": {"data.synthetic_seed": 5}})  # fmt: skip
    runs = runs_of(asked)
    assert len(runs) == len(set(runs))
    found = list(stages_of(asked, runs).values())
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    for place, stage in enumerate(found):
        assert all(n in names[:place] for n in stage.inputs), stage.name
        assert stage.config.seed in (1, 2)
        assert stage.config.data.synthetic_seed == (5 if stage.name.startswith("b_") else 0)
    by_name = dict(zip(names, found, strict=True))
    soft, ours = by_name["cls_soft_8_s1"].config, by_name["cls_distilled_8_s1"].config
    assert soft.optim.phases[: len(ours.optim.phases)] != ours.optim.phases
    assert len(soft.optim.phases) == 2
    assert soft.init_from is None
    assert ours.init_from == "@cls_scratch_8_s1"
    assert ours.teacher.run == "@cls_teacher_s1"
    assert ours.model.divide == 8
    assert by_name["cls_teacher_s1"].config.model.divide == 1
    assert by_name["ver_triplet_distill_soft_8_s1"].config.target.gamma == 0
    joint = by_name["ver_joint_distill_soft_8_s1"]
    assert joint.config.target.gamma == 1
    assert joint.inputs == ("cls_distilled_8_s1", "ver_joint_teacher_s1")
    alone = by_name["cls_logits_alone_8_s1"].config.target
    assert (alone.gamma, alone.logits, alone.alpha) == (0, 1, 0)


def test_a_budget_meets_the_cheap_tables_and_the_narrow_student_first():
    order = ("table3", "table1", "table4", "table5", "table2")
    labels = [group.label for group in groups_of(studies(*order, special={"second": {}}))]
    assert labels[:4] == ["table3, 1/8", "table1, 1/8", "table4, 1/8", "table5, 1/8"]
    assert all("second" in label for label in labels[-3:])
    extra = labels.index("table1, 1/8, further rows")
    assert extra < labels.index("table4, 1/4")


def test_a_shared_teacher_is_one_run_for_every_seed():
    asked = studies("table3", teachers="one")
    runs = runs_of(asked)
    assert {run.seed for run in runs if run.arm.endswith("_teacher")} == {1}
    found = stages_of(asked, runs).values()
    students = [s for s in found if s.name.startswith("cls_distilled")]
    assert {s.config.teacher.run for s in students} == {"@cls_teacher_s1"}
    assert {s.config.init_from for s in students} == {f"@cls_scratch_8_s{k}" for k in (1, 2, 3)}


def test_keys_of_one_task_reach_its_runs_alone():
    asked = studies("table3", scale="paper", seeds=1, common={"data.root": "casia"},
                    special={"alignment": {"data.root": "celeba"}})  # fmt: skip
    for stage in stages_of(asked, runs_of(asked)).values():
        alignment = stage.config.task == "alignment"
        assert stage.config.data.root == ("celeba" if alignment else "casia")


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean two-cores"):
        _ = studies("table3", scale="two-core")[0].schedules


def finished(folder: Path, key: str, metrics: dict[str, list[float]], **items: np.ndarray) -> None:
    """A run directory as the engine leaves it, with these metrics at the ends of its phases."""
    count = len(next(iter(metrics.values())))
    phases = [{"metrics": {n: v[i] for n, v in metrics.items()}} for i in range(count)]
    results = {"key": key, "phases": phases, "floors": {"top1": 0.5}, "untrained": {"top1": 0.1}}
    (folder / "items").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    for i in range(count):
        np.savez(folder / "items" / f"phase{i}.npz", **{n: a[i] for n, a in items.items()})


@pytest.fixture
def request8() -> Study:
    return studies("table1", seeds=2)[0]


def collected(request: Study, root: Path, keys: dict[str, str], **failures: str) -> Collection:
    runs = runs_of([request])
    return Collection(
        request,
        {run: Result.read(root / run.name, keys.get(run.name, "k"), failures.get(run.name, ""))
         for run in runs},
    )  # fmt: skip


def test_cells_hold_mean_and_spread_of_the_right_phase(tmp_path, request8):
    for seed, top in ((1, 0.5), (2, 0.6)):
        finished(tmp_path / f"cls_soft_8_s{seed}", "k", {"top1": [top, top + 0.2]})
    found = collected(request8, tmp_path, {})
    first = found.cell(At("cls_soft", 8, 61.27, 0), "top1", False)
    last = found.cell(At("cls_soft", 8), "top1", False)
    assert first.value == pytest.approx(55)
    assert first.spread == pytest.approx(100 * 0.1 / 2**0.5)
    assert first.per_seed == pytest.approx((50, 60))
    assert first.paper == 61.27
    assert last.value == pytest.approx(75)


def test_what_has_no_number_says_why(tmp_path, request8):
    (tmp_path / "cls_hidden_8_s1").mkdir()
    (tmp_path / "cls_hidden_8_s1" / "diverged.json").write_text('{"key": "k", "message": "nan"}')
    (tmp_path / "cls_logits_8_s1").mkdir()
    (tmp_path / "cls_logits_8_s1" / "run.json").write_text('{"key": "k"}')
    finished(tmp_path / "cls_fitnet_8_s1", "an older key", {"top1": [0.9]})
    finished(tmp_path / "cls_soft_8_s1", "k", {"top1": [0.5, 0.5]})
    found = collected(request8, tmp_path, {}, cls_distilled_8_s2="broken")
    state = {
        part: found.cell(At(part, 8), "top1", False).state
        for part in ("cls_hidden", "cls_logits", "cls_fitnet", "cls_distilled", "cls_scratch")
    }
    assert state == {
        "cls_hidden": "diverged", "cls_logits": "unfinished", "cls_fitnet": "not run",
        "cls_distilled": "failed", "cls_scratch": "not run",
    }  # fmt: skip
    half = found.cell(At("cls_soft", 8), "top1", False)
    assert half.per_seed == (pytest.approx(50), None)
    assert half.note == "not run"


def test_verdicts_pair_the_seeds_and_items_of_both_arms(tmp_path, request8):
    generator = np.random.default_rng(0)
    for seed in (1, 2):
        base = (generator.random(400) < 0.4).astype(np.float32)
        better = np.maximum(base, (generator.random(400) < 0.2).astype(np.float32))
        ours = {"top1": [float(better.mean())]}
        finished(tmp_path / f"cls_distilled_8_s{seed}", "k", ours, top1=better[None])
        control = {"top1": [float(base.mean())]}
        finished(tmp_path / f"cls_control_8_s{seed}", "k", control, top1=base[None])
    shown = table(collected(request8, tmp_path, {}), [])
    verdicts = {trend.claim: trend.verdict for trend in shown.trends}
    control = verdicts["full > softmax alone, same rates"]
    assert control.state == "held"
    assert control.seeds == control.agreeing == 2
    assert 5 < (control.difference or 0) < 20
    assert verdicts["soft > hidden, first rate"].state == "not run"
    rows = {row.name: row for block in shown.blocks for row in block.rows}
    assert rows["raw pixels"].cells[0].value == pytest.approx(50)
    assert rows["untrained network"].cells[0].value == pytest.approx(10)


def test_a_teacher_below_the_floor_makes_the_block_uninformative(tmp_path, request8):
    finished(tmp_path / "cls_teacher_s1", "k", {"top1": [0.3, 0.45]})
    shown = table(collected(request8, tmp_path, {}), [])
    assert any("uninformative" in note and "45.0" in note for note in shown.notes)
    finished(tmp_path / "cls_teacher_s2", "k", {"top1": [0.9, 0.95]})
    shown = table(collected(request8, tmp_path, {}), [])
    assert not any("uninformative" in note for note in shown.notes)


def test_names_of_runs_tell_them_apart():
    (request,) = studies("table2", special={"second": {}})
    runs = {
        request.run_of(At(arm, width), seed, second)
        for arm in ARMS
        for width in request.widths
        for seed in (1, 2)
        for second in (False, True)
    }
    assert len({run.name for run in runs}) == len(runs)
    assert Run("cls_soft", 1, 8).name == "cls_soft_8_s1"
    assert request.run_of(At("cls_teacher", 4), 2, True).name == "b_cls_teacher_s2"
    assert Run("kt", 1, None, 16).name == "kt_r16_s1"


def test_claims_over_all_count_the_pairs_that_are_there_and_compare_them_with_the_paper(tmp_path):
    (request,) = studies("table4", seeds=2)
    for start, top in (("pretrain", 0.0), ("distill", 1.0)):
        for target in ("none", "hidden", "soft"):
            scores = {"nn_top1": np.full((1, 50), top, np.float32)}
            for seed in (1, 2):
                folder = tmp_path / f"ver_triplet_{start}_{target}_8_s{seed}"
                finished(folder, "k", {"nn_top1": [top]}, **scores)
    shown = table(collected(request, tmp_path, {}), [])
    (over,) = [t for t in shown.trends if t.claim == "over all: Distill beats Pretrain"]
    assert over.verdict.state == "held"
    assert over.note == "over 3 of 9 pairs"
    assert over.paper == pytest.approx((56.69 - 51.03 + 53.99 - 49.19 + 56.52 - 51.76) / 3)


def test_a_claim_whose_arm_diverged_says_so(tmp_path, request8):
    for seed in (1, 2):
        folder = tmp_path / f"cls_fitnet_8_s{seed}"
        folder.mkdir()
        (folder / "diverged.json").write_text('{"key": "k", "message": "nan"}')
    shown = table(collected(request8, tmp_path, {}), [])
    verdicts = {trend.claim: trend.verdict.state for trend in shown.trends}
    assert verdicts["FitNet > scratch"] == "diverged"
    assert verdicts["hidden > logits, first rate"] == "not run"


def test_an_untrained_network_stands_below_the_width_that_it_has(tmp_path):
    (request,) = studies("table2", seeds=1)
    for width, floor in ((2, 0.7), (8, 0.5)):
        folder = tmp_path / f"cls_soft_{width}_s1"
        finished(folder, "k", {"pair_accuracy": [0.9, 0.9]})
        results = json.loads((folder / "results.json").read_text())
        results["untrained"] = {"pair_accuracy": floor}
        (folder / "results.json").write_text(json.dumps(results))
    shown = table(collected(request, tmp_path, {}), [])
    rows = {row.name: row for row in shown.blocks[1].rows}
    values = [cell.value for cell in rows["untrained network"].cells]
    assert values == [pytest.approx(70), None, pytest.approx(50)]


def test_students_without_a_teacher_are_trained_first_with_their_inputs():
    asked = studies("table3", seeds=1)
    found = stages_of(asked, runs_of(asked))
    first = controls(found.values())
    names = ["ali_pretrain_none", "ali_plain_none", "ali_scratch", "cls_control", "cls_scratch"]
    assert first == {f"{name}_8_s1" for name in names}
    ordered = pipeline.ordered({stage.name: stage for stage in found.values()}, first)
    assert {stage.name for stage in ordered[: len(first)]} == first


@pytest.mark.parametrize("name", ["systems", "resolutions"])
def test_packaged_studies_with_a_row_per_arm_build_their_runs(name):
    asked = studies(name, seeds=1)
    found = stages_of(asked, runs_of(asked))
    assert {run.arm for run in found} >= set(asked[0].rows)
    assert asked[0].teachers[0] == "teacher"
    arms = {at.arm for claim in asked[0].claims for at in (*claim.better, *claim.worse)}
    assert arms <= set(asked[0].students)
    assert {stage.config.seed for stage in found.values()} == {1}


def test_the_study_in_the_docs_loads_and_builds(tmp_path):
    text = (settings.RECIPES.parent.parent / "docs" / "studies.md").read_text(encoding="utf-8")
    (tmp_path / "targets.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    study = load(str(tmp_path / "targets.yaml"))
    names = {stage.name for stage in stages_of([study], runs_of([study])).values()}
    arms = ("teacher", "student", "longer", "soft", "hidden")
    assert names == {f"{arm}_s{seed}" for arm in arms for seed in (1, 2)}


STUDY = {
    "recipes": ".",
    "title": "soft target",
    "seeds": 2,
    "keys": {"data": {"identities": 9}},
    "arms": {
        "teacher": {},
        "student": {},
        "soft": {"recipe": "student", "teacher": "@teacher", "target": {"alpha": 1.0}},
    },
    "claims": [{"kind": "worse", "rows": [["E", "student < soft", "student", "soft"]]}],
}


def written(folder: Path, tree: object) -> str:
    for name, width in (("teacher", 16), ("student", 8)):
        recipe = {**TINY, "model.width": width, "optim.phases": [{"epochs": 1, "lr": 0.05}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings.nested(recipe)))
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    return str(folder / "mine.yaml")


def test_a_users_study_trains_and_ends_in_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "run_all", in_process())
    monkeypatch.setattr(campaign, "seconds_of", lambda *_: {})
    words = ["study", written(tmp_path, STUDY), "--run-dir", str(tmp_path / "runs"), "--jobs", "1"]
    assert main(words) == 0
    assert "6 runs in all, 0 finished before" in capsys.readouterr().out
    folder = tmp_path / "runs" / "tables"
    names = {file.name for file in folder.iterdir()}
    assert names == {
        f"mine{end}" for end in (".txt", ".md", ".csv", ".html", ".png", "-trends.csv")
    }
    with open(folder / "mine-trends.csv", newline="") as file:
        rows = {row["claim"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"student < soft, top-1"}
    results = {
        arm: [
            json.loads((tmp_path / "runs" / f"{arm}_s{seed}" / "results.json").read_text())
            for seed in (1, 2)
        ]
        for arm in ("student", "soft")
    }
    assert results["soft"][0]["data"]["classes"] == 9
    means = {arm: np.mean([r["metrics"]["top1"] for r in two]) for arm, two in results.items()}
    gain = 100 * (means["soft"] - means["student"])
    assert float(rows["student < soft, top-1"]["difference"]) == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": None}, "arms: expected a mapping of arms, or a list of recipes' names, got None"),
        ({"arm": {}}, "arm: unknown key; did you mean arms?"),
        ({"seeds": 0}, "seeds: expected a number, or a list of seeds, got 0"),
        ({"resolutions": [4]}, "expected a list of different whole numbers of at least 8"),
        ({"costs": "yes"}, "costs: expected true or false, got 'yes'"),
        ({"keys": {"data": {"identites": 3}}}, "unknown key 'data.identites'"),
        ({"arms": {"a": {"target": {"alfa": 1}}}}, "arms.a: unknown key 'target.alfa'"),
        ({"arms": {"a": {"seed": 1}}}, "arms.a: task is the recipe's, seed the study's"),
        ({"arms": {"a": 3}}, "arms.a: expected a mapping of keys, got 3"),
        ({"arms": {"a": {"recipe": 3}}}, "arms.a.recipe: expected text, got 3"),
        ({"arms": {"a": {}}, "claims": []}, "claims: expected a list that is not empty"),
        ({"claims": [{"rows": [["E", "x", "soft"]]}]}, "claims.0.rows.0: expected [CODE, CLAIM,"),
        ({"claims": [{"kind": "best"}]}, "kind: expected one of better, worse, neutral, at_least"),
        ({"claims": [{"rows": [["E", "x", "sofd", "soft"]]}]}, "got 'sofd'; did you mean soft?"),
        ({"claims": [{"rows": [["E", "x", "so ft", "soft"]]}]}, "expected a cell ARM, ARM/WIDTH"),
        ({"claims": [{"rows": [["E", "x", "soft/8", "soft"]]}]}, "expected a width of widths []"),
        ({"blocks": [{"title": "t"}]}, "blocks.0.columns: expected a list of texts, got nothing"),
        (
            {"blocks": [{"title": "t", "columns": ["c"], "metric": "top1", "lines": [["soft"]]}]},
            "blocks.0.lines.0: expected [NAME, KIND] and 1 cells, got ['soft']",
        ),
        ({"base": 3}, "base: expected a study file, got 3"),
        ({"metrics": ["top2"]}, "metrics: expected a list of top1, nn_top1,"),
        ({"claims": [{"metric": "top2", "rows": []}]}, "claims.0.metric: expected one of top1,"),
        ({"claims": [{"rows": [["E", "x", "soft", "soft"]]}]}, "two different cells, got 'soft'"),
        ({"runs": "../out"}, "runs: expected a name of letters, digits"),
        ({"arms": {"../x": {}}}, "arms.../x: expected a name of letters, digits"),
        ({"base": "mine.yaml"}, "base studies form a circle"),
    ],
)
def test_a_bad_study_names_file_key_and_what_was_expected(change, words, tmp_path, capsys):
    path = written(tmp_path, {**STUDY, **change})
    assert main(["study", path, "--run-dir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert path in told
    assert not (tmp_path / "runs").exists()


def test_an_arm_whose_keys_do_not_fit_is_rejected_before_anything_is_timed(tmp_path, capsys):
    arms = {**STUDY["arms"], "soft": {"recipe": "student", "target": {"alpha": 1.0}}}
    path = written(tmp_path, {**STUDY, "arms": arms})
    assert main(["study", path, "--run-dir", str(tmp_path / "runs")]) == 2
    assert re.search("soft_s.: target.alpha, .* need a teacher", capsys.readouterr().err)
    arms = {**STUDY["arms"], "soft": {"recipe": "student", "teacher": "@coach"}}
    path = written(tmp_path, {**STUDY, "arms": arms})
    assert main(["study", path]) == 2
    assert "soft: takes @coach, and there is no arm of that name" in capsys.readouterr().err


def test_an_unknown_study_names_the_nearest(capsys):
    assert main(["study", "tabel3"]) == 2
    assert "no study 'tabel3'; did you mean table3?" in capsys.readouterr().err
    assert main(["study", "nowhere.yaml"]) == 2
    assert "no study file nowhere.yaml" in capsys.readouterr().err
    assert main(["study"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names()


def test_arms_of_one_name_in_two_studies_must_be_the_same(tmp_path, capsys):
    one, other = written(tmp_path, STUDY), tmp_path / "other.yaml"
    arms = {name: {"recipe": "student"} for name in ("soft", "b")}
    claims = [{"rows": [["E", "x", "soft", "b"]]}]
    other.write_text(yaml.safe_dump({**STUDY, "arms": arms, "claims": claims}))
    assert main(["study", one, str(other), "--run-dir", str(tmp_path / "runs")]) == 2
    assert "mine and other have different arms soft; run one alone" in capsys.readouterr().err
