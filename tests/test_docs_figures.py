"""The figures of README and docs: each is shown by a page, and fits a screen."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {path.relative_to(ROOT): path for path in ROOT.glob("docs/**/*.png")}


def test_every_figure_is_shown_and_every_shown_figure_exists():
    shown = set()
    for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md")):
        for name in re.findall(r'(?:src|srcset)="([^"]*)"|\]\(([^)]*\.png)\)', page.read_text()):
            shown.add((page.parent / "".join(name)).resolve().relative_to(ROOT))
    assert shown == set(FIGURES)


def test_a_figure_fits_a_screen_and_has_a_dark_twin():
    for name, path in FIGURES.items():
        with Image.open(path) as image:
            assert image.width <= 1600, name
            assert image.height <= 1000, name
        twin = path.name.replace("-light", "-dark") if "-light" in path.name else path.name
        assert path.with_name(twin).is_file(), name


def test_the_claims_of_readme_are_in_the_committed_results():
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    for _, table, claim in figures["CLAIMS"]:
        assert claim in figures["read"](table)
