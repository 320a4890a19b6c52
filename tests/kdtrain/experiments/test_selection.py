"""The choice of targets from handmade scores: every state, the check, table, CSV and recipe."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
from rich.console import Console
from tiny_runs import tiny_config

from kdtrain.config import settings
from kdtrain.experiments.selection import (
    HEADS,
    Arm,
    Selection,
    check,
    csv_text,
    judge,
    recipe_text,
    rows,
    table,
    text,
    write,
)

IMAGES = 200
SEEDS = (1, 2, 3)


def scores(share: float, seed: int) -> np.ndarray:
    """Right-or-wrong answers of which exactly `share` are right, nearly the same ones with every
    seed.
    """
    right = np.zeros(IMAGES)
    right[: round(share * IMAGES)] = 1
    return np.roll(right, seed)


def arm(name: str, *shares: float | None, weight: float = 1.0) -> Arm:
    """One seed for each share; None diverged."""
    measured = tuple(None if s is None else scores(s, n) for n, s in enumerate(shares))
    weights = {} if name == "none" else dict.fromkeys(name.split("+"), weight)
    images = range(IMAGES) if any(s is not None for s in shares) else ()
    return Arm(name, weights, measured, SEEDS[: len(shares)], images)


NONE = arm("none", 0.5, 0.5, 0.5)
HELPS = arm("soft", 0.7, 0.71, 0.69, weight=0.5)
HURTS = arm("hidden", 0.3, 0.31, 0.29)
LEVEL = arm("logits", 0.5, 0.51, 0.49)


@pytest.mark.parametrize(
    ("measured", "keep", "state", "weight"),
    [
        (HELPS, False, "held", 0.5),
        (HURTS, True, "reversed", 0.0),
        (LEVEL, False, "inconclusive", 0.0),
        (LEVEL, True, "inconclusive", 1.0),
        (arm("soft", 0.9, None, 0.9), True, "diverged", 0.0),
        (arm("soft", None, None, None), True, "diverged", 0.0),
    ],
)
def test_the_decision_follows_from_the_verdict(measured, keep, state, weight):
    judged = judge(measured, NONE, True, keep)
    assert judged.state == state
    assert judged.weight == weight


def test_the_gain_is_positive_where_less_error_is_better():
    judged = judge(HURTS, NONE, False)
    assert judged.state == "held"
    assert judged.verdict.difference == pytest.approx(20.0)
    assert judge(HELPS, NONE, False).state == "reversed"


def test_arms_without_a_common_image_are_refused():
    nothing = tuple(np.full(IMAGES, np.nan) for _ in SEEDS)
    unseen = dataclasses.replace(HELPS, scores=nothing)
    moved = dataclasses.replace(HELPS, images=range(1, IMAGES + 1))
    with pytest.raises(ValueError, match="soft and none were measured on different images"):
        judge(moved, NONE, True)
    with pytest.raises(ValueError, match="no image was measured in both soft and none"):
        judge(unseen, NONE, True)


def _selection(*arms: Arm, together: Arm | None = None, seeds: int = 3, **kept: bool) -> Selection:
    none = arm("none", *([0.5] * seeds))
    judged = [judge(a, none, True, **kept) for a in arms]
    checked = None if together is None else check(together, none, judged, True)
    return Selection("validation", "top1", True, none, judged, checked, ["so it is"], "the command")


def test_the_table_states_every_number_and_the_rule():
    selection = _selection(HELPS, HURTS, LEVEL)
    lines = text(selection).splitlines()
    assert "top1 % (higher is better), 200 images of the validation split" in lines[0]
    cells = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert cells["none"][1:] == ["50.0", "50.0", "50.0", "50.0", "±0.0"]
    soft = cells["soft"]
    assert soft[1:8] == ["0.5", "70.0", "71.0", "69.0", "70.0", "±1.0", "+20.00"]
    assert soft[-3:] == ["3/3", "held", "0.5"]
    assert float(soft[8]) < 20 < float(soft[10])
    assert cells["hidden"][-3:] == ["0/3", "reversed", "0"]
    assert cells["logits"][-2:] == ["inconclusive", "0"]
    told = " ".join(lines)
    assert "Chosen: target.alpha 0.5, target.beta 0, target.logits 0." in told
    assert "Note: so it is." in told
    assert "reversed (it hurts): 0; inconclusive: 0 too" in told
    assert "Check:" not in told
    assert lines[-1] == "Command: the command"


def test_a_narrow_terminal_shows_every_number():
    second, both = arm("hidden", 0.8, 0.8, 0.8), arm("soft+hidden", 0.6, 0.6, 0.6)
    selection = _selection(HELPS, second, LEVEL, together=both)
    stream = io.StringIO()
    Console(file=stream, width=80).print(table(selection))
    shown = stream.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join([*HEADS, *(" ".join(row) for row in rows(selection))]).split()
    assert Counter(words) - Counter(shown.split()) == Counter()


def test_helpful_targets_stay_together_even_where_the_check_warns():
    second = arm("hidden", 0.8, 0.8, 0.8)
    worse = _selection(HELPS, second, together=arm("soft+hidden", 0.6, 0.6, 0.6))
    assert [one.weight for one in worse.judged] == [0.5, 1.0]
    told = " ".join(text(worse).split())
    assert "Check: soft+hidden better than hidden alone: -20.00 points" in told
    assert "Warning: together they do worse than hidden alone." in told
    better = _selection(HELPS, second, together=arm("soft+hidden", 0.9, 0.9, 0.9))
    told = " ".join(text(better).split())
    assert "better than hidden alone: +10.00 points" in told
    assert "Warning" not in told
    lost = _selection(HELPS, second, together=arm("soft+hidden", 0.9, None, 0.9))
    told = " ".join(text(lost).split())
    assert "Check: soft+hidden better than hidden alone: diverged with seed 2." in told
    assert "Warning" in told
    assert [one.weight for one in lost.judged] == [0.5, 1.0]


def test_one_seed_is_told_as_a_weakness():
    selection = _selection(arm("soft", 0.7), seeds=1)
    assert "one seed, so the interval does not know" in text(selection)
    assert "one seed" not in text(_selection(HELPS))


def test_the_csv_holds_the_same_evidence_unrounded():
    selection = _selection(HELPS, arm("hidden", 0.8, None, 0.8), together=None)
    lines = list(csv.DictReader(io.StringIO(csv_text(selection))))
    assert [line["arm"] for line in lines] == ["none", "soft", "hidden"]
    none, soft, hidden = lines
    assert none["verdict"] == none["points"] == none["weight"] == ""
    assert [float(soft[f"seed_{n}"]) for n in SEEDS] == [70.0, 71.0, 69.0]
    assert float(soft["points"]) == pytest.approx(20.0)
    assert (soft["verdict"], soft["weight"], soft["agreeing"]) == ("held", "0.5", "3")
    assert (hidden["verdict"], hidden["weight"], hidden["seed_2"]) == ("diverged", "0", "")
    checked = _selection(
        HELPS, arm("hidden", 0.8, 0.8, 0.8), together=arm("soft+hidden", 0.9, 0.9, 0.9)
    )
    last = list(csv.DictReader(io.StringIO(csv_text(checked))))[-1]
    assert (last["arm"], last["verdict"], last["weight"]) == ("soft+hidden", "held", "")


def test_the_recipe_says_why_and_loads_as_it_was(tmp_path):
    selection = _selection(HELPS, HURTS)
    config = tiny_config(teacher="somewhere", target__alpha=0.5)
    write(selection, config, tmp_path, tmp_path / "new" / "chosen.yaml")
    chosen = tmp_path / "new" / "chosen.yaml"
    assert settings.build(settings.read_recipe(chosen)) == config
    comment = settings.head_comment(chosen)
    assert "Command: the command" in comment
    assert "+20.00" in comment
    assert chosen.read_text() == recipe_text(selection, config)
    assert (tmp_path / "select-targets.txt").read_text() == text(selection)
    assert (tmp_path / "select-targets.csv").read_text() == csv_text(selection)
