"""How a run takes its directory, and how commands end that are stopped or cannot write."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_runs import assert_same_run, tiny_config, train

from kdtrain.cli import commands
from kdtrain.cli.commands import main
from kdtrain.config import ConfigError, settings
from kdtrain.objectives.task import Task
from kdtrain.training import checkpoint, engine
from kdtrain.training.run_directory import opened

SHORT = {"optim__phases": [{"epochs": 2, "lr": 0.05}]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_config(**SHORT), folder)
    return folder


def _recipe(folder, **keys):
    recipe = folder / "recipe.yaml"
    recipe.write_text(settings.to_yaml(tiny_config(**{**SHORT, **keys})))
    return recipe


@pytest.mark.parametrize("seed", [0, 1])
def test_who_waits_for_a_new_directory_finds_what_the_first_one_made_there(seed, tmp_path):
    run = tmp_path / "run"

    def second():
        with opened(tiny_config(seed=seed), run, resume=False, overwrite=False) as finished:
            return finished

    with ThreadPoolExecutor(1) as pool:
        with checkpoint.lock(run):
            waiting = pool.submit(second)
            time.sleep(0.2)
            checkpoint.write_text(run / "config.yaml", settings.to_yaml(tiny_config(seed=0)))
            checkpoint.write_json(run / "results.json", {"key": "first"})
        if seed == 0:
            assert waiting.result() == {"key": "first"}
        else:
            with pytest.raises(ConfigError, match="a run of another config .seed: 1 here, 0 there"):
                waiting.result()
    assert checkpoint.read_json(run / "results.json") == {"key": "first"}


def test_overwrite_removes_every_file_that_a_run_with_every_option_writes(whole, tmp_path):
    run = tmp_path / "run"
    config = tiny_config(
        **SHORT,
        teacher__run=str(whole),
        teacher__cache="float32",
        target__alpha=1.0,
        optim__ema=0.9,
        data__validation_fraction=0.25,
        train__early_stop=1,
    )
    train(config, run)
    killed = {"last.new", "last.previous", "best.new", "best.previous"}
    never = {"diverged.json", "tensorboard", *killed}
    assert {f.name for f in run.iterdir()} == {".lock", ".owner", *checkpoint.RUN_FILES} - never
    for name in never:
        (run / name).mkdir()
    (run / "notes.txt").write_text("mine")
    with opened(config, run, resume=False, overwrite=True):
        assert {path.name for path in run.iterdir()} == {".lock", ".owner", "notes.txt"}


def test_a_disk_that_fills_up_within_a_run_ends_it_in_one_line_and_resume_goes_on(
    whole, tmp_path, monkeypatch, capsys
):
    run, command = tmp_path / "run", ["train", str(_recipe(tmp_path))]
    command += ["--run-dir", str(run)]
    limits, saves, save = resource.getrlimit(resource.RLIMIT_FSIZE), [], checkpoint.save

    def filling(folder, *arguments):
        saves.append(folder.name)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        save(folder, *arguments)

    monkeypatch.setattr(checkpoint, "save", filling)
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {run / saves[2]}: cannot be written: ")
    assert "File too large" in line
    assert "are needed and" in line
    assert main([*command, "--resume"]) == 0
    assert_same_run(whole, run)


def test_a_signal_before_the_first_step_ends_the_command_with_nothing_written(
    tmp_path, monkeypatch, capsys
):
    def reading(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(engine, "RunData", reading)
    recipe, run = _recipe(tmp_path), tmp_path / "run"
    assert main(["train", str(recipe), "--run-dir", str(run)]) == 130
    said = f"stopped; to resume: python -m kdtrain train {recipe} --run-dir {run}\n"
    assert capsys.readouterr().err == said
    assert not run.exists()


def test_a_signal_within_an_evaluation_is_heard_there_and_resume_goes_on(
    whole, tmp_path, monkeypatch, capsys
):
    run, evaluate, told = tmp_path / "run", Task.evaluate, []

    def slow(self, batches):
        if not told:
            told.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        return evaluate(self, batches)

    monkeypatch.setattr(Task, "evaluate", slow)
    assert main(["train", str(_recipe(tmp_path)), "--run-dir", str(run)]) == 130
    said = f"stopped; to resume: python -m kdtrain train {run} --resume\n"
    assert capsys.readouterr().err == said
    assert main(["train", str(run), "--resume"]) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", sorted(set(commands.COMMANDS) - {"train"}))
def test_every_command_hears_a_signal(command, number, monkeypatch, capsys):
    def slow(_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            if command == "data":  # as an import that was cut short
                raise AttributeError("module has no attribute")

    monkeypatch.setitem(commands.COMMANDS, command, slow)
    assert main([command, "a b", "--overwrite"]) == 130
    said = f"stopped; to resume: python -m kdtrain {command} 'a b' --overwrite\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", [["recipes"], ["--help"], ["train", "--help"], ["data"]])
def test_a_closed_pipe_ends_a_command_without_a_word(command, tmp_path, monkeypatch, capsys):
    if command == ["data"]:
        command = ["data", str(_recipe(tmp_path)), "--grid", str(tmp_path / "grid.png")]
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(command) in (0, 141)  # argparse itself swallows the error of --help
    assert capsys.readouterr().err == ""
