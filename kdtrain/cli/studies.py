"""The commands that train many runs to answer a question: reproduce, compare, select-targets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from kdtrain.cli.arguments import (
    UsageError,
    add_jobs,
    command_parser,
    default_run_dir,
    ended,
    jobs_of,
    parse,
    take_stage_keys,
)
from kdtrain.config import settings
from kdtrain.config.program import PROGRAM
from kdtrain.config.settings import add_keys

TASKS = ("classification", "alignment", "verification")


def reproduce(argv: Sequence[str]) -> int:
    """Reproduce the tables of arXiv 1709.02929."""
    parser = command_parser(
        "reproduce",
        "table1|table2|table3|table4|table5|all ... [--section.key value ...]",
        "Train every cell of the tables of arXiv 1709.02929 with its controls, over several seeds, "
        "and write each table as text, CSV, HTML and PNG. The plan and its cost are printed first. "
        "Run again, it reuses finished runs and continues unfinished ones. Keys count for every "
        "run; --alignment.section.key value for the runs of one task, --second.section.key value "
        "for those on the second data source of table 2.",
    )
    parser.add_argument("tables", nargs="+", help="table1 ... table5, or all")
    parser.add_argument("--scale", type=str, help="preset of schedules and networks (two-cores)")
    parser.add_argument("--seeds", type=int, help="number of seeds, from --first-seed on (3)")
    parser.add_argument(
        "--first-seed", type=int, help="first seed (1: seed 0 is where schedules were chosen)"
    )
    parser.add_argument("--widths", type=str, help="divisions of the students' kernels (2,4,8)")
    parser.add_argument("--teachers", type=str, help="each: one a seed (default) | one: for all")
    parser.add_argument("--cache", type=str, help="teacher.cache of the students (float32)")
    _add_campaign(parser, "runs/tables-SCALE")
    options, common, special, command = _given(parser, "reproduce", argv, ["second", *TASKS])

    from kdtrain.experiments.tables import reproduce as tables
    from kdtrain.experiments.tables.stages import request_from

    request = request_from(options, common, special)
    root = Path(options.get("run_dir") or f"runs/tables-{Path(request.scale).name}")
    return ended(tables.main(request, root, **_campaign(options), command=command), command)


def _add_campaign(parser: ArgumentParser, root: str) -> None:
    """What the commands of campaign.py have in common, and the keys. root: default of --run-dir."""
    parser.add_argument("--budget", type=float, help="minutes on the clock; the rest is not run")
    parser.add_argument("--run-dir", type=str, help=f"root of the run folders ({root})")
    add_jobs(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    add_keys(parser)


def _given(
    parser: ArgumentParser, name: str, argv: Sequence[str], prefixes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], str]:
    """Options, keys of every run, those by prefix, and the command as it was given."""
    rest = list(argv)
    special = take_stage_keys(rest, prefixes)
    options, common = parse(parser, rest, prefixes)
    return options, common, special, shlex.join([*PROGRAM.split(), name, *argv])


def _campaign(options: dict[str, Any]) -> dict[str, Any]:
    """What `_add_campaign` added, as the commands' main functions take it. Raises UsageError."""
    budget = options.get("budget")
    if budget is not None and budget <= 0:
        raise UsageError(f"--budget: expected minutes, more than 0, got {budget}")
    dry_run = bool(options.get("dry_run"))
    return {"jobs": jobs_of(options), "budget_min": budget, "dry_run": dry_run}


def compare(argv: Sequence[str]) -> int:
    """Train several methods under one budget; one table and one picture."""
    parser = command_parser(
        "compare",
        "METHODS ... [--resolutions 24,16] [--section.key value ...] [--second.section.key value]",
        "Train several methods over the same seeds and pictures, with the teachers and students "
        "that they need, and write one table with floors and verdicts as text, Markdown, CSV, HTML "
        "and PNG. A method is a recipe in the folder, by its name, or a path of a recipe. The plan "
        "and its cost are printed first. Run again, it reuses finished runs and continues "
        "unfinished ones. Keys count for every run; --second.section.key value for those on a "
        "second data source.",
    )
    parser.add_argument("methods", nargs="+", help="names of recipes in the folder, or paths")
    parser.add_argument("--scale", type=str, help="preset that has the folder (two-cores)")
    parser.add_argument(
        "--folder", type=str, help="folder of recipes in the preset, or a path (systems)"
    )
    parser.add_argument("--seeds", type=int, help="every method trains seeds 1 to N (3)")
    parser.add_argument(
        "--resolutions", type=str, help="sides of the methods' input (the recipes' own), as 24,16"
    )
    _add_campaign(parser, "runs/compare-FOLDER")
    options, common, special, command = _given(parser, "compare", argv, ["second"])

    from kdtrain.experiments.comparison import compare as comparison
    from kdtrain.experiments.comparison.request import request_from

    request = request_from(options, common, special.get("second"))
    root = Path(options.get("run_dir") or f"runs/compare-{Path(request.folder).name}")
    return ended(comparison.main(request, root, **_campaign(options), command=command), command)


def select_targets(argv: Sequence[str]) -> int:
    """Measure which of the teacher's targets help a student; write that recipe."""
    from kdtrain.experiments.selection import CANDIDATES

    parser = command_parser(
        "select-targets",
        "RECIPE [--targets soft,hidden,logits] [--seeds N] [--section.key value ...]",
        "Train a student without targets and with each target alone, over the same seeds; keep the "
        "weights of those that help, set the others to 0, and write the recipe and the evidence. "
        "Pictures held out of the training split judge. Run again, it reuses finished runs and "
        "continues unfinished ones.",
    )
    parser.add_argument("recipe", help="recipe name, YAML file or run folder, with a teacher")
    parser.add_argument(
        "--targets",
        type=str,
        help=f"candidates: {', '.join(CANDIDATES)} "
        "(default: those with a weight, else soft,hidden)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="every arm trains seeds 1 to N (3)")
    parser.add_argument(
        "--keep-inconclusive",
        action="store_true",
        help="keep a target that neither helps nor hurts",
    )
    add_jobs(parser)
    parser.add_argument(
        "--run-dir", type=str, help="folder of the runs (default: runs/RECIPE-targets)"
    )
    parser.add_argument(
        "--out", type=str, help="the chosen recipe (default: selected.yaml in the run dir)"
    )
    parser.add_argument("--overwrite", action="store_true", help="train every run anew")
    add_keys(parser)
    options, overrides = parse(parser, argv)
    path = settings.recipe_path(options["recipe"])
    default = default_run_dir(options["recipe"], path)
    root = Path(options.get("run_dir") or default.with_name(f"{default.name}-targets"))
    out = Path(options.get("out") or root / "selected.yaml")
    if out.suffix not in (".yaml", ".yml") or out.resolve() == path.resolve():
        raise UsageError(f"--out: expected a .yaml file other than the recipe, got {out}")
    jobs = jobs_of(options)
    from kdtrain.experiments import select_targets as study

    words = (*PROGRAM.split(), "select-targets", *argv)
    command = shlex.join(word for word in words if word != "--overwrite")
    asked = study.plan(
        path, overrides, root, targets=options.get("targets"), seeds=options.get("seeds", 3)
    )
    status = study.run(
        asked,
        out,
        jobs=jobs,
        keep_inconclusive=bool(options.get("keep_inconclusive")),
        overwrite=bool(options.get("overwrite")),
        command=command,
    )
    return ended(status, command)
