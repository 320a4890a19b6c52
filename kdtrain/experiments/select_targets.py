"""Choice of a teacher's targets: a study of each target alone against none.

    measure each target's individual influence, set to 0 what hurts, keep both where both help

(section 5.4 of "Model Distillation with Knowledge Transfer", arXiv 1709.02929.) The arms differ in
the targets' weights and in nothing else. Images held out of the training split judge, unless
data.validation_fraction is set to 0: the choice must not read the test split.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdtrain.config import (
    TARGETS,
    Config,
    ConfigError,
    TeacherConfig,
    named_runs,
    run_folder,
    settings,
)
from kdtrain.experiments import engine, pipeline
from kdtrain.experiments.campaign import Campaign, Order
from kdtrain.experiments.collect import Collection, table
from kdtrain.experiments.figure import draw
from kdtrain.experiments.study import Arm, At, Claim, Study
from kdtrain.objectives.tasks import TASKS
from kdtrain.reports.tables import files
from kdtrain.reports.tables.data import ONE_SEED, Block, Cell, Row, Table
from kdtrain.reports.tables.text import difference_text, plain, show
from kdtrain.training import checkpoint, keys
from kdtrain.training.input_runs import run_config, same_set

CANDIDATES = {row.name: row for row in TARGETS.values() if not row.alone}
"""The targets by name; a hint is a stage of its own."""
VALIDATION = 0.2
"""data.validation_fraction of the arms, where neither the recipe nor the command line sets one."""
NONE = "none"
RULE = (
    "Rule: a target is judged by the paired bootstrap of its arm against none over seeds and "
    "images (95 %). held: its weight stays; reversed (it hurts): 0; inconclusive or one seed: 0 "
    "too, as a target without a gain still costs a pass of the teacher (--keep-inconclusive keeps "
    "it); diverged in any seed: 0."
)


class SelectionError(RuntimeError):
    """A selection that cannot be made; the message names the stage to blame and the way out."""


@dataclass(frozen=True)
class Selection:
    """The candidates of a recipe, with everything else held fixed."""

    root: Path
    """Of the arms' runs; @NAME in the recipe is the run beside it."""
    config: Config
    """The recipe with every candidate's weight, as the arms train it (but for seed and weights)."""
    weights: Mapping[str, float]
    """The candidates: target -> weight."""
    seeds: tuple[int, ...]
    final_validation: float
    """data.validation_fraction of the recipe that is written."""

    def weighed(self, chosen: Sequence[str]) -> Config:
        """The config with the weights of `chosen` and 0 for the other candidates; without teacher
        where neither a target nor the head needs it any more.
        """
        fields = {CANDIDATES[n].key: w if n in chosen else 0.0 for n, w in self.weights.items()}
        target = replace(self.config.target, **fields)
        needed = target.needs_teacher or self.config.head.needs_teacher
        teacher = self.config.teacher if needed else TeacherConfig()
        return replace(self.config, target=target, teacher=teacher)

    def study(self, kept: Sequence[str] = ()) -> Study:
        """An arm without the candidates and one for each, judged against none; of several `kept`
        targets also an arm with all of them, judged against none and each of them alone.
        """
        chosen = {NONE: (), **{name: (name,) for name in self.weights}}
        claims = [(name, NONE) for name in self.weights]
        if len(kept) > 1:
            both = "+".join(kept)
            chosen[both] = tuple(kept)
            claims += [(both, NONE), *((both, name) for name in kept)]
        arms = {}
        for name, targets in chosen.items():
            flat = settings.to_flat(self.weighed(targets))
            arms[name] = Arm("", keys={k: v for k, v in flat.items() if k != "seed"})
        metric = TASKS[self.config.task].metric[0]
        words = {arm: "check" if "+" in arm else "target" for arm, _ in claims}
        found = (Claim(words[a], f"{a} > {b}", (At(a),), (At(b),), metric) for a, b in claims)
        return Study(
            name="select-targets", title="targets by their individual influence", arms=arms,
            source="arXiv 1709.02929, section 5.4", seeds=self.seeds, split=self.split,
            metrics=(metric,), claims=tuple(found),
        )  # fmt: skip

    @property
    def split(self) -> Any:
        """The images that judge: validation or test."""
        return "validation" if self.config.data.validation_fraction > 0 else "test"


