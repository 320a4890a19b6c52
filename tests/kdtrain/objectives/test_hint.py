"""FitNet's hint: the loss of the middle stage, what runs, what stays, and the run that follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, quiet, stop_after, tiny_config, train
from tiny_tasks import IDENTITIES, eval_batches, make_batch, make_teacher

from kdtrain.cli.arguments import default_run_dir
from kdtrain.config import Config, ConfigError, ModelConfig, TargetConfig, TeacherConfig
from kdtrain.config.settings import build, recipe_path
from kdtrain.data.run_data import RunData
from kdtrain.models.network import FaceNetwork, seeded
from kdtrain.objectives.targets import HintTarget
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import build_task
from kdtrain.reports.report import report
from kdtrain.training import checkpoint, engine
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import number, read_lines
from kdtrain.training.preparation import prepare_task

HINT = {"target__hint": 1.0, "target__gamma": 0.0, "target__hint_reduction": "mean"}


def make_hint(stage: int = 2, fused: bool = True, reduction: str = "mean") -> Task:
    config = Config(
        fused=fused,
        teacher=TeacherConfig(run="teacher"),
        model=ModelConfig(depth=14, width=8, divide=2, stem="small"),
        target=TargetConfig(gamma=0.0, hint=0.5, hint_stage=stage, hint_reduction=reduction),
    )
    return build_task(config, IDENTITIES, make_teacher(9))


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_tap_is_what_the_stage_puts_out(stage):
    network = make_teacher().eval()
    seen = []
    network.backbone.stages[stage - 1].register_forward_hook(lambda *a: seen.append(a[2]))
    images = make_batch()[0]
    network(images)
    maps = network.tap(images, stage)
    assert torch.equal(maps, seen[0])
    assert maps.shape[1] == network.backbone.widths[stage - 1] == 4 * 8 * 2 ** (stage - 1)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_loss_is_the_squared_distance_through_the_regressor(reduction):
    task = make_hint(reduction=reduction)
    assert task.teacher is not None
    images, labels, _ = make_batch()
    guide = task.teacher.tap(images, 2)
    state = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    convolution, norm, _ = task.extra["hint"].regressor
    ours = torch.einsum(
        "nchw,dc->ndhw", task.network.tap(images, 2), convolution.weight[:, :, 0, 0]
    )
    ours = torch.nn.functional.batch_norm(ours, None, None, norm.weight, norm.bias, True).relu()
    task.network.load_state_dict(state)
    result = task.step(images, labels)
    count = {"mean": guide.numel(), "batchmean": len(guide), "sum": 1}[reduction]
    expected = (ours - guide).square().sum() / count
    torch.testing.assert_close(result.loss, 0.5 * expected)
    torch.testing.assert_close(result.terms, {"hint": expected.detach()})


@pytest.mark.parametrize("stage", [1, 3])
def test_what_lies_above_the_stage_neither_runs_nor_learns(stage):
    task = make_hint(stage)
    assert task.teacher is not None

    def refuse(*_: object) -> None:
        raise AssertionError("ran")

    for network in (task.network, task.teacher):
        for above in (*network.backbone.stages[stage:], network.classifier):
            above.register_forward_hook(refuse)
    task.step(*make_batch()[:2]).loss.backward()
    task.evaluate(eval_batches())
    task.floors(eval_batches(), eval_batches())
    learning = {name for name, p in task.network.named_parameters() if p.grad is not None}
    below = {
        name
        for name, _ in task.network.named_parameters()
        if name.startswith(("backbone.stem", "backbone.input_norm"))
        or any(name.startswith(f"backbone.stages.{place}.") for place in range(stage))
    }
    assert learning == below
    assert all(p.grad is not None for p in task.extra.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_fused_and_eager_hints_agree():
    results = []
    for fused in (True, False):
        task = make_hint(fused=fused)
        result = task.step(*make_batch()[:2])
        result.loss.backward()
        results.append((result.loss.detach(), task.network.backbone.stem.weight.grad))
    # float32 sums in another order
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("student", "teacher"), [("imagenet", "small"), ("small", "imagenet")])
@pytest.mark.parametrize("side", [32, 27])
def test_maps_of_another_stem_are_averaged_to_the_smaller(student, teacher, side):
    networks = [
        FaceNetwork(ModelConfig(depth=14, width=8, divide=d, stem=stem), 3)
        for d, stem in ((2, student), (1, teacher))
    ]
    images = torch.rand(2, 3, side, side) * 255
    maps = [network.tap(images, 2).detach() for network in networks]
    ours, theirs = HintTarget(32, 64)(*maps)
    smaller = min(maps, key=lambda m: m.shape[-1])
    assert ours.shape == theirs.shape == (2, 64, *smaller.shape[2:])
    if teacher == "small":
        first = maps[1][:, :, :2, :2].mean((2, 3))
        torch.testing.assert_close(theirs[:, :, 0, 0], first)
    else:
        assert torch.equal(theirs, maps[1])


def test_the_error_is_the_mean_over_elements_and_images_and_the_floor_a_constant():
    task = make_hint(reduction="sum")
    batches = eval_batches(32, 16)
    task.network.train()
    first, second = task.evaluate(batches), task.evaluate(batches)
    assert first == second
    assert task.network.training
    assert task.extra["hint"].training
    assert task.teacher is not None
    task.network.eval()
    task.extra.eval()
    with torch.no_grad():
        images = torch.cat([batch.images for batch in batches])
        guide = task.teacher.tap(images, 2)
        ours, _ = task.extra["hint"](task.network.tap(images, 2), guide)
    assert first["hint"] == pytest.approx((ours - guide).square().mean().item(), rel=1e-6)
    items = task.items()
    assert items["index"].tolist() == list(range(32))
    assert np.mean(items["hint"], dtype=np.float64) == pytest.approx(first["hint"], rel=1e-6)
    floor = (guide - guide.mean((0, 2, 3), keepdim=True)).square().mean().item()
    assert task.floors(batches, batches)["hint"] == pytest.approx(floor, rel=1e-5)
    with pytest.raises(ValueError, match="no image to look at"):
        task.evaluate([])


@pytest.fixture(scope="module")
def hinted(tmp_path_factory):
    """A teacher, the hint stage of a student, and that stage's results."""
    root = tmp_path_factory.mktemp("hinted")
    train(tiny_config(), root / "teacher")
    config = tiny_config(teacher="@teacher", model__divide=2, **HINT)
    return root, config, train(config, root / "hint")


