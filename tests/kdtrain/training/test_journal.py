"""What is written while a run trains: terms, lines, pace, and what identities see."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from kdtrain.training.checkpoint import CheckpointError
from kdtrain.training.journal.journal import (
    Clock,
    Lines,
    NonFinite,
    Screen,
    Terms,
    duration,
    number,
    plain,
    read_lines,
)


def _terms(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_adding_terms_never_reads_them():
    terms = Terms()
    # a meta tensor has no value: whatever synchronises with the device raises on it
    terms.add(1, {"loss": torch.empty((), device="meta")})
    with pytest.raises((RuntimeError, NotImplementedError)):
        terms.read()


def test_terms_give_their_means_and_begin_anew():
    terms = Terms()
    for step, value in enumerate([1.0, 2.0, 6.0]):
        terms.add(step, _terms(loss=value, hard=2 * value))
    assert terms.read() is None
    assert terms.take() == {"loss": 3.0, "hard": 6.0}
    terms.add(4, _terms(loss=5.0, hard=1.0))
    terms.read()
    assert terms.take() == {"loss": 5.0, "hard": 1.0}


def test_terms_keep_no_graph():
    terms = Terms()
    weight = torch.ones((), requires_grad=True)
    terms.add(1, {"loss": weight * 2})
    assert terms.read() is None
    assert terms.take() == {"loss": 2.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_step_and_the_term_before_the_sum_are_named(value):
    terms = Terms()
    terms.add(7, _terms(loss=1.0, hard=0.5, soft=0.5))
    terms.add(8, _terms(loss=value, hard=0.5, soft=value))
    terms.add(9, _terms(loss=value, hard=value, soft=value))
    found = terms.read()
    assert isinstance(found, NonFinite)
    assert (found.step, found.term) == (8, "soft")
    assert math.isnan(value) == math.isnan(found.value)


def test_a_sum_that_overflows_alone_is_named_loss():
    terms = Terms()
    terms.add(1, _terms(loss=float("inf"), hard=1.0))
    found = terms.read()
    assert found is not None
    assert found.term == "loss"


def test_a_window_continues_from_its_state():
    whole, first = Terms(), Terms()
    for step, value in enumerate([0.1, 0.7, 0.3, 0.9]):
        whole.add(step, _terms(loss=value))
        if step < 2:
            first.add(step, _terms(loss=value))
    first.read()
    second = Terms()
    second.restore(json.loads(json.dumps(first.state())))
    for step, value in [(2, 0.3), (3, 0.9)]:
        second.add(step, _terms(loss=value))
    whole.read()
    second.read()
    assert whole.take() == second.take()


def test_lines_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = Lines(path)
    lines.write({"step": 1})
    length = lines.sync()
    lines.write({"step": 2})
    lines.close()
    lines = Lines(path, length)
    lines.write({"step": 3})
    lines.close()
    assert [r["step"] for r in read_lines(path)] == [1, 3]


def test_lines_shorter_than_the_checkpoint_records_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: shorter.*--overwrite"):
        Lines(tmp_path / "metrics.jsonl", 100)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [r["step"] for r in read_lines(path)] == [1, 2]
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    lines = Lines(tmp_path / "metrics.jsonl")
    lines.write({"a": float("nan"), "b": float("inf"), "c": 1.5, "d": [float("nan")]})
    lines.close()
    (record,) = read_lines(tmp_path / "metrics.jsonl")
    assert record == {"a": None, "b": None, "c": 1.5, "d": [None]}
    assert plain({"x": {"y": float("nan")}}) == {"x": {"y": None}}


def test_time_left_follows_the_pace_of_this_process(monkeypatch):
    now = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("kdtrain.training.journal.journal.time.perf_counter", lambda: next(now))
    clock = Clock(steps_total=50, steps_done=30, spent={})
    for _ in range(5):
        clock.step(images=8, data_s=0.5)
    assert clock.left_s() == pytest.approx(15 * 10 / 5)
    assert clock.pace() == {"samples_per_s": 4.0, "wait_share": 0.25}


def test_times_and_metrics_read_like_times_and_metrics():
    assert [duration(s) for s in (0, 75.4, 4000)] == ["0:00", "1:15", "1:06:40"]
    assert number("top1", 0.12345) == "12.35 %"
    assert number("pairs", 600) == "600"
    assert number("cross_entropy", 1.25) == "1.2500 nats"
    assert number("top1", None) == "-"


def test_a_screen_that_is_no_terminal_gets_plain_lines():
    stream = io.StringIO()
    screen = Screen("run", stream)
    screen.update(0.5, "half way")
    screen.say("epoch 1/2  [not markup]")
    screen.close()
    assert stream.getvalue() == "run: epoch 1/2  [not markup]\n"
