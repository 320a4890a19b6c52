"""train.tensorboard: the same numbers as the journal, once each, however often the run was
resumed.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
from tiny_runs import assert_same_run, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.training import keys
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import read_lines


class Recorder:
    """Stands for SummaryWriter: what lies in its folder is what it was given."""

    def __init__(self, folder: str) -> None:
        from pathlib import Path

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        self._file = open(place / f"events.{len(list(place.iterdir()))}", "w")  # noqa: SIM115

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._file.write(f"{tag} {step} {value!r}\n")

    def close(self) -> None:
        self._file.close()


def _expected(folder):
    """(tag, step, value) of every number in the journal."""
    found = []
    for record in [*read_lines(folder / "metrics.jsonl"), *read_lines(folder / "timing.jsonl")]:
        for name, value in record.items():
            if name not in ("kind", "step", "phase", "epoch", "phase_ends", "split"):
                found.append((f"{record.get('kind', 'timing')}/{name}", record["step"], value))
    return sorted(found)


def _interrupted_run(folder):
    config = tiny_config(train__tensorboard=True)
    with pytest.raises(Interrupted):  # after a line that the checkpoint does not know of
        train(config, folder, stop=stop_after(11))
    train(config, folder, resume=True)


def test_a_resumed_run_shows_every_number_once(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    _interrupted_run(tmp_path / "run")
    lines = [
        line.split()
        for file in sorted((tmp_path / "run" / "tensorboard").iterdir())
        for line in file.read_text().splitlines()
    ]
    shown = sorted((tag, int(step), float(value)) for tag, step, value in lines)
    assert shown == _expected(tmp_path / "run")
    assert {tag for tag, *_ in shown} >= {"train/loss", "train/lr", "eval/top1"}
    assert "timing/samples_per_s" in {tag for tag, *_ in shown}
    train(tiny_config(), tmp_path / "plain")
    assert_same_run(tmp_path / "plain", tmp_path / "run")  # its key too: showing changes nothing


def test_tensorboard_itself_reads_every_number_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _interrupted_run(tmp_path / "run")
    reader = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    shown = [
        (tag, event.step, event.value)
        for tag in reader.Tags()["scalars"]
        for event in reader.Scalars(tag)
    ]
    expected = _expected(tmp_path / "run")
    assert [s[:2] for s in sorted(shown)] == [e[:2] for e in expected]
    values = [value for *_, value in expected]
    assert [value for *_, value in sorted(shown)] == pytest.approx(values, rel=1e-6)


def test_without_the_package_the_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"train.tensorboard needs the tensorboard extra"):
        train(tiny_config(train__tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_changes_a_number_is_in_the_key_and_showing_is_not():
    plain = tiny_config()

    def key(**values):
        changed = dataclasses.replace(plain, train=dataclasses.replace(plain.train, **values))
        return keys.run_key(changed, {}, "data")

    assert key(tensorboard=True) == key()
    changes = [{"precision": "bfloat16"}, {"channels_last": False}, {"compile": True}]
    assert len({key(), *(key(**change) for change in changes)}) == 4
