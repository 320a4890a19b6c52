"""Messages for a wrong command line or recipe: our words, the setting to use, no guesses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from kdtrain.cli import main
from kdtrain.cli.arguments import UsageError, command_parser, parse
from kdtrain.config import SETTINGS, Config, ConfigError, build, read_recipe, settings
from kdtrain.config.settings import add_keys
from kdtrain.config.synonyms import HINTS

PARSER_WORDS = re.compile(
    r"typing|Literal|<class|Parser key|NoneType|Union|ubtype|class_path|ITEM|more\+|Got value"
)
WRONG = ("[{a: [x]}]", "imagefolder", "[{epochs: x, lr: 1}]")


def error(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 2) -> str:
    """The error line of a command that has to fail."""
    assert main(list(argv)) == status
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("error: ")
    return first.removeprefix("error: ")


def _rejection(parser: ArgumentParser, key: str, value: str) -> str | None:
    """The message for an option's value, if it is rejected."""
    try:
        parse(parser, [f"--{key}={value}"])
    except UsageError as error:
        return str(error)
    return None


def test_a_wrong_value_of_any_setting_is_named_in_plain_words_on_the_command_line():
    parser = command_parser("train", "", "")
    add_keys(parser)
    for setting in SETTINGS:
        messages = [_rejection(parser, setting.key, value) for value in WRONG]
        assert any(messages) or "text" in settings.values_of(setting.key), setting.key
        for message, value in zip(messages, WRONG, strict=True):
            wanted = f"{re.escape(setting.key)}: expected .*; got {re.escape(repr(value))}"
            assert message is None or re.fullmatch(wanted, message), message
            assert message is None or not PARSER_WORDS.search(message), message


def test_a_wrong_value_of_any_setting_is_named_in_plain_words_in_a_recipe():
    for setting in SETTINGS:
        for value in ([{"a": ["x"]}], [[1]], [{"epochs": "x"}]):
            with pytest.raises(ConfigError, match=f"{setting.key}: expected .*; got ") as wrong:
                build({setting.key: value})
            assert not PARSER_WORDS.search(str(wrong.value)), setting.key


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.kind", "imagefolder"], "expected one of synthetic, celeba, folder; got 'imagef"),
        (["--optim.batch_size", "big"], "expected a whole number, at least 2; got 'big'"),
        (["--optim.ema", "x"], "expected a number, 0 < x < 1, or null; got 'x'"),
        (["--train.compile", "3"], "train.compile: expected true or false; got '3'"),
        (["--classes", "x"], "--classes: expected a whole number; got 'x'"),
        (["--classes=3", "--classes", "x"], "--classes: expected a whole number; got 'x'"),
        (["--seed"], "--seed: a value is missing"),
        (["--resume=3"], "--resume: takes no value"),
        (["more"], "unexpected argument more"),
        (["--run-dir="], "--run-dir: expected a value; got an empty one"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_takes(argv, message, capsys):
    assert message in error(capsys, "train", "demo/cls_student", *argv)


def test_a_missing_argument_is_named(capsys):
    assert error(capsys, "train") == "missing: RECIPE"
    assert error(capsys, "import", "x.pth") == "missing: --layout, --out"


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("--lr", "the learning rate is in optim.phases, a list: --optim.phases '[{epochs: 3, lr"),
        ("--optim.lr", "the learning rate is in optim.phases"),
        ("--epochs", "the number of epochs is in optim.phases"),
        ("--batch-size", "did you mean --optim.batch_size?"),
        ("--gpus", "not yet: kdtrain trains on one device, train.device"),
        ("--amp", "mixed precision is train.precision: bfloat16 or float16"),
        ("--train.amp", "mixed precision is train.precision"),
        ("--workers", "did you mean --data.workers?"),
        ("--num-workers", "loader threads are data.workers"),
        ("--wandb", "not yet: train.tensorboard logs for TensorBoard"),
        ("--pretrained", "weights come from a run directory, init_from"),
        ("--output_dir", "the run directory is --run-dir"),
        ("--weight_decay", "did you mean --optim.weight_decay?"),
        ("--momentum", "did you mean --optim.momentum?"),
        ("--arch", "the network is model.name"),
        ("--model", "the network is model.name"),
        ("--data-dir", "the images are data.kind and data.root"),
        ("--device", "did you mean --train.device?"),
        ("--fp16", "mixed precision is train.precision"),
        ("--ema", "did you mean --optim.ema?"),
        ("--margin", "did you mean --head.margin or --triplet.margin?"),
        ("--dropout", "no known name is similar"),
        ("-b", "no known name is similar"),
    ],
)
def test_options_of_other_trainers_name_the_setting_and_others_no_guess(word, answer, capsys):
    shown = error(capsys, "train", "demo/cls_student", word, "3")
    assert shown.startswith(f"unknown option {word}; {answer}")


