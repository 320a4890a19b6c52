"""Command lines: options, keys, help, and errors that name similar options."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from kdtrain.config import SETTINGS, settings
from kdtrain.config.fields import Setting, in_words, placeholder
from kdtrain.config.program import INTERRUPTED, PROGRAM, cores, printable
from kdtrain.config.settings import correction, flatten

USUAL = (
    *("task", "seed", "init_from", "teacher.run", "data.kind", "data.root", "data.split"),
    *("data.input_size", "data.workers", "model.name", "model.divide", "head.kind", "head.margin"),
    *("target.alpha", "target.beta", "target.temperature", "optim.phases", "optim.batch_size"),
    *("train.device", "train.precision"),
)
"""Keys that --help shows; --help-all shows all."""


class UsageError(Exception):
    """A wrong command line; the message names the mistake."""


class CommandParser(ArgumentParser):
    """The parser of a command; its help wraps to the width of the terminal."""

    examples: Sequence[str] = ()
    all_keys = False
    many_runs = False

    def format_help(self, formatter: Any = None) -> str:  # noqa: ARG002
        """Usage, arguments, keys and examples; `all_keys` for --help-all."""
        text = argparse.HelpFormatter(self.prog, max_help_position=34)
        text.add_text(f"usage: {self.usage}")
        text.add_text(self.description)
        keys = {setting.key for setting in SETTINGS}
        # jsonargparse adds --optim.phases.help
        own = [a for a in self._actions if a.dest not in keys and a.help and "." not in a.dest]
        text.start_section("arguments")
        text.add_arguments(own)
        text.end_section()
        # a command of many runs sets the keys that distinguish them
        usual = [s for s in SETTINGS if s.key in USUAL and not (s.own and self.many_runs)]
        groups = [(f"{len(usual)} of {len(SETTINGS)} keys (all: --help-all)", None, usual)]
        groups = settings.sections() if self.all_keys else groups
        takes_keys = any(action.dest == "seed" for action in self._actions)
        for title, about, members in groups if takes_keys else ():
            text.start_section(title)
            text.add_text(about)
            text.add_arguments([_help_of(setting, self.all_keys) for setting in members])
            text.end_section()
        if self.examples:
            text.start_section("examples")
            text.add_arguments([argparse.Action([line], "", nargs=0) for line in self.examples])
            text.end_section()
        return text.format_help()


def _help_of(setting: Setting, long: bool) -> argparse.Action:
    """A key with the first sentence of its text, or all of it with range and default."""
    text, value = f"{setting.text} [{setting.limits}]", placeholder(setting.kind)
    if not long:
        text = setting.text.partition(". ")[0].rstrip(".")
        value = re.sub(r"\|.*", "|...", value)
    return argparse.Action([f"--{setting.key}"], "", metavar=value, help=text.replace("%", "%%"))


def command_parser(command: str, operands: str, text: str, *examples: str) -> CommandParser:
    """The parser of a command. operands: the usage line; examples: what follows PROGRAM."""
    parser = CommandParser(
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} {operands}".rstrip(),
        description=text,
        exit_on_error=False,
    )
    parser.add_argument("--help-all", action="store_true", help=argparse.SUPPRESS)
    parser.examples = [f"{PROGRAM} {line}" for line in examples]
    return parser


def parse(
    parser: ArgumentParser, argv: Sequence[str], stages: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the command, dotted keys) in `argv`. Raises UsageError."""
    argv = [_in_full(word) for word in argv]
    known = {option for action in parser._actions for option in action.option_strings}
    if isinstance(parser, CommandParser):
        parser.all_keys, parser.many_runs = "--help-all" in argv, bool(stages)
        argv = ["--help"] if parser.all_keys else argv
    for word in argv:
        name = word.partition("=")[0]
        if re.match("--?[A-Za-z]", name) and name not in known:
            raise UsageError(f"unknown option {name}; {_correction(name, known, stages)}")
    try:
        given = flatten(parser.parse_args(argv, defaults=False).as_dict())
    except ArgumentError as error:
        raise UsageError(_problem(error, parser, argv)) from None
    schema = set(settings.keys())
    overrides = {key: given.pop(key) for key in list(given) if key in schema}
    for name, value in given.items():
        option = _option(parser, name)
        if value == "":  # such as --run-dir "$DIR" where DIR is not set
            raise UsageError(f"{option}: expected a value; got an empty one")
        if name in ("run_dir", "out", "grid"):
            _check_place(option, Path(value))
    return given, overrides


