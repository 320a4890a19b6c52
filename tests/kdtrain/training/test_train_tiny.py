"""Whole tiny runs by the command line: killed for real, fused against eager, and how they end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_same_run, environment, quiet, tiny_config, train

from kdtrain.cli.commands import main
from kdtrain.config import settings
from kdtrain.config.program import PARENT, polled, signals_heard, told_to_stop
from kdtrain.data.run_data import RunData
from kdtrain.training import checkpoint
from kdtrain.training.preparation import prepare_task

# Imports once and forks a fresh process for every life of the run, before torch has computed.
LIVES = """
import os, sys
import kdtrain.training.engine
from kdtrain.cli import main
while line := sys.stdin.readline():
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os._exit(main(line.split()))
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Lives:
    """Runs `python -m kdtrain` command lines as processes that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LIVES],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def live(self, arguments: list[str], kill_after_s: float | None = None) -> int:
        """Exit status of one life; -9 when it was killed before its end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(arguments) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is still its own
        self.process.stdin.write("wait for it\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    process = Lives(tmp_path_factory.mktemp("lives"))
    yield process
    process.close()


@pytest.mark.parametrize(
    "task", ["alignment", pytest.param("verification", marks=pytest.mark.prove)]
)
def test_a_run_killed_at_random_moments_ends_with_the_bits_of_an_unkilled_one(
    task, lives, tmp_path
):
    teacher = {"alignment": {"target__beta": 1.0}, "verification": {"target__alpha": 1.0}}[task]
    train(tiny_config(), tmp_path / "teacher")
    config = tiny_config(task, teacher="@teacher", model__divide=2, train__save_every=1, **teacher)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings.to_yaml(config))
    arguments = ["train", str(recipe), "--run-dir"]
    started = time.monotonic()
    assert lives.live([*arguments, str(tmp_path / "whole")]) == 0
    whole_s = time.monotonic() - started
    moments = random.Random(task)
    killed, resume = 0, []
    for _ in range(40):
        # short enough that the run cannot end before its second death
        after = moments.uniform(0.05, 0.3) * whole_s if killed < 5 else None
        run = tmp_path / "parts"
        status = lives.live([*arguments, str(run), *resume], after)
        if status == 0:
            break
        assert status == -9
        killed += 1
        # the lives after the first keep the teacher's answers, or read what one kept before it died
        resume = ["--teacher.cache", "float32"]
        resume += ["--resume"] if (run / "config.yaml").exists() else []
    assert (run / "results.json").exists()
    assert killed >= 2
    assert_same_run(tmp_path / "whole", run)


@pytest.mark.parametrize("task", ["classification", "alignment", "verification"])
def test_fused_and_eager_training_agree_step_by_step(task, tmp_path):
    train(tiny_config(), tmp_path / "teacher")
    targets = {"target__alpha": 1.0, "target__beta": 0.1, "target__logits": 0.01}
    runs = {}
    for fused in (True, False):
        config = tiny_config(task, fused=fused, teacher="@teacher", model__divide=2, **targets)
        data = RunData(config)
        runs[fused] = prepare_task(config, data, tmp_path / "student", quiet())
    data = RunData(tiny_config(task))
    optimizer = torch.optim.SGD(runs[True].network.parameters(), lr=0.01)
    batches = data.epoch(0)
    assert len(batches) >= 3
    for indices in batches:
        # from the same weights at every step: in a free run rounding alone decides which negative
        # is mined, and two runs part
        runs[False].network.load_state_dict(runs[True].network.state_dict())
        batch = data.batch(indices, phase=0, epoch=0, following=None)
        results = {f: r.step(batch.images, batch.labels, batch.points) for f, r in runs.items()}
        optimizer.zero_grad()
        runs[False].network.zero_grad()
        for result in results.values():
            result.loss.backward()
        assert results[True].terms.keys() == results[False].terms.keys()
        for name, value in results[False].terms.items():
            # float32 sums in another order: 1e-7 per element, over at most a few hundred of them
            torch.testing.assert_close(results[True].terms[name], value, rtol=2e-5, atol=1e-6)
        pairs = zip(runs[True].network.parameters(), runs[False].network.parameters(), strict=True)
        for ours, theirs in pairs:
            if theirs.grad is not None:
                assert ours.grad is not None
                scale = theirs.grad.abs().max().item()
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * scale)
        optimizer.step()
    assert {"soft", "hidden", "logits"} < set(results[True].terms)


