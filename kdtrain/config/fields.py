"""Declaration of a setting, and errors for wrong values."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal, NamedTuple

Cost = Literal["value", "switch", "none"]
RANGES: Mapping[str, Callable[[float], bool]] = {
    "0 or more": lambda x: x >= 0,
    "more than 0": lambda x: x > 0,
    "at least 1": lambda x: x >= 1,
    "at least 2": lambda x: x >= 2,
    "at least 8": lambda x: x >= 8,
    "0 < x < 1": lambda x: 0 < x < 1,
    "0 <= x < 1": lambda x: 0 <= x < 1,
    "0 < x <= 1": lambda x: 0 < x <= 1,
    "0 <= x <= 1": lambda x: 0 <= x <= 1,
}
"""Ranges of a number, by their text in an error."""
WORDS = {
    bool: ("true or false", "true|false"),
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    str: ("text", "TEXT"),
}
"""Types of a value in an error, and in the help of an option."""


class ConfigError(ValueError):
    """A recipe, key or value that cannot be used; the message names it and what is expected."""


def require(holds: bool, key: str, expected: str, got: object) -> None:
    """Raises ConfigError for the value `got` of a key, unless `holds`."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}; got {got!r}")


def setting(default: Any = MISSING, *, factory: Any = MISSING, **about: Any) -> Any:
    """A dataclass field of a config. about: fields of Setting other than their default."""
    return dataclasses.field(default=default, default_factory=factory, metadata=about)


def in_words(kind: Any, within: str | None = None) -> str:
    """The values of a setting: 'one of a, b', or 'a whole number, at least 2, or null'."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, members))}"
    if typing.get_origin(kind) is list:
        item = members[0]
        if item in WORDS:
            return f"a list, each {WORDS[item][0]}"
        fields = ", ".join(f"{s.key}: {in_words(s.kind)}" for s in settings_of(item))
        return f"a list of {{{fields}}}"
    if type(None) in members:
        return f"{in_words(members[0], within)}, or null"
    return ", ".join(filter(None, (WORDS[kind][0], within)))


def placeholder(kind: Any) -> str:
    """A value in the help of an option: 'a|b', 'N', 'LIST'."""
    members = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, members))
    if typing.get_origin(kind) is list:
        return "LIST"
    return placeholder(members[0]) if members else WORDS[kind][1]


def check_settings(section: Any, prefix: str) -> None:
    """Raises ConfigError, by name, for a value outside its Literal type, and for a number that is
    not finite or outside its setting's range. prefix: of the keys.
    """
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        kind, within = _types(type(section))[item.name], item.metadata.get("within")
        if typing.get_origin(kind) is Literal:
            require(value in typing.get_args(kind), key, in_words(kind), value)
        elif within is not None:
            nullable = type(None) in typing.get_args(kind)
            holds = nullable if value is None else math.isfinite(value) and RANGES[within](value)
            require(holds, key, in_words(kind, within), value)


class Setting(NamedTuple):
    """A setting of the schema."""

    key: str
    """Dotted."""
    kind: Any
    default: Any
    text: str
    counted: bool = True
    """Whether it can change a trained number, so that it is part of a run's key."""
    cost: Cost = "value"
    "Dependence of a step's time and memory: on the value, on whether it is set, or none."
    own: bool = False
    """Whether it distinguishes the runs of a table: a command line cannot set it for all."""
    run: str | None = None
    "Name of the input whose run directory is the value; its key counts in the value's place."
    within: str | None = None
    """One of RANGES."""
    source: bool = False
    """Whether it selects the images that are read, or how they are read."""
    target: Mapping[str, Any] | None = None
    """The row of a distillation target, for a setting that weighs one (target.py)."""

    @property
    def shown_default(self) -> str:
        """The default as a recipe has it."""
        if isinstance(self.default, str):
            return self.default
        return json.dumps(self.default, default=dataclasses.asdict).replace('"', "")

    @property
    def limits(self) -> str:
        """The range, if any, and the default: 'at least 2; default 256'."""
        return "; ".join(filter(None, (self.within, f"default {self.shown_default}")))


def settings_of(kind: type, prefix: str = "", cost: Cost = "value") -> Iterator[Setting]:
    """Every setting of a dataclass and of the sections in it, in their order."""
    types, texts = _types(kind), _texts(kind)
    for item in dataclasses.fields(kind):
        inner, about = types[item.name], {"cost": cost, **item.metadata}
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from settings_of(inner, f"{prefix}{item.name}.", about["cost"])
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        about["counted"] = about.get("counted", True) and "run" not in about
        yield Setting(prefix + item.name, inner, default, texts[item.name], **about)


_types = cache(typing.get_type_hints)


def _texts(kind: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, by the field's name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in itertools.pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }
