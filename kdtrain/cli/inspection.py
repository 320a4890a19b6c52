"""The images of a config in numbers and as a grid: the `data` command."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table

from kdtrain.config import Config
from kdtrain.config.program import printable
from kdtrain.data import left_out, sample_grid
from kdtrain.data.run_data import RunData
from kdtrain.objectives.tasks import TASKS, build_task
from kdtrain.training.checkpoint import write_bytes
from kdtrain.training.environment import computing
from kdtrain.training.journal.journal import console, number
from kdtrain.training.preparation import without_teacher

FLOORS = {
    "top1": "identity of the nearest training image, by pixels",
    "pair_accuracy": "pairs verified by pixels, ten folds",
    "nrmse": "landmark error of the mean shape",
    "failure_rate": "share of images with a landmark error above 10 %",
    "nn_top1": "nearest test image of the same identity, by pixels",
    "nn_top1_other_video": "the same, without images of one video",
}
"""Metrics whose floors are shown, by name."""


def show(config: Config, grid: Path | None) -> None:
    """Print counts, identities, split and floors of the images of `config`, and write a grid of
    images to `grid`, if given.

    Raises what the data sources raise for missing or damaged files.
    """
    table = Table.grid(padding=(0, 2))

    def row(*cells: str) -> None:
        table.add_row(*(escape(printable(cell)) for cell in cells))

    with computing(config):
        data = RunData(config)
        source = data.source
        counts = torch.bincount(source.labels, minlength=source.num_classes).sort().values
        row("source", source.name)
        row("images", f"{source.num_images} of {source.num_classes} identities")
        low, middle, high = counts[[0, len(counts) // 2, -1]].tolist()
        row("per identity", f"{low} to {high}, median {middle}")
        (narrow, flat), (wide, high) = source.sizes.amin(0).tolist(), source.sizes.amax(0).tolist()
        row("pixels", f"{narrow}x{flat} to {wide}x{high}, stored at {config.data.store_size}")
        row("landmarks", "5 points" if source.landmarks is not None else "none")
        if source.groups is not None:
            row("videos", str(len(source.groups.unique())))
        for line in data.notes():
            row("note", line)
        held = f", {len(data.validation)} validation" if len(data.validation) else ""
        sizes = f"{len(data.train)} training{held}, {len(data.test)} test"
        row("split", f"{config.data.split}: {sizes}")
        wrong = int((data.labels != source.labels).sum())
        if wrong:
            row("", f"{wrong} training labels are wrong on purpose (data.noise)")
        row("", f"{data.unseen()} test images of identities without a training image")
        alone = len(left_out(data.train, data.labels))
        row("", f"{alone} training images without another of their identity (no triplet)")
        row("floors", "scores of a method that learns nothing")
        for name in TASKS:
            if source.landmarks is None and TASKS[name].needs_landmarks:
                continue
            alone_config = dataclasses.replace(without_teacher(config), task=name)
            task = build_task(alone_config, source.num_classes)
            floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
            for key, words in FLOORS.items():
                if key in floors:
                    row(f"  {name}", words, number(key, floors[key]))
        if grid is not None:
            sheet = io.BytesIO()
            sample_grid(data.store).save(sheet, format="PNG")
            write_bytes(grid, sheet.getvalue())
            row("grid", str(grid))
    console(120).print(table)