def test_a_key_of_another_trainer_in_a_recipe_names_the_setting(tmp_path):
    (tmp_path / "own.yaml").write_text("optim: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'optim.lr'; the learning rate is in optim"):
        read_recipe(tmp_path / "own.yaml")


def test_every_hint_names_settings_that_exist():
    sections = {key.partition(".")[0] for key in settings.keys() if "." in key}  # noqa: SIM118
    for word, hint in HINTS.items():
        assert word == word.lower().replace("-", "_")
        assert f"--{word}" not in {f"--{key}" for key in settings.keys()}  # noqa: SIM118
        for section, name in re.findall(r"(\w+)\.(\w+)", hint):
            assert section not in sections or f"{section}.{name}" in settings.keys(), hint  # noqa: SIM118


def test_a_recipe_in_another_folder_builds_on_a_packaged_one_by_its_name(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "common.yaml").write_text("seed: 5\n")
    own = tmp_path / "mine" / "own.yaml"
    own.write_text("base: [demo/cls_student, ../common.yaml]\nmodel: {divide: 2}\n")
    packaged = build(read_recipe(settings.recipe_path("demo/cls_student")))
    config: Config = build(read_recipe(own))
    assert (config.seed, config.model.divide, config.data) == (5, 2, packaged.data)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("demo/cls_studnt", "no file or packaged recipe 'demo/cls_studnt'; did you mean demo/cls_"),
        ("other.yaml", "no file or packaged recipe 'other.yaml'"),
        ("runs/cls", "no file or packaged recipe 'runs/cls'"),
    ],
)
def test_a_base_that_is_missing_is_named_with_the_recipe(base, message, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(f"base: {base}\n")
    assert f"own.yaml: base: {message}" in error(capsys, "train", str(tmp_path / "own.yaml"))


DIRECTORY_OPTIONS = {
    "train": ["demo/cls_student"],
    "demo": [],
    "pipeline": [],
    "study": ["table1"],
    "reproduce": ["table1"],
    "compare": ["student"],
    "select-targets": ["demo/cls_distilled"],
}


@pytest.mark.parametrize(
    ("command", "below"), [("train", ""), *((name, "/run") for name in DIRECTORY_OPTIONS)]
)
def test_a_run_directory_that_is_a_file_is_named_by_its_option(command, below, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = f"{tmp_path}/file{below}"
    shown = error(capsys, command, *DIRECTORY_OPTIONS[command], "--run-dir", place)
    assert shown == f"--run-dir: expected a directory; {tmp_path}/file is a file"


OTHER_PATHS = [
    (["train", "FILE"], "FILE"),
    (["eval", "FILE"], "FILE"),
    (["report", "FILE"], "FILE"),
    (["report", "MISSING"], "MISSING"),
    (["import", "MISSING", "--layout", "arcface_torch", "--out", "new"], "MISSING"),
    (["import", "FOLDER", "--layout", "arcface_torch", "--out", "new"], "FOLDER"),
    (["import", "FILE", "--layout", "arcface_torch", "--out", "FILE/x"], "--out"),
    (["select-targets", "demo/cls_distilled", "--out", "FILE/x.yaml"], "--out"),
    (["data", "demo/cls_student", "--grid", "FILE/x.png"], "--grid"),
    (["data", "demo/cls_student", "--grid", "FOLDER"], "--grid"),
    (["pipeline", "--preset", "FILE"], "FILE"),
    (["compare", "student", "--folder", "FILE"], "FILE"),
]


@pytest.mark.parametrize(("argv", "named"), OTHER_PATHS, ids=lambda words: " ".join(words)[:40])
def test_a_path_that_cannot_be_used_is_named(argv, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("text")
    Path("FOLDER").mkdir()
    assert main(argv) in (1, 2)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert named in first
    assert "Errno" not in first
    assert len(others) <= 1
