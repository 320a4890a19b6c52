"""Makes the fixtures of test_fixtures.py: `python tests/kdtrain/make_fixtures.py [--render-only]`.

Trains tiny runs on synthetic faces for the reports, writes runs with seeded numbers for the tables,
the comparison and the selection of targets, and renders all of them. --render-only renders again
from the committed run directories: for a change of words or layout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# ruff: noqa: E402 - the imports need the folders of the package and of the tests
sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1, 2)]

from rendering import (
    FAILED,
    KEY,
    KINDS,
    RENDERED,
    RUNS,
    SELECTION_SEEDS,
    TARGETS,
    render,
    runs_of_comparison,
    runs_of_tables,
)
from tiny_runs import stop_after, tiny_config, train

from kdtrain.config import settings
from kdtrain.training.engine import Interrupted
from kdtrain.training.preparation import TrainingError

READ = (
    *("config.yaml", "results.json", "diverged.json", "metrics.jsonl", "samples.npz"),
    "items/phase1.npz",
)
"""The files of a run directory that a report reads."""
ENVIRONMENT = {
    "python": "3.12.0",
    "torch": "2.13.0",
    "numpy": "2.0.0",
    "kdkernels": "0.1.0",
    "simd": "v3",
    "threads": 1,
    "workers": 0,
    "device": "a processor",
}
DATA = {
    "name": "synthetic",
    "images": 400,
    "classes": 8,
    "train": 360,
    "validation": 0,
    "test": 40,
    "test_of_unseen_identities": 0,
    "skipped": 0,
}
ITEMS = 40
LOW_RATES = [{"epochs": 2, "lr": 0.02}, {"epochs": 1, "lr": 0.005}]
STUDENT = {"model__divide": 2}
DISTILLED = {"target__alpha": 1.0, "target__beta": 0.01}
CHAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "cls_teacher": ("classification", {}),
    "cls_student": ("classification", STUDENT),
    "cls_control": ("classification", {**STUDENT, "init_from": "@cls_student"}),
    "cls_distilled": ("classification", {**STUDENT, **DISTILLED, "init_from": "@cls_student",
                                         "teacher__run": "@cls_teacher"}),
    "cls_hint": ("classification", {**STUDENT, "target__gamma": 0.0, "target__hint": 0.1,
                                    "teacher__run": "@cls_teacher"}),
    "two_teachers": ("classification", {**STUDENT, "target__alpha": 1.0,
                                        "target__tau_squared": True,
                                        "teacher__run": "@cls_teacher",
                                        "teacher__more": ["@cls_control"],
                                        "teacher__weights": [2.0, 1.0],
                                        "data__validation_fraction": 0.3}),
    "cls_under_way": ("classification", STUDENT),
    "ali_teacher": ("alignment", {"init_from": "@cls_teacher"}),
    "ali_scratch": ("alignment", STUDENT),
    "ali_distilled": ("alignment", {**STUDENT, "init_from": "@cls_distilled",
                                    "target__beta": 0.01, "teacher__run": "@ali_teacher"}),
    "ver_teacher": ("verification", {"init_from": "@cls_teacher"}),
    "ver_scratch": ("verification", STUDENT),
    "ver_control": ("verification", {**STUDENT, "init_from": "@cls_student",
                                     "optim__phases": [{"epochs": 2, "lr": 1e30}]}),
    "ver_distilled": ("verification", {**STUDENT, **DISTILLED, "init_from": "@cls_distilled",
                                       "teacher__run": "@ver_teacher"}),
    "ver_cosine": ("verification", {**STUDENT, "triplet__weight": 0.0, "head__kind": "cosine",
                                    "head__margin": "cosface"}),
    "ali_control": ("alignment", {**STUDENT, "init_from": "@cls_control"}),
}  # fmt: skip
UNDER_WAY, DIVERGED, PLANNED = "cls_under_way", "ver_control", "ali_control"
# of 40 test images
RIGHT = {"teacher": 33, "student": 17, "soft": 29, "hidden": 12, "sh_kd": 26, "sh_teacher": 31}
DIVERGED_RUNS = ("cls_hidden_8_s1", "cls_hidden_8_s2", "cls_fitnet_8_s2")
UNFINISHED_RUNS = ("ver_triplet_distill_soft_8_s1", "ver_triplet_distill_soft_8_s2")
MISSING_RUNS = ("ver_joint_pretrain_hidden_8_s1", "ver_joint_pretrain_hidden_8_s2")
ARMS = {"none": 20, "soft": 29, "hidden": 12, "logits": 20, "attention": 27, "soft+attention": 30}


def main() -> None:
    """Make the run directories, unless they are to stay, and render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--only", choices=KINDS, help="render one kind")
    options = parser.parse_args()
    if not options.render_only:
        shutil.rmtree(RUNS, ignore_errors=True)
        make_chain(RUNS / "chain")
        make_tables(RUNS / "tables")
        make_comparison(RUNS / "comparison")
        make_selection(RUNS / "selection")
    for kind in [options.only] if options.only else KINDS:
        shutil.rmtree(RENDERED / kind, ignore_errors=True)
        render(kind, RENDERED / kind)


