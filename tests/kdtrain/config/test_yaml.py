"""YAML of any kind yields a Config, or quickly one ConfigError with file and key."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import kdtrain
from kdtrain.cli import main
from kdtrain.config import Config, ConfigError, build, read_recipe, settings

SCALARS = ("", "~", "5", "-1", "0.5", ".inf", "-.nan", "1e400", "'inf'", "yes", "2024-13-45", "0b_")
SCALARS += (
    "1" + "0" * 400,
    "1" + "0" * 5000,
    '"\\0"',
    '"\\ud800"',
    "!!int x",
    "!!binary aGk=",
    "<<",
)
SCALARS += (
    "'&a [*a]'",
    "@teacher",
    "runs/x",
    "random",
    "folder",
    "true",
    "[1]",
    "{a: 1}",
    "[{a: ~}]",
)
NAMES = settings.keys()
SECTIONS = sorted({key.partition(".")[0] for key in NAMES})
KEYS = st.sampled_from([*NAMES, *SECTIONS, "base", "run", "epochs", "lr", "5", "~", "on"])


def flow(tree):
    if isinstance(tree, list):
        return f"[{', '.join(map(flow, tree))}]"
    if isinstance(tree, dict):
        return f"{{{', '.join(f'{key}: {flow(value)}' for key, value in tree.items())}}}"
    return tree


def nests(inner):
    return st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2)


TREES = st.recursive(st.sampled_from(SCALARS), nests, max_leaves=5)
LETTERS = st.text(st.sampled_from("ab1:,-[]{}&*!|>#%@'\"\n \t?~<\\"), max_size=30)
quick = examples(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(st.dictionaries(KEYS, TREES, max_size=3))
@quick
def test_any_tree_is_a_config_or_a_config_error(tmp_path, tree):
    write(tmp_path, "\n".join(f"{key}: {flow(value)}" for key, value in tree.items()))
    is_config_or_error(tmp_path)


@given(LETTERS)
@quick
def test_any_text_is_a_config_or_a_config_error(tmp_path, text):
    is_config_or_error(write(tmp_path, text))


def test_every_key_rejects_values_of_a_wrong_kind(tmp_path):
    for place, key in enumerate(NAMES):
        for value in SCALARS[place % 9 :: 9]:
            is_config_or_error(write(tmp_path, f"{key}: {value}\n"))


def write(folder, text):
    (folder / "r.yaml").write_text(text)
    return folder


def is_config_or_error(folder):
    with contextlib.suppress(ConfigError):
        assert isinstance(build(read_recipe(folder / "r.yaml")), Config)


LAUGHS = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}\n" for i in range(1, 10)
)
WRONG = {
    "base:\n": "base: expected a recipe file or a list of them, got None",
    "base: 5\n": "base: expected a recipe file",
    "base: [{a: 1}]\n": "base: expected a recipe file",
    "base: {a: 1}\n": "base: expected a recipe file",
    "[1, 2]\n": "expected a mapping of keys, got seq",
    "5\n": "expected a mapping of keys, got int",
    "5: 1\n": "top level: expected keys that are text, got '5'",
    "optim: {~: 1}\n": "optim: expected keys that are text, got '~'",
    "seed: 1\noptim: {momentum: 0}\nseed: 2\n": "seed: set again on line 3",
    "optim: {batch_size: 8, batch_size: 9}\n": "optim.batch_size: set again on line 1",
    "optim: 5\n": "optim: expected a mapping of its keys; got 5",
    "optim:\n": "optim: expected a mapping of its keys; got None",
    "optim: {batch_size: {a: 1}}\n": "unknown key 'optim.batch_size.a'",
    "optim: {batch_size: [1]}\n": "optim.batch_size",
    "optim: {batch_size: ~}\n": "optim.batch_size: expected a whole number, at least 2; got null",
    "optim: {phases: [{epochs: 1, lr: .inf}]}\n": "optim.phases.0.lr: expected a finite number",
    "augment: {scale_min: .nan}\n": "augment.scale_min: expected a finite number",
    "data: {root: 2024-01-02}\n": "data.root: expected text, a number, .* got timestamp",
    "data: {root: 2024-13-45}\n": "data.root: expected text, a number, .* got timestamp",
    "data: {root: !!binary aGk=}\n": "data.root: expected text, a number, .* got binary",
    "seed: !!python/object/apply:os.getpid []\n": "seed: expected text, .* got .*os.getpid",
    "seed: 0b_\n": "seed: '0b_' cannot be read as int",
    'data: {root: "a\\0"}\n': "data.root: .* cannot be read as str",
    LAUGHS: "more than 10000 values, aliases expanded",
    "a: &a [*a]\n": "a: nested deeper than 12 levels",
    "a: &a {b: *a}\n": "a: nested deeper than 12 levels",
    f"a: {'[' * 20}{']' * 20}\n": "a: nested deeper than 12 levels",
    f"a: {'[' * 40_000}\n": "nested deeper than 12 levels",
    f"a: {'x' * 100_000}\n": "longer than 100000 characters",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_recipe_exits_with_status_2_and_names_file_and_key(text, tmp_path, capsys):
    path = write(tmp_path, text) / "r.yaml"
    with pytest.raises(ConfigError, match=WRONG[text]):
        read_recipe(path)
    assert main(["train", str(path), "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {path}: ")
    assert len(lines) == 2  # the second names --help


def test_an_alias_has_the_value_of_its_anchor(tmp_path):
    write(tmp_path, "data: {input_size: &side 32, store_size: *side}\n")
    assert read_recipe(tmp_path / "r.yaml") == {"data.input_size": 32, "data.store_size": 32}


def test_bases_of_bases_are_read_once_each(tmp_path):
    """30 levels of two bases each are 2^30 readings otherwise; the later base still wins."""
    (tmp_path / "b0.yaml").write_text("seed: 7\n")
    for level in range(1, 31):
        twice = f"[b{level - 1}.yaml, b{level - 1}.yaml]"
        (tmp_path / f"b{level}.yaml").write_text(f"base: {twice}\n")
    assert read_recipe(tmp_path / "b30.yaml") == {"seed": 7}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_base_that_is_no_file_is_never_opened(make, tmp_path):
    make(tmp_path / "b.yaml")
    write(tmp_path, "base: b.yaml\n")
    with pytest.raises(ConfigError, match=r"b.yaml: .* expected a file, got a directory, FIFO"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="no recipe file"):
        settings.recipe_path(str(tmp_path / "b.yaml"))


def test_a_path_that_is_not_utf_8_survives_the_resolved_config(tmp_path):
    root = os.fsdecode(b"faces-\xc3(\xe9")
    config = build({"data.kind": "folder", "data.root": root})
    write(tmp_path, settings.to_yaml(config))
    assert build(read_recipe(tmp_path / "r.yaml")) == config


def test_reading_does_not_change_what_was_read(tmp_path):
    flat = {"optim.phases": [{"epochs": 1, "lr": 0.1}]}
    build(flat)
    assert flat == {"optim.phases": [{"epochs": 1, "lr": 0.1}]}


def test_every_yaml_file_is_read_by_one_loader():
    root = Path(kdtrain.__file__).parent
    users = [f.relative_to(root) for f in root.rglob("*.py") if "import yaml" in f.read_text()]
    assert users == [Path("config/settings.py")]
