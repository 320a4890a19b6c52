"""What is asked of a reproduction, and the runs of tables 1 to 5 that it takes as pipeline stages:
every width, seed and data source, in the order in which a budget is spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kdtrain.config import SETTINGS, ConfigError, settings
from kdtrain.experiments import pipeline
from kdtrain.experiments.campaign import Group, grouped
from kdtrain.experiments.study import where
from kdtrain.experiments.tables.paper import FULL, PARTS, WIDTHS, At, TableSpec, table_specs

SCHEDULES = "_tables.yaml"
# In this order a budget is spent: alignment is the cheapest table, the second table the dearest.
TABLE_ORDER = ("table3", "table1", "table4", "table5", "table2")
NARROWEST_FIRST = (8, 4, 2)
NARROWEST = 8  # the width of tables 1 and 3
AT_PHASE_ENDS = 10_000  # epochs between evaluations; the end of a phase is always evaluated
TABLES = tuple(table_specs())
OWN = tuple(setting.key for setting in SETTINGS if setting.own)
"""What makes the cells of a table what they are."""


@dataclass(frozen=True)
class RunOf:
    """One run of a reproduction."""

    part: str
    width: int
    seed: int
    second: bool = False

    @property
    def name(self) -> str:
        """Its stage and folder: cls_soft_8_s1, on the second data source b_cls_soft_8_s1."""
        width = "" if self.width == FULL else f"_{self.width}"
        return f"{'b_' if self.second else ''}{self.part}{width}_s{self.seed}"


@dataclass(frozen=True)
class Request:
    """What is to be reproduced, and how."""

    tables: tuple[str, ...]
    scale: str = "two-cores"
    seeds: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = WIDTHS
    common: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of every run, those of the data among them."""
    second: Mapping[str, Any] | None = None
    """Dotted keys of the second data source; None: there is none."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Dotted keys of the runs of one task, on top of common."""
    shared_teachers: bool = False
    """One teacher, of the first seed, for the students of every seed."""
    cache: str = "float32"
    """teacher.cache of the students."""

    @property
    def specs(self) -> dict[str, TableSpec]:
        """Every table, by name, those of the second data source where there is one."""
        return table_specs(self.second is not None)

    def run_of(self, at: At, seed: int, second: bool) -> RunOf:
        """The run that a cell reads for one seed."""
        if not PARTS[at.part].full_width:
            return RunOf(at.part, at.width, seed, second)
        return RunOf(at.part, FULL, self.seeds[0] if self.shared_teachers else seed, second)


def request_from(
    options: Mapping[str, Any], common: Mapping[str, Any], special: Mapping[str, Mapping[str, Any]]
) -> Request:
    """The request that a command line makes; raises ConfigError.

    special: keys of the runs of one task, by its name, and of those on the "second" data source.
    """
    names = list(dict.fromkeys(options["tables"]))
    if "all" in names:
        names = sorted(TABLES)
    for name in names:
        if name not in TABLES:
            raise ConfigError(f"no table {name!r}; {settings.nearest(name, [*TABLES, 'all'])}")
    fixed = [key for keys in (common, *special.values()) for key in OWN if key in keys]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} is each run's own in the tables; leave --{fixed[0]} out (schedules: a "
            "--scale folder of your own)"
        )
    if "second" in special and "table2" not in names:
        raise ConfigError("--second.KEY: only table2 has a second data source; ask for it too")
    count, first = options.get("seeds", 3), options.get("first_seed", 1)
    if count < 1 or first < 0:
        raise ConfigError(f"--seeds, --first-seed: at least 1 and 0, got {count} and {first}")
    text = options.get("widths") or "2,4,8"
    widths = [int(part) for part in text.split(",") if part.strip().isdigit()]
    if not widths or not set(widths) <= set(WIDTHS) or len(widths) != text.count(",") + 1:
        raise ConfigError(f"--widths: expected some of 2,4,8, as --widths 8,4; got {text!r}")
    narrow = [name for name in names if name in ("table1", "table3")]
    if narrow and NARROWEST not in widths:
        raise ConfigError(f"--widths: {narrow[0]} is of the student of 1/{NARROWEST}; add it")
    teachers = options.get("teachers") or "each"
    if teachers not in ("each", "one"):
        raise ConfigError(f"--teachers: expected each or one, got {teachers!r}")
    scale = options.get("scale") or "two-cores"
    schedules(scale)  # known, before anything is timed
    return Request(
        tables=tuple(names),
        scale=scale,
        seeds=tuple(range(first, first + count)),
        widths=tuple(sorted(set(widths))),
        common=common,
        second=special.get("second"),
        tasks={name: keys for name, keys in special.items() if name != "second"},
        shared_teachers=teachers == "one",
        cache=options.get("cache") or "float32",
    )