def make_chain(root: Path) -> None:
    """Train the chain and keep what a report reads, with fixed times and a fixed environment."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        for number, (name, (task, keys)) in enumerate(CHAIN.items()):
            config = tiny_config(task, **{"optim__phases": LOW_RATES, "seed": number, **keys})
            if name in (UNDER_WAY, DIVERGED, PLANNED):  # the table reads their tasks there
                (root / "recipes").mkdir(exist_ok=True, parents=True)
                (root / "recipes" / f"{name}.yaml").write_text(settings.to_yaml(config))
            if name == PLANNED:
                continue
            options = {"stop": stop_after(18)} if name == UNDER_WAY else {}
            with contextlib.suppress(Interrupted, TrainingError):
                train(config, Path(name), **options)
            copy_run(Path(name), root / name, seconds=62.0 + number)


def copy_run(run: Path, place: Path, *, seconds: float) -> None:
    """Copy what a report reads of a run directory."""
    place.mkdir(parents=True)
    for name in READ:
        path = run / name
        if not path.exists():
            continue
        if path.suffix == ".json":
            fixed = {"key": KEY, "seconds": seconds, "samples_per_s": 100.0, "wait_share": 0.0}
            fixed["environment"] = ENVIRONMENT
            values = json.loads(path.read_text())
            write_json(place / name, {k: fixed.get(k, value) for k, value in values.items()})
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                write_arrays(place / name, dict(arrays))
        else:
            shutil.copy(path, place / name)


def make_tables(root: Path) -> None:
    """Runs of tables 1 to 5 with seeded numbers; some diverged, unfinished, failed or missing."""
    for run in runs_of_tables():
        name, random = run.name, seeded(run.name)
        if name in (*MISSING_RUNS, FAILED):
            continue
        if name in DIVERGED_RUNS:
            write_diverged(root / name)
            continue
        if name in UNFINISHED_RUNS:
            write_json(root / name / "run.json", {"key": KEY})
            continue
        share = 0.25 + 0.6 * seeded(name.rpartition("_s")[0]).random()
        items = [phase_items(name, share - 0.1 + 0.1 * phase, random) for phase in range(2)]
        write_run(root / name, items)


def phase_items(name: str, share: float, random: np.random.Generator) -> dict[str, np.ndarray]:
    """The results per test image of a phase: images differ alike in every run."""
    hard = seeded("images").random(ITEMS)
    if "ali_" in name:
        noise = random.normal(0.0, 0.002, ITEMS)
        return {"nrmse": (0.02 + 0.04 * (1 - share) * (0.5 + hard) + noise).astype(np.float32)}
    right = (hard + random.normal(0.0, 0.05, ITEMS) < share).astype(np.float32)
    pairs = (hard + random.normal(0.0, 0.05, ITEMS) < share + 0.1).astype(np.float32)
    if "cls_" in name:
        return {"top1": right, "pair_accuracy": pairs}
    return {"nn_top1": right, "nn_top1_other_video": right * pairs}


def make_comparison(root: Path) -> None:
    """Runs of the compared methods with seeded numbers; one diverged."""
    for run in runs_of_comparison():
        if run.name == "hidden_s2":
            write_diverged(root / run.name)
            continue
        random = seeded(run.name)
        smaller = 6 if run.side is not None else 0
        hit = (np.arange(ITEMS) < RIGHT[run.method] + random.integers(4) - smaller).astype("f4")
        metrics = {"tar_at_far_0.01_all": float(hit.mean()) / 1.2}
        if run.method == "soft":
            metrics["asym_nn_top1"] = 0.25
        items = {"nn_top1": hit, "pair_accuracy": hit[::2]}
        write_run(root / run.name, [items], metrics)
        far = np.logspace(-3, -1, 12)
        scores = {"all_far": far, "all_tar": far ** (0.5 - float(hit.mean()) / 3)}
        np.savez_compressed(root / run.name / "samples.npz", **scores)


def make_selection(root: Path) -> None:
    """Arms of a selection of targets with seeded numbers, and the teacher's config."""
    (root / "teacher").mkdir(parents=True)
    teacher = settings.to_yaml(tiny_config(data__split_seed=5))
    (root / "teacher" / "config.yaml").write_text(teacher)
    write_json(root / "teacher" / "results.json", {"key": KEY})
    for seed in SELECTION_SEEDS:
        for arm, right in ARMS.items():
            hit = (np.arange(ITEMS) < right + (seed if arm == "logits" else 0)).astype(np.float32)
            items = {"top1": np.roll(hit, seed), "index": np.arange(ITEMS)}
            folder = root / "arms" / f"{arm}_s{seed}"
            write_arrays(folder / "items" / "validation_phase0.npz", items)
            results = {"key": KEY, "metric": {"name": "top1", "higher_is_better": True},
                       "validation": {"top1": float(hit.mean())}}  # fmt: skip
            write_json(folder / "results.json", results)
        missing = [name for name in TARGETS if name not in ARMS]
        for arm in missing:
            write_diverged(root / "arms" / f"{arm}_s{seed}")


