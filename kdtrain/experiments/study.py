"""A study: arms that are trained over seeds, the table that they fill and the claims about them.

A study is a YAML file (docs/studies.md); those of recipes/studies have a name. Here it is read and
checked, and its runs are worked out: every arm at every width, resolution, seed and data source.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from kdtrain.config import RUN_SETTINGS, ConfigError, settings
from kdtrain.experiments import pipeline
from kdtrain.reports.tables.data import ROW_KINDS, RowKind

FOLDER = settings.RECIPES / "studies"
SCHEDULES = "_tables.yaml"
LAST = -1  # the end of a run; 0 is the end of its first phase
AT_PHASE_ENDS = 10_000  # epochs between evaluations; the end of a phase is always evaluated
CACHE = "float32"  # teacher.cache of students: bitwise identical to online training
SIZE, DIVIDE, TEACHER = "data.input_size", "model.divide", "teacher"
ClaimKind = Literal["better", "worse", "neutral", "at_least"]
Rank = tuple[bool, int, bool]
_CELL = re.compile(r"([^\s/@()]+)(?:/(\d+))?(?:@(\d+))?(?: \(([\d.]+)\))?")


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    arm: str
    seed: int
    width: int | None = None
    """Division of the kernels, where the recipe or the arm does not set it."""
    side: int | None = None
    """data.input_size, where it is not the recipe's own."""
    second: bool = False

    @property
    def name(self) -> str:
        """Its stage and run directory: th_kd_s1, cls_soft_8_s1 (1/8 of the kernels), th_kd_r16_s1
        (16 pixels), b_th_kd_s1 (second data source).
        """
        width = "" if self.width is None else f"_{self.width}"
        side = "" if self.side is None else f"_r{self.side}"
        return f"{'b_' if self.second else ''}{self.arm}{width}{side}_s{self.seed}"


@dataclass(frozen=True)
class Arm:
    """A recipe with further keys."""

    recipe: str
    """Name of a recipe in the study's folder, or of a packaged one, or a path; "": keys alone."""
    schedule: str | None = None
    """Phases of the folder's _tables.yaml, as classification.scratch; None: the recipe's."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys on top of the recipe."""


@dataclass(frozen=True)
class At:
    """The source of a number: an arm, its width or resolution, and the phase at whose end it is
    read.
    """

    arm: str
    width: int | None = None
    paper: float | None = None
    """In percent."""
    phase: int = LAST
    side: int | None = None


@dataclass(frozen=True)
class Line:
    """A row: one place for each column of its block."""

    name: str
    kind: RowKind
    places: tuple[At | None, ...]
    """None: the table has no such cell."""


@dataclass(frozen=True)
class BlockSpec:
    """Rows that share columns."""

    title: str
    columns: tuple[str, ...]
    metric: str
    lines: tuple[Line, ...]
    second: bool = False
    """On the second data source."""
    metrics: tuple[str, ...] = ()
    """One per column, where the block has no metric of its own."""