def groups(request: Request) -> list[Group[RunOf]]:
    """The runs of every cell for all seeds, and what they start from or learn from, by priority:
    the narrowest student first, rows that the paper does not have last, the second data source at
    the very end.
    """
    ranked: dict[tuple[int, ...], tuple[str, list[RunOf]]] = {}
    for name in request.tables:
        for at, second, extra in _places(request.specs[name]):
            if at.width not in (FULL, *request.widths):
                continue
            width = max(request.widths) if at.width == FULL else at.width
            rank = second, NARROWEST_FIRST.index(width), extra, TABLE_ORDER.index(name)
            label = f"{name}, 1/{width}{', further rows' if extra else ''}{where(second)}"
            _, runs = ranked.setdefault(rank, (label, []))
            for seed in request.seeds:
                runs += _with_inputs(at, seed, second, request)
    return grouped(ranked[rank] for rank in sorted(ranked))


def _places(spec: TableSpec) -> Iterator[tuple[At, bool, bool]]:
    """The cells of a table and of its claims: where, on the second source, beyond the paper."""
    for block in spec.blocks:
        for line in block.lines:
            yield from ((at, block.second, line.kind == "extra") for at in line.places if at)
    for claim in spec.claims:
        yield from ((at, claim.second, False) for at in (*claim.better, *claim.worse))


def _with_inputs(at: At, seed: int, second: bool, request: Request) -> Iterator[RunOf]:
    """A run after everything that it reads."""
    part = PARTS[at.part]
    for needed in (part.start, part.teacher):
        if needed is not None:
            yield from _with_inputs(At(needed, at.width), seed, second, request)
    yield request.run_of(at, seed, second)


def _folder(scale: str) -> Path:
    packaged = settings.RECIPES / scale
    return packaged if packaged.is_dir() else Path(scale)


def schedules(scale: str) -> dict[str, list[dict[str, float]]]:
    """The phases of a scale by name, as classification.scratch; raises ConfigError."""
    path = _folder(scale) / SCHEDULES
    if not path.is_file():
        known = sorted(f.parent.name for f in settings.RECIPES.glob(f"*/{SCHEDULES}"))
        raise ConfigError(f"--scale {scale}: no {path}; {settings.nearest(scale, known)}")
    found = settings.flatten(settings.read_yaml(path))
    both = found["classification.scratch"] + found["classification.initialised"]
    return {"classification.both": both, **found}


def stages(runs: Iterable[RunOf], request: Request) -> list[pipeline.Stage]:
    """The runs as stages, inputs first. Raises ConfigError where a recipe or key does not fit."""
    named = schedules(request.scale)
    recipe = cache(lambda name: settings.read_recipe(_folder(request.scale) / f"{name}.yaml"))
    found = []
    for run in dict.fromkeys(runs):
        part = PARTS[run.part]
        flat = {
            **recipe(part.recipe),
            "seed": run.seed,
            "model.divide": run.width,
            "train.eval_every": AT_PHASE_ENDS,
            **part.settings,
        }
        for key, name in (("init_from", part.start), ("teacher.run", part.teacher)):
            flat[key] = None
            if name is not None:
                beside = request.run_of(At(name, run.width), run.seed, run.second)
                flat[key] = f"@{beside.name}"
        if part.schedule is not None:
            flat["optim.phases"] = [dict(phase) for phase in named[part.schedule]]
        if part.teacher is not None:
            flat["teacher.cache"] = request.cache
        flat |= {**request.common, **request.tasks.get(flat["task"], {})}
        flat |= (request.second or {}) if run.second else {}
        found.append(pipeline.make_stage(run.name, flat, run.name))
    return found
