"""Command lines: which options are known, which keys were given, and errors that name the nearest
one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from kdtrain.config import settings
from kdtrain.config.program import INTERRUPTED, PROGRAM, cores, printable
from kdtrain.config.settings import add_keys, flatten, nearest


class UsageError(Exception):
    """A wrong command line; the message names what is wrong."""


def command_parser(command: str, operands: str, text: str) -> ArgumentParser:
    """A parser whose errors are exceptions and whose usage line stays short."""
    return ArgumentParser(
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} {operands}".rstrip(),
        description=text,
        exit_on_error=False,
    )


def parse(
    parser: ArgumentParser, argv: Sequence[str], stages: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the command's own options, the dotted keys that were given). Raises UsageError."""
    argv = [_in_full(word) for word in argv]
    known = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        name = word.partition("=")[0]
        if name.removeprefix("--") in settings.RENAMED:
            raise UsageError(settings.unknown(name.removeprefix("--")))
        if name.startswith("--") and name not in known:
            close = nearest(name, [*sorted(known), *(f"--{stage}.KEY" for stage in stages)])
            raise UsageError(f"unknown option {name}; {close}")
    try:
        given = flatten(parser.parse_args(argv, defaults=False).as_dict())
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    schema = set(settings.keys())
    overrides = {key: given.pop(key) for key in list(given) if key in schema}
    for name, value in given.items():
        if value == "":  # such as --run-dir "$DIR" where DIR is not set
            raise UsageError(f"{name}: expected a value, got an empty one")
    return given, overrides


def add_dry_run(parser: ArgumentParser, text: str) -> None:
    """Add --dry-run, which `text` explains, and what goes with it."""
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "of the whole data set, with --dry-run, where the images are not at hand"
    parser.add_argument("--classes", type=int, help=f"identities {text}")
    parser.add_argument("--images", type=int, help=f"images {text}")


def check_dry_run(options: Mapping[str, Any]) -> None:
    """Raises UsageError for --classes or --images without --dry-run, alone, or below 2."""
    sizes = {f"--{name}": options.get(name) for name in ("classes", "images")}
    for name, value in sizes.items():
        if value is not None and not options.get("dry_run"):
            raise UsageError(f"{name} goes with --dry-run; training counts the images itself")
        if value is not None and value < 2:
            raise UsageError(f"{name}: at least 2, got {value}")
    if len([value for value in sizes.values() if value is not None]) == 1:
        raise UsageError("--classes and --images: both or neither; images counts the test too")


def take_stage_keys(argv: list[str], stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Remove --STAGE.key value from argv; the dotted keys by stage. Raises UsageError."""
    taken: dict[str, list[str]] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        stage, dot, key = word.removeprefix("--").partition(".")
        if not (word.startswith("--") and dot and stage in stages):
            rest.append(word)
            continue
        taken.setdefault(stage, []).append(f"--{key}")
        if "=" not in key:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{word}: a value is missing")
            taken[stage].append(value)
    argv[:] = rest
    special = {}
    for stage, given in taken.items():
        parser = ArgumentParser(prog=stage, exit_on_error=False, add_help=False)
        add_keys(parser)
        try:
            special[stage] = parse(parser, given)[1]
        except UsageError as error:
            raise UsageError(f"stage {stage}: {error}") from None
    return special


def ended(status: int, again: str) -> int:
    """The exit status of a command; an interruption prints the command that continues."""
    if status == INTERRUPTED:
        print(printable(f"stopped; to continue: {again}"), file=sys.stderr)
    return status


def _in_full(word: str) -> str:
    """--teacher.run for --teacher, with or without =VALUE; any other word as it is."""
    name, equals, value = word.partition("=")
    full = settings.SHORT.get(name.removeprefix("--")) if name.startswith("--") else None
    return f"--{full}{equals}{value}" if full else word


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of one option before the rest is parsed: it decides what else is known."""
    for here, word in enumerate(argv):
        if word == option and here + 1 < len(argv):
            return argv[here + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def default_run_dir(recipe: str, path: Path) -> Path:
    """runs/two-cores/cls_teacher for a packaged recipe, runs/NAME for NAME.yaml, the folder itself
    for a run folder.
    """
    if Path(recipe).is_dir():
        return Path(recipe)
    if path.is_relative_to(settings.RECIPES):
        # two-cores/tables/cls_hint too stands beside the runs that it names by @
        return Path("runs") / path.relative_to(settings.RECIPES).parts[0] / path.stem
    return Path("runs") / path.stem


def add_jobs(parser: ArgumentParser, what: str = "runs") -> None:
    """Add --jobs, which `jobs_of` reads. what: is trained side by side."""
    text = f"{what} side by side (default: one per core, <= 4)"
    parser.add_argument("--jobs", type=int, help=text)


def jobs_of(options: dict[str, Any]) -> int:
    """--jobs, or one per core up to 4."""
    jobs = options.get("jobs")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs: at least 1, got {jobs}")
    return jobs or max(1, min(4, cores()))