@dataclass(frozen=True)
class Claim:
    """A trend as a comparison of `better` with `worse`; of several pairs the mean counts."""

    code: str
    text: str
    better: tuple[At, ...]
    worse: tuple[At, ...]
    metric: str | None = None
    """None: each metric of the table that is measured per item."""
    kind: ClaimKind = "better"
    """worse: the claim is that `better` does worse."""
    second: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained and shown. With `blocks` the table has these cells; else a row per arm."""

    name: str
    """Of its files."""
    arms: Mapping[str, Arm]
    recipes: str = ""
    """Folder of the arms' recipes: a packaged preset, or a path."""
    title: str = ""
    source: str = ""
    """The line below the title."""
    subject: str = "Study"
    """Of the HTML page."""
    runs: str = ""
    """Studies with this word share the run directory runs/WORD-RECIPES; "": runs/NAME."""
    seeds: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = ()
    """Divisions of the kernels, in the order in which a budget is spent."""
    resolutions: tuple[int, ...] = ()
    """Sides of the arms' input; empty: each recipe's own."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of every run."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Dotted keys of the runs of one task, on top."""
    second: Mapping[str, Any] | None = None
    """Dotted keys of the second data source; None: there is none."""
    one_teacher: bool = False
    """The teachers of the first seed serve every seed."""
    split: Literal["test", "validation"] = "test"
    """The images that are measured."""
    metrics: tuple[str, ...] = ()
    """Columns of a table with a row per arm; empty: those that the runs have."""
    costs: bool = False
    """Also show parameters, multiply-adds, images per second and the length of training."""
    blocks: tuple[BlockSpec, ...] = ()
    claims: tuple[Claim, ...] = ()

    @cached_property
    def flat(self) -> Mapping[str, Mapping[str, Any]]:
        """Dotted keys of every arm and of every recipe that an arm takes a run from (@NAME: an arm,
        or a recipe beside it or in the folder above), by name. Raises ConfigError for one that is
        not there, and for two of one name that differ.
        """
        found: dict[str, dict[str, Any]] = {}
        origins: dict[str, Path] = {}
        read = cache(settings.read_recipe)
        waiting = [(name, self._file(arm.recipe), arm.keys) for name, arm in self.arms.items()]
        while waiting:
            name, path, keys = waiting.pop(0)
            flat = {**(read(path) if path.name else {}), **keys}
            if name in found:
                if flat != found[name]:
                    raise ConfigError(
                        f"{name}: {origins[name]} and {path} differ and would be one run; rename "
                        "one"
                    )
                continue
            origins[name], found[name] = path, flat
            for needed in inputs_of(flat):
                places = (path.parent / f"{needed}.yaml", path.parent.parent / f"{needed}.yaml")
                beside = next((place for place in places if place.is_file()), None)
                if needed in self.arms and (beside is None or self.arms[needed].keys):
                    continue
                if beside is None:
                    raise ConfigError(
                        f"{name}: takes @{needed}, and there is no arm of that name and no recipe "
                        f"{places[0]}"
                    )
                waiting.append((needed, beside, {}))
        return found

    def _file(self, recipe: str) -> Path:
        """The file of a recipe's name or path; none for ""."""
        if not recipe:
            return Path()
        beside = _folder(self.recipes) / f"{recipe}.yaml"
        return beside if beside.is_file() else settings.recipe_path(recipe)

    @cached_property
    def schedules(self) -> Mapping[str, list[dict[str, float]]]:
        """The phases of the folder by name, as classification.scratch; raises ConfigError."""
        path = _folder(self.recipes) / SCHEDULES
        if not path.is_file():
            known = sorted(f.parent.name for f in settings.RECIPES.glob(f"*/{SCHEDULES}"))
            raise ConfigError(
                f"--scale {self.recipes}: no {path}; {settings.nearest(self.recipes, known)}"
            )
        found = settings.flatten(settings.read_yaml(path))
        both = found["classification.scratch"] + found["classification.initialised"]
        return {"classification.both": both, **found}

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """The arms and inputs that an arm learns from or is searched among, in the order of the
        arms; an input of the name "teacher" too.
        """
        keys = ("teacher.run", "teacher.more", "eval.gallery")
        named = [name for arm in self.arms for name in inputs_of(self.flat[arm], keys)]
        own = (n for arm in self.arms for n in inputs_of(self.flat[arm]) if n == TEACHER)
        return tuple(dict.fromkeys([*named, *own]))

    @property
    def root(self) -> Path:
        """The default run directory."""
        name = f"{self.runs}-{Path(self.recipes).name}" if self.runs else self.name
        return Path("runs") / name

    @property
    def students(self) -> tuple[str, ...]:
        """The arms that are no other's teacher."""
        return tuple(name for name in self.arms if name not in self.teachers)

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of a table with a row per arm."""
        return (*self.students, *self.teachers)

    def kind(self, arm: str) -> RowKind:
        """teacher; control: takes nothing from another run but a gallery; paper: every other."""
        if arm in self.teachers:
            return "teacher"
        flat = self.flat[arm]
        taken = any(flat.get(k) for k in RUN_SETTINGS.values() if k != "eval.gallery")
        return "paper" if taken else "control"

    @property
    def sources(self) -> tuple[bool, ...]:
        """Whether each data source is the second."""
        return (False,) if self.second is None else (False, True)

    def run_of(self, at: At, seed: int, second: bool) -> Run:
        """The run behind a place. A teacher and an arm that sets model.divide have one width;
        teachers and inputs have the resolution of their recipe.
        """
        if self.one_teacher and at.arm in self.teachers:
            seed = self.seeds[0]
        arm, side = self.arms.get(at.arm), at.side
        width = at.width if arm is None or DIVIDE not in arm.keys else None
        own = arm is None or at.arm in self.teachers
        if side is not None and (own or side == self._own_side(at.arm, second)):
            side = None
        return Run(at.arm, seed, width, side, second)

    def of(self, at: At, second: bool) -> list[Run]:
        """The runs behind a place, one per seed; a shared teacher is one run."""
        return list(dict.fromkeys(self.run_of(at, seed, second) for seed in self.seeds))

    def _own_side(self, arm: str, second: bool) -> int:
        if (arm, second) not in self._sides:
            self._sides[arm, second] = self.stage(Run(arm, 0, second=second)).config.data.input_size
        return self._sides[arm, second]

    @cached_property
    def _sides(self) -> dict[tuple[str, bool], int]:
        return {}

    def stage(self, run: Run) -> pipeline.Stage:
        """A run as a stage. Raises ConfigError where a recipe or key does not fit."""
        arm, flat = self.arms.get(run.arm, Arm("")), dict(self.flat[run.arm])
        task = self.tasks.get(flat.get("task", "classification"), {})
        own = {**arm.keys, **self.keys, **task, **((self.second or {}) if run.second else {})}
        if {**flat, **own}.get("train.early_stop") is None:
            flat["train.eval_every"] = AT_PHASE_ENDS
        if flat.get("teacher.run") is not None:
            flat.setdefault("teacher.cache", CACHE)
        if arm.schedule is not None:
            if arm.schedule not in self.schedules:
                known = settings.nearest(arm.schedule, self.schedules)
                raise ConfigError(
                    f"{self.name}: arms.{run.arm}.schedule: no {arm.schedule!r} in "
                    f"{_folder(self.recipes) / SCHEDULES}; {known}"
                )
            flat["optim.phases"] = [dict(phase) for phase in self.schedules[arm.schedule]]
        if run.width is not None:
            flat[DIVIDE] = run.width
        flat |= {**own, "seed": run.seed}
        if run.side is not None:
            try:
                whole = settings.build(flat)
            except ConfigError as error:
                raise ConfigError(f"{run.name}: {error}") from None
            # the same crop at another resolution, and the teacher as it was
            flat |= {SIZE: run.side, "data.crop_size": whole.data.crop_side}
            if whole.teacher.run is not None:
                flat["teacher.input_size"] = whole.teacher_side

        def beside(name: str) -> str:
            here = isinstance(name, str) and name.startswith("@")
            return f"@{self._input(run, name[1:]).name}" if here else name

        return pipeline.make_stage(run.name, pipeline.rename_runs(flat, beside), run.name)

    def _input(self, run: Run, name: str) -> Run:
        """The run of an arm or input that a run reads: of its seed, width and data source."""
        return self.run_of(At(name, run.width), run.seed, run.second)

    def chain(self, run: Run, above: tuple[str, ...] = ()) -> Iterator[Run]:
        """A run after every run that it needs. Raises ConfigError for a circle."""
        if run.arm in above:
            raise ConfigError(f"recipes wait for each other: {', '.join((*above, run.arm))}")
        for name in inputs_of(self.flat[run.arm]):
            yield from self.chain(self._input(run, name), (*above, run.arm))
        yield run

    def places(self, second: bool) -> list[tuple[Rank, str, At]]:
        """Rank, label and place of everything that is trained, in the order in which a budget is
        spent: the second data source last, the widths in their order, rows beyond the paper after
        the paper's; controls first.
        """
        found = []
        if self.blocks:
            for at, extra in self.cells(second):
                if at.width is None or at.width in self.widths:
                    width = next(iter(self.widths), None) if at.width is None else at.width
                    size = "" if width is None else f", 1/{width}"
                    rank = second, self.widths.index(width) if width else 0, extra
                    label = f"{self.name}{size}{', further rows' if extra else ''}{where(second)}"
                    found.append((rank, label, at))
            return sorted(found, key=lambda one: one[0])
        for arm in sorted(self.students, key=lambda name: self.kind(name) != "control"):
            for side in self.resolutions or (None,):
                label = f"{arm}{pixels(side)}{where(second)}"
                found.append(((second, 0, False), label, At(arm, side=side)))
        teachers = (((second, 0, False), f"{n}{where(second)}", At(n)) for n in self.teachers)
        return [*found, *teachers]

    def cells(self, second: bool) -> Iterator[tuple[At, bool]]:
        """The cells of the table and of its claims, and whether they are beyond the paper."""
        for block in self.blocks:
            if block.second == second:
                for line in block.lines:
                    yield from ((at, line.kind == "extra") for at in line.places if at)
        for claim in self.claims:
            if claim.second == second:
                yield from ((at, False) for at in (*claim.better, *claim.worse))


def inputs_of(flat: Mapping[str, Any], keys: Sequence[str] = ()) -> list[str]:
    """The names behind @ in the settings that name runs; keys: these settings alone."""
    values = [flat.get(key) for key in keys or RUN_SETTINGS.values()]
    every = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(v[1:] for v in every if isinstance(v, str) and v.startswith("@")))


def _folder(recipes: str) -> Path:
    packaged = settings.RECIPES / recipes
    return packaged if packaged.is_dir() else Path(recipes)


def where(second: bool) -> str:
    """Names the second data source, behind a title."""
    return ", second data source" if second else ""


def pixels(side: int | None) -> str:
    """Names a resolution, behind a title; nothing for the recipes' own."""
    return "" if side is None else f", {side} pixels"


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
ITEMS: Check = lambda v: isinstance(v, list) and bool(v), "a list that is not empty"
TEXTS: Check = lambda v: ITEMS[0](v) and all(TEXT[0](one) for one in v), "a list of texts"
KEYS: Check = lambda v: isinstance(v, dict), "a mapping of keys"
ARMS: Check = lambda v: KEYS[0](v) or TEXTS[0](v), "a mapping of arms, or a list of recipes' names"


