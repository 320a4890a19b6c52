"""Which methods are compared, on what, and the runs that this takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kdtrain.config import RUN_SETTINGS, Config, ConfigError, settings
from kdtrain.experiments import pipeline
from kdtrain.experiments.campaign import Group, grouped
from kdtrain.experiments.study import pixels, where

AT_PHASE_ENDS = 10_000  # epochs between evaluations; the end of a phase is always evaluated
CACHE = "float32"  # teacher.cache of the students: the bits of online training
SIZE = "data.input_size"
TEACHER = "teacher"


@dataclass(frozen=True)
class RunOf:
    """One run of a comparison."""

    method: str
    seed: int
    side: int | None = None
    """data.input_size where the recipe has another one."""
    second: bool = False

    @property
    def name(self) -> str:
        """Its stage and folder: th_kd_s1, th_kd_r16_s1; on the second data source b_th_kd_s1."""
        side = "" if self.side is None else f"_r{self.side}"
        return f"{'b_' if self.second else ''}{self.method}{side}_s{self.seed}"


class Place(NamedTuple):
    """A column block: one resolution on one data source."""

    side: int | None
    second: bool

    @property
    def title(self) -> str:
        """Names it behind a title."""
        return pixels(self.side) + where(self.second)


@dataclass(frozen=True)
class Request:
    """What is to be compared, and how."""

    methods: tuple[str, ...]
    recipes: Mapping[str, Mapping[str, Any]]
    """Dotted keys of every method's recipe, and of those that it takes runs from, by name."""
    folder: str
    """The folder of the recipes as printed: two-cores/systems for a packaged folder, else its
    path.
    """
    seeds: tuple[int, ...] = (1, 2, 3)
    resolutions: tuple[int, ...] = ()
    """Sides of the methods' input; empty: each recipe's own."""
    common: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys of every run."""
    second: Mapping[str, Any] | None = None
    """Dotted keys of the second data source; None: there is none."""

    @cached_property
    def teachers(self) -> tuple[str, ...]:
        """Whom the methods learn from or are searched among, in the order of the methods; a recipe
        of the name "teacher" that they start from too.
        """
        keys = ("teacher.run", "teacher.more", "eval.gallery")
        named = [name for m in self.methods for name in inputs_of(self.recipes[m], keys)]
        own = (n for m in self.methods for n in inputs_of(self.recipes[m]) if n == TEACHER)
        return tuple(dict.fromkeys([*named, *own]))

    @property
    def students(self) -> tuple[str, ...]:
        """The methods that are no other's teacher."""
        return tuple(name for name in self.methods if name not in self.teachers)

    def is_control(self, method: str) -> bool:
        """Whether a method takes nothing from another run but a gallery."""
        flat = self.recipes[method]
        return not any(flat.get(k) for k in RUN_SETTINGS.values() if k != "eval.gallery")

    @property
    def sources(self) -> tuple[bool, ...]:
        """Whether each data source is the second."""
        return (False,) if self.second is None else (False, True)

    def places(self, second: bool) -> list[Place]:
        """The resolutions on a data source, None for the recipes' own."""
        return [Place(side, second) for side in self.resolutions or (None,)]

    @cached_property
    def own_sides(self) -> Mapping[tuple[str, bool], int]:
        """data.input_size of each method's recipe, with the keys of the command, by data source."""
        places = [(method, second) for method in self.methods for second in self.sources]
        return {p: settings.build(self._flat(*p)).data.input_size for p in places}

    def run_of(self, method: str, seed: int, place: Place) -> RunOf:
        """The run of a method; teachers and inputs keep the size of their recipes (side None)."""
        kept = place.side is None or method in self.teachers
        if kept or place.side == self.own_sides[method, place.second]:
            return RunOf(method, seed, None, place.second)
        return RunOf(method, seed, place.side, place.second)

    def config(self, run: RunOf) -> Config:
        """The settings of a run; runs that it names are of its seed. Raises ConfigError."""

        def beside(name: str) -> str:
            here = isinstance(name, str) and name.startswith("@")
            return f"@{RunOf(name[1:], run.seed, None, run.second).name}" if here else name

        flat = self._flat(run.method, run.second) | {"seed": run.seed}
        try:
            if run.side is not None:
                own = settings.build(flat)
                # the same crop at another resolution, and the teacher as it was
                flat |= {SIZE: run.side, "data.crop_size": own.data.crop_side}
                if own.teacher.run is not None:
                    flat["teacher.input_size"] = own.teacher_side
            return settings.build(pipeline.rename_runs(flat, beside))
        except ConfigError as error:
            raise ConfigError(f"{run.name}: {error}") from None

    def _flat(self, method: str, second: bool) -> dict[str, Any]:
        """A recipe with the keys of the command, without seed and run names of its own."""
        flat = dict(self.recipes[method])
        if flat.get("train.early_stop") is None:
            flat["train.eval_every"] = AT_PHASE_ENDS
        if flat.get("teacher.run") is not None:
            flat.setdefault("teacher.cache", CACHE)
        return flat | dict(self.common) | dict((self.second if second else None) or {})


