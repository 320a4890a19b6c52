"""Writes docs/options.md from the docstrings of the schema: python tests/kdtrain/make_options.py"""

from pathlib import Path

from kdtrain.config import settings
from kdtrain.config.fields import in_words

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
HEAD = """# Options

Every setting of a run. In a recipe, sections nest the keys (`optim: {batch_size: 32}`); on the
command line a key is an option (`--optim.batch_size 32`). `python -m kdtrain train --help` shows
the usual settings, `--help-all` all of them. This page is generated from the docstrings of
`kdtrain/config`: `python tests/kdtrain/make_options.py`.
"""


def text() -> str:
    """The page: a table per section with key, default, meaning and values."""
    lines = [HEAD]
    for name, about, members in settings.sections():
        lines += [
            f"## {name}",
            "",
            about,
            "",
            "| key | default | meaning | values |",
            "|---|---|---|---|",
        ]
        for setting in members:
            cells = (
                f"`{setting.key}`",
                f"`{setting.shown_default}`",
                setting.text,
                in_words(setting.kind, setting.within).removeprefix("one of "),
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
