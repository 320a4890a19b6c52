"""The commands: demo, train, eval, pipeline, reproduce, compare, select-targets, import, data,
recipes, report.

Exit status: 0 done; 1 the run could not go on (one line says why); 2 wrong usage; 130 interrupted,
to be continued.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a name's characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with signals_heard():
                status = _command(argv)
        except SystemExit as end:  # --help; or rich, where nobody reads its output
            if isinstance(end.__context__, BrokenPipeError):
                raise end.__context__ from None
            status = int(end.code or 0)
        sys.stdout.flush()
    except BrokenPipeError:  # as a command that SIGPIPE ends, and nothing is left to be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
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
        if os.environ.get("KDTRAIN_TRACEBACK"):
            traceback.print_exc()
        elif not _is_ours(error):
            # not one of the errors that name their cause: keep where it came from
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f" ({Path(last.filename).name}:{last.lineno}; KDTRAIN_TRACEBACK=1 shows all)"
            print(f"error: {type(error).__name__}: {_line(error)}{where}", file=sys.stderr)
            return 1
        print(f"error: {_line(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Exception) as error:
        # an import that a signal cuts short may raise something else
        if not (told_to_stop() or isinstance(error, KeyboardInterrupt)):
            raise
        words = [word for word in argv if word != "--overwrite"]
        return ended(INTERRUPTED, shlex.join([*PROGRAM.split(), *words]))


def train(argv: Sequence[str]) -> int:
    """Train one run."""
    parser = command_parser(
        "train",
        "RECIPE [--section.key value ...]",
        "Train one run from a recipe. RECIPE: a name (see `recipes`), a YAML file, or a run "
        "folder, whose config.yaml is then the recipe.",
    )
    parser.add_argument("recipe", help="recipe name, YAML file or run folder")
    parser.add_argument("--run-dir", type=str, help="run folder (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the unfinished run in the run folder"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="throw away the run in the run folder"
    )
    add_dry_run(parser, "print the resolved config, its size, memory and time, and do nothing")
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
        begun = _written(run_dir) != before  # else the run there, if any, is not this one
        words = [str(run_dir), "--resume"] if begun else argv
        return ended(INTERRUPTED, shlex.join([*PROGRAM.split(), "train", *words]))
    finally:
        screen.close()
    if results["status"] == "reused":
        name = results["metric"]["name"]
        reused = f"reused: {name} {number(name, results['metrics'].get(name))}"
        print(printable(f"{run_dir}: finished before, {reused} (--overwrite trains it anew)"))
        return 0
    _print_results(results, f"{run_dir}: finished")
    return 0


def evaluate_run(argv: Sequence[str]) -> int:
    """Measure a trained run again."""
    parser = command_parser(
        "eval",
        "RUN [--gallery RUN] [--section.key value ...]",
        "Measure a run's network on its test split, or on other images given by keys. RUN: a run "
        "folder (its last weights) or its checkpoint RUN/best.",
    )
    parser.add_argument("run", help="run folder, or its best/")
    parser.add_argument(
        "--gallery",
        type=str,
        help="run folder whose network's features are searched (verification): eval.gallery",
    )
    add_keys(parser)
    options, overrides = parse(parser, argv)
    if options.get("gallery") is not None:
        overrides["eval.gallery"] = options["gallery"]
    from kdtrain.training import checkpoint, engine

    run = Path(options["run"])
    recipe = checkpoint.run_of(run) / "config.yaml"
    if not recipe.is_file():
        raise UsageError(f"{run}: no run folder (no config.yaml there)")
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
            f"  the classifier's own metrics are left out: it knows {trained} identities, these "
            f"images show {found}"
        )
    return 0


def pipeline(argv: Sequence[str]) -> int:
    """Run the whole chain on synthetic faces or your own images."""
    return _pipeline("pipeline", argv, "two-cores")


def demo(argv: Sequence[str]) -> int:
    """Run the whole chain on synthetic faces in a few minutes."""
    return _pipeline("demo", argv, "demo")


def data(argv: Sequence[str]) -> int:
    """Show what a recipe's images are: counts, split, floors, samples."""
    parser = command_parser(
        "data",
        "[RECIPE] [--grid FILE.png] [--section.key value ...]",
        "Count the images, identities and splits of a recipe, measure the floors that learn "
        "nothing, and draw a grid of images.",
    )
    parser.add_argument("recipe", nargs="?", help="recipe (default: two-cores/cls_teacher)")
    parser.add_argument("--grid", type=str, default="faces.png", help="where the grid is written")
    add_keys(parser)
    options, overrides = parse(parser, argv)
    recipe = settings.recipe_path(options.get("recipe") or "two-cores/cls_teacher")
    config = settings.build({**settings.read_recipe(recipe), **overrides})
    from kdtrain.cli import inspection

    inspection.show(config, Path(options.get("grid") or "faces.png"))
    return 0


