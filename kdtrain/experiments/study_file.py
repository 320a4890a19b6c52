"""Studies as YAML files: reading and checking, and what a command line changes in one."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kdtrain.config import RUN_SETTINGS, ConfigError, settings
from kdtrain.experiments.study import (
    DIVIDE,
    ITEMS,
    LAST,
    METRICS,
    SIZE,
    Arm,
    At,
    BlockSpec,
    Claim,
    ClaimKind,
    Keys,
    Line,
    Study,
)
from kdtrain.reports.tables.data import RowKind

FOLDER = settings.RECIPES / "studies"
_CELL = re.compile(r"([^\s/@()]+)(?:/(\d+))?(?:@(\d+))?(?: \(([\d.]+)\))?")


def names() -> list[str]:
    """The packaged studies."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def path_of(name: str) -> Path:
    """The file of a study: a path of a YAML file, or a packaged one by its name."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if name not in names():
            raise ConfigError(f"no study {name!r}; {settings.nearest(name, names())}")
    elif not path.is_file():
        raise ConfigError(f"no study file {name}")
    return path


Check = tuple[Callable[[Any], bool], str]
TEXT: Check = lambda v: isinstance(v, str) and v != "", "text"
FLAG: Check = lambda v: isinstance(v, bool), "true or false"
FILLED: Check = lambda v: isinstance(v, list) and bool(v), "a list that is not empty"
TEXTS: Check = lambda v: FILLED[0](v) and all(TEXT[0](one) for one in v), "a list of texts"
KEYS: Check = lambda v: isinstance(v, dict), "a mapping of keys"
ARMS: Check = lambda v: KEYS[0](v) or TEXTS[0](v), "a mapping of arms, or a list of recipes' names"


def _number(least: int) -> Check:
    return lambda v: type(v) is int and v >= least, f"a whole number of at least {least}"


def _numbers(least: int) -> Check:
    one = _number(least)[0]
    return (
        lambda v: FILLED[0](v) and all(map(one, v)) and len(set(v)) == len(v),
        f"a list of different whole numbers of at least {least}",
    )


def _one_of(values: Sequence[str]) -> Check:
    return lambda v: v in values, f"one of {', '.join(values)}"


NAME: Check = (
    lambda v: isinstance(v, str) and re.fullmatch(r"\w[\w.+-]*", v) is not None,
    "a name of letters, digits, _, ., + and -",
)
MEASURED = (*METRICS, "failure_rate", "hint")
STUDY: Mapping[str, Check] = {
    **dict.fromkeys(("title", "source", "subject", "recipes"), TEXT),
    "runs": NAME,
    "seeds": (lambda v: _number(1)[0](v) or _numbers(0)[0](v), "a number, or a list of seeds"),
    "widths": _numbers(1),
    "resolutions": _numbers(8),
    **dict.fromkeys(("keys", "second"), KEYS),
    "split": _one_of(("test", "validation")),
    "metrics": (
        lambda v: TEXTS[0](v) and set(v) <= set(MEASURED),
        f"a list of {', '.join(MEASURED)}",
    ),
    "costs": FLAG,
    "arms": ARMS,
    **dict.fromkeys(("blocks", "claims"), FILLED),
}
BLOCK = {
    "title": TEXT,
    "columns": TEXTS,
    "metric": _one_of(MEASURED),
    "lines": FILLED,
    "second": FLAG,
}
CLAIMS = {"metric": _one_of(ITEMS), "kind": _one_of(get_args(ClaimKind)), "second": FLAG}
CLAIMS |= {"over_all": TEXT, "rows": FILLED}


def load(name: str) -> Study:
    """The study of a YAML file or of a name. Raises ConfigError, which names file and key, for a
    key that is unknown, missing or of another kind, and for a cell or claim of no arm.
    """
    path = path_of(name)
    tree = _read(path, ())
    check = _checked(f"{path}: ", tree, STUDY, ("arms",))
    if not path.is_relative_to(FOLDER) and "recipes" in check:
        beside = path.parent / check["recipes"]
        if beside.is_dir():
            check["recipes"] = str(beside)
    check.setdefault("recipes", str(path.parent))
    if isinstance(seeds := check.get("seeds"), int):
        check["seeds"] = list(range(1, seeds + 1))
    check["arms"] = {arm: _arm(path, arm, keys) for arm, keys in check["arms"].items()}
    for key in ("keys", "second"):
        if key in check:
            check[key] = _keys(f"{path}: {key}", check[key])
    blocks, groups = enumerate(check.get("blocks", ())), enumerate(check.get("claims", ()))
    check["blocks"] = [_block(f"{path}: blocks.{k}.", block) for k, block in blocks]
    found = [one for k, group in groups for one in _claims(f"{path}: claims.{k}.", group)]
    check["claims"] = sorted(found, key=lambda claim: len(claim.better) == 1)  # over several first
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in check.items()}
    study = Study(**{"name": path.stem, "title": path.stem, **values})
    for at, _ in study.cells():
        if at.arm not in study.arms:
            known = settings.nearest(at.arm, study.arms)
            raise ConfigError(f"{path}: expected a cell of an arm, got {at.arm!r}; {known}")
        if at.width is not None and at.width not in study.widths:
            raise ConfigError(
                f"{path}: {at.arm}/{at.width}: expected a width of widths "
                f"{list(study.widths)}, got {at.width}"
            )
    return study


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tree of a file on top of its `base`: arms and keys are merged, all else is replaced."""
    if path in above:
        raise ConfigError(f"{path}: base studies form a circle")
    tree = settings.read_yaml(path)
    if isinstance(tree.get("arms"), list) and TEXTS[0](tree["arms"]):
        tree["arms"] = {Path(one).stem: {"recipe": one} for one in tree["arms"]}
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected a study file, got {reprlib.repr(base)}")
    beside = path.parent / base
    found = _read(beside if beside.is_file() else path_of(base), (*above, path))
    for key in ("arms", "keys"):
        if isinstance(tree.get(key), dict) and isinstance(found.get(key), dict):
            merged = dict(found[key])
            for name, value in tree[key].items():
                both = isinstance(value, dict) and isinstance(merged.get(name), dict)
                merged[name] = {**merged[name], **value} if both else value
            tree[key] = merged
    return {**found, **tree}


