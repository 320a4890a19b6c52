"""Tables, reports and pages from the committed run directories are what they were, byte for byte.

A change of words or layout that is meant: render again (make_fixtures.py --render-only) and review
the difference. Dates are masked; a device, versions and times come from the run directories.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rendering import KINDS, RENDERED, STEP, render

# The images are bitwise equal on one machine. On other processors the outlines of glyphs and lines
# may differ by a level in single pixels; a changed letter differs in more.
OTHER_PIXELS = 20
RENDER = "python tests/kdtrain/make_fixtures.py --render-only"


@pytest.mark.parametrize("kind", KINDS)
def test_rendered_files_equal_the_committed_ones(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    render(kind, folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (RENDERED / kind).iterdir())
    for name in names:
        ours, theirs = folder / name, RENDERED / kind / name
        if ours.read_bytes() == theirs.read_bytes():
            continue
        if ours.suffix == ".png":
            assert other_pixels(ours, theirs) <= OTHER_PIXELS, f"{kind}/{name} differs; {RENDER}"
        else:
            old, new = theirs.read_text(encoding="utf-8"), ours.read_text(encoding="utf-8")
            assert new.splitlines() == old.splitlines(), f"{kind}/{name} differs; {RENDER}"
            assert new == old, f"{kind}/{name}: ends of lines differ; {RENDER}"


def other_pixels(one: Path, other: Path) -> int:
    """How many pixels differ by more than a step; all where the sizes differ."""
    with Image.open(one) as ours, Image.open(other) as theirs:
        if ours.size != theirs.size:
            return ours.width * ours.height
        pixels = [np.asarray(image.convert("RGB")).astype(int) for image in (ours, theirs)]
    return int((np.abs(pixels[0] - pixels[1]) > STEP).any(axis=-1).sum())


def test_a_changed_word_in_an_image_is_seen(tmp_path: Path) -> None:
    path = RENDERED / "tables" / "table1.png"
    with Image.open(path) as image:
        changed = image.convert("RGB")
    changed.paste((255, 255, 255), (20, 10, 60, 20))  # inside the title
    changed.save(tmp_path / "changed.png")
    assert other_pixels(tmp_path / "changed.png", path) > OTHER_PIXELS
    assert other_pixels(path, path) == 0
