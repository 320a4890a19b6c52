"""A study: arms that are trained over seeds, the table that they fill and the claims about them.

study_file.py reads one from YAML. Here its runs are worked out: every arm at every width,
resolution, seed and data source, each a stage of pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from kdtrain.config import RUN_SETTINGS, ConfigError, settings
from kdtrain.experiments import pipeline
from kdtrain.reports.tables.data import RowKind

SCHEDULES = "_tables.yaml"
METRICS = {
    "top1": "top-1",
    "nn_top1": "NN top-1",
    "nn_top1_other_video": "NN, other videos",
    "pair_accuracy": "pairs",
    "tar_at_far_0.01_all": "TAR@1e-2",
    "tar_at_far_0.001_all": "TAR@1e-3",
    "tar_at_far_0.0001_all": "TAR@1e-4",
    "asym_nn_top1": "asym. NN",
    "asym_nn_top1_other_video": "asym. NN, other videos",
    "asym_pair_accuracy": "asym. pairs",
    "asym_tar_at_far_0.001_all": "asym. TAR@1e-3",
    "nrmse": "NRMSE",
}
"""Columns of a table with a row per arm, where any run has them."""
ITEMS = ("top1", "nn_top1", "nn_top1_other_video", "pair_accuracy", "nrmse", "hint")
"""Metrics by which a claim is judged: a number per image, or per pair."""
LAST = -1  # the end of a run; 0 is the end of its first phase
AT_PHASE_ENDS = 10_000  # epochs between evaluations; the end of a phase is always evaluated
CACHE = "float32"  # teacher.cache of students: bitwise identical to online training
SIZE, DIVIDE, TEACHER = "data.input_size", "model.divide", "teacher"
ClaimKind = Literal["better", "worse", "neutral", "at_least"]
Rank = tuple[bool, int, bool]
Keys = Mapping[str, Any]
"""Dotted keys of the schema, or options, with their values."""


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
    keys: Keys = field(default_factory=dict)
    """On top of the recipe."""


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
    """Arms, seeds, data and table of a study. Without `blocks` the table has a row per arm."""

    name: str
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
    keys: Keys = field(default_factory=dict)
    """Of every run."""
    tasks: Mapping[str, Keys] = field(default_factory=dict)
    """Of the runs of one task, on top."""
    second: Keys | None = None
    """Of the second data source; None: there is none."""
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
    def flat(self) -> Mapping[str, Keys]:
        """Dotted keys of every arm and of every recipe that an arm takes a run from (@NAME: an arm,
        or a recipe beside it or in the folder above), by name. Raises ConfigError for one that is
        not there, and for two of one name that differ.
        """
        found: dict[str, Keys] = {}
        origins: dict[str, Path] = {}
        read = cache(settings.read_recipe)
        waiting = [(name, self._file(arm.recipe), arm.keys) for name, arm in self.arms.items()]
        for name, path, keys in waiting:  # which grows
            flat = {**(read(path) if path.name else {}), **keys}
            if found.get(name, flat) != flat:
                both = f"{origins[name]} and {path}"
                raise ConfigError(f"{name}: {both} differ and would be one run; rename one")
            if name in found:
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

    @cached_property
    def _own_side(self) -> Callable[[str, bool], int]:
        def of(arm: str, second: bool) -> int:
            return self.stage(Run(arm, 0, second=second)).config.data.input_size

        return cache(of)

    def stage(self, run: Run) -> pipeline.Stage:
        """A run as a stage. Raises ConfigError where a recipe or key does not fit."""
        arm, flat = self.arms.get(run.arm, Arm("")), dict(self.flat[run.arm])
        task = self.tasks.get(flat.get("task", "classification"), {})
        second = dict(self.second or {}) if run.second else {}
        if second.get("data.kind") == "synthetic":
            second["data.root"] = None  # that of the first source
        own = {**arm.keys, **self.keys, **task, **second}
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
                width = at.width or next(iter(self.widths), None)
                if width is None or width in self.widths:
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

    def cells(self, second: bool | None = None) -> Iterator[tuple[At, bool]]:
        """The cells of the table and of its claims, on one data source or (None) on both, and
        whether they are beyond the paper.
        """
        for block in self.blocks:
            if second in (None, block.second):
                for line in block.lines:
                    yield from ((at, line.kind == "extra") for at in line.places if at)
        for claim in self.claims:
            if second in (None, claim.second):
                yield from ((at, False) for at in (*claim.better, *claim.worse))


def inputs_of(flat: Keys, keys: Sequence[str] = ()) -> list[str]:
    """The names behind @ in the settings that name runs; keys: these settings alone."""
    values = [flat.get(key) for key in keys or RUN_SETTINGS.values()]
    every = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(v[1:] for v in every if isinstance(v, str) and v.startswith("@")))


def _folder(recipes: str) -> Path:
    packaged = settings.RECIPES / recipes
    return packaged if packaged.is_dir() and Path(recipes) != Path() else Path(recipes)


def where(second: bool) -> str:
    """Names the second data source, behind a title."""
    return ", second data source" if second else ""


def pixels(side: int | None) -> str:
    """Names a resolution, behind a title; nothing for the recipes' own."""
    return "" if side is None else f", {side} pixels"
