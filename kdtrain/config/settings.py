"""Recipes and keys to a Config: YAML with `base:`, dotted keys, and errors that name similar keys.

A recipe is a YAML mapping of the schema's keys. `base:` names a recipe that it extends, or a list
of them: YAML files relative to the recipe (`base: common.yaml`) or packaged recipes by name
(`base: demo/cls_student`). The command line overrides single keys (`--optim.batch_size 32`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
import re
import reprlib
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import accumulate, groupby, takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdtrain.config.fields import ConfigError, Setting, in_words
from kdtrain.config.program import name_bytes, regular
from kdtrain.config.schema import SETTINGS, Config
from kdtrain.config.synonyms import HINTS

RECIPES = Path(__file__).parent.parent / "recipes"
# abbreviated keys
SHORT = {"teacher": "teacher.run"}
SIMILAR = 0.75  # difflib's ratio of two names, below which an error suggests neither
MANY = 16  # known names, above which an error does not list them
FEW = 3  # suggestions
LENGTH, DEPTH, VALUES = 100_000, 12, 10_000
"""Bounds of a YAML file: characters, nested levels, values with aliases expanded."""


_BY_KEY = {setting.key: setting for setting in SETTINGS}


def keys() -> tuple[str, ...]:
    """Every dotted key of the schema, in its order."""
    return tuple(_BY_KEY)


def sections() -> list[tuple[str, str, list[Setting]]]:
    """Name, docstring and settings of every section; `run` holds the keys of no section."""
    owners = typing.get_type_hints(Config)
    groups = groupby(SETTINGS, lambda setting: setting.key.rpartition(".")[0] or "run")
    return [
        (name, " ".join(str(owners.get(name, Config).__doc__).split()), list(members))
        for name, members in groups
    ]


def add_keys(parser: ArgumentParser) -> None:
    """Add one option per key of the schema."""
    for key, setting in _BY_KEY.items():
        parser.add_argument(f"--{key}", type=setting.kind)


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for the known names whose last part is like that of `word`; else all of
    them, if they are few.
    """
    known = list(known)
    tails = {name: _tail(name) for name in known}
    like = difflib.get_close_matches(_tail(word), set(tails.values()), n=1, cutoff=SIMILAR)
    ends = [name for name in known if tails[name] in like]
    most = FEW if word.lstrip("-") == _tail(word) else 1
    close = difflib.get_close_matches(word, ends, n=most, cutoff=0.0)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}" if len(known) <= MANY else "no known name is similar"


def correction(word: str, known: Iterable[str]) -> str:
    """The setting for an option of another trainer; else the result of `nearest`. word, known:
    options with their dashes, or keys.
    """
    known, tail = list(known), _tail(word).lower().replace("-", "_")
    is_key = tail in HINTS and {"seed", "--seed"}.intersection(known)
    return HINTS[tail] if is_key else nearest(word, known)


def _tail(name: str) -> str:
    """The last part of an option, a key or a path."""
    return re.split("[./]", name)[-1].lstrip("-")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'optim': {'batch_size': 8}} -> {'optim.batch_size': 8}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def in_full(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same dotted keys, without abbreviations."""
    return {SHORT.get(key, key): value for key, value in flat.items()}


def recipe_path(name: str) -> Path:
    """The file of a recipe, which is named by path, run directory or packaged name."""
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"no recipe file {name}")
        return path
    packaged = RECIPES / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    beside = [file.parent.as_posix() for file in path.parent.glob("*/config.yaml")]
    known = [*recipe_names(), *beside]
    raise ConfigError(f"no run directory and no recipe {name!r}; {nearest(name, known)}")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, such as two-cores/cls_teacher; the stages of a preset have one
    slash.
    """
    files = sorted(f for f in RECIPES.glob("*/**/[!_]*.yaml") if f.parent.name != "studies")
    return [f.relative_to(RECIPES).with_suffix("").as_posix() for f in files]


def preset_names() -> list[str]:
    """Directories of the packaged recipes, such as two-cores."""
    return sorted({name.partition("/")[0] for name in recipe_names()})


def head_comment(path: Path) -> str:
    """The comment at the top of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.lstrip("#").strip() for line in comment)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file as plain values; {} for an empty file.

    Raises ConfigError with file and key for a file that is not a regular one, not UTF-8, not YAML
    or no mapping; for a key that is no text or a duplicate; for a value other than text, number,
    true, false, null, list and mapping; and above LENGTH, DEPTH or VALUES, as self references are.
    """
    try:
        with regular(path).open(encoding="utf-8") as file:
            text = file.read(LENGTH + 1)
        if len(text) > LENGTH:
            raise ConfigError(f"longer than {LENGTH} characters")
        # PyYAML takes seconds to reject thousands of open brackets
        if max(accumulate((c in "[{") - (c in "]}") for c in text), default=0) > 10 * DEPTH:
            raise RecursionError
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"expected a mapping of keys, got {root.tag.rpartition(':')[2]}")
        return _plain(root, (), [VALUES])
    except RecursionError:
        problem = f"nested deeper than {DEPTH} levels"
    except ConfigError as error:
        problem = str(error)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = f"cannot be read as YAML: {' '.join(str(error).split())}"
    raise ConfigError(f"{path}: {problem}")


