"""docs/options.md is current, and every setting has a description in plain words."""

import re

import make_options

from kdtrain.config import SETTINGS


def test_the_page_of_options_is_that_of_the_schema():
    page = make_options.PAGE.read_text(encoding="utf-8")
    assert page == make_options.text(), "python tests/kdtrain/make_options.py"


def test_every_setting_has_a_row_with_meaning_and_values():
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| (.+?) \| (.+?) \|$", make_options.text(), re.M)
    assert [row[0] for row in rows] == [setting.key for setting in SETTINGS]


def test_a_setting_is_described_by_whole_sentences_of_the_glossary():
    for setting in SETTINGS:
        assert re.fullmatch(r"[A-Z].*\.", setting.text), setting.key
        first = setting.text.partition(". ")[0]
        assert not first.startswith(("What", "Which", "Whoever", "How")), setting.key
        assert len(setting.text) < 340, setting.key
        for word in (" person", " people", " picture", "answers", "drawn", " kept", "same bits"):
            assert word not in setting.text, setting.key
