"""The tables of the paper as data: every cell has a run, runs come after their inputs, the paper's
numbers and differences are the paper's, and run folders become the right cells.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdtrain.config import ConfigError, settings
from kdtrain.experiments.study import Result
from kdtrain.experiments.tables.paper import FULL, PARTS, WIDTHS, At, table_specs
from kdtrain.experiments.tables.reproduce import Collection, table
from kdtrain.experiments.tables.stages import (
    SCHEDULES,
    Request,
    RunOf,
    groups,
    schedules,
    stages,
)

ALL = tuple(table_specs())
SCALES = [f.parent.name for f in sorted(settings.RECIPES.glob(f"*/{SCHEDULES}"))]


def every_place(second: bool = True):
    for name, spec in table_specs(second=second).items():
        for block in spec.blocks:
            for line in block.lines:
                for at in line.places:
                    if at is not None:
                        yield name, block, line, at


def test_every_place_names_a_part_and_every_part_has_a_place():
    named = {at.part for *_, at in every_place()}
    assert named <= set(PARTS)
    unseen = {p.name for p in PARTS.values()} - named
    assert unseen == {"cls_hint"}  # a start alone


def test_whatever_a_claim_speaks_of_is_planned_with_its_table():
    for name, spec in table_specs().items():
        request = Request((name,), seeds=(1,))
        runs = {run for group in groups(request) for run in group.runs}
        for claim in spec.claims:
            for at in (*claim.better, *claim.worse):
                assert request.run_of(at, 1, claim.second) in runs, (name, claim.text)


def test_rows_have_a_place_for_each_column_and_claims_speak_of_cells():
    for name, spec in table_specs(second=True).items():
        for block in spec.blocks:
            for line in block.lines:
                assert len(line.places) == len(block.columns), (name, line.name)
        shown = {
            (at.part, at.width, at.phase)
            for block in spec.blocks
            for line in block.lines
            for at in line.places
            if at is not None
        }
        for claim in spec.claims:
            assert len(claim.better) == len(claim.worse)
            for at in (*claim.better, *claim.worse):
                if claim.text.endswith("the joint softmax lifts") and "triplet" in at.part:
                    continue  # in table 4
                assert (at.part, at.width, at.phase) in shown, (name, claim.text)


def test_the_papers_differences_are_what_its_text_says():
    found = {
        claim.text: sum(a.paper - b.paper for a, b in zip(claim.better, claim.worse, strict=True))
        for claim in table_specs()["table1"].claims
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
    seeds, widths = ((1, 2), (4, 8)) if scale == "two-cores" else ((1,), (8,))
    request = Request(ALL, scale, seeds=seeds, widths=widths, second={"data.synthetic_seed": 5},
                      common={"data.kind": "synthetic", "data.root": None})  # fmt: skip
    runs = [run for group in groups(request) for run in group.runs]
    assert len(runs) == len(set(runs))
    found = stages(runs, request)
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
    labels = [g.label for g in groups(Request(ALL, second={}))]
    assert labels[:4] == ["table3, 1/8", "table1, 1/8", "table4, 1/8", "table5, 1/8"]
    assert all("second" in label for label in labels[-3:])
    extra = labels.index("table1, 1/8, further rows")
    assert extra < labels.index("table4, 1/4")


def test_a_shared_teacher_is_one_run_for_every_seed():
    request = Request(("table3",), seeds=(1, 2, 3), shared_teachers=True)
    runs = [run for group in groups(request) for run in group.runs]
    teachers = {run for run in runs if PARTS[run.part].full_width}
    assert {run.seed for run in teachers} == {1}
    students = [s for s in stages(runs, request) if s.name.startswith("cls_distilled")]
    assert {s.config.teacher.run for s in students} == {"@cls_teacher_s1"}
    assert {s.config.init_from for s in students} == {f"@cls_scratch_8_s{k}" for k in (1, 2, 3)}


def test_keys_of_one_task_reach_its_runs_alone():
    request = Request(("table3",), "paper", seeds=(1,), common={"data.root": "casia"},
                      tasks={"alignment": {"data.root": "celeba"}})  # fmt: skip
    runs = [run for group in groups(request) for run in group.runs]
    for stage in stages(runs, request):
        alignment = stage.config.task == "alignment"
        assert stage.config.data.root == ("celeba" if alignment else "casia")


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean two-cores"):
        schedules("two-core")


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
def request8():
    return Request(("table1",), seeds=(1, 2))


def collected(request: Request, root: Path, keys: dict[str, str], **failures: str) -> Collection:
    runs = [run for group in groups(request) for run in group.runs]
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
    shown = table(table_specs()["table1"], collected(request8, tmp_path, {}), [])
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
    shown = table(table_specs()["table1"], collected(request8, tmp_path, {}), [])
    assert any("uninformative" in note and "45.0" in note for note in shown.notes)
    finished(tmp_path / "cls_teacher_s2", "k", {"top1": [0.9, 0.95]})
    shown = table(table_specs()["table1"], collected(request8, tmp_path, {}), [])
    assert not any("uninformative" in note for note in shown.notes)


def test_names_of_runs_tell_them_apart():
    request = Request(ALL, second={})
    runs = {request.run_of(At(p, FULL if PARTS[p].full_width else w), s, b)
            for p in PARTS for w in WIDTHS for s in (1, 2) for b in (False, True)}  # fmt: skip
    assert len({run.name for run in runs}) == len(runs)
    assert RunOf("cls_soft", 8, 1).name == "cls_soft_8_s1"
    assert RunOf("cls_teacher", FULL, 2, True).name == "b_cls_teacher_s2"


def test_claims_over_all_count_the_pairs_that_are_there_and_compare_them_with_the_paper(tmp_path):
    request = Request(("table4",), seeds=(1,))
    for start, top in (("pretrain", 0.0), ("distill", 1.0)):
        for target in ("none", "hidden", "soft"):
            scores = {"nn_top1": np.full((1, 50), top, np.float32)}
            finished(
                tmp_path / f"ver_triplet_{start}_{target}_8_s1", "k", {"nn_top1": [top]}, **scores
            )
    shown = table(table_specs()["table4"], collected(request, tmp_path, {}), [])
    (over,) = [t for t in shown.trends if t.claim == "over all: Distill beats Pretrain"]
    assert over.verdict.state == "held"
    assert over.note == "over 3 of 9 pairs"
    assert over.paper == pytest.approx((56.69 - 51.03 + 53.99 - 49.19 + 56.52 - 51.76) / 3)


def test_a_claim_whose_arm_diverged_says_so(tmp_path, request8):
    for seed in (1, 2):
        folder = tmp_path / f"cls_fitnet_8_s{seed}"
        folder.mkdir()
        (folder / "diverged.json").write_text('{"key": "k", "message": "nan"}')
    shown = table(table_specs()["table1"], collected(request8, tmp_path, {}), [])
    verdicts = {trend.claim: trend.verdict.state for trend in shown.trends}
    assert verdicts["FitNet > scratch"] == "diverged"
    assert verdicts["hidden > logits, first rate"] == "not run"


def test_an_untrained_network_stands_below_the_width_that_it_has(tmp_path):
    request = Request(("table2",), seeds=(1,))
    for width, floor in ((2, 0.7), (8, 0.5)):
        folder = tmp_path / f"cls_soft_{width}_s1"
        finished(folder, "k", {"pair_accuracy": [0.9, 0.9]})
        results = json.loads((folder / "results.json").read_text())
        results["untrained"] = {"pair_accuracy": floor}
        (folder / "results.json").write_text(json.dumps(results))
    shown = table(table_specs()["table2"], collected(request, tmp_path, {}), [])
    rows = {row.name: row for row in shown.blocks[1].rows}
    values = [cell.value for cell in rows["untrained network"].cells]
    assert values == [pytest.approx(70), None, pytest.approx(50)]
