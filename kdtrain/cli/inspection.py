"""What a config's images are, in numbers and as a sheet of samples: the `data` command."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from kdtrain.config import Config
from kdtrain.config.program import printable
from kdtrain.data import left_out, sample_grid
from kdtrain.data.run_data import RunData
from kdtrain.objectives.tasks import build_task
from kdtrain.training.checkpoint import write_bytes
from kdtrain.training.environment import computing
from kdtrain.training.journal.journal import console, number
from kdtrain.training.preparation import without_teacher


def show(config: Config, grid: Path) -> None:
    """Print counts, classes, split and floors of the images that `config` names, and write the
    sheet to `grid`.

    Raises what the data sources raise for missing or damaged files.
    """
    say = console().print
    with computing(config):
        data = RunData(config)
        source = data.source
        counts = torch.bincount(source.labels, minlength=source.num_classes).sort().values
        say(f"source      {source.name}")
        say(f"images    {source.num_images} of {source.num_classes} identities")
        low, middle, high = counts[[0, len(counts) // 2, -1]].tolist()
        say(f"per identity  {low} to {high}, median {middle}")
        widths, heights = source.sizes.T
        say(
            f"pixels      {int(widths.min())}x{int(heights.min())} to "
            f"{int(widths.max())}x{int(heights.max())}, kept at {config.data.store_size}"
        )
        say(f"landmarks   {'5 points' if source.landmarks is not None else 'none'}")
        if source.groups is not None:
            say(f"videos      {len(source.groups.unique())}")
        for line in data.notes():
            say(f"note        {printable(line)}", markup=False)
        kept = f", {len(data.validation)} validation" if len(data.validation) else ""
        say(
            f"split       {config.data.split}: {len(data.train)} training{kept}, "
            f"{len(data.test)} test"
        )
        wrong = int((data.labels != source.labels).sum())
        if wrong:
            say(f"            {wrong} training labels are wrong on purpose (data.noise)")
        say(f"            {data.unseen()} test images of identities without a training image")
        alone = len(left_out(data.train, data.labels))
        say(f"            {alone} training images are their identity's only one (no triplet)")
        task = build_task(without_teacher(config), source.num_classes)
        if source.landmarks is not None or not task.needs_landmarks:
            floors = task.floors(data.evaluation(data.train), data.evaluation(data.test))
            say(f"floors      what a method scores in {config.task} that learns nothing:")
            say(f"            {', '.join(f'{k} {number(k, v)}' for k, v in floors.items())}")
        sheet = io.BytesIO()
        sample_grid(data.store).save(sheet, format="PNG")
        write_bytes(grid, sheet.getvalue())
        say(f"grid        {grid}")
