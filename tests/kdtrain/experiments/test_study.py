"""The tables of the paper as data: every cell has a run, runs come after their inputs, the paper's
numbers and differences are the paper's, and run folders become the right cells.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdtrain.config import ConfigError, settings
from kdtrain.experiments import pipeline
from kdtrain.experiments.campaign import controls, groups_of, stages_of
from kdtrain.experiments.collect import Collection, Result, table
from kdtrain.experiments.study import SCHEDULES, At, Run, Study, adjusted, load

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
    """A run folder as the engine leaves it, with these metrics at the ends of its phases."""
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