def _number(least: int) -> Check:
    return lambda v: type(v) is int and v >= least, f"a whole number of at least {least}"


def _numbers(least: int) -> Check:
    one = _number(least)[0]
    return (
        lambda v: ITEMS[0](v) and all(map(one, v)) and len(set(v)) == len(v),
        f"a list of different whole numbers of at least {least}",
    )


def _one_of(values: Sequence[str]) -> Check:
    return lambda v: v in values, f"one of {', '.join(values)}"


STUDY: Mapping[str, Check] = {
    **dict.fromkeys(("title", "source", "subject", "runs", "recipes"), TEXT),
    "seeds": (lambda v: _number(1)[0](v) or _numbers(0)[0](v), "a number, or a list of seeds"),
    "widths": _numbers(1),
    "resolutions": _numbers(8),
    **dict.fromkeys(("keys", "second"), KEYS),
    "split": _one_of(("test", "validation")),
    "metrics": TEXTS,
    "costs": FLAG,
    "arms": ARMS,
    **dict.fromkeys(("blocks", "claims"), ITEMS),
}
BLOCK = {"title": TEXT, "columns": TEXTS, "metric": TEXT, "lines": ITEMS, "second": FLAG}
CLAIMS = {"metric": TEXT, "kind": _one_of(get_args(ClaimKind)), "second": FLAG}
CLAIMS |= {"over_all": TEXT, "rows": ITEMS}