def _checked(
    place: str, tree: Any, known: Mapping[str, Check], needed: Sequence[str] = ()
) -> dict[str, Any]:
    """A mapping whose keys are known and whose values are of their kinds; else ConfigError."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}expected a mapping, got {reprlib.repr(tree)}")
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{place}{key}: unknown key; {settings.nearest(key, known)}")
        fits, words = known[key]
        if not fits(value):
            raise ConfigError(f"{place}{key}: expected {words}, got {reprlib.repr(value)}")
    for key in needed:
        if key not in tree:
            raise ConfigError(f"{place}{key}: expected {known[key][1]}, got nothing")
    return dict(tree)


def _arm(path: Path, name: str, tree: Any) -> Arm:
    place = f"{path}: arms.{name}"
    if not NAME[0](name):
        raise ConfigError(f"{place}: expected {NAME[1]}, got {name!r}")
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{place}: expected a mapping of keys, got {reprlib.repr(tree)}")
    keys = dict(tree or {})
    own = {key: keys.pop(key) for key in ("recipe", "schedule") if key in keys}
    own = {"recipe": name, **_checked(f"{place}.", own, {"recipe": TEXT, "schedule": TEXT})}
    if "task" in keys or "seed" in keys:
        raise ConfigError(f"{place}: task is the recipe's, seed the study's; leave them out")
    beside = path.parent / own["recipe"]
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        own["recipe"] = str(beside)
    return Arm(**own, keys=_keys(place, keys))


def _keys(place: str, tree: Keys) -> dict[str, Any]:
    """Dotted keys of the schema."""
    keys, known = settings.in_full(settings.flatten(tree)), settings.keys()
    for key in keys:
        if key not in known:
            raise ConfigError(f"{place}: unknown key {key!r}; {settings.correction(key, known)}")
    return keys


def _block(place: str, tree: Any) -> BlockSpec:
    check = _checked(place, tree, BLOCK, ("title", "columns", "metric", "lines"))
    lines, columns = [], len(check["columns"])
    for number, line in enumerate(check["lines"]):
        at = f"{place}lines.{number}"
        if not isinstance(line, list) or len(line) != 2 + columns:
            wanted = f"[NAME, KIND] and {columns} cells"
            raise ConfigError(f"{at}: expected {wanted}, got {reprlib.repr(line)}")
        name, kind, *cells = line
        if kind not in get_args(RowKind):
            known = ", ".join(get_args(RowKind))
            raise ConfigError(f"{at}: expected a kind of {known}, got {kind!r}")
        lines.append(Line(str(name), kind, tuple(c if c is None else _at(at, c) for c in cells)))
    return BlockSpec(**{**check, "columns": tuple(check["columns"]), "lines": tuple(lines)})


def _claims(place: str, tree: Any) -> list[Claim]:
    """The claims of a group and, with over_all, the claim over all of them."""
    check = _checked(place, tree, CLAIMS, ("rows",))
    shared = {key: check[key] for key in ("metric", "kind", "second") if key in check}
    claims = []
    for number, row in enumerate(check["rows"]):
        at = f"{place}rows.{number}"
        if not isinstance(row, list) or len(row) != 4 or not all(map(TEXT[0], row[:2])):
            raise ConfigError(
                f"{at}: expected [CODE, CLAIM, CELL, CELL], all text, got {reprlib.repr(row)}"
            )
        better, worse = (_at(at, cell) for cell in row[2:])
        if better == worse:
            raise ConfigError(f"{at}: expected two different cells, got {row[2]!r} twice")
        code, text = row[:2]
        claims.append(Claim(code, text, (better,), (worse,), **shared))
    if "over_all" in check:
        better, worse = zip(*((*claim.better, *claim.worse) for claim in claims), strict=True)
        text = f"over all: {check['over_all']}"
        claims.append(Claim(claims[0].code, text, better, worse, **shared))
    return claims


def _at(place: str, text: Any) -> At:
    match = _CELL.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(
            f"{place}: expected a cell ARM, ARM/WIDTH, ARM/WIDTH@PHASE or ARM/WIDTH@PHASE (PAPER), "
            f"got {reprlib.repr(text)}"
        )
    arm, width, phase, paper = match.groups()
    return At(
        arm,
        int(width) if width else None,
        float(paper) if paper else None,
        int(phase) if phase else LAST,
    )


def adjusted(
    studies: Sequence[Study], options: Keys, common: Keys, special: Mapping[str, Keys]
) -> list[Study]:
    """The studies with the options and keys of a command line; raises ConfigError.

    special: keys of the runs of one task, by its name, and of those on the "second" data source.
    """
    if "second" in special and not any(
        not study.blocks or any(block.second for block in study.blocks) for study in studies
    ):
        shown = ", ".join(study.name for study in studies)
        raise ConfigError(f"--second.KEY: no second data source in {shown}; table2 has one")
    return [_adjusted(study, options, common, special) for study in studies]


def _adjusted(study: Study, options: Keys, common: Keys, special: Mapping[str, Keys]) -> Study:
    options = {name: value for name, value in options.items() if value is not None}
    changes: dict[str, Any] = {"recipes": options.get("scale", study.recipes)}
    if {"seeds", "first_seed"} & options.keys():
        count = options.get("seeds", len(study.seeds))
        first = options.get("first_seed", study.seeds[0])
        for option, value, least in (("--seeds", count, 1), ("--first-seed", first, 0)):
            if value < least:
                raise ConfigError(f"{option}: at least {least}, got {value}")
        changes["seeds"] = tuple(range(first, first + count))
    if text := options.get("widths"):
        widths = _listed(text, "--widths", f"some of {list(study.widths)}", study.widths)
        if not widths.keys() & {at.width for at, _ in study.cells()}:
            raise ConfigError(f"--widths: {study.name} has no cell of {text}; add another width")
        changes["widths"] = tuple(width for width in study.widths if width in widths)
    if text := options.get("resolutions"):
        if study.blocks:
            raise ConfigError(f"--resolutions: the cells of {study.name} have one resolution")
        sides = _listed(text, "--resolutions", "pixels of 8 and more", range(8, 10_000))
        changes["resolutions"] = tuple(sides)
    if teachers := options.get("teachers"):
        if teachers not in ("each", "one"):
            raise ConfigError(f"--teachers: expected each or one, got {teachers!r}")
        changes["one_teacher"] = teachers == "one"
    study = replace(study, **changes)
    own = {"task", "seed", *RUN_SETTINGS.values()}.union(*(a.keys for a in study.arms.values()))
    if any(arm.schedule for arm in study.arms.values()) and study.schedules:
        own.add("optim.phases")  # the schedules are read before anything is timed
    own |= {DIVIDE} if study.widths else set()
    own |= {SIZE, "data.crop_size"} if study.resolutions else set()
    fixed = [key for keys in (common, *special.values()) for key in keys if key in own]
    if fixed:
        raise ConfigError(
            f"--{fixed[0]}: the arms of {study.name} set it; leave it out, or copy the study and "
            "change it there"
        )
    tasks = dict(special)
    second = study.second
    if "second" in tasks:
        second = {**(second or {}), **tasks.pop("second")}
    study = replace(study, keys={**study.keys, **common}, second=second, tasks=tasks)
    kept = study.sources
    return replace(
        study,
        blocks=tuple(block for block in study.blocks if block.second in kept),
        claims=tuple(claim for claim in study.claims if claim.second in kept),
    )


def _listed(text: str, option: str, words: str, known: Sequence[int]) -> dict[int, None]:
    """The numbers of an option's value, in their order."""
    found = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) in known for word in found):
        raise ConfigError(f"{option}: expected {words}, as in 16,8, got {text!r}")
    return dict.fromkeys(map(int, found))


