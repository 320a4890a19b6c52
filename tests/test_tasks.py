"""The three tasks: their losses written out, fused against eager training, metrics, floors and
samples.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdtrain import evaluate, tasks
from kdtrain.config import (
    Config,
    EvalConfig,
    ModelConfig,
    TargetConfig,
    TeacherConfig,
    TripletConfig,
)
from kdtrain.models import FaceNetwork, seeded
from kdtrain.observe import EvalBatch
from kdtrain.tasks import Task, build_task

PEOPLE = 6
NAMES = ("classification", "alignment", "verification")


@pytest.fixture(autouse=True)
def _one_thread():
    """On networks this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


def make_config(task: str, *, fused: bool = True, mining: str = "hard", **target: float) -> Config:
    wants_teacher = any(target.get(name) for name in ("alpha", "beta", "logits"))
    target.setdefault("gamma", 1.0 if task == "classification" else 0.0)
    return Config(
        task=task,
        fused=fused,
        teacher=TeacherConfig(run="teacher" if wants_teacher else None),
        model=ModelConfig(depth=14, width=8, divide=2, stem="small"),
        target=TargetConfig(**target),
        triplet=TripletConfig(mining=mining),
    )


def make_teacher(classes: int = PEOPLE) -> FaceNetwork:
    with seeded(9):
        return FaceNetwork(ModelConfig(depth=14, width=8, stem="small"), classes)


def make_task(name: str, **options) -> Task:
    config = make_config(name, **options)
    return build_task(config, PEOPLE, make_teacher() if config.teacher.run else None)