def plan(
    recipe: Path,
    overrides: Mapping[str, Any],
    root: Path,
    *,
    targets: str | None = None,
    seeds: int = 3,
) -> Selection:
    """The selection that a recipe and a command line ask for.

    targets: candidates with commas; by default those with a weight in the recipe, else soft and
    hidden. A candidate without weight gets its published weight; a target that is no
    candidate keeps the recipe's weight in every arm. Raises ConfigError for a recipe without
    teacher, an unknown target, an input run that is missing, and settings that do not fit together.
    """
    if "seed" in overrides:
        raise ConfigError("seed is each arm's own: --seeds N trains seeds 1 to N")
    if seeds < 1:
        raise ConfigError(f"--seeds: at least 1, got {seeds}")
    overrides = settings.in_full(overrides)
    flat = {**settings.read_recipe(recipe), **overrides}
    if flat.get("teacher.run") is None:
        raise ConfigError(
            f"{recipe.stem}: no teacher, so there is no target to choose: set --teacher to the "
            "teacher's run directory (@NAME is the run beside --run-dir)"
        )
    keys_of = {name: f"target.{row.key}" for name, row in CANDIDATES.items()}
    given = {name: float(flat.get(key, 0.0)) for name, key in keys_of.items()}
    names = [name for name, weight in given.items() if weight > 0] or ["soft", "hidden"]
    if targets is not None:
        names = [name.strip() for name in targets.split(",")]
    for name in names:
        if name not in CANDIDATES:
            raise ConfigError(f"--targets: no {name!r}; {settings.nearest(name, CANDIDATES)}")
    weights = {name: given[name] or CANDIDATES[name].published for name in given if name in names}
    flat |= {keys_of[name]: weight for name, weight in weights.items()}
    key = "data.validation_fraction"
    final = settings.build(flat).data.validation_fraction
    held_out = final if key in overrides or final > 0 else VALIDATION
    config = settings.build({**flat, key: held_out})
    require_inputs(config, root, recipe, {**overrides, key: held_out})
    # folders for @NAME, as the arms lie one folder deeper than `root`
    flat = pipeline.rename_runs(settings.to_flat(config), lambda run: str(run_folder(run, root)))
    found = Selection(root, settings.build(flat), weights, tuple(range(1, seeds + 1)), final)
    try:
        found.weighed(())
    except ConfigError as error:
        problem = f"without {', '.join(weights)} the recipe cannot train: {error}"
        raise ConfigError(problem) from None
    return found