def test_the_hint_s_error_falls_below_its_floor(hinted):
    root, _, results = hinted
    assert results["metric"] == {"name": "hint", "higher_is_better": False}
    assert results["units"] == {"hint": "squared error"}
    lines = read_lines(root / "hint" / "metrics.jsonl")
    records = [line["hint"] for line in lines if line["kind"] == "eval"]
    assert records[-1] < 0.7 * records[0]
    assert records[-1] < results["floors"]["hint"]
    assert results["best"]["metrics"]["hint"] == min(records)
    with np.load(root / "hint" / "items" / "phase1.npz") as items:
        mean = np.mean(items["hint"], dtype=np.float64)
    assert mean == pytest.approx(records[-1], rel=1e-6)


def test_an_interrupted_hint_ends_bitwise_identical(hinted):
    root, config, _ = hinted
    with pytest.raises(Interrupted):
        train(config, root / "parts", stop=stop_after(8))
    train(config, root / "parts", resume=True)
    assert_same_run(root / "hint", root / "parts")


def test_the_run_that_follows_takes_over_the_hinted_layers_exactly(hinted):
    root, config, _ = hinted
    soft = tiny_config(teacher="@teacher", init_from="@hint", model__divide=2, target__alpha=1.0)
    task = prepare_task(soft, RunData(soft), root / "fitnet", quiet())
    with seeded(config.seed):
        fresh = FaceNetwork(config.model, 8).state_dict()
    learnt = checkpoint.load_weights(root / "hint" / "last")
    changed = set()
    for name, tensor in task.network.state_dict().items():
        assert torch.equal(tensor, learnt[name]), name
        if not torch.equal(tensor, fresh[name]):
            changed.add(name)
    above = ("backbone.stages.2", "backbone.stages.3", "classifier")
    assert not any(name.startswith(above) for name in changed)
    assert changed >= {n for n in fresh if n.startswith("backbone.stages.1") and "conv" in n}
    assert not any("hint" in name for name in learnt)
    assert "top1" in train(soft, root / "fitnet")["metrics"]


def test_a_hint_s_network_can_be_measured_and_reported(hinted):
    root, config, results = hinted
    metrics = engine.evaluate(config, root / "hint")["metrics"]
    assert "hint" not in metrics
    assert "top1" in metrics
    page = report(root / "hint").read_text()
    assert "hint of stage 2 (mean); teacher teacher" in page
    assert f"{results['metrics']['hint']:.4f}" in page
    assert number("hint", 0.25) == "0.2500 squared error"


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({}, "excludes other losses, but target.gamma is 1"),
        ({"target.gamma": 0.0, "target.alpha": 1.0}, "target.alpha is 1"),
        ({"target.gamma": 0.0, "task": "verification"}, "target.hint needs task classification"),
        ({"target.gamma": 0.0, "target.hint_stage": 5}, "target.hint_stage"),
        ({"target.gamma": 0.0, "target.hint": -1.0}, "target.hint"),
        ({"target.gamma": 0.0, "teacher": None}, "hint need a teacher"),
    ],
)
def test_a_hint_beside_other_terms_is_refused_with_what_to_do(flat, message):
    with pytest.raises(ConfigError, match=message):
        build({"target.hint": 1.0, "teacher": "runs/x", **flat})


@pytest.mark.parametrize("preset", ["two-cores", "paper"])
def test_the_recipe_s_run_stands_beside_its_teacher_s(preset):
    runs = {
        name: default_run_dir(f"{preset}/{name}", recipe_path(f"{preset}/{name}"))
        for name in ("cls_teacher", "tables/cls_hint", "tables/cls_fitnet")
    }
    assert {path.parent.as_posix() for path in runs.values()} == {f"runs/{preset}"}
    assert runs["tables/cls_hint"].name == "cls_hint"