def make_batch(seed: int = 0, count: int = 12, side: int = 16):
    """Pictures of people who differ by colour, with a bright dot at each landmark."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % PEOPLE
    colours = torch.rand(PEOPLE, 3, generator=torch.Generator().manual_seed(77)) * 200
    pictures = colours[labels][:, :, None, None] + 20 * torch.rand(
        count, 3, side, side, generator=generator
    )
    face = torch.tensor([[5.0, 5], [10, 5], [7, 8], [5, 11], [10, 11]])
    points = face + 3 * torch.rand(count, 1, 2, generator=generator)
    for i, row in enumerate(points.long().tolist()):
        for x, y in row:
            pictures[i, :, y, x] = 255
    return pictures, labels, points


def to_original(points: torch.Tensor, scale: float) -> torch.Tensor:
    return points * torch.tensor([scale, 2 * scale]) + torch.tensor([4.0, 6.0])


def eval_batches(count: int = 48, size: int = 20, groups: bool = False) -> list[EvalBatch]:
    pictures, labels, points = make_batch(1, count)
    batches = []
    for part in torch.arange(count).split(size):
        batches.append(
            EvalBatch(
                pictures=pictures[part],
                labels=labels[part],
                indices=part,
                sizes=torch.tensor([[72, 136]]).expand(len(part), 2),
                points_original=to_original(points[part], 4.0),
                groups=part // PEOPLE if groups else None,
                to_original=partial(to_original, scale=4.0),
            )
        )
    return batches


def soft(student, teacher):
    probs = torch.softmax(teacher / 3, 1)
    return -(probs * torch.log_softmax(student / 3, 1)).sum(1).mean()


def outputs_of(task: Task, pictures: torch.Tensor):
    """What one training step sees; running statistics are put back."""
    state = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    out = task.network.train()(pictures)
    task.network.load_state_dict(state)
    return out


def test_classification_is_hard_plus_alpha_soft():
    task = make_task("classification", alpha=0.5)
    pictures, labels, _ = make_batch()
    out = outputs_of(task, pictures)
    assert task.teacher is not None
    guide = task.teacher(pictures)
    result = task.step(pictures, labels)
    expected = F.cross_entropy(out.logits, labels) + 0.5 * soft(out.logits, guide.logits)
    torch.testing.assert_close(result.loss, expected)
    assert set(result.terms) == {"hard", "top1", "soft", "teacher_entropy"}


@pytest.mark.parametrize("name", ["soft", "logits", "hidden"])
def test_classification_without_its_hard_term_is_the_target_alone(name):
    weight = "alpha" if name == "soft" else "beta" if name == "hidden" else "logits"
    task = make_task("classification", gamma=0.0, **{weight: 0.5})
    pictures, labels, _ = make_batch()
    out = outputs_of(task, pictures)
    assert task.teacher is not None
    guide = task.teacher(pictures)
    if name == "soft":
        expected = soft(out.logits, guide.logits)
    elif name == "logits":
        expected = (out.logits - guide.logits).square().sum(1).mean()
    else:
        expected = task.extra["hidden"].projection(out.hidden) - guide.hidden
        expected = expected.square().sum(1).mean()
    result = task.step(pictures, labels)
    torch.testing.assert_close(result.loss, 0.5 * expected)
    assert set(result.terms) == {name} | ({"teacher_entropy"} if name == "soft" else set())
    result.loss.backward()
    assert (task.network.classifier.weight.grad is None) == (name == "hidden")


def test_alignment_is_the_squared_distance_of_ten_coordinates_and_targets():
    task = make_task("alignment", alpha=0.5, beta=0.25, hidden_reduction="mean")
    pictures, labels, points = make_batch()
    out = outputs_of(task, pictures)
    assert task.teacher is not None
    guide = task.teacher(pictures)
    result = task.step(pictures, labels, points)
    truth = torch.stack([points[:, :, 0] / 16 - 0.5, points[:, :, 1] / 16 - 0.5], 2)
    regression = (out.points.reshape(-1, 5, 2) - truth).square().sum((1, 2)).mean()
    hidden = F.mse_loss(task.extra["hidden"].projection(out.hidden), guide.hidden)
    expected = regression + 0.5 * soft(out.logits, guide.logits) + 0.25 * hidden
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.terms["points"], regression.detach())
    torch.testing.assert_close(result.terms["hidden"], hidden.detach())


def test_landmarks_of_a_picture_that_is_not_square_are_scaled_by_each_side():
    task = make_task("alignment")
    pictures = torch.rand(4, 3, 16, 32) * 255
    points = torch.rand(4, 5, 2) * 16
    out = outputs_of(task, pictures)
    truth = (points / torch.tensor([32.0, 16.0]) - 0.5).flatten(1)
    result = task.step(pictures, torch.zeros(4).long(), points)
    torch.testing.assert_close(result.loss, (out.points - truth).square().sum(1).mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_verification_is_the_triplet_loss_of_unit_features_and_the_joint_softmax(normalize):
    config = make_config("verification", mining="all", gamma=0.5, alpha=2.0)
    triplet = dataclasses.replace(config.triplet, normalize=normalize)
    task = build_task(dataclasses.replace(config, triplet=triplet), PEOPLE, make_teacher())
    pictures, labels, _ = make_batch()
    out = outputs_of(task, pictures)
    assert task.teacher is not None
    guide = task.teacher(pictures)
    result = task.step(pictures, labels)
    rows = F.normalize(out.hidden, dim=1) if normalize else out.hidden
    hinges = []
    for a in range(12):
        for p in range(12):
            for n in range(12):
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                    near = (rows[a] - rows[p]).square().sum()
                    far = (rows[a] - rows[n]).square().sum()
                    hinges.append((near - far + 0.4).clamp(min=0))
    metric = torch.stack(hinges).mean()
    softmax = 0.5 * F.cross_entropy(out.logits, labels) + 2 * soft(out.logits, guide.logits)
    torch.testing.assert_close(result.terms["triplet"], metric.detach())
    torch.testing.assert_close(result.loss, metric + softmax)


def test_with_the_triplet_loss_alone_the_classifier_gets_no_gradient():
    task = make_task("verification")
    pictures, labels, _ = make_batch()
    task.step(pictures, labels).loss.backward()
    assert task.network.classifier.weight.grad is None
    assert task.network.backbone.stem.weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_detached_scalars_with_the_same_names_at_every_step(name):
    task = make_task(name, alpha=1.0, beta=1.0, logits=1.0, gamma=1.0)
    steps = [task.step(*make_batch(seed)) for seed in range(2)]
    assert list(steps[0].terms) == list(steps[1].terms)
    assert {"hard", "soft", "hidden", "logits", "top1"} <= set(steps[0].terms)
    for term in steps[0].terms.values():
        assert term.shape == ()
        assert term.dtype == torch.float32
        assert not term.requires_grad
    assert steps[0].loss.requires_grad


CASES = [
    ("classification", {"alpha": 1.0}),
    ("classification", {"alpha": 1.0, "tau_squared": True, "logits": 0.1, "gamma": 0.5}),
    ("classification", {"label_smoothing": 0.1}),
    ("alignment", {"alpha": 1.0, "beta": 1.0, "hidden_reduction": "mean"}),
    ("alignment", {"beta": 0.1}),
    ("verification", {"mining": "semihard"}),
    ("verification", {"mining": "all", "gamma": 1.0, "alpha": 1.0}),
    ("verification", {"beta": 0.01, "hidden_normalize": True}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_fused_and_eager_training_agree_step_by_step(name, options):
    """Relative 1e-5 over eight Nesterov steps: float32 noise of the two backends does not grow past
    it.
    """
    losses = []
    for fused in (True, False):
        task = make_task(name, fused=fused, **options)
        parameters = [*task.network.parameters(), *task.extra.parameters()]
        optimizer = torch.optim.SGD(
            parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        task.network.train()
        curve = []
        for step in range(8):
            result = task.step(*make_batch(step))
            optimizer.zero_grad()
            result.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            curve.append(result.loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_fused_off_runs_every_op_on_eager(monkeypatch):
    seen = []

    def record(module, name):
        original = getattr(module, name)

        def call(*args, **options):
            seen.append((name, options["backend"]))
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    from kdtrain import targets

    record(targets, "kd_cross_entropy")
    record(targets, "hidden_l2")
    record(tasks, "batch_triplet_loss")
    record(evaluate, "nearest_neighbor")
    task = make_task("verification", fused=False, gamma=1.0, alpha=1.0, beta=1.0)
    task.step(*make_batch())
    task.evaluate(eval_batches())
    task.floors(eval_batches(), eval_batches())
    assert {name for name, _ in seen} == {
        "kd_cross_entropy",
        "hidden_l2",
        "batch_triplet_loss",
        "nearest_neighbor",
    }
    assert {backend for _, backend in seen} == {"eager"}


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_is_in_eval_mode_and_never_changes(name):
    task = make_task(name, alpha=1.0, beta=1.0)
    assert task.teacher is not None
    before = {key: tensor.clone() for key, tensor in task.teacher.state_dict().items()}
    task.network.train()
    task.step(*make_batch()).loss.backward()
    assert not task.teacher.training
    assert all(parameter.grad is None for parameter in task.teacher.parameters())
    assert all(torch.equal(before[key], t) for key, t in task.teacher.state_dict().items())
    own = {id(p) for m in (task.network, task.extra) for p in m.parameters()}
    assert not own & {id(p) for p in task.teacher.parameters()}


def test_a_student_starts_alike_with_and_without_a_teacher():
    plain, taught = make_task("classification"), make_task("classification", alpha=1.0, beta=1.0)
    pairs = zip(plain.network.parameters(), taught.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_projection_is_trained_but_kept_out_of_the_network():
    task = make_task("classification", beta=1.0)
    task.step(*make_batch()[:2]).loss.backward()
    (projection,) = task.extra.parameters()
    assert projection.shape == (256, 128)
    assert projection.grad is not None
    assert not any("projection" in name for name in task.network.state_dict())


def test_a_target_without_its_teacher_is_refused():
    with pytest.raises(ValueError, match="needs a teacher network"):
        build_task(make_config("classification", alpha=1.0), PEOPLE)


def test_a_teacher_of_other_people_is_refused_unless_only_features_are_compared():
    with pytest.raises(ValueError, match="tells 9 people apart and the data has 6"):
        build_task(make_config("alignment", alpha=1.0), PEOPLE, make_teacher(9))
    assert build_task(make_config("alignment", beta=1.0), PEOPLE, make_teacher(9)).teacher


def test_an_unknown_task_names_the_known_ones():
    config = dataclasses.replace(make_config("classification"), task="detection")
    with pytest.raises(ValueError, match="classification, alignment, verification, got 'detect"):
        build_task(config, PEOPLE)


def test_alignment_without_landmarks_is_an_error():
    task = make_task("alignment")
    pictures, labels, _ = make_batch()
    with pytest.raises(ValueError, match="landmarks are needed"):
        task.step(pictures, labels)
    bare = [dataclasses.replace(batch, points_original=None) for batch in eval_batches()]
    with pytest.raises(ValueError, match="landmarks are needed"):
        task.evaluate(bare)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_restores_the_mode_and_changes_nothing(name):
    task = make_task(name)
    task.network.train()
    before = {key: tensor.clone() for key, tensor in task.network.state_dict().items()}
    first, second = task.evaluate(eval_batches()), task.evaluate(eval_batches())
    assert first == second
    assert task.network.training
    assert all(torch.equal(before[key], t) for key, t in task.network.state_dict().items())
    assert task.metric[0] in first
    assert all(np.isfinite(value) for value in first.values())


@pytest.mark.parametrize("name", NAMES)
def test_metrics_do_not_depend_on_the_batches(name):
    task = make_task(name)
    one, many = task.evaluate(eval_batches(size=48)), task.evaluate(eval_batches(size=7))
    assert one == pytest.approx(many, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_split_is_an_error(name):
    with pytest.raises(ValueError, match="no picture to look at"):
        make_task(name).evaluate([])


def test_classification_top1_is_the_share_of_right_labels():
    task = make_task("classification")
    batches = eval_batches()
    task.network.eval()
    with torch.no_grad():
        logits = torch.cat([task.network(batch.pictures).logits for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    metrics = task.evaluate(batches)
    assert metrics["top1"] == (logits.argmax(1) == labels).double().mean().item()
    assert metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item())


def test_alignment_is_measured_in_the_original_pixel_frame():
    config = make_config("alignment")
    batches = eval_batches()
    for kind in evaluate.NORMALIZERS:
        task = build_task(dataclasses.replace(config, eval=EvalConfig(normalizer=kind)), PEOPLE)
        task.network.eval()
        with torch.no_grad():
            points = torch.cat([task.network(batch.pictures).points for batch in batches])
        predicted = to_original((points.reshape(-1, 5, 2) + 0.5) * 16, 4.0)
        true = torch.cat([batch.points_original for batch in batches])
        sizes = torch.cat([batch.sizes for batch in batches])
        expected = evaluate.nrmse(predicted, true, sizes, kind)
        assert task.evaluate(batches)["nrmse"] == pytest.approx(expected, rel=1e-6)


def test_the_mean_shape_is_the_floor_of_alignment():
    train, test = eval_batches(), eval_batches(24)
    floor = make_task("alignment").floors(train, test)
    shape = torch.cat([batch.points_original for batch in train]).mean(0)  # one frame for all here
    true = torch.cat([batch.points_original for batch in test])
    sizes = torch.cat([batch.sizes for batch in test])
    expected = evaluate.nrmse(shape.expand_as(true), true, sizes)
    assert floor["nrmse"] == pytest.approx(expected, rel=1e-5)


def test_raw_pixels_are_the_floor_of_the_identity_tasks():
    train, test = eval_batches(), eval_batches(24)
    # people here differ by their mean colour, which raw pixels see
    assert make_task("classification").floors(train, test)["top1"] > 0.9
    pixels = torch.cat([batch.pictures.flatten(1) for batch in test])
    labels = torch.cat([batch.labels for batch in test])
    floor = make_task("verification").floors(train, test)
    assert floor == evaluate.nn_top1(pixels, labels)
    assert floor["nn_queries"] == 24


def test_neighbours_outside_the_video_are_measured_where_videos_are_known():
    task = make_task("verification")
    assert "nn_top1_other_video" not in task.evaluate(eval_batches())
    metrics = task.evaluate(eval_batches(groups=True))
    # a video here is one picture of each person
    assert metrics["nn_queries_other_video"] == 48
    items = task.items()
    for name in ("nn_top1", "nn_top1_other_video"):
        assert np.nanmean(items[name], dtype=np.float64) == metrics[name]


def test_a_lone_query_is_no_number_among_the_pictures_results():
    task = make_task("verification")
    batch = eval_batches(48, 48)[0]
    labels = batch.labels.where((batch.labels != 5) | (torch.arange(48) == 5), 4)
    metrics = task.evaluate([dataclasses.replace(batch, labels=labels)])
    found = task.items()["nn_top1"]
    assert np.flatnonzero(np.isnan(found)).tolist() == [5]
    assert np.nanmean(found, dtype=np.float64) == metrics["nn_top1"]


def test_the_untrained_network_is_the_one_before_its_first_step_whatever_came_since():
    task = make_task("verification")
    before = task.evaluate(eval_batches(groups=True))
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.mul_(-1.3)
    after, items = task.evaluate(eval_batches(groups=True)), task.items()
    assert after != before
    assert task.untrained(eval_batches(groups=True)) == before
    assert {"nn_top1", "nn_top1_other_video"} <= set(before)
    assert all((task.items()[name] == values).all() for name, values in items.items())
    assert make_task("alignment").untrained(eval_batches()) == {}


def test_pair_accuracy_appears_once_ten_folds_have_people_enough():
    task = build_task(make_config("verification"), 40)
    pictures, _, _ = make_batch(1, 80)
    batch = dataclasses.replace(
        eval_batches(80, 80)[0], pictures=pictures, labels=torch.arange(80) // 2
    )
    metrics = task.evaluate([batch])
    assert metrics["pairs"] == 2 * 10 * 4
    assert 0 <= metrics["pair_accuracy"] <= 1
    assert {"roc_far", "roc_tar"} <= set(task.artifacts())
    assert task.untrained([batch]) == metrics
    features = build_task(make_config("classification"), 40).untrained([batch])
    assert set(features) == {n for n in metrics if not n.startswith("nn_")}
    assert "pair_accuracy" not in make_task("verification").evaluate(eval_batches())


def test_samples_of_identity_tasks_are_queries_with_their_nearest_neighbours():
    for name in ("classification", "verification"):
        task = make_task(name)
        assert task.artifacts() == {}
        task.evaluate(eval_batches())
        samples = task.artifacts()
        assert samples["queries"].shape == samples["neighbours"].shape == (12, 3, 16, 16)
        assert samples["queries"].dtype == np.uint8
        assert int(samples["gallery"]) == 48
        assert (samples["distances"] >= 0).all()
        same = (samples["queries"] == samples["neighbours"]).all((1, 2, 3))
        assert not same.any()  # a picture is not its own neighbour


def test_samples_of_alignment_are_in_the_pixels_of_the_picture_shown():
    task = make_task("alignment")
    task.evaluate(eval_batches())
    samples = task.artifacts()
    pictures, _, points = make_batch(1, 48)
    chosen = torch.linspace(0, 47, 12, dtype=torch.float64).round().long()
    np.testing.assert_allclose(samples["true"], points[chosen], atol=1e-4)
    np.testing.assert_array_equal(samples["pictures"], pictures[chosen].round().byte())
    assert samples["ced_share"].shape == samples["ced_threshold"].shape


def test_large_pictures_are_shrunk_for_the_report_and_their_points_with_them():
    task = make_task("alignment")
    batch = eval_batches(4)[0]
    large = F.interpolate(batch.pictures, size=(192, 192))
    task.evaluate([dataclasses.replace(batch, pictures=large)])
    samples = task.artifacts()
    assert samples["pictures"].shape == (4, 3, 96, 96)
    # the frame maps crop pixels to the original by 4, whatever the crop's size
    expected = (batch.points_original[:, :, 0] - 4.0) / 4.0 / 2
    np.testing.assert_allclose(samples["true"][:, :, 0], expected, atol=1e-4)


def test_balanced_batches_and_landmarks_are_asked_for_where_needed():
    wants = {
        name: (make_task(name).needs_balanced_batches, make_task(name).needs_landmarks)
        for name in NAMES
    }
    assert wants == {
        "classification": (False, False),
        "alignment": (False, True),
        "verification": (True, False),
    }
    assert {make_task(name).metric for name in NAMES} == {
        ("top1", 1),
        ("nrmse", -1),
        ("nn_top1", 1),
    }