def write_run(
    folder: Path,
    phases: list[dict[str, np.ndarray]],
    more: Mapping[str, float] | None = None,
) -> None:
    """A finished run: the mean of every array is the metric of that name."""
    shown = [
        {
            "metrics": {n: float(a.mean(dtype=np.float64)) for n, a in items.items()}
            | dict(more or {})
        }
        for items in phases
    ]
    names = shown[-1]["metrics"]
    floors = dict.fromkeys(names, 0.4) | {"nrmse": 0.055, "tar_at_far_0.01_all": 0.05}
    results = {
        "key": KEY,
        "metrics": names,
        "phases": shown,
        "floors": {name: floors[name] for name in names},
        "untrained": {name: floors[name] * (1.5 if name == "nrmse" else 0.7) for name in names},
        "parameters": {"student": 9876, "teacher": 129_494},
        "data": DATA,
        "seconds": 60.0,
        "environment": ENVIRONMENT,
    }
    write_json(folder / "results.json", results)
    for number, items in enumerate(phases):
        write_arrays(folder / "items" / f"phase{number}.npz", items)


def write_diverged(folder: Path) -> None:
    """A run that diverged."""
    write_json(folder / "diverged.json", {"key": KEY, "message": "loss term 'hard' is nan",
                                          "seconds": 5.0})  # fmt: skip


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file on one line, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A compressed .npz file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def seeded(name: str) -> np.random.Generator:
    """Random numbers that depend on a name alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


if __name__ == "__main__":
    main()
