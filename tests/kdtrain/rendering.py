"""Renders every table, report and page from the committed run directories: a function per kind.

Each function writes the files of its kind into a folder. make_fixtures.py renders into
fixtures/rendered, test_fixtures.py into a temporary folder. Images inside an HTML page are replaced
by their size and a hash of their pixels; large ones are also written as files of their own.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image
from rich.console import Console

from kdtrain.cli import commands as cli
from kdtrain.cli import inspection
from kdtrain.config import Config, program, settings
from kdtrain.config.settings import build, read_recipe
from kdtrain.experiments import (
    campaign,
    collect,
    cost,
    dryrun,
    engine,
    figure,
    pipeline,
    select_targets,
    study,
    study_file,
)
from kdtrain.experiments.estimate import Counts, Estimate, network_size
from kdtrain.reports import chain_table
from kdtrain.reports.report import report
from kdtrain.reports.tables import files
from kdtrain.reports.tables import text as table_text
from kdtrain.reports.tables.plot import draw
from kdtrain.training import checkpoint

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RUNS = FIXTURES / "run_directories"
RECIPES = FIXTURES / "recipes"
RENDERED = FIXTURES / "rendered"

KEY = "0123456789abcdef"
"""The key in every results.json, diverged.json and run.json of the fixtures."""
STEP = 32
"""Difference of two values of a colour in the reduced images."""
LARGE = 100
"""An image of an HTML page that is wider than this is written as a file, pixels."""
DRAWN = ("table1", "table3")
"""Tables of which the figure is drawn, which takes seconds."""
TABLES = ("table1", "table2", "table3", "table4", "table5")
FAILED = "b_cls_scratch_8_s2"
METHODS = ("student", "soft", "hidden", "sh_kd")
SMALL = {
    "data.identities": 20,
    "data.images_per_identity": 5,
    "data.store_size": 20,
    "data.input_size": 16,
    "model.width": 8,
}
"""Keys of the dry runs of packaged recipes, for seconds of time."""
TARGETS = {"soft": 0.5, "hidden": 1.0, "logits": 0.01, "attention": 10.0, "rkd_angle": 50.0}
SELECTION_SEEDS = (1, 2)


def report_of_chain(out: Path) -> None:
    """report.html of a chain: every role of the three tasks, a stage under way, one that diverged,
    one that is planned, and others outside the chain.
    """
    _report(RUNS / "chain", out, "python -m kdtrain pipeline --preset tiny")


def report_of_run(out: Path) -> None:
    """report.html of a single run directory."""
    _report(RUNS / "chain" / "ver_distilled", out, "python -m kdtrain train ver_distilled")


def result_table(out: Path) -> None:
    """The result table of a chain on the console, and the line of each finished stage."""
    states = {}
    folders = {path.parent.name for path in (RUNS / "chain").glob("*/config.yaml")}
    planned = {path.stem for path in (RUNS / "chain" / "recipes").glob("*.yaml")}
    for name in sorted(folders | planned):
        folder = RUNS / "chain" / name
        state = "skipped" if name not in folders else "stopped"
        state = "diverged" if (folder / "diverged.json").exists() else state
        state = "done" if (folder / "results.json").exists() else state
        states[name] = state
    console, text = _console(100)
    for name, state in states.items():
        if state == "done":
            results = checkpoint.read_json(RUNS / "chain" / name / "results.json") or {}
            console.print(f"{name}: {state}, {pipeline.headline(results)}")
    console.print(chain_table.result_table(RUNS / "chain", states))
    _write(out / "console.txt", text())


def tables(out: Path) -> None:
    """Tables 1 to 5 as `reproduce` writes them, and on the console; some cells have no number. Only
    the tables of DRAWN have a figure and are on the page of all tables.
    """
    results = {run: _result(RUNS / "tables" / run.name) for run in runs_of_tables()}
    setting = [("command", "python -m kdtrain reproduce all"), ("scale", "two-cores")]
    setting += collect.about(results.values(), 2)
    found = [collect.Collection(one, results) for one in _studies_of_tables()]
    made = [collect.table(one, setting) for one in found]
    files.write_all([(one, draw(one)) for one in made if one.name in DRAWN], out,
                    "Distillation transfer", table_text.TEXT_WIDTH)  # fmt: skip
    for one in made:
        if one.name not in DRAWN:
            files.write(one, out, b"", subject="Distillation transfer")
    console, text = _console(120)
    for one in made:
        table_text.show(one, console)
    _write(out / "console.txt", text())


def comparison(out: Path) -> None:
    """The comparison of methods at two resolutions as `compare` writes it."""
    with contextlib.chdir(RECIPES):
        _render_comparison(out)


def _render_comparison(out: Path) -> None:
    studied = _comparison()
    stages = campaign.stages_of([studied], runs_of_comparison())
    results = {run: _result(RUNS / "comparison" / stage.name) for run, stage in stages.items()}
    configs = {run: stage.config for run, stage in stages.items()}
    lengths = cost.lengths(studied, stages)
    networks = dict.fromkeys(cost.network_key(config) for config in configs.values())
    sizes, speeds = {}, {}
    for number, key in enumerate(networks, 1):
        model, side = json.loads(key)
        sizes[key] = cost.Size(f"ResNet-14/{model['divide']}", side, 9000 * number, 10**6 // 4)
        speeds[key] = {
            batch: cost.Quartiles(low=90.5 * batch / number, median=100.5 * batch / number,
                                  high=120.5 * batch / number)
            for batch in cost.BATCHES
        }  # fmt: skip
    found = collect.Collection(studied, results, stages, lengths, sizes, speeds)
    setting = [("command", "python -m kdtrain compare"), ("recipes", studied.recipes)]
    setting += collect.about(results.values(), 2)
    made = collect.table(found, setting)
    drawn = figure.draw(found, made)
    files.write(made, out, drawn, subject="Methods", width=engine.WIDTH)
    console, text = _console(120)
    console.print(engine.lengths_grid(studied, lengths, False))
    _write(out / "lengths.txt", text())


def selection(out: Path) -> None:
    """The evidence and the recipe that `select-targets` writes."""
    with contextlib.chdir(RUNS / "selection"):
        _render_selection(out)


def _render_selection(out: Path) -> None:
    root = Path("arms")
    flat = read_recipe(RECIPES / "selection.yaml")
    config = build(pipeline.rename_runs(flat, lambda name: name.removeprefix("@")))
    selected = select_targets.Selection(root, config, TARGETS, SELECTION_SEEDS, 0.0)

    def found(studied: study.Study) -> collect.Collection:
        runs = [run for group in campaign.groups_of([studied]) for run in group.runs]
        stages = campaign.stages_of([studied], runs)
        return collect.Collection(studied, {r: _result(root / r.name) for r in runs}, stages)

    kept = select_targets.judge(found(selected.study()), ("held",))
    collection = found(selected.study(kept))
    setting = [("command", "python -m kdtrain select-targets selection.yaml")]
    made = select_targets.evidence(selected, collection, kept, setting)
    files.write(made, out, figure.draw(collection, made), subject="Targets")
    _write(out / "selected.yaml", select_targets.recipe_text(selected, kept, made))


def data(out: Path) -> None:
    """The text and the grid of the `data` command."""
    config = build(read_recipe(RECIPES / "data.yaml"))
    with contextlib.chdir(out), _printed(out / "data.txt"):
        inspection.show(config, Path("grid.png"))


def dry_runs(out: Path) -> None:
    """`--dry-run` of train, pipeline, reproduce and compare; steps are not timed."""
    with _untimed():
        with _printed(out / "train.txt"):
            config = build(read_recipe(RECIPES / "tiny" / "soft.yaml"))
            dryrun.show_run(config, Path("runs/soft"), RECIPES / "tiny", {})
        with _printed(out / "train_published_size.txt"):
            options = {"classes": 10_575, "images": 494_414}
            dryrun.show_run(config, Path("runs/soft"), RECIPES / "tiny", options)
        with _printed(out / "pipeline.txt"):
            stages = pipeline.plan("demo", SMALL, {})
            dryrun.show_stages(stages, Path("runs/demo"), 2, {})
        with _printed(out / "reproduce.txt"):
            options = {"seeds": 1, "widths": "8"}
            (table3,) = study_file.adjusted([study_file.load("table3")], options, SMALL, {})
            engine.run([table3], _dry("runs/tables"))
        with _printed(out / "compare.txt"), contextlib.chdir(RECIPES):
            engine.run([_comparison()], _dry("runs/comparison"))


def recipes(out: Path) -> None:
    """The list of the packaged recipes."""
    with _printed(out / "recipes.txt"):
        cli.main(["recipes"])


KINDS: dict[str, Callable[[Path], None]] = {
    "report_of_chain": report_of_chain,
    "report_of_run": report_of_run,
    "result_table": result_table,
    "tables": tables,
    "comparison": comparison,
    "selection": selection,
    "data": data,
    "dry_runs": dry_runs,
    "recipes": recipes,
}


def render(kind: str, out: Path) -> None:
    """Write the files of a kind into an empty folder, with the images of its pages taken out and
    every image reduced.
    """
    out.mkdir(parents=True)
    with mock.patch.object(settings, "build", _build):
        KINDS[kind](out)
    for page in sorted(out.glob("*.html")):
        text = page.read_text(encoding="utf-8")
        _write(page, without_images(text, page.with_suffix("")))
    for plot in sorted(out.glob("*.png")):
        if plot.stat().st_size:
            plot.write_bytes(reduced(plot.read_bytes()))
        else:
            plot.unlink()


def without_images(page: str, place: Path) -> str:
    """The page with 'image WIDTHxHEIGHT HASH' for each embedded image. Large ones are written to
    PLACE_1.png, PLACE_2.png, ... unless a file beside it has the same bytes, and have no hash.
    """
    beside = {path.read_bytes(): path.name for path in sorted(place.parent.glob("*.png"))}
    count = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal count
        content = base64.b64decode(match[1])
        with Image.open(io.BytesIO(content)) as image:
            size = f"{image.width}x{image.height}"
            if image.width <= LARGE:
                pixels = hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()
                return f"image {size} {pixels[:8]}"
        if content not in beside:
            count += 1
            beside[content] = f"{place.name}_{count}.png"
            (place.parent / beside[content]).write_bytes(content)
        return f"image {beside[content]}"

    return re.sub(r"data:image/(?:png|jpeg);base64,([\w+/=]+)", replaced, page)


def reduced(content: bytes) -> bytes:
    """A PNG file of half the width and height, in steps of STEP per colour: a few times smaller."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB").reduce(2)) // STEP * STEP
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _build(flat: Mapping[str, Any]) -> Config:
    """settings.build, which takes 50 ms, once per config."""
    key = json.dumps(dict(flat), sort_keys=True)
    if key not in _built:
        _built[key] = build(copy.deepcopy(dict(flat)))  # build changes the lists that it is given
    return _built[key]