def test_a_diverging_run_ends_with_status_1_and_one_line_and_stays_diverged(tmp_path, capsys):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    phases = [{"epochs": 1, "lr": 0.05}, {"epochs": 2, "lr": 1e20}]
    recipe.write_text(settings.to_yaml(tiny_config(optim__phases=phases)))
    command = ["train", str(recipe), "--run-dir", str(run)]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: diverged at step ")
    assert "batch was" in line
    assert not (run / "results.json").exists()
    record = checkpoint.read_json(run / "diverged.json")
    begun = checkpoint.read_json(run / "run.json")
    assert record is not None
    assert begun is not None
    assert record["key"] == begun["key"]
    assert line == f"error: {record['message']}"
    assert (record["phase"], record["epoch"]) == (1, 0)
    assert 7 <= record["step"] <= 12  # 6 steps an epoch
    for again in (command, [*command, "--resume"]):
        assert main(again) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "ended before: diverged at step " in line
        assert "--overwrite trains it again" in line
    phases = json.dumps([{"epochs": 1, "lr": 0.05}])
    assert main([*command, "--overwrite", "--optim.phases", phases]) == 0
    assert (run / "results.json").exists()
    assert not (run / "diverged.json").exists()


def test_a_damaged_image_ends_with_status_1_and_names_its_file(tmp_path, capsys):
    from PIL import Image

    for identity in ("anna", "berta"):
        (tmp_path / "faces" / identity).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (24, 24), (number, 9, 9)).save(
                tmp_path / "faces" / identity / f"{number}.png"
            )
    (tmp_path / "faces" / "berta" / "2.png").write_bytes(b"no image")
    recipe = tmp_path / "recipe.yaml"
    config = tiny_config(
        data__kind="folder", data__root=str(tmp_path / "faces"), optim__batch_size=2
    )
    recipe.write_text(settings.to_yaml(config))
    arguments = ["train", str(recipe), "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "2.png" in line
    assert main([*arguments, "--data.on_error", "skip"]) == 0
    results = checkpoint.read_json(tmp_path / "run" / "results.json")
    assert results is not None
    assert results["data"]["skipped"] == 1
    assert results["data"]["images"] == 7


def test_an_unfinished_run_needs_resume_or_overwrite(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings.to_yaml(tiny_config()))
    run = tmp_path / "run"
    arguments = ["train", str(recipe), "--run-dir", str(run)]
    assert main([*arguments, "--resume"]) == 2
    assert "no run to resume" in capsys.readouterr().err
    assert main(arguments) == 0
    (run / "results.json").unlink()
    assert main(arguments) == 2
    assert "--resume to continue it or --overwrite" in capsys.readouterr().err
    weights = (run / "last" / checkpoint.WEIGHTS).read_bytes()
    # a run folder is its own recipe
    assert main(["train", str(run), "--resume"]) == 0
    assert (run / "last" / checkpoint.WEIGHTS).read_bytes() == weights
    assert main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert (run / "last" / checkpoint.WEIGHTS).read_bytes() != weights


def test_eval_and_data_say_what_they_measured(tmp_path, capsys):
    config = tiny_config("verification")
    train(config, tmp_path / "run")
    assert main(["eval", str(tmp_path / "run" / "best")]) == 0
    shown = capsys.readouterr().out
    assert "nn_top1" in shown
    assert "(floor " in shown
    assert ", untrained " in shown
    recipe = tmp_path / "run" / "config.yaml"
    assert main(["data", str(recipe), "--grid", str(tmp_path / "grid.png")]) == 0
    shown = capsys.readouterr().out
    assert "40 of 8 identities" in shown
    assert "random: 24 training, 16 test" in shown
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "holiday.txt").write_text("mine")
    recipe = tmp_path.parent / "recipe_of_nothing.yaml"
    recipe.write_text(settings.to_yaml(tiny_config()))
    for flags in ([], ["--overwrite"]):
        assert main(["train", str(recipe), "--run-dir", str(tmp_path), *flags]) == 2
        assert "not" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["holiday.txt"]


def _signalled_twice(number: int) -> None:
    with polled():
        assert not told_to_stop()
        os.kill(os.getpid(), number)
        assert told_to_stop()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_heard_at_once_and_by_a_loop_that_polls_after_its_step(monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv(PARENT, str(os.getppid()))
    for number in (signal.SIGINT, signal.SIGTERM):
        with signals_heard(), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with signals_heard(), pytest.raises(KeyboardInterrupt, match="signal 15"):
            _signalled_twice(number)
    with signals_heard(), pytest.raises(KeyboardInterrupt), polled():
        os.kill(os.getpid(), signal.SIGTERM)  # after the last question
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not told_to_stop()


def test_a_stage_stops_when_its_pipeline_is_gone(monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getpid()))  # not the parent of this process
    with signals_heard(), pytest.raises(KeyboardInterrupt):
        time.sleep(5)
