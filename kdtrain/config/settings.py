"""From recipes and command lines to a Config: YAML with `base:`, dotted keys, and errors that name
the nearest key.

A recipe is a YAML mapping of the schema's keys; `base:` names one recipe or a list of recipes that
it starts from. The command line overrides single keys (`--optim.batch_size 32`).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdtrain.config.fields import ConfigError
from kdtrain.config.schema import SETTINGS, Config

RECIPES = Path(__file__).parent.parent / "recipes"
# keys that may be written shorter
SHORT = {"teacher": "teacher.run"}
RENAMED = {
    "data.people": "data.identities",
    "data.pictures": "data.images_per_identity",
    "triplet.people": "triplet.identities",
    "triplet.pictures": "triplet.images_per_identity",
}
"""Keys of versions before 0.1, whose run directories are refused by name."""
MANY = 16  # known words, above which an error lists the FEW nearest of them
FEW = 3


@cache
def keys() -> tuple[str, ...]:
    """Every dotted key of the schema, in its order."""
    return tuple(setting.key for setting in SETTINGS)


def add_keys(parser: ArgumentParser) -> None:
    """Add one option per key of the schema, with its default and help, grouped by section."""
    sections = {item.name: item for item in dataclasses.fields(Config)}
    groups = {}
    for setting in SETTINGS:
        key = setting.key
        section = key.partition(".")[0] if "." in key else "run"
        if section not in groups:
            owner = typing.get_type_hints(Config)[section] if section in sections else Config
            groups[section] = parser.add_argument_group(section, inspect.getdoc(owner))
        groups[section].add_argument(
            f"--{key}", type=setting.kind, default=setting.default, help=setting.text
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """'did you mean ...?' for the closest known word; else all of them, of many the FEW nearest."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        by_tail = {key.rpartition(".")[2]: key for key in known}
        close = [
            by_tail[m] for m in difflib.get_close_matches(word.rpartition(".")[2], by_tail, n=1)
        ]
    if close:
        return f"did you mean {close[0]}?"
    if len(known) <= MANY:
        return f"known: {', '.join(known)}"
    few = difflib.get_close_matches(word, known, n=FEW, cutoff=0.0)
    return f"the nearest of {len(known)} names: {', '.join(few)}"


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
    """The same dotted keys with every short one written in full."""
    return {SHORT.get(key, key): value for key, value in flat.items()}


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path to a YAML file, a run folder, or a name as
    two-cores/cls_teacher.
    """
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
    raise ConfigError(f"no run folder and no recipe {name!r}; {nearest(name, known)}")


def recipe_names() -> list[str]:
    """Names of the packaged recipes, as two-cores/cls_teacher; those in a folder of a preset are no
    stages of its pipeline.
    """
    files = sorted(RECIPES.glob("*/**/*.yaml"))
    return [
        f.relative_to(RECIPES).with_suffix("").as_posix()
        for f in files
        if not f.name.startswith("_")
    ]


def preset_names() -> list[str]:
    """Folders of the packaged recipes, as two-cores."""
    return sorted({name.partition("/")[0] for name in recipe_names()})


def head_comment(path: Path) -> str:
    """The comment that opens a recipe."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines)


def read_recipe(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The dotted keys that a recipe sets, those of its `base` recipes first (a later one wins)."""
    path = path.resolve()
    if path in _seen:
        raise ConfigError(f"{path}: base recipes form a circle")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as YAML: {' '.join(str(error).split())}"
        ) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(tree).__name__}")
    bases = tree.pop("base", [])
    flat: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        flat.update(read_recipe(path.parent / base, (*_seen, path)))
    own = in_full(flatten({str(key): value for key, value in tree.items()}))
    check_version(own, path)
    for key in own:
        if key not in keys():
            raise ConfigError(f"{path}: {unknown(key)}")
    flat.update(own)
    return flat


def unknown(key: str) -> str:
    """What is wrong with a key that the schema does not have, for an error."""
    if key in RENAMED:
        return f"the key {key} is now {RENAMED[key]}"
    return f"unknown key {key!r}; {nearest(key, keys())}"


def check_version(flat: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for the config.yaml of a run directory that an older version wrote."""
    old = [key for key in RENAMED if key in flat]
    if old and path.name == "config.yaml":
        raise ConfigError(
            f"{path.parent}: written by an older version of kdtrain (its {old[0]} is now "
            f"{RENAMED[old[0]]}); train that run again"
        )


def build(flat: Mapping[str, Any]) -> Config:
    """A checked Config from dotted keys, short ones too; keys that are not set take the schema's
    defaults.

    Raises ConfigError for an unknown key, a value of the wrong type, or values that do not fit
    together.
    """
    tree: dict[str, Any] = {}
    for key, value in in_full(flat).items():
        if key not in keys():
            raise ConfigError(unknown(key))
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    parser = _key_parser()
    try:
        values = parser.instantiate(parser.parse_object(tree, defaults=False)).as_dict()
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from None
    types = typing.get_type_hints(Config)
    for name, kind in types.items():
        if dataclasses.is_dataclass(kind):
            values[name] = kind(**values.get(name, {}))  # type: ignore[operator]
    return Config(**values)


@cache
def _key_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_keys(parser)
    return parser


def to_flat(config: Config) -> dict[str, Any]:
    """Every dotted key with its plain value; `build` of it gives an equal Config."""
    tree = dataclasses.asdict(config)
    return {key: value for key, value in flatten(tree).items() if key in keys()}


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
