"""The commands that train many runs to answer a question: reproduce, compare, select-targets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from kdtrain.cli import arguments
from kdtrain.cli.arguments import UsageError, ended
from kdtrain.config import settings
from kdtrain.config.program import PROGRAM
from kdtrain.config.settings import add_keys

if TYPE_CHECKING:
    from kdtrain.experiments.campaign import Order

TASKS = ("classification", "alignment", "verification")


def reproduce(argv: Sequence[str]) -> int:
    """Reproduce the tables of arXiv 1709.02929."""
    parser = arguments.command_parser(
        "reproduce",
        "table1|table2|table3|table4|table5|all ... [--section.key value ...]",
        "Train every cell of the tables of arXiv 1709.02929 with its controls, over several seeds, "
        "and write each table as text, CSV, HTML and PNG. The plan and its cost are printed first. "
        "Run again, it reuses finished runs and continues unfinished ones. Keys count for every "
        "run; --alignment.section.key value for the runs of one task, --second.section.key value "
        "for those on the second data source of table 2.",
    )
    add = parser.add_argument
    add("tables", nargs="+", help="table1 ... table5, or all")
    add("--scale", type=str, help="preset of schedules and networks (two-cores)")
    add("--seeds", type=int, help="number of seeds, from --first-seed on (3)")
    add("--first-seed", type=int, help="first seed (1: seed 0 is where schedules were chosen)")
    add("--widths", type=str, help="divisions of the students' kernels (2,4,8)")
    add("--teachers", type=str, help="each: one a seed (default) | one: for all")
    add("--cache", type=str, help="teacher.cache of the students (float32)")
    _add_campaign(parser, "runs/tables-SCALE")
    options, common, special, command = _given(parser, "reproduce", argv, ["second", *TASKS])

    from kdtrain.experiments.tables import reproduce as tables
    from kdtrain.experiments.tables.stages import request_from

    request = request_from(options, common, special)
    order = _order(options, f"runs/tables-{Path(request.scale).name}", command)
    return ended(tables.main(request, order), command)


def _add_campaign(parser: ArgumentParser, root: str) -> None:
    """What the commands of campaign.py have in common, and the keys. root: default of --run-dir."""
    add = parser.add_argument
    add("--budget", type=float, help="minutes on the clock; the rest is not run")
    add("--run-dir", type=str, help=f"root of the run folders ({root})")
    arguments.add_jobs(parser)
    add("--dry-run", action="store_true", help="print the plan and train nothing")
    add_keys(parser)


def _given(
    parser: ArgumentParser, name: str, argv: Sequence[str], prefixes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], str]:
    """Options, keys of every run, those by prefix, and the command as it was given."""
    rest = list(argv)
    special = arguments.take_stage_keys(rest, prefixes)
    options, common = arguments.parse(parser, rest, prefixes)
    return options, common, special, shlex.join([*PROGRAM.split(), name, *argv])


def _order(options: dict[str, Any], root: str, command: str) -> Order:
    """What `_add_campaign` added, as the commands' main functions take it. Raises UsageError."""
    from kdtrain.experiments.campaign import Order

    budget = options.get("budget")
    if budget is not None and budget <= 0:
        raise UsageError(f"--budget: expected minutes, more than 0, got {budget}")
    place, dry_run = Path(options.get("run_dir") or root), bool(options.get("dry_run"))
    return Order(place, arguments.jobs_of(options), budget, command, dry_run)


def compare(argv: Sequence[str]) -> int:
    """Train several methods under one budget; one table and one image."""
    parser = arguments.command_parser(
        "compare",
        "METHODS ... [--resolutions 24,16] [--section.key value ...] [--second.section.key value]",
        "Train several methods over the same seeds and images, with the teachers and students "
        "that they need, and write one table with floors and verdicts as text, Markdown, CSV, HTML "
        "and PNG. A method is a recipe in the folder, by its name, or a path of a recipe. The plan "
        "and its cost are printed first. Run again, it reuses finished runs and continues "
        "unfinished ones. Keys count for every run; --second.section.key value for those on a "
        "second data source.",
    )
    add = parser.add_argument
    add("methods", nargs="+", help="names of recipes in the folder, or paths")
    add("--scale", type=str, help="preset that has the folder (two-cores)")
    add("--folder", type=str, help="folder of recipes in the preset, or a path (systems)")
    add("--seeds", type=int, help="every method trains seeds 1 to N (3)")
    add("--resolutions", type=str, help="sides of the methods' input (the recipes' own), as 24,16")
    _add_campaign(parser, "runs/compare-FOLDER")
    options, common, special, command = _given(parser, "compare", argv, ["second"])

    from kdtrain.experiments.comparison import compare as comparison
    from kdtrain.experiments.comparison.request import request_from

    request = request_from(options, common, special.get("second"))
    order = _order(options, f"runs/compare-{Path(request.folder).name}", command)
    return ended(comparison.main(request, order), command)


def select_targets(argv: Sequence[str]) -> int:
    """Measure which of the teacher's targets help a student; write that recipe."""
    from kdtrain.experiments.selection import CANDIDATES

    parser = arguments.command_parser(
        "select-targets",
        "RECIPE [--targets soft,hidden,logits] [--seeds N] [--section.key value ...]",
        "Train a student without targets and with each target alone, over the same seeds; keep the "
        "weights of those that help, set the others to 0, and write the recipe and the evidence. "
        "Images held out of the training split judge. Run again, it reuses finished runs and "
        "continues unfinished ones.",
    )
    add = parser.add_argument
    add("recipe", help="recipe name, YAML file or run folder, with a teacher")
    add(
        "--targets",
        type=str,
        help=f"candidates: {', '.join(CANDIDATES)} "
        "(default: those with a weight, else soft,hidden)",
    )
    add("--seeds", type=int, default=3, help="every arm trains seeds 1 to N (3)")
    add(
        "--keep-inconclusive",
        action="store_true",
        help="keep a target that neither helps nor hurts",
    )
    arguments.add_jobs(parser)
    add("--run-dir", type=str, help="folder of the runs (default: runs/RECIPE-targets)")
    add("--out", type=str, help="the chosen recipe (default: selected.yaml in the run dir)")
    add("--overwrite", action="store_true", help="train every run anew")
    add_keys(parser)
    options, overrides = arguments.parse(parser, argv)
    path = settings.recipe_path(options["recipe"])
    default = arguments.default_run_dir(options["recipe"], path)
    root = Path(options.get("run_dir") or default.with_name(f"{default.name}-targets"))
    out = Path(options.get("out") or root / "selected.yaml")
    if out.suffix not in (".yaml", ".yml") or out.resolve() == path.resolve():
        raise UsageError(f"--out: expected a .yaml file other than the recipe, got {out}")
    words = (*PROGRAM.split(), "select-targets", *argv)
    command = shlex.join(word for word in words if word != "--overwrite")
    order = _order(options, str(root), command)
    from kdtrain.experiments import select_targets as study

    targets, seeds = options.get("targets"), options.get("seeds", 3)
    asked = study.plan(path, overrides, root, targets=targets, seeds=seeds)
    keep, overwrite = bool(options.get("keep_inconclusive")), bool(options.get("overwrite"))
    status = study.run(asked, out, order, keep_inconclusive=keep, overwrite=overwrite)
    return ended(status, command)
