"""The commands of many runs: study, and its short spellings reproduce, compare, select-targets."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from kdtrain.cli import arguments
from kdtrain.cli.arguments import UsageError, ended
from kdtrain.config import ConfigError, settings
from kdtrain.config.program import PROGRAM
from kdtrain.config.settings import add_keys

if TYPE_CHECKING:
    from kdtrain.experiments.campaign import Order
    from kdtrain.experiments.study import Study

TASKS = ("classification", "alignment", "verification")
# In this order `reproduce` spends a budget: table 3 costs least, table 2 most.
TABLES = ("table3", "table1", "table4", "table5", "table2")


def study(argv: Sequence[str]) -> int:
    """Train the arms of a study over seeds; without a name, list."""
    parser = arguments.command_parser(
        "study",
        "[NAME|FILE.yaml ...] [--KEY VALUE ...]",
        "Train the arms of studies over several seeds and write a table with verdicts.",
        "study table3 --budget 60",
        "study my.yaml --seeds 2 --dry-run",
    )
    parser.add_argument("studies", nargs="*", help="packaged studies, or YAML files")
    _add_options(parser)
    options, common, special, command = _given(parser, "study", argv)
    from kdtrain.experiments import study_file as found

    if not options.get("studies"):
        for name in found.names():
            head = settings.head_comment(found.path_of(name)).partition("\n")[0]
            print(f"{name:12} {head}")
        return 0
    studies = [found.load(name) for name in dict.fromkeys(options["studies"])]
    return _run(studies, options, common, special, command)


def reproduce(argv: Sequence[str]) -> int:
    """Reproduce the tables of arXiv 1709.02929."""
    parser = arguments.command_parser(
        "reproduce",
        "table1|...|table5|all ... [--KEY VALUE ...]",
        "Train every cell of the tables of arXiv 1709.02929, and write the tables.",
        "reproduce table3 --scale demo --alignment.data.root photos",
    )
    parser.add_argument("tables", nargs="+", help="table1 ... table5, or all")
    _add_options(parser)
    options, common, special, command = _given(parser, "reproduce", argv)
    from kdtrain.experiments.study_file import load

    for name in options["tables"]:
        if name not in (*TABLES, "all"):
            raise ConfigError(f"no table {name!r}; {settings.nearest(name, [*TABLES, 'all'])}")
    chosen = [n for n in TABLES if n in options["tables"] or "all" in options["tables"]]
    return _run([load(name) for name in chosen], options, common, special, command)


def compare(argv: Sequence[str]) -> int:
    """Train several recipes; one table, a row per recipe."""
    parser = arguments.command_parser(
        "compare",
        "METHODS ... [--KEY VALUE ...]",
        "Train recipes over the same seeds and write one table with costs and verdicts.",
        "compare student soft th_kd --jobs 2",
    )
    parser.add_argument("methods", nargs="+", help="names of recipes in the folder, or paths")
    parser.add_argument("--folder", type=str, help="folder of recipes in the preset, or a path")
    _add_options(parser)
    options, common, special, command = _given(parser, "compare", argv)
    from kdtrain.experiments.study_file import comparison

    scale, folder = options.pop("scale", "two-cores"), options.get("folder", "systems")
    found = comparison(options["methods"], scale, folder)
    return _run([found], options, common, special, command)


def _add_options(parser: ArgumentParser) -> None:
    """Add the options of every study, and the keys."""
    add = parser.add_argument
    add("--scale", type=str, metavar="DIR", help="preset or folder of the recipes")
    add("--seeds", type=int, metavar="N", help="number of seeds (3)")
    add("--first-seed", type=int, metavar="N", help="first seed (1)")
    add("--widths", type=str, metavar="N,N", help="divisions of the kernels, as 8,4")
    add("--resolutions", type=str, metavar="N,N", help="input sizes, as 24,16")
    add("--teachers", type=str, metavar="each|one", help="teachers of each seed, or of the first")
    add("--budget", type=float, metavar="MINUTES", help="time on the clock")
    add("--run-dir", type=str, metavar="DIR", help="root of the run directories")
    arguments.add_jobs(parser)
    add("--dry-run", action="store_true", help="print the plan; train nothing")
    add_keys(parser)


def _given(
    parser: ArgumentParser, name: str, argv: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]], str]:
    """Options, keys of every run, those by prefix, and the command as it was given."""
    rest, prefixes = list(argv), ["second", *TASKS]
    special = arguments.take_stage_keys(rest, prefixes)
    options, common = arguments.parse(parser, rest, prefixes)
    return options, common, special, shlex.join([*PROGRAM.split(), name, *argv])


def _run(
    studies: Sequence[Study],
    options: dict[str, Any],
    common: dict[str, Any],
    special: dict[str, dict[str, Any]],
    command: str,
) -> int:
    """Run studies with the options of `_add_options` and the keys of a command line."""
    from kdtrain.experiments import engine
    from kdtrain.experiments.study_file import adjusted, load, names

    studies = adjusted(studies, options, common, special)
    roots = {str(study.root) for study in studies}
    if len(roots) > 1 and not options.get("run_dir"):
        raise UsageError(f"--run-dir: expected one for studies of {' and '.join(sorted(roots))}")
    order = _order(options, min(roots), command)
    word, taken = studies[0].runs, [study.name for study in studies]
    others = [load(name) for name in names() if word and name not in taken]
    options.pop("widths", None)
    others = [one for one in others if one.runs == word and bool(one.blocks)]
    beside = adjusted([*studies, *others], options, common, special)[len(studies) :]
    return ended(engine.run(studies, order, beside), command)


def _order(options: dict[str, Any], root: str, command: str) -> Order:
    """The options --budget, --run-dir, --jobs, --dry-run and --overwrite. Raises UsageError."""
    from kdtrain.experiments.campaign import Order

    budget = options.get("budget")
    if budget is not None and budget <= 0:
        raise UsageError(f"--budget: expected minutes, more than 0, got {budget}")
    place = Path(options.get("run_dir") or root)
    dry_run, overwrite = bool(options.get("dry_run")), bool(options.get("overwrite"))
    return Order(place, arguments.jobs_of(options), budget, command, dry_run, overwrite)


def select_targets(argv: Sequence[str]) -> int:
    """Measure which of the teacher's targets help a student; write that recipe."""
    parser = arguments.command_parser(
        "select-targets",
        "RECIPE [--KEY VALUE ...]",
        "Train a student without targets and with each alone; keep those that help.",
        "select-targets demo/cls_distilled --seeds 3",
    )
    add = parser.add_argument
    add("recipe", help="name, YAML file or run directory, with a teacher")
    add("--targets", type=str, metavar="NAMES", help="candidates (the weighted; or soft,hidden)")
    add("--seeds", type=int, default=3, metavar="N", help="number of seeds (3)")
    add("--keep-inconclusive", action="store_true", help="keep a target without a verdict too")
    arguments.add_jobs(parser)
    add("--run-dir", type=str, metavar="DIR", help="default: runs/RECIPE-targets")
    add("--out", type=str, metavar="FILE", help="chosen recipe (RUN-DIR/selected.yaml)")
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
    from kdtrain.experiments import select_targets as selecting

    targets, seeds = options.get("targets"), options.get("seeds", 3)
    selection = selecting.plan(path, overrides, root, targets=targets, seeds=seeds)
    keep = bool(options.get("keep_inconclusive"))
    return ended(selecting.run(selection, out, order, keep_inconclusive=keep), command)
