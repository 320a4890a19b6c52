"""Command lines: which options are known, which keys were given, and errors that name the nearest
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from kdtrain import settings
from kdtrain.settings import add_keys, flatten, nearest

PROGRAM = "python -m kdtrain"
# set by a pipeline for its stages: the process whose death stops them
PARENT = "KDTRAIN_PARENT"


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
        if name.startswith("--") and name not in known:
            close = nearest(name, [*sorted(known), *(f"--{stage}.KEY" for stage in stages)])
            raise UsageError(f"unknown option {name}; {close}")
    try:
        given = flatten(parser.parse_args(argv, defaults=False).as_dict())
    except ArgumentError as error:
        raise UsageError(" ".join(str(error).split())) from None
    schema = set(settings.keys())
    return (
        {key: value for key, value in given.items() if key not in schema},
        {key: value for key, value in given.items() if key in schema},
    )


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


def _in_full(word: str) -> str:
    """--teacher.run for --teacher, with or without =VALUE; any other word as it is."""
    name, equals, value = word.partition("=")
    key = name.removeprefix("--")
    short = name.startswith("--") and key in settings.SHORT
    return f"--{settings.SHORT[key]}{equals}{value}" if short else word


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of one option before the rest is parsed: it decides what else is known."""
    for here, word in enumerate(argv):
        if word == option and here + 1 < len(argv):
            return argv[here + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