def load(name: str) -> Study:
    """The study of a YAML file or of a name. Raises ConfigError, which names file and key, for a
    key that is unknown, missing or of another kind, and for a cell or claim of no arm.
    """
    path = path_of(name)
    tree = _read(path, ())
    check = _checked(f"{path}: ", tree, STUDY, ("arms",))
    if not path.is_relative_to(FOLDER) and "recipes" in check:
        beside = path.parent / check["recipes"]
        if not (settings.RECIPES / check["recipes"]).is_dir() and beside.is_dir():
            check["recipes"] = str(beside)
    check.setdefault("recipes", str(path.parent))
    if isinstance(seeds := check.get("seeds"), int):
        check["seeds"] = list(range(1, seeds + 1))
    check["arms"] = {arm: _arm(path, arm, keys) for arm, keys in check["arms"].items()}
    for key in ("keys", "second"):
        if key in check:
            check[key] = settings.in_full(settings.flatten(check[key]))
    blocks = enumerate(check.pop("blocks", ()))
    check["blocks"] = [_block(f"{path}: blocks.{k}.", block) for k, block in blocks]
    groups = enumerate(check.pop("claims", ()))
    found = [one for k, group in groups for one in _claims(f"{path}: claims.{k}.", group)]
    check["claims"] = sorted(found, key=lambda claim: len(claim.better) == 1)  # over several first
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in check.items()}
    study = Study(**{"name": path.stem, "title": path.stem, **values})
    cells = [at for second in (False, True) for at, _ in study.cells(second)]
    for at in cells:
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
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{place}: expected a mapping of keys, got {reprlib.repr(tree)}")
    keys = settings.in_full(settings.flatten(tree or {}))
    own = {key: keys.pop(key) for key in ("recipe", "schedule") if key in keys}
    own = _checked(f"{place}.", own, {"recipe": TEXT, "schedule": TEXT})
    if "task" in keys or "seed" in keys:
        raise ConfigError(f"{place}: task is the recipe's, seed the study's; leave them out")
    recipe = own.setdefault("recipe", name)
    beside = path.parent / recipe
    if beside.suffix in (".yaml", ".yml") and beside.is_file():
        own["recipe"] = str(beside)
    known = settings.keys()
    for key in keys:
        if key not in known:
            raise ConfigError(f"{place}: {settings.unknown(key)}")
    return Arm(**own, keys=keys)