def _plain(node: Any, place: tuple[str, ...], left: list[int]) -> Any:
    """The value of a YAML node at the keys `place`; left: remaining number of values."""
    left[0] -= 1
    key, kind = ".".join(place), node.tag.removeprefix("tag:yaml.org,2002:")
    if len(place) > DEPTH:
        raise ConfigError(f"{place[0]}: nested deeper than {DEPTH} levels")
    if left[0] < 0:
        raise ConfigError(f"{place[0]}: more than {VALUES} values, aliases expanded")
    if kind == "seq":
        return [_plain(item, (*place, str(k)), left) for k, item in enumerate(node.value)]
    if kind == "map":
        tree: dict[str, Any] = {}
        for name, value in node.value:
            if name.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"{key or 'top level'}: expected keys that are text, got "
                    f"{reprlib.repr(name.value)} (put it in quotes; << is not supported)"
                )
            if name.value in tree:
                line = name.start_mark.line + 1
                raise ConfigError(f"{'.'.join((*place, name.value))}: set again on line {line}")
            tree[name.value] = _plain(value, (*place, name.value), left)
        return tree
    if kind not in ("str", "int", "float", "bool", "null"):
        raise ConfigError(
            f"{key}: expected text, a number, true, false, null, a list or a mapping, got {kind} "
            "(text goes in quotes)"
        )
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
        # no file name holds a zero byte, or a surrogate without a byte
        if isinstance(value, str) and b"\0" in name_bytes(value):
            raise ValueError
    except (ValueError, LookupError, yaml.YAMLError):
        got = reprlib.repr(node.value)
        raise ConfigError(f"{key}: {got} cannot be read as {kind}") from None
    return value


def read_recipe(path: Path, _found: dict[Path, Any] | None = None) -> dict[str, Any]:
    """The dotted keys that a recipe sets, with those of its `base` recipes (a later one wins).

    Raises ConfigError with file and key for the errors of `read_yaml`, and of `build` in one key.
    """
    found = {} if _found is None else _found
    path = Path(os.path.realpath(path))
    if path in found:
        if found[path] is None:
            raise ConfigError(f"{path}: base recipes form a circle")
        return found[path]
    found[path] = None
    tree = read_yaml(path)
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{path}: base: expected a recipe file or a list of them, got {reprlib.repr(bases)}"
        )
    flat: dict[str, Any] = {}
    for base in bases:
        flat.update(read_recipe(_base(base, path), found))
    own = in_full(flatten(tree))
    try:
        _typed(own)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    found[path] = {**flat, **own}
    return found[path]


def _base(name: str, recipe: Path) -> Path:
    """The file of `base: name` in a recipe: a YAML file beside it, or a packaged recipe."""
    is_file = name.endswith((".yaml", ".yml"))
    path = recipe.parent / name if is_file else RECIPES / f"{name}.yaml"
    if not path.exists():
        close = nearest(name, recipe_names())
        raise ConfigError(f"{recipe}: base: no file or packaged recipe {name!r}; {close}")
    return path


def build(flat: Mapping[str, Any]) -> Config:
    """A checked Config from dotted keys, abbreviated ones too; other keys have their defaults.

    Raises ConfigError for an unknown key, a wrong value, or values that exclude each other.
    """
    values = _typed(in_full(flat))
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            values[name] = kind(**values.get(name, {}))  # type: ignore[operator]
    return Config(**values)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{'optim.batch_size': 8} -> {'optim': {'batch_size': 8}}, of keys of the schema."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _typed(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by section, converted to the types of the schema. Raises ConfigError."""
    for key, value in flat.items():
        if key not in _BY_KEY:
            if any(known.startswith(f"{key}.") for known in _BY_KEY):
                got = reprlib.repr(value)
                raise ConfigError(f"{key}: expected a mapping of its keys; got {got}")
            raise ConfigError(f"unknown key {key!r}; {correction(key, keys())}")
        # jsonargparse accepts null for any type
        if value is None and type(None) not in typing.get_args(_BY_KEY[key].kind):
            raise ConfigError(f"{key}: expected {values_of(key)}; got null")
        _check_numbers(key, value)
    parser = key_parser()
    try:
        # a copy: jsonargparse replaces mappings in place
        given = parser.parse_object(copy.deepcopy(nested(flat)), defaults=False)
        for key, value in given.items():
            _check_numbers(key, value)
        return parser.instantiate(given).as_dict()
    except ArgumentError as error:
        key = wrong_key(error)
        raise ConfigError(f"{key}: expected {values_of(key)}; got {flat[key]!r}") from None


def values_of(key: str) -> str:
    """The values that a key may have, in words."""
    return in_words(_BY_KEY[key].kind, _BY_KEY[key].within)


def wrong_key(error: ArgumentError) -> str:
    """The key whose value jsonargparse rejects; '' where the error is of another kind."""
    found = re.match('Parser key "(.+?)":', str(error))
    return found[1] if found else ""


def _check_numbers(key: str, value: Any) -> None:
    """Raises ConfigError for a number that is not finite, and for an integer above 63 bits."""
    if isinstance(value, (list, dict)):
        for place, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(f"{key}.{place}", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number; got {value}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key}: expected at most 63 bits; got {reprlib.repr(value)}")


@cache
def key_parser() -> ArgumentParser:
    """A parser of keys alone."""
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    add_keys(parser)
    return parser


def to_flat(config: Config) -> dict[str, Any]:
    """Every dotted key with its plain value; `build` of it gives an equal Config."""
    tree = dataclasses.asdict(config)
    return {key: value for key, value in flatten(tree).items() if key in _BY_KEY}


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