def request_from(
    options: Mapping[str, Any], common: Mapping[str, Any], second: Mapping[str, Any] | None
) -> Request:
    """The request that a command line makes; raises ConfigError."""
    text = options.get("resolutions") or ""
    words = [word.strip() for word in text.split(",")] if text else []
    if not all(word.isdigit() and int(word) >= 8 for word in words):
        raise ConfigError(f"--resolutions: expected pixels of 8 and more, as 24,16; got {text!r}")
    resolutions = tuple(dict.fromkeys(map(int, words)))
    sizes = (SIZE, "data.crop_size") if resolutions else ()
    own = ("task", "seed", *RUN_SETTINGS.values(), *sizes)
    fixed = [key for keys in (common, second or {}) for key in own if key in keys]
    if fixed:
        where = "--resolutions says it" if fixed[0].startswith("data.") else "it is each recipe's"
        raise ConfigError(f"--{fixed[0]}: {where} in a comparison; leave it out")
    seeds = options.get("seeds", 3)
    if seeds < 1:
        raise ConfigError(f"--seeds: at least 1, got {seeds}")
    folder = method_folder(options.get("scale") or "two-cores", options.get("folder") or "systems")
    files = method_files(options["methods"], folder)
    request = Request(
        methods=tuple(files),
        recipes=with_inputs(files),
        folder=(
            folder.relative_to(settings.RECIPES).as_posix()
            if folder.is_relative_to(settings.RECIPES)
            else str(folder)
        ),
        seeds=tuple(range(1, seeds + 1)),
        resolutions=resolutions,
        common=dict(common),
        second=second,
    )
    if not request.students:
        raise ConfigError(
            f"{', '.join(request.methods)}: only teachers of each other; name a student's method"
        )
    stages(request)  # they fit, before anything is timed
    return request


def method_folder(scale: str, folder: str) -> Path:
    """The folder of the recipes: below a packaged scale, below a folder, or the folder itself."""
    places = (settings.RECIPES / scale / folder, Path(scale) / folder, Path(folder))
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        known = sorted(f.name for f in (settings.RECIPES / scale).glob("*/") if f.is_dir())
        raise ConfigError(
            f"--folder {folder}: no such folder of recipes below {scale}; "
            f"{settings.nearest(folder, known)}"
        )
    return found


def method_files(words: Sequence[str], folder: Path) -> dict[str, Path]:
    """Recipes by name: words are stems in the folder, or paths. Raises ConfigError."""
    known = {f.stem: f for f in sorted(folder.glob("*.yaml")) if not f.name.startswith("_")}
    found: dict[str, Path] = {}
    for word in words:
        path = known.get(word)
        if path is None and Path(word).suffix in (".yaml", ".yml"):
            path = settings.recipe_path(word)
        if path is None:
            raise ConfigError(f"no method {word!r} in {folder}; {settings.nearest(word, known)}")
        if found.setdefault(path.stem, path).resolve() != path.resolve():
            raise ConfigError(
                f"{path.stem}: two recipes of that name; rename one, or compare it alone"
            )
    return found


def with_inputs(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Recipes and those that they take runs from (@NAME: a recipe beside it, or in the folder
    above), as dotted keys. Raises ConfigError for one that is not there, or two of one name.
    """
    recipes: dict[str, dict[str, Any]] = {}
    origins: dict[str, Path] = {}
    waiting = list(files.items())
    while waiting:
        name, path = waiting.pop(0)
        if name in origins:
            flat = settings.read_recipe(path)
            if origins[name].resolve() != path.resolve() and flat != recipes[name]:
                raise ConfigError(
                    f"{name}: {origins[name]} and {path} differ and would be one run; rename one"
                )
            continue
        origins[name], recipes[name] = path, settings.read_recipe(path)
        for needed in inputs_of(recipes[name]):
            places = (path.parent / f"{needed}.yaml", path.parent.parent / f"{needed}.yaml")
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise ConfigError(f"{name}: takes @{needed}, and there is no recipe {places[0]}")
            waiting.append((needed, found))
    return recipes


def inputs_of(flat: Mapping[str, Any], keys: Sequence[str] = ()) -> list[str]:
    """The names behind @ in the settings that name runs; keys: these settings alone."""
    values = [flat.get(key) for key in keys or RUN_SETTINGS.values()]
    every = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(v[1:] for v in every if isinstance(v, str) and v.startswith("@")))


def groups(request: Request) -> list[Group[RunOf]]:
    """A group for each method, resolution and data source, all seeds, with the inputs that no
    group before it has. In this order a budget is spent: a control first, as the others are
    compared with it.
    """
    students = sorted(request.students, key=lambda method: not request.is_control(method))
    found = []
    for second in request.sources:
        of_students = [(name, place) for name in students for place in request.places(second)]
        for method, place in (*of_students, *((t, Place(None, second)) for t in request.teachers)):
            runs = (request.run_of(method, seed, place) for seed in request.seeds)
            needed = [one for run in runs for one in chain(request, run)]
            found.append((f"{method}{place.title}", needed))
    return grouped(found)


def chain(request: Request, run: RunOf, above: tuple[str, ...] = ()) -> Iterator[RunOf]:
    """A run after every run that it needs. Raises ConfigError for a circle."""
    if run.method in above:
        raise ConfigError(f"recipes wait for each other: {', '.join((*above, run.method))}")
    for needed in inputs_of(request.recipes[run.method]):
        yield from chain(request, RunOf(needed, run.seed, None, run.second), (*above, run.method))
    yield run


def stages(request: Request) -> dict[RunOf, pipeline.Stage]:
    """Every run as a stage, inputs first."""
    runs = [run for group in groups(request) for run in group.runs]
    return {run: pipeline.Stage(run.name, request.config(run)) for run in runs}
