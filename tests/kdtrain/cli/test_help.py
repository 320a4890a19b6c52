"""Help of one screen and of every key, the list of recipes, versions, and a missing package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain import __main__ as program
from kdtrain.cli import COMMANDS, commands, main
from kdtrain.config import SETTINGS, settings

KEYLESS = {"import", "recipes", "report"}


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Standard output of a command that succeeds."""
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_with_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, command, "--help")
    assert len(text.splitlines()) <= 40
    assert f"\nexamples:\n  python -m kdtrain {command} " in text
    assert text == shown(capsys, "help", command)
    assert (": --help-all)" in text) == (command not in KEYLESS)


@pytest.mark.parametrize("width", [60, 200])
def test_help_wraps_to_the_width_of_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for words in (["help"], ["train", "--help"], ["train", "--help-all"], ["recipes"]):
        lines = shown(capsys, *words).splitlines()
        long = [x for x in lines if len(x) > width and not x.startswith(("  --", "  python"))]
        assert long == []
    assert max(map(len, lines)) > width / 2


def test_help_all_lists_every_key_with_text_range_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = shown(capsys, "train", "--help-all")
    for setting in SETTINGS:
        assert f"  --{setting.key} " in text
        assert f"{setting.text} [{setting.limits}]" in text
    for word in ("typing", "Literal", "ITEM", "(type:", ".more+", "<class"):
        assert word not in text


def test_recipes_are_a_line_each_by_folder_and_filter(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = shown(capsys, "recipes").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(names) == sorted(name.rpartition("/")[2] for name in settings.recipe_names())
    assert max(map(len, lines)) <= 100
    found = shown(capsys, "recipes", "two-cores/systems").splitlines()
    assert found[0] == "two-cores/systems"
    (soft,) = (line for line in found if line.startswith("  soft "))
    assert soft.split("  ")[-3:-1] != []
    assert "NN top-1 80.2 ± 3.0 %" in soft
    long = shown(capsys, "recipes", "two-cores/systems/soft", "-v")
    assert "Command:  python -m kdtrain train two-cores/systems/soft" in long
    assert main(["recipes", "two-cores/sistems"]) == 2
    assert "no recipe's name contains" in capsys.readouterr().err


def test_a_recipe_that_was_not_run_has_no_result(capsys):
    assert "not run" not in shown(capsys, "recipes")


def test_version_names_package_torch_and_commit(capsys):
    text = shown(capsys, "--version")
    assert text.startswith("kdtrain 0.1.0, torch 2.")


@pytest.mark.parametrize("module", ["yaml", "jsonargparse"])
def test_a_base_install_prints_the_missing_extra_in_one_line(module):
    code = f"import sys; sys.modules[{module!r}] = None; import runpy; "
    code += "runpy.run_module('kdtrain', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    line = f'kdtrain needs the train extra: pip install ".[train]" (no module {module})\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_a_package_that_a_command_imports_late_is_named_in_one_line(capsys, monkeypatch):
    def lacking(argv):
        raise ModuleNotFoundError("No module named 'rich'", name="rich.table")

    monkeypatch.setitem(commands.COMMANDS, "train", lacking)
    monkeypatch.setattr(sys, "argv", ["kdtrain", "train"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert program.main() == 1
    assert "(no module rich.table)" in capsys.readouterr().err


def test_a_missing_module_of_our_own_raises(monkeypatch):
    def broken(argv):
        raise ModuleNotFoundError("No module named 'kdtrain.x'", name="kdtrain.x")

    monkeypatch.setitem(commands.COMMANDS, "train", broken)
    monkeypatch.setattr(sys, "argv", ["kdtrain", "train"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(ModuleNotFoundError):
        program.main()


def test_data_writes_a_grid_only_where_it_is_named(monkeypatch):
    grids = []
    monkeypatch.setattr("kdtrain.cli.inspection.show", lambda config, grid: grids.append(grid))
    for words in ([], ["--grid", "faces.png"]):
        assert main(["data", "demo/cls_student", *words]) == 0
    assert grids == [None, Path("faces.png")]