def comparison(words: Sequence[str], scale: str, folder: str) -> Study:
    """A study with a row per recipe: words are names of recipes in the folder (below a packaged
    scale, below a path, or a path itself), or paths of recipes. Its claims are those of the
    packaged studies whose arms are compared. Raises ConfigError.
    """
    places = (settings.RECIPES / scale / folder, Path(scale) / folder, Path(folder))
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        known = sorted(f.name for f in (settings.RECIPES / scale).glob("*/") if f.is_dir())
        raise ConfigError(
            f"--folder {folder}: no such folder of recipes below {scale}; "
            f"{settings.nearest(folder, known)}"
        )
    known = [f.stem for f in sorted(place.glob("[!_]*.yaml"))]
    arms: dict[str, Arm] = {}
    for word in words:
        if word not in known and Path(word).suffix not in (".yaml", ".yml"):
            raise ConfigError(f"no method {word!r} in {place}; {settings.nearest(word, known)}")
        name = word if word in known else Path(word).stem
        if arms.setdefault(name, Arm(word)).recipe != word:
            raise ConfigError(f"{name}: two recipes of that name; rename one, or compare it alone")
    packaged = place.is_relative_to(settings.RECIPES)
    recipes = place.relative_to(settings.RECIPES).as_posix() if packaged else str(place)
    study = Study(
        name="comparison", arms=arms, recipes=recipes, title="methods under one budget",
        source=f"kdtrain compare, {recipes}", subject="Methods", runs="compare", costs=True,
    )  # fmt: skip
    if not study.students:
        raise ConfigError(
            f"{', '.join(study.arms)}: only teachers of each other; name a student's method"
        )
    claims = [
        claim
        for name in names()
        for claim in load(name).claims
        if {at.arm for at in (*claim.better, *claim.worse)} <= set(study.students)
    ]
    return replace(study, claims=tuple(claims))