def _block(place: str, tree: Any) -> BlockSpec:
    check = _checked(place, tree, BLOCK, ("title", "columns", "metric", "lines"))
    lines = []
    for number, line in enumerate(check["lines"]):
        wanted = f"[NAME, KIND] and {len(check['columns'])} cells"
        if not isinstance(line, list) or len(line) != 2 + len(check["columns"]):
            raise ConfigError(f"{place}lines.{number}: expected {wanted}, got {reprlib.repr(line)}")
        name, kind, *cells = line
        if kind not in ROW_KINDS:
            known = ", ".join(ROW_KINDS)
            raise ConfigError(f"{place}lines.{number}: expected a kind of {known}, got {kind!r}")
        at = f"{place}lines.{number}"
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
        claims.append(Claim(*row[:2], *((_at(at, cell),) for cell in row[2:]), **shared))
    if "over_all" in check:
        better, worse = (tuple(getattr(c, arm)[0] for c in claims) for arm in ("better", "worse"))
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
    studies: Sequence[Study],
    options: Mapping[str, Any],
    common: Mapping[str, Any],
    special: Mapping[str, Mapping[str, Any]],
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


def _adjusted(
    study: Study,
    options: Mapping[str, Any],
    common: Mapping[str, Any],
    special: Mapping[str, Mapping[str, Any]],
) -> Study:
    changes: dict[str, Any] = {}
    if (scale := options.get("scale")) is not None:
        changes["recipes"] = scale
    count, first = options.get("seeds"), options.get("first_seed")
    if count is not None or first is not None:
        count = len(study.seeds) if count is None else count
        first = study.seeds[0] if first is None else first
        for option, value, least in (("--seeds", count, 1), ("--first-seed", first, 0)):
            if value < least:
                raise ConfigError(f"{option}: at least {least}, got {value}")
        changes["seeds"] = tuple(range(first, first + count))
    if (text := options.get("widths")) is not None:
        widths = _listed(text, "--widths", f"some of {list(study.widths)}", study.widths)
        if not widths.keys() & {
            at.width for second in (False, True) for at, _ in study.cells(second)
        }:
            raise ConfigError(f"--widths: {study.name} has no cell of {text}; add another width")
        changes["widths"] = tuple(width for width in study.widths if width in widths)
    if (text := options.get("resolutions")) is not None:
        if study.blocks:
            raise ConfigError(f"--resolutions: the cells of {study.name} have one resolution")
        sides = _listed(text, "--resolutions", "pixels of 8 and more", range(8, 10_000))
        changes["resolutions"] = tuple(sides)
    if (teachers := options.get("teachers")) is not None:
        if teachers not in ("each", "one"):
            raise ConfigError(f"--teachers: expected each or one, got {teachers!r}")
        changes["one_teacher"] = teachers == "one"
    study = replace(study, **changes)
    own = {"task", "seed", *RUN_SETTINGS.values()}
    own |= {key for arm in study.arms.values() for key in arm.keys}
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
    second = study.second
    if "second" in special:
        second = {**(second or {}), **special["second"]}
    study = replace(
        study,
        keys={**study.keys, **common},
        second=second,
        tasks={name: keys for name, keys in special.items() if name != "second"},
    )
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