def _check_place(option: str, path: Path) -> None:
    """Raises UsageError where an option's file or directory cannot be written at `path`."""
    for place in path.parents if option != "--run-dir" else (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UsageError(f"{option}: expected a directory; {place} is a file")
    if option == "--grid" and path.is_dir():
        raise UsageError(f"{option}: expected a file; {path} is a directory")


def _correction(name: str, known: set[str], stages: Sequence[str]) -> str:
    """Replacement of an unknown option, for an error."""
    section, dot, _ = name.lstrip("-").partition(".")
    stage = difflib.get_close_matches(section, stages if dot else (), n=1, cutoff=settings.SIMILAR)
    return f"did you mean --{stage[0]}.KEY?" if stage else correction(name, sorted(known))


def _problem(error: ArgumentError, parser: ArgumentParser, argv: Sequence[str]) -> str:
    """The message of a parser's error, without its terms."""
    name = settings.wrong_key(error)
    if name:
        option = _option(parser, name)
        kind = next(vars(action)["_typehint"] for action in parser._actions if action.dest == name)
        is_key = name in set(settings.keys())
        expected = settings.values_of(name) if is_key else in_words(kind)
        got = value_of(argv, option)
        return f"{name if is_key else option}: expected {expected}; got {got!r}"
    option = re.match("argument (--[^/:]+)", str(error))
    if option:
        takes = "takes no value" if "explicit" in str(error) else "a value is missing"
        return f"{option[1]}: {takes}"
    what, _, words = str(error).partition(": ")
    if "required" in what:
        return f"missing: {', '.join(_option(parser, name) for name in words.split(', '))}"
    return f"unexpected argument {words}"


def _option(parser: ArgumentParser, name: str) -> str:
    """The option of a parsed name, or the operand."""
    action = next(action for action in parser._actions if action.dest == name)
    return next(iter(action.option_strings), name.upper())


def add_dry_run(parser: ArgumentParser, text: str) -> None:
    """Add --dry-run with the help `text`, --classes and --images."""
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "of absent data (--dry-run)"
    parser.add_argument("--classes", type=int, metavar="N", help=f"identities {text}")
    parser.add_argument("--images", type=int, metavar="N", help=f"images {text}")


def check_dry_run(options: Mapping[str, Any]) -> None:
    """Raises UsageError for --classes or --images without --dry-run, alone, or below 2."""
    sizes = {f"--{name}": options[name] for name in ("classes", "images") if name in options}
    for name, value in sizes.items():
        if not options.get("dry_run"):
            raise UsageError(f"{name} needs --dry-run; training counts the images")
        if value < 2:
            raise UsageError(f"{name}: expected at least 2; got {value}")
    if len(sizes) == 1:
        raise UsageError("--classes and --images: both or neither; images include the test images")


def take_stage_keys(argv: list[str], stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Remove --STAGE.KEY VALUE from argv; the dotted keys by stage. Raises UsageError."""
    taken: dict[str, list[str]] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        stage, dot, key = word.removeprefix("--").partition(".")
        if word.startswith("--") and dot and stage in stages:
            value = () if "=" in key else itertools.islice(words, 1)
            taken.setdefault(stage, []).extend([f"--{key}", *value])
        else:
            rest.append(word)
    argv[:] = rest
    special = {}
    for stage, given in taken.items():
        try:
            special[stage] = parse(settings.key_parser(), given)[1]
        except UsageError as error:
            raise UsageError(f"stage {stage}: {error}") from None
    return special


def ended(status: int, again: str) -> int:
    """The exit status of a command; after an interruption, the command that resumes is printed."""
    if status == INTERRUPTED:
        print(printable(f"stopped; to resume: {again}"), file=sys.stderr)
    return status


def _in_full(word: str) -> str:
    """--teacher.run for --teacher, with or without =VALUE; any other word unchanged."""
    name, equals, value = word.partition("=")
    full = settings.SHORT.get(name.removeprefix("--")) if name.startswith("--") else None
    return f"--{full}{equals}{value}" if full else word


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option, without parsing the rest; None without one."""
    for here in reversed(range(len(argv))):
        name, equals, value = argv[here].partition("=")
        if name == option:
            return value if equals else next(iter(argv[here + 1 :]), None)
    return None


def default_run_dir(recipe: str, path: Path) -> Path:
    """runs/two-cores/cls_teacher for a packaged recipe, runs/NAME for NAME.yaml, else the run
    directory itself.
    """
    if Path(recipe).is_dir():
        return Path(recipe)
    inside = path.is_relative_to(settings.RECIPES)
    # two-cores/tables/cls_hint too is beside the runs that it names by @
    preset = path.relative_to(settings.RECIPES).parts[0] if inside else ""
    return Path("runs") / preset / path.stem


def add_jobs(parser: ArgumentParser, what: str = "runs") -> None:
    """Add --jobs, which `jobs_of` reads. what: the processes, in the plural."""
    text = f"{what} in parallel (default: cores, at most 4)"
    parser.add_argument("--jobs", type=int, metavar="N", help=text)


def jobs_of(options: dict[str, Any]) -> int:
    """--jobs, or one per core up to 4."""
    jobs = options.get("jobs")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs: expected at least 1; got {jobs}")
    return jobs or max(1, min(4, cores()))
