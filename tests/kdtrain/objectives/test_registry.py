"""The registry of targets: every place that speaks of targets knows every one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny_tasks import make_batch, make_config, make_teacher
from torch import nn

from kdtrain.config import TARGETS, TargetConfig
from kdtrain.experiments.select_targets import CANDIDATES
from kdtrain.models.network import Outputs
from kdtrain.objectives import registry
from kdtrain.objectives.registry import compared, losses_of, pairs_of
from kdtrain.objectives.targets import Guide, WidthMap
from kdtrain.objectives.tasks import build_task
from kdtrain.reports import runs


def test_every_target_has_its_mathematics_in_one_place():
    by_the_task = ["alpha", "teacher_head", "hint"]
    assert sorted([*registry.PAIRS, *registry.LOSSES, *by_the_task]) == sorted(TARGETS)
    for keys in registry.MAPS.values():
        assert set(keys) <= set(TARGETS)


@pytest.mark.parametrize("key", TARGETS)
def test_a_target_with_a_weight_is_a_term_of_the_step_under_its_name(key):
    gamma = 0.0 if TARGETS[key].alone else 1.0
    config = make_config("classification", **{key: 0.5, "gamma": gamma})
    task = build_task(config, 6, make_teacher())
    images, labels, _ = make_batch(1, 8)
    result = task.step(images, labels)
    assert TARGETS[key].name in result.terms
    without = [row.name for row in TARGETS.values() if row.key != key]
    assert not set(without) & set(result.terms)
    assert torch.isfinite(result.loss)


def test_select_targets_has_every_target_that_stands_beside_others():
    assert {row.key for row in CANDIDATES.values()} == set(TARGETS) - {"hint"}


@pytest.mark.parametrize("key", TARGETS)
def test_a_report_names_every_target_that_has_a_weight(key):
    gamma = 0.0 if TARGETS[key].alone else 1.0
    config = make_config("classification", **{key: 0.5, "gamma": gamma})
    stage = runs.Stage("run", Path(), dataclasses.asdict(config), {}, [], {})
    words = TARGETS[key].words.format_map(vars(config.target))
    assert f"0.5 {words}" in runs.loss_text(stage)


@pytest.mark.parametrize("key", TARGETS)
def test_the_documentation_has_every_target_with_its_published_weight(key):
    rows = re.findall(r"^\| `target\.(\w+)` \|.*", (ROOT / "docs/targets.md").read_text(), re.M)
    lines = (ROOT / "docs/targets.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith(f"| `target.{key}` |"))
    assert rows.count(key) == 1
    weight = row.split("|")[3]
    assert f"{TARGETS[key].published:g}" in re.findall(r"\d+(?:\.\d+)?", weight)


def test_hidden_and_logit_pairs_carry_their_weights():
    student = Outputs(torch.randn(3, 8), torch.randn(3, 5), None)
    teacher = Guide(logits=torch.randn(3, 5), hidden=torch.randn(3, 8))
    target = TargetConfig(beta=2.0, logits=0.5, hidden_reduction="mean", logits_reduction="sum")
    extra = nn.ModuleDict({"hidden": WidthMap("hidden", ("beta",), 8, 8, target)})
    step = compared(student, teacher, extra, target)
    pairs = pairs_of(step)
    assert [(p.name, p.weight, p.reduction) for p in pairs] == [
        ("hidden", 2.0, "mean"),
        ("logits", 0.5, "sum"),
    ]
    assert pairs[0].student is student.hidden
    assert pairs[1].teacher is teacher.logits
    assert losses_of(step) is None