def require_inputs(config: Config, root: Path, recipe: Path, overrides: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the commands to run first, for a named run not finished."""
    for setting, folder in keys.input_folders(config, root).items():
        problem = _problem(folder)
        if problem is None:
            continue
        named = config.runs()[setting]
        if not named.startswith("@") or (folder / "diverged.json").exists():
            raise ConfigError(f"{setting}: {problem}")
        data = ((key, str(value)) for key, value in overrides.items() if key.startswith("data."))
        extra = " ".join(f"--{key} {shlex.quote(value)}" for key, value in data)
        commands = training_commands(named[1:], folder, recipe.parent, extra)
        raise ConfigError(
            f"{setting} {named}: no finished run in {folder}; train it first: "
            f"{'; then '.join(commands)}"
        )


def training_commands(name: str, folder: Path, recipes: Path, extra: str) -> list[str]:
    """The commands that bring run `folder` to its end, those of its own missing inputs first.

    recipes: the folder whose NAME.yaml trains it; extra: options for every new run.
    """
    if (folder / "config.yaml").is_file():
        return [f"python -m kdtrain train {folder} --resume"]
    # a recipe of PRESET/tables names runs of the preset too
    places = (recipes / f"{name}.yaml", recipes.parent / f"{name}.yaml")
    recipe = next((place for place in places if place.is_file()), None)
    if recipe is None:
        return [f"python -m kdtrain train RECIPE_OF_{name} --run-dir {folder}"]
    flat, commands = settings.read_recipe(recipe), []
    for value in named_runs(flat.get).values():
        if value.startswith("@") and _problem(folder.parent / value[1:]):
            before = training_commands(value[1:], folder.parent / value[1:], recipes, extra)
            commands += [command for command in before if command not in commands]
    packaged = recipe.is_relative_to(settings.RECIPES)
    shown = recipe.relative_to(settings.RECIPES).with_suffix("") if packaged else recipe
    return [*commands, f"python -m kdtrain train {shown} --run-dir {folder} {extra}".rstrip()]


def run(selection: Selection, out: Path, order: Order, *, keep_inconclusive: bool = False) -> int:
    """Train the arms, judge, and write table and recipe; exit status 0, 1 (a run failed) or 130.

    Raises SelectionError where no baseline is left, CheckpointError for run directories in use.
    """
    wanted = ("held", "inconclusive", ONE_SEED) if keep_inconclusive else ("held",)
    found: list[Collection] = []

    def note(studies: Sequence[Study], plan: Campaign, outcomes: Any, *_: Any, timed: bool) -> None:
        found.append(engine.collected(studies[0], plan, outcomes, timed=timed)[0])

    status = engine.run([selection.study()], order, write=note)
    if status:
        return status
    kept = judge(found[-1], wanted)
    if len(kept) > 1:
        order.console.print(f"a check of {' and '.join(kept)} together")
        again = replace(order, overwrite=False)
        status = engine.run([selection.study(kept)], again, write=note)
        if status:
            return status
    setting = [("command", order.command), ("seeds", ", ".join(map(str, selection.seeds)))]
    shown = evidence(selection, found[-1], kept, setting)
    show(shown, order.console)
    png = draw(found[-1], shown)
    page = files.write(shown, order.root / "tables", png, subject="Targets")
    checkpoint.write_text(out, recipe_text(selection, kept, shown))
    order.console.print(f"evidence: {page}, and as text, Markdown, CSV and PNG; recipe: {out}")
    return 0


def judge(found: Collection, wanted: Sequence[str]) -> tuple[str, ...]:
    """The targets that stay, by RULE: those whose claim has a verdict of `wanted`. Raises
    SelectionError for a baseline that diverged, and for arms measured on no image or on other
    images.
    """
    study = found.study
    images = set()
    for run, result in found.results.items():
        if run.arm == NONE and result.state == "diverged":
            raise SelectionError(
                f"{run.name} diverged: without targets the recipe does not train, so there is "
                "nothing to compare with; lower optim.phases' lr, or set optim.clip_norm"
            )
        if result.state == "done":
            items = result.items("index", split=study.split)
            if items is None or result.metric(study.metrics[0], split=study.split) is None:
                raise SelectionError(
                    f"{result.folder}: {study.metrics[0]} cannot be measured on the images of the "
                    f"{study.split} split; set a larger data.validation_fraction"
                )
            images.add(tuple(items.tolist()))
    if len(images) > 1:
        raise SelectionError(
            f"{study.name}: the arms were judged on different images; --overwrite trains them anew"
        )
    kept = []
    for claim in study.claims:
        arm, other = claim.better[0], claim.worse[0].arm
        diverged = any(result.state == "diverged" for result in found.of(arm, False))
        verdict = found.trend(claim, study.metrics[0]).verdict
        if other == NONE and arm.arm in CANDIDATES and not diverged and verdict.state in wanted:
            kept.append(arm.arm)
    return tuple(kept)


def evidence(
    selection: Selection, found: Collection, kept: Sequence[str], setting: Sequence[tuple[str, str]]
) -> Table:
    """The table of the study, with the weights that follow and remarks as notes."""
    made = table(found, setting)
    chosen = {name: w if name in kept else 0.0 for name, w in selection.weights.items()}
    shown = {
        name: (Cell(w, state="done", shown=f"{w:g}") for w in (weight, chosen[name]))
        for name, weight in selection.weights.items()
    }
    rows = (Row(name, "paper", tuple(cells)) for name, cells in shown.items())
    block = Block("weights", ("candidate", "chosen"), tuple(rows), "weight", unit="")
    words = (f"target.{CANDIDATES[name].key} {w:g}" for name, w in chosen.items())
    notes = [f"Chosen: {', '.join(words)}."]
    for trend in made.trends:
        alone = not trend.claim.startswith(f"{'+'.join(kept)} > {NONE}")
        if trend.code == "check" and alone and trend.verdict.state in ("reversed", "diverged"):
            notes.append(
                f"Warning: {trend.claim}: {trend.verdict.state}, {difference_text(trend)} points. "
                "The targets stay together, as in the paper; to keep one alone, set the other "
                "weights to 0."
            )
    if len(selection.seeds) == 1:
        notes.append("Note: one seed gives no verdict, as it does not show how seeds differ.")
    notes += [*(f"Note: {note}." for note in leaks(selection)), RULE]
    return replace(made, blocks=(*made.blocks, block), notes=tuple([*made.notes, *notes]))


def recipe_text(selection: Selection, kept: Sequence[str], shown: Table) -> str:
    """The chosen recipe: a head comment with the evidence, then every setting."""
    config = selection.weighed(kept)
    data = replace(config.data, validation_fraction=selection.final_validation)
    head = "Targets chosen by their individual influence (arXiv 1709.02929, section 5.4)."
    comment = "\n".join(f"# {line}".rstrip() for line in [head, *plain(shown).splitlines()])
    return f"{comment}\n{settings.to_yaml(replace(config, data=data))}"


def leaks(selection: Selection) -> list[str]:
    """A note for every input run that was trained on images that judge here."""
    if selection.split == "test":
        return [
            "the test split chose, so its results for the chosen recipe are no longer untouched "
            "evidence; --data.validation_fraction 0.2 leaves it alone"
        ]
    ours, notes = selection.config.data, []
    cut = ("split", "test_fraction", "split_seed", "validation_fraction")
    for setting, folder in keys.input_folders(selection.config, selection.root).items():
        if setting == "gallery":  # which no arm learns from
            continue
        try:
            theirs = run_config(folder).data
        except checkpoint.CheckpointError:  # weights alone
            continue
        cut_alike = all(getattr(theirs, key) == getattr(ours, key) for key in cut)
        if same_set(theirs, ours) and not cut_alike:
            is_teacher = setting.startswith("teacher")
            effect = "favours its targets" if is_teacher else "lifts every arm"
            notes.append(
                f"{setting} ({folder.name}) was trained on images that judge here, which "
                f"{effect}; train it with --data.validation_fraction "
                f"{ours.validation_fraction:g} to leave them out"
            )
    return notes


def _problem(folder: Path) -> str | None:
    """Why a run cannot be read as an input, or None where it can."""
    try:
        keys.input_key(folder)
    except checkpoint.CheckpointError as error:
        return str(error)
    return None
