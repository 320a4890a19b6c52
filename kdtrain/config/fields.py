"""How a setting is declared, and what a wrong value raises."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
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
"""Ranges that a number may be `within`, by their text in an error."""


class ConfigError(ValueError):
    """A recipe, key or value that cannot be used; the message says which, and what to write
    instead.
    """


def require(holds: bool, key: str, expected: str, got: object) -> None:
    """Raises ConfigError, by name, where a key's value does not hold."""
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | Any = dataclasses.MISSING,
    counted: bool = True,
    cost: Cost | None = None,
    own: bool = False,
    run: str | None = None,
    within: str | None = None,
    source: bool = False,
) -> Any:
    """A dataclass field that says more of a setting than type, default and help text.

    counted: whether it can change a trained number, so that it is part of a run's key. cost: what
    of it the time and memory of a step depend on: its value (the default), whether it is set, or
    nothing; a section passes it on to its fields. own: what distinguishes the runs of a table of
    the paper, so that a command line cannot set it for all of them. run: name of the input whose
    run directory (or @NAME, the run beside; or a list of them) is the value; the input's key counts
    in its place. within: one of RANGES; null is allowed where it is the default. source: whether it
    says which images are read, and how.
    """
    metadata = {"counted": counted and run is None, "cost": cost, "own": own, "run": run}
    metadata |= {"within": within, "source": source}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def check_settings(section: Any, prefix: str) -> None:
    """Raises ConfigError, by name, for a value that is not one of its Literal type's, or not finite
    and within its setting's range. prefix: of the keys.
    """
    for item in dataclasses.fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        kind, within = _types(type(section))[item.name], item.metadata.get("within")
        if typing.get_origin(kind) is Literal:
            known = typing.get_args(kind)
            require(value in known, key, f"one of {', '.join(map(str, known))}", value)
        elif within is not None:
            nullable = item.default is None
            holds = nullable if value is None else math.isfinite(value) and RANGES[within](value)
            require(holds, key, f"{within}, or null" if nullable else within, value)


class Setting(NamedTuple):
    """A setting of the schema."""

    key: str
    """Dotted."""
    kind: Any
    default: Any
    text: str
    counted: bool
    cost: Cost
    own: bool
    run: str | None


def settings_of(kind: type, prefix: str = "", cost: Cost = "value") -> Iterator[Setting]:
    """Every setting of a dataclass and of the sections in it, in their order; see `setting`."""
    types, texts = _types(kind), _texts(kind)
    for item in dataclasses.fields(kind):
        said: Mapping[str, Any] = item.metadata
        own_cost: Cost = said.get("cost") or cost
        if dataclasses.is_dataclass(types[item.name]):
            yield from settings_of(types[item.name], f"{prefix}{item.name}.", own_cost)
            continue
        factory = item.default_factory
        yield Setting(
            key=prefix + item.name,
            kind=types[item.name],
            default=item.default if factory is dataclasses.MISSING else factory(),
            text=texts[item.name],
            counted=said.get("counted", True),
            cost=own_cost,
            own=said.get("own", False),
            run=said.get("run"),
        )


_types = cache(typing.get_type_hints)


def _texts(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for here, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(here, ast.AnnAssign)
            and isinstance(here.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[here.target.id] = " ".join(str(below.value.value).split())
    return texts
