"""Sixteen-bit passes, the loss scaler, memory layout and torch.compile."""

from __future__ import annotations

import functools
import io

import pytest
import torch
from tiny_runs import assert_same_run, stop_after, tiny_config, train

from kdtrain.config import ConfigError
from kdtrain.config.settings import build
from kdtrain.data.run_data import EvalBatch
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, engine, outcome
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen, read_lines
from kdtrain.training.optimization import Optimisation
from kdtrain.training.preparation import TrainingError

SHORT = {"optim__phases": [{"epochs": 1, "lr": 0.05}]}


def _batch():
    generator = torch.Generator().manual_seed(0)
    images = 255 * torch.rand(6, 3, 16, 16, generator=generator)
    return images, torch.arange(6) % 3, 16 * torch.rand(6, 5, 2, generator=generator)


@pytest.mark.parametrize("task", ["classification", "alignment", "verification"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_short_format_is_the_networks_own_and_the_loss_stays_near(task, precision):
    torch.set_num_threads(1)
    dtype = getattr(torch, precision)
    losses, gradients = [], []
    for name in ("float32", precision):
        config = tiny_config(task, train__precision=name)
        one = build_task(config, 4)
        one.network.train()
        seen = []
        hook = one.network.classifier.register_forward_hook(
            lambda *call, seen=seen: seen.append(call[-1].dtype)
        )
        result = one.step(*_batch())
        result.loss.backward()
        hook.remove()
        assert seen == [torch.float32 if name == "float32" else dtype]
        assert result.loss.dtype == torch.float32
        weight = one.network.classifier.weight
        assert weight.dtype == torch.float32
        losses.append(result.loss.item())
        stem = one.network.backbone.stem.weight.grad
        assert stem is not None
        assert stem.dtype == torch.float32
        gradients.append(stem.flatten())
    # 8 bits of bfloat16 through 14 layers normalised by batches of 6
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.8


def test_a_hint_s_stages_run_in_the_short_format_and_its_evaluation_does_not():
    torch.set_num_threads(1)
    keys = {"target__hint": 1.0, "target__gamma": 0.0, "target__hint_reduction": "mean"}
    losses = []
    for precision in ("float32", "bfloat16"):
        config = tiny_config(**keys, teacher="runs/teacher", train__precision=precision)
        teacher = build_task(tiny_config(), 4).network
        task = build_task(config, 4, teacher)
        task.network.train()
        seen = []
        for network in (task.network, teacher):
            network.backbone.stages[1].register_forward_hook(
                lambda *call, seen=seen: seen.append(call[-1].dtype)
            )
        losses.append(task.step(*_batch()).loss)
        assert seen == [getattr(torch, precision)] * 2
        images, labels, _ = _batch()
        sizes = torch.full((6, 2), 16)
        places = torch.arange(6)
        task.evaluate([EvalBatch(images=images, labels=labels, indices=places, sizes=sizes)])
        assert seen[2:] == [torch.float32] * 2
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_what_is_measured_is_measured_in_float32(tmp_path):
    config = tiny_config(train__precision="bfloat16", **SHORT)
    results = train(config, tmp_path)
    assert engine.evaluate(tiny_config(), tmp_path)["metrics"] == results["metrics"]


EVERYTHING = {
    "optim__accumulate": 2,
    "optim__schedule": "cosine",
    "optim__warmup_epochs": 0.5,
    "optim__ema": 0.8,
    "optim__clip_norm": 1.0,
    "data__validation_fraction": 0.2,
    "train__early_stop": 2,
    "train__save_every": 2,
}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_that_was_interrupted_everywhere_ends_the_same(precision, tmp_path):
    config = tiny_config("alignment", **{**EVERYTHING, "train__precision": precision})
    whole = train(config, tmp_path / "whole")
    if precision == "float16":  # the first scale overflows here: the case has skipped steps
        assert whole["skipped_steps"] > 0
    resume, interrupts = False, 0
    while True:
        try:
            train(config, tmp_path / "parts", resume=resume, stop=stop_after(2))
            break
        except Interrupted:
            resume, interrupts = True, interrupts + 1
    assert interrupts >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_scaled_gradient_is_clipped_and_applied_as_the_plain_one():
    moved = []
    for scaled in (False, True):
        torch.manual_seed(5)
        layer = torch.nn.Linear(4, 3)
        before = layer.weight.detach().clone()
        optim = build({"optim.clip_norm": 0.5, "optim.phases": [{"epochs": 1, "lr": 0.1}]}).optim
        optimisation = Optimisation(layer, torch.nn.ModuleDict(), optim, scaled=scaled)
        optimisation.begin(0.1)
        optimisation.backward(layer(torch.ones(2, 4)).square().sum())
        terms = optimisation.step(1)
        assert terms is not None
        moved.append((terms["gradient_norm"], layer.weight.detach() - before))
    assert moved[0][0] > 0.5  # so that the clip does something
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def _overflowing(monkeypatch, steps):
    """Optimisation.backward whose gradient is infinite at the given calls, counted from 1."""
    original, count = Optimisation.backward, 0

    def backward(self, loss):
        nonlocal count
        count += 1
        original(self, loss * float("inf") if count in steps else loss)

    monkeypatch.setattr(Optimisation, "backward", backward)


def test_an_overflow_is_skipped_counted_and_no_divergence(tmp_path, monkeypatch):
    _overflowing(monkeypatch, {5})
    config = tiny_config(train__precision="float16", train__log_every=1, optim__clip_norm=1.0)
    states, original = [], Optimisation.step

    def step(self, number):
        before = [p.detach().clone() for p in self._network.parameters()]
        taken = original(self, number)
        now = list(self._network.parameters())
        same = all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        states.append((number, taken is None, same, self._scaler.get_scale()))
        return taken

    monkeypatch.setattr(Optimisation, "step", step)
    results = train(config, tmp_path)
    skipped = [number for number, was_skipped, *_ in states if was_skipped]
    assert 5 in skipped
    assert all(was_skipped == same for _, was_skipped, same, _ in states)
    assert states[4][3] == states[3][3] / 2
    assert results["skipped_steps"] == len(skipped)
    lines = [r for r in read_lines(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in lines if "loss" not in r] == skipped
    assert lines[-1]["skipped_steps"] == len(skipped)
    assert all(r["gradient_norm"] is not None for r in lines if "loss" in r)


def test_a_gradient_that_overflows_at_every_scale_is_a_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(outcome, "MAX_SKIPPED", 4)
    _overflowing(monkeypatch, set(range(8, 100)))
    message = "step 11: the gradients of 4 steps in a row.*train.precision to bfloat16"
    with pytest.raises(TrainingError, match=message):
        train(tiny_config(train__precision="float16"), tmp_path)
    record = checkpoint.read_json(tmp_path / "diverged.json")
    assert record is not None
    assert record["step"] == 11


@pytest.mark.parametrize("last", [True, False])
def test_the_memory_layout_is_the_configured_one(last):
    torch.set_num_threads(1)
    config = tiny_config("alignment", train__channels_last=last)
    task = build_task(config, 4)
    seen = []
    task.network.backbone.stem.register_forward_hook(lambda *call: seen.append(call))
    task.network.train()
    loss = task.step(*_batch()).loss
    ((_, (given,), made),) = seen
    for tensor in (given, made, task.network.backbone.stages[0][0].conv2.weight):  # type: ignore[index]
        assert tensor.is_contiguous(memory_format=torch.channels_last) == last
    plain = build_task(tiny_config("alignment"), 4)
    plain.network.train()
    torch.testing.assert_close(loss, plain.step(*_batch()).loss, rtol=1e-4, atol=0)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its code generator, which takes a minute: tracing alone."""
    pytest.importorskip("torch._dynamo")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_compiled_networks_train_the_same_weights_under_the_same_names(traced, tmp_path):
    train(tiny_config(**SHORT), tmp_path / "teacher")
    keys = {"target__alpha": 1.0, "teacher": "@teacher", "model__divide": 2, **SHORT}
    train(tiny_config(**keys), tmp_path / "plain")
    config = tiny_config(**keys, train__compile=True)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "compiled", stop=stop_after(3))
    train(config, tmp_path / "compiled", resume=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # student and teacher
    one, other = (
        checkpoint.load_weights(tmp_path / name / "last") for name in ("plain", "compiled")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_compiler_that_fails_is_named_with_the_way_out(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no compiler on this machine")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    shown = io.StringIO()
    with pytest.raises(ConfigError, match=r"train\.compile: .*set train\.compile to false") as e:
        train(tiny_config(train__compile=True), tmp_path, screen=Screen("run", shown))
    assert "no compiler on this machine" in str(e.value)


@pytest.mark.parametrize("value", ["float64", "fp16"])
def test_a_format_that_cannot_be_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="train.precision"):
        build({"train.precision": value})