def import_weights(argv: Sequence[str]) -> int:
    """Write published weights as a run folder."""
    from kdtrain.config.networks import NAMES
    from kdtrain.models.published.layouts import PREFIXES
    from kdtrain.training.published.import_weights import SCALE, write_run

    parser = command_parser(
        "import",
        "WEIGHTS --layout LAYOUT --out RUN [--name NAME] [--head FILE]",
        "Read the published weights of a face network and write them as a run folder, to be named "
        "as --teacher, --init_from or --head.run. Every name and shape is checked.",
    )
    layouts = ", ".join(PREFIXES)
    parser.add_argument("weights", help="the project's file: .pt, .pth, .ckpt or .safetensors")
    parser.add_argument("--layout", type=str, help=f"whose layout: {layouts}")
    parser.add_argument("--out", type=str, help="run folder to write")
    parser.add_argument(
        "--name", type=str, help="the network, checked (default: the one that fits)"
    )
    parser.add_argument(
        "--head",
        type=str,
        help="file of the classifier; of shards any one, its neighbours are found by their ranks "
        "(default: adaface takes the checkpoint's own, the others none)",
    )
    parser.add_argument(
        "--classes", type=int, help="identities of the classifier, where its last rows are padding"
    )
    parser.add_argument("--scale", type=float, help=f"of its cosines (default {SCALE:g})")
    parser.add_argument("--color", type=str, help="rgb or bgr (default: as the project publishes)")
    options, _ = parse(parser, argv)
    for name in ("layout", "out"):
        if options.get(name) is None:
            wanted = f"one of {layouts}" if name == "layout" else "the run folder to write"
            raise UsageError(f"--{name} is missing: {wanted}")
    if options["layout"] not in PREFIXES:
        raise UsageError(f"--layout: one of {layouts}, got {options['layout']}")
    name, color = options.get("name"), options.get("color")
    if name is not None and name not in NAMES:
        raise UsageError(f"--name: one of {', '.join(NAMES)}, got {name}")
    if color not in (None, "rgb", "bgr"):
        raise UsageError(f"--color: rgb or bgr, got {color}")
    for line in write_run(
        Path(options["weights"]),
        options["layout"],
        Path(options["out"]),
        name=name,
        head=Path(options["head"]) if options.get("head") else None,
        classes=options.get("classes"),
        scale=options.get("scale") or SCALE,
        color=color,
    ):
        print(printable(line))
    return 0


def recipes(argv: Sequence[str]) -> int:
    """List the packaged recipes."""
    parser = command_parser("recipes", "", "List the packaged recipes with their head comments.")
    parse(parser, argv)
    for name in settings.recipe_names():
        print(name)
        for line in settings.head_comment(settings.recipe_path(name)).splitlines():
            print(f"    {line}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Write report.html for a folder of runs."""
    parser = command_parser(
        "report", "RUN_ROOT", "Write RUN_ROOT/report.html from the runs below RUN_ROOT."
    )
    parser.add_argument("root", help="folder of run folders, as runs/demo")
    options, _ = parse(parser, argv)
    from kdtrain.reports.report import report as write_report

    print(printable(str(write_report(Path(options["root"])))))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "eval": evaluate_run,
    "pipeline": pipeline,
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
        "[--section.key value ...] [--STAGE.section.key value ...]",
        "Train every stage of a preset and end in a table and report.html. Run again, it reuses "
        "finished stages and continues unfinished ones. Keys count for every stage; "
        "--STAGE.section.key value for one (--cls_teacher.optim.batch_size 32).",
    )
    if command == "pipeline":
        names = ", ".join(settings.preset_names())
        parser.add_argument("--preset", type=str, default=preset, help=f"{names}, or a folder")
    parser.add_argument("--run-dir", type=str, help=f"root of the run folders (runs/{preset})")
    add_jobs(parser, "stages")
    parser.add_argument("--divide", type=int, help="kernels of the students: 2, 4 or 8 times fewer")
    parser.add_argument("--resume", action="store_true", help="continue, as it does by itself")
    parser.add_argument("--overwrite", action="store_true", help="train every stage anew")
    add_dry_run(parser, "print the stages, their sizes, memory and time, and do nothing")
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
        line = f"left out, as {chain.NO_LANDMARKS}: {', '.join(lost)}"
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
    """When the run there was begun; 0 where none is."""
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
        # counts are the same for all
        beside = [f"{k} {number(name, v)}" for k, v in known.items() if v not in (None, value)]
        shown = f"   ({', '.join(beside)})" if beside else ""
        shown += drawn if name == "pair_accuracy" else ""
        print(f"  {name:24} {number(name, value):>9}{shown}")


def _line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def _is_ours(error: BaseException) -> bool:
    """Errors written for users: our own classes, and ValueError or OSError raised on purpose."""
    if type(error).__module__.startswith("kdtrain"):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    raised_here = f"{os.sep}kdtrain{os.sep}" in frames[-1].filename if frames else False
    return isinstance(error, OSError) or (isinstance(error, ValueError) and raised_here)


def _overview() -> str:
    lines = [f"usage: {PROGRAM} COMMAND ...", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:15} {(command.__doc__ or '').splitlines()[0]}")
    lines += ["", f"{PROGRAM} COMMAND --help lists a command's options."]
    return "\n".join(lines)