_built: dict[str, Config] = {}


def _report(runs: Path, out: Path, command: str) -> None:
    copy = out / runs.name
    shutil.copytree(runs, copy)
    page = report(copy, command=command).read_text(encoding="utf-8")
    shutil.rmtree(copy)
    _write(out / "report.html", re.sub("(<dt>written</dt><dd>)[^<]*", r"\1DATE", page))


def _result(folder: Path) -> collect.Result:
    return collect.Result.read(folder, KEY, "no space left" if folder.name == FAILED else "")


def _studies_of_tables() -> list[study.Study]:
    options = {"seeds": 2, "widths": "8"}
    return study_file.adjusted(
        [study_file.load(name) for name in TABLES], options, {}, {"second": {}}
    )


def _comparison() -> study.Study:
    found = study_file.comparison(METHODS, "two-cores", "tiny")
    return study_file.adjusted([found], {"seeds": 2, "resolutions": "16,8"}, {}, {})[0]


def _dry(root: str) -> campaign.Order:
    return campaign.Order(Path(root), 2, 2.0, dry_run=True)


@contextlib.contextmanager
def _untimed() -> Iterator[None]:
    """Estimates from the sizes alone, on a machine with two processors."""
    about = {"device": "a processor"}
    with (
        mock.patch.object(dryrun, "estimate", _estimate),
        mock.patch.object(campaign, "estimate", _estimate),
        mock.patch.object(program, "cores", return_value=2),
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": ""}),
        mock.patch.object(dryrun, "environment", return_value=about),
        mock.patch.object(dryrun.torch, "get_num_threads", return_value=2),
    ):
        yield


