"""The commands of `python -m kdtrain`.

Exit status: 0 done; 1 the run cannot go on (one line with the reason); 2 wrong usage; 130
interrupted, can be resumed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdtrain.cli import studies
from kdtrain.cli.arguments import (
    UsageError,
    add_dry_run,
    add_jobs,
    check_dry_run,
    command_parser,
    default_run_dir,
    ended,
    jobs_of,
    parse,
    take_stage_keys,
    value_of,
)
from kdtrain.config import ConfigError, DataConfig, settings
from kdtrain.config.program import INTERRUPTED, PROGRAM, printable, signals_heard, told_to_stop
from kdtrain.config.settings import add_keys, nearest

if TYPE_CHECKING:
    from kdtrain.data import FaceSource


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with signals_heard():
                status = _command(argv)
        except SystemExit as end:  # --help; or rich, when its output is closed
            if isinstance(end.__context__, BrokenPipeError):
                raise end.__context__ from None
            status = int(end.code or 0)
        print(end="", flush=True)  # nothing to flush where stdout was closed at the start
    except BrokenPipeError:  # the exit status of SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _command(argv: list[str]) -> int:
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(_version())
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UsageError(f"no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except (UsageError, ConfigError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        name = f"{argv[0]} " if argv[0] in COMMANDS else ""
        print(f"see {PROGRAM} {name}--help", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        text = printable(" ".join(str(error).split())) or type(error).__name__
        if os.environ.get("KDTRAIN_TRACEBACK"):
            traceback.print_exc()
        elif not _is_ours(error):
            # an error without its cause in the message: show the line that raised it
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}; KDTRAIN_TRACEBACK=1 shows all"
            text = f"{type(error).__name__}: {text} ({where})"
        print(f"error: {text}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Exception) as error:
        # an import that a signal interrupts may raise another error
        if not (told_to_stop() or isinstance(error, KeyboardInterrupt)):
            raise
        # before any run was begun: --overwrite is still to be carried out
        return ended(INTERRUPTED, shlex.join([*PROGRAM.split(), *argv]))


def train(argv: Sequence[str]) -> int:
    """Train one run."""
    parser = command_parser(
        "train",
        "RECIPE [--KEY VALUE ...]",
        "Train one run.",
        "train demo/cls_student --optim.batch_size 128",
        "train my.yaml --run-dir runs/mine --dry-run",
    )
    parser.add_argument("recipe", help="name (see `recipes`), YAML file or run directory")
    add = parser.add_argument
    add("--run-dir", type=str, metavar="DIR", help="run directory (default: runs/RECIPE)")
    add("--resume", action="store_true", help="resume the unfinished run")
    add("--overwrite", action="store_true", help="delete the run in the run directory")
    add_dry_run(parser, "print config, size and time; train nothing")
    add_keys(parser)
    options, overrides = parse(parser, argv)
    check_dry_run(options)
    path = settings.recipe_path(options["recipe"])
    config = settings.build({**settings.read_recipe(path), **overrides})
    run_dir = Path(options.get("run_dir") or default_run_dir(options["recipe"], path))
    if options.get("dry_run"):
        from kdtrain.experiments import dryrun

        return dryrun.show_run(config, run_dir, path.parent, options)
    if options.get("resume") and options.get("overwrite"):
        raise UsageError("--resume and --overwrite exclude each other")
    resume, overwrite = bool(options.get("resume")), bool(options.get("overwrite"))

    from kdtrain.training import engine
    from kdtrain.training.journal.journal import Screen, number

    before = 0 if resume else _written(run_dir)
    screen = Screen(run_dir.name)
    try:
        results = engine.train(config, run_dir, resume=resume, overwrite=overwrite, screen=screen)
    except KeyboardInterrupt:
        screen.close()
        begun = _written(run_dir) != before  # else a run there is an earlier one
        words = [str(run_dir), "--resume"] if begun else argv
        return ended(INTERRUPTED, shlex.join([*PROGRAM.split(), "train", *words]))
    finally:
        screen.close()
    if results["status"] == "reused":
        name = results["metric"]["name"]
        reused = f"reused: {name} {number(name, results['metrics'].get(name))}"
        print(printable(f"{run_dir}: already finished, {reused} (--overwrite trains it again)"))
        return 0
    _print_results(results, f"{run_dir}: finished")
    return 0


def evaluate_run(argv: Sequence[str]) -> int:
    """Evaluate a trained run."""
    parser = command_parser(
        "eval",
        "RUN [--gallery RUN] [--KEY VALUE ...]",
        "Evaluate the network of a run on its test split, or on other images given by keys.",
        "eval runs/demo/cls_distilled/best",
        "eval runs/demo/ver_distilled --data.kind folder --data.root photos",
    )
    parser.add_argument("run", help="run directory, or its best/")
    parser.add_argument("--gallery", type=str, metavar="RUN", help="short for --eval.gallery")
    add_keys(parser)
    options, overrides = parse(parser, argv)
    if options.get("gallery") is not None:
        overrides["eval.gallery"] = options["gallery"]
    from kdtrain.training import checkpoint, engine

    run = Path(options["run"])
    recipe = checkpoint.run_of(run) / "config.yaml"
    if not recipe.is_file():
        raise UsageError(f"{run}: no run directory (no config.yaml there)")
    config = settings.build({**settings.read_recipe(recipe), **overrides})
    results = engine.evaluate(config, run)
    _print_results(results, f"{run}: test split of {config.data.kind}")
    for line in results["data"]["notes"]:
        print(printable(f"  note: {line}"))
    if results["warning"]:
        print(printable(f"  warning: {run} {results['warning']}"))
    trained, found = results["trained_classes"], results["data"]["classes"]
    if trained != found:
        print(
            f"  without the metrics of the classifier, which has {trained} identities: these "
            f"images have {found}"
        )
    return 0


def pipeline(argv: Sequence[str]) -> int:
    """Train all stages of a preset, on synthetic faces or your images."""
    return _pipeline("pipeline", argv, "two-cores")


def demo(argv: Sequence[str]) -> int:
    """Train all stages on few synthetic faces, in minutes."""
    return _pipeline("demo", argv, "demo")


def data(argv: Sequence[str]) -> int:
    """Show the images of a recipe: counts, split, floors, a grid."""
    parser = command_parser(
        "data",
        "[RECIPE] [--grid FILE.png] [--KEY VALUE ...]",
        "Count the images, identities and splits of a recipe, and measure the floors: scores of a "
        "method that learns nothing.",
        "data --data.kind folder --data.root photos --grid faces.png",
    )
    parser.add_argument("recipe", nargs="?", help="recipe (default: two-cores/cls_teacher)")
    parser.add_argument("--grid", type=str, metavar="FILE", help="write a grid of images (PNG)")
    add_keys(parser)
    options, overrides = parse(parser, argv)
    recipe = settings.recipe_path(options.get("recipe") or "two-cores/cls_teacher")
    config = settings.build({**settings.read_recipe(recipe), **overrides})
    from kdtrain.cli import inspection

    inspection.show(config, Path(options["grid"]) if "grid" in options else None)
    return 0


def import_weights(argv: Sequence[str]) -> int:
    """Write published weights as a run directory."""
    from kdtrain.config.networks import NAMES
    from kdtrain.models.published.layouts import PREFIXES
    from kdtrain.training.published.import_weights import SCALE, write_run

    parser = command_parser(
        "import",
        "WEIGHTS --layout LAYOUT --out RUN [--name NAME] [--head FILE]",
        "Write the published weights of a face network as a run directory for --teacher, "
        "--init_from or --head.run. Every name and shape is checked.",
        "import backbone.pth --layout arcface_torch --out runs/r50",
    )
    add = parser.add_argument
    add("weights", help="file of the project: .pt, .pth, .ckpt or .safetensors")
    layouts = Literal[tuple(PREFIXES)]
    add("--layout", type=layouts, required=True, metavar="LAYOUT", help=", ".join(PREFIXES))
    add("--out", type=str, required=True, metavar="RUN", help="run directory to write")
    name = "network, to be checked (default: the one that fits)"
    add("--name", type=Literal[NAMES], metavar="NAME", help=name)
    head = "file of the classifier, or one of its shards (default: adaface's own, else none)"
    add("--head", type=str, metavar="FILE", help=head)
    add("--classes", type=int, metavar="N", help="identities, where the last rows are padding")
    add("--scale", type=float, metavar="X", help=f"scale of the cosines (default {SCALE:g})")
    color = "order of the color channels (default: as published)"
    add("--color", type=Literal["rgb", "bgr"], metavar="rgb|bgr", help=color)
    options, _ = parse(parser, argv)
    for line in write_run(
        Path(options["weights"]),
        options["layout"],
        Path(options["out"]),
        name=options.get("name"),
        head=Path(options["head"]) if options.get("head") else None,
        classes=options.get("classes"),
        scale=options.get("scale") or SCALE,
        color=options.get("color"),
    ):
        print(printable(line))
    return 0


def recipes(argv: Sequence[str]) -> int:
    """List the packaged recipes."""
    parser = command_parser(
        "recipes",
        "[FILTER] [-v]",
        "List the packaged recipes: name, content, result. Numbers with ± are over seeds. A number "
        "of one seed may differ by up to ten points on another processor.",
        "recipes two-cores/systems",
        "recipes demo/cls -v",
    )
    parser.add_argument("filter", nargs="?", help="text that the names contain")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the whole comments")
    options, _ = parse(parser, argv)
    wanted, names = options.get("filter") or "", settings.recipe_names()
    found = sorted(name.rpartition("/")[::2] for name in names if wanted in name)
    if not found:
        raise UsageError(f"no recipe's name contains {wanted!r}; {nearest(wanted, names)}")
    width = shutil.get_terminal_size((160, 24)).columns
    for folder, members in itertools.groupby(found, lambda place: place[0]):
        rows = [_recipe(folder, name) for _, name in members]
        if options.get("verbose"):
            for name, *_, comment in rows:
                print(f"{folder}/{name}\n{textwrap.indent(comment, '    ')}")
            continue
        names, results = (max(len(row[place]) for row in rows) for place in (0, 2))
        room = max(20, width - names - results - 6)
        print(folder)
        for name, about, result, _ in rows:
            about = textwrap.shorten(about, room, placeholder="...")
            print(f"  {name:{names}}  {about:{room}}  {result}".rstrip()[:width])
    return 0


def _recipe(folder: str, name: str) -> tuple[str, str, str, str]:
    """Name, content, result and the whole comment of a recipe."""
    comment = settings.head_comment(settings.recipe_path(f"{folder}/{name}"))
    about, _, rest = comment.partition("Command:")
    result = re.sub(r" \(.*?\)|: docs.*", "", rest.partition("Result:")[2].splitlines()[0]).strip()
    result = "" if result.startswith(("not run", "part of")) else result
    return name, about.splitlines()[0].rstrip("."), result, comment


def report(argv: Sequence[str]) -> int:
    """Write report.html for a directory of runs."""
    parser = command_parser(
        "report", "ROOT", "Write ROOT/report.html from the runs below ROOT.", "report runs/demo"
    )
    parser.add_argument("root", help="directory of run directories, such as runs/demo")
    options, _ = parse(parser, argv)
    from kdtrain.reports.report import report as write_report

    print(printable(str(write_report(Path(options["root"])))))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate_run,
    "pipeline": pipeline,
    "study": studies.study,
    "reproduce": studies.reproduce,
    "compare": studies.compare,
    "select-targets": studies.select_targets,
    "import": import_weights,
    "data": data,
    "recipes": recipes,
    "report": report,
}


def _pipeline(command: str, argv: Sequence[str], preset: str) -> int:
    parser = command_parser(
        command,
        "[--KEY VALUE ...] [--STAGE.KEY VALUE ...]",
        "Train every stage of a preset, then write a table and report.html. Run again, it reuses "
        "finished stages and resumes unfinished ones. --KEY sets all stages, --STAGE.KEY one.",
        f"{command} --jobs 2 --data.kind folder --data.root photos",
        f"{command} --cls_teacher.optim.batch_size 32 --dry-run",
    )
    add = parser.add_argument
    if command == "pipeline":
        names = ", ".join(settings.preset_names())
        add("--preset", type=str, default=preset, help=f"{names}, or a directory of recipes")
    add("--run-dir", type=str, metavar="DIR", help=f"root of the runs (runs/{preset})")
    add_jobs(parser, "stages")
    add("--divide", type=int, metavar="N", help="model.divide of the students: 2, 4 or 8")
    add("--resume", action="store_true", help="resume, which is the default")
    add("--overwrite", action="store_true", help="train every stage again")
    add_dry_run(parser, "print stages, sizes and times; train nothing")
    add_keys(parser)
    again = shlex.join(a for a in (*PROGRAM.split(), command, *argv) if a != "--overwrite")
    argv = list(argv)
    chosen = value_of(argv, "--preset") if command == "pipeline" else None
    preset = chosen or preset
    from kdtrain.experiments import pipeline as chain

    stage_names = [f.stem for f in chain.stage_files(preset)]
    special = take_stage_keys(argv, stage_names)
    options, common = parse(parser, argv, stage_names)
    jobs = jobs_of(options)
    check_dry_run(options)
    stages = chain.plan(preset, common, special, options.get("divide"))
    root = Path(options.get("run_dir") or f"runs/{Path(preset).name}")
    sources: dict[DataConfig, FaceSource] = {}
    if lost := chain.without_landmarks(stages, sources):
        stages = [stage for stage in stages if stage.name not in lost]
        line = f"omitted, as {chain.NO_LANDMARKS}: {', '.join(lost)}"
        if not stages:
            raise ConfigError(f"every stage is {line}")
        print(f"# {line}" if options.get("dry_run") else line, flush=True)
    if options.get("dry_run"):
        from kdtrain.experiments import dryrun

        return dryrun.show_stages(stages, root, jobs, options)
    overwrite = bool(options.get("overwrite"))
    status, outcomes = chain.run(stages, root, jobs=jobs, overwrite=overwrite, sources=sources)
    if status == INTERRUPTED:
        return ended(status, again)
    chain.finish(root, outcomes)
    for name, outcome in outcomes.items():
        if outcome.state in ("failed", "diverged", "skipped"):
            print(printable(f"error: {name} {outcome.state}: {outcome.note}"), file=sys.stderr)
    return status


def _written(run_dir: Path) -> int:
    """Time at which the run in a directory began; 0 without one."""
    try:
        return (run_dir / "config.yaml").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _print_results(results: dict[str, Any], title: str) -> None:
    from kdtrain.training.journal.journal import number

    print(printable(title))
    pairs = results["metrics"].get("pairs")
    drawn = f"   ({pairs:,} pairs drawn from this test split)" if pairs else ""
    for name, value in results["metrics"].items():
        known = {"floor": results["floors"].get(name), "untrained": results["untrained"].get(name)}
        # counts are equal in all three
        beside = [f"{k} {number(name, v)}" for k, v in known.items() if v not in (None, value)]
        shown = f"   ({', '.join(beside)})" if beside else ""
        shown += drawn if name == "pair_accuracy" else ""
        print(f"  {name:24} {number(name, value):>9}{shown}")


def _is_ours(error: BaseException) -> bool:
    """True for errors with a message for users: our classes, OSError, and ValueError of ours."""
    if type(error).__module__.startswith("kdtrain"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = f"{os.sep}kdtrain{os.sep}" in frames[-1].filename if frames else False
    return isinstance(error, OSError) or (isinstance(error, ValueError) and raised_here)


def _overview() -> str:
    text = argparse.HelpFormatter(PROGRAM)
    text.add_text(f"usage: {PROGRAM} COMMAND ...")
    text.start_section("commands")
    text.add_arguments(
        [
            argparse.Action([name], "", nargs=0, help=(command.__doc__ or "").splitlines()[0])
            for name, command in COMMANDS.items()
        ]
    )
    text.end_section()
    text.add_text(f"{PROGRAM} help COMMAND shows the options of a command, --version the version.")
    return text.format_help().rstrip()


def _version() -> str:
    """Versions of the package and of torch, and the commit of a checkout."""
    torch = importlib.metadata.version("torch")
    root = Path(__file__).parents[2]
    commit = ""
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        commit = f", commit {found.strip()}" if found else ""
    return f"kdtrain {importlib.metadata.version('kdkernels')}, torch {torch}{commit}"