def _estimate(config: Config, counts: Counts, *_: Any, **__: Any) -> Estimate:
    size = network_size(config, config.model, counts.classes)
    steps = sum(p.epochs for p in config.optim.phases) * (counts.train // config.optim.batch_size)
    return Estimate(
        size=size,
        memory_bytes=16 * size.parameters,
        batch=config.optim.batch_size,
        timed_batch=config.optim.batch_size,
        steps=steps,
        training_s=0.125 * steps,
        evaluation_s=1.5,
    )


def _console(width: int) -> tuple[Console, Callable[[], str]]:
    """A console that is no terminal, and a function that returns its text."""
    stream = io.StringIO()
    console = Console(file=stream, highlight=False, soft_wrap=True, width=width)
    return console, lambda: "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


@contextlib.contextmanager
def _printed(path: Path) -> Iterator[None]:
    """Write standard output to a file, without blanks at the ends of lines."""
    stream = io.StringIO()
    width = mock.patch.dict(os.environ, {"COLUMNS": "100"})
    with width, contextlib.redirect_stdout(stream):
        yield
    _write(path, "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines()))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def runs_of_tables() -> list[study.Run]:
    """The runs of tables 1 to 5 that the fixtures hold."""
    return [run for group in campaign.groups_of(_studies_of_tables()) for run in group.runs]


def runs_of_comparison() -> list[study.Run]:
    """The runs of the comparison, inputs first."""
    with contextlib.chdir(RECIPES):
        return [run for group in campaign.groups_of([_comparison()]) for run in group.runs]
