"""The three tasks: their losses written out, fused against eager training, targets refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_tasks import (
    IDENTITIES,
    NAMES,
    eval_batches,
    make_batch,
    make_config,
    make_task,
    make_teacher,
)
from torch.nn import functional as F

from kdtrain.objectives import evaluate, tasks
from kdtrain.objectives.task import Task
from kdtrain.objectives.tasks import build_task


@pytest.fixture(autouse=True)
def _one_thread():
    """On networks this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


def soft(student, teacher):
    probs = torch.softmax(teacher / 3, 1)
    return -(probs * torch.log_softmax(student / 3, 1)).sum(1).mean()


def outputs_of(task: Task, images: torch.Tensor):
    """What one training step sees; running statistics are put back."""
    state = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    out = task.network.train()(images)
    task.network.load_state_dict(state)
    return out


def test_classification_is_hard_plus_alpha_soft():
    task = make_task("classification", alpha=0.5)
    images, labels, _ = make_batch()
    out = outputs_of(task, images)
    assert task.teacher is not None
    guide = task.teacher(images)
    result = task.step(images, labels)
    expected = F.cross_entropy(out.logits, labels) + 0.5 * soft(out.logits, guide.logits)
    torch.testing.assert_close(result.loss, expected)
    assert set(result.terms) == {"hard", "top1", "soft", "teacher_entropy"}


@pytest.mark.parametrize("name", ["soft", "logits", "hidden"])
def test_classification_without_its_hard_term_is_the_target_alone(name):
    weight = "alpha" if name == "soft" else "beta" if name == "hidden" else "logits"
    task = make_task("classification", gamma=0.0, **{weight: 0.5})
    images, labels, _ = make_batch()
    out = outputs_of(task, images)
    assert task.teacher is not None
    guide = task.teacher(images)
    if name == "soft":
        expected = soft(out.logits, guide.logits)
    elif name == "logits":
        expected = (out.logits - guide.logits).square().sum(1).mean()
    else:
        expected = task.extra["hidden"].projection(out.hidden) - guide.hidden
        expected = expected.square().sum(1).mean()
    result = task.step(images, labels)
    torch.testing.assert_close(result.loss, 0.5 * expected)
    assert set(result.terms) == {name} | ({"teacher_entropy"} if name == "soft" else set())
    result.loss.backward()
    assert (task.network.classifier.weight.grad is None) == (name == "hidden")


def test_alignment_is_the_squared_distance_of_ten_coordinates_and_targets():
    task = make_task("alignment", alpha=0.5, beta=0.25, hidden_reduction="mean")
    images, labels, points = make_batch()
    out = outputs_of(task, images)
    assert task.teacher is not None
    guide = task.teacher(images)
    result = task.step(images, labels, points)
    truth = torch.stack([points[:, :, 0] / 16 - 0.5, points[:, :, 1] / 16 - 0.5], 2)
    regression = (out.points.reshape(-1, 5, 2) - truth).square().sum((1, 2)).mean()
    hidden = F.mse_loss(task.extra["hidden"].projection(out.hidden), guide.hidden)
    expected = regression + 0.5 * soft(out.logits, guide.logits) + 0.25 * hidden
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.terms["points"], regression.detach())
    torch.testing.assert_close(result.terms["hidden"], hidden.detach())


def test_landmarks_of_a_image_that_is_not_square_are_scaled_by_each_side():
    task = make_task("alignment")
    images = torch.rand(4, 3, 16, 32) * 255
    points = torch.rand(4, 5, 2) * 16
    out = outputs_of(task, images)
    truth = (points / torch.tensor([32.0, 16.0]) - 0.5).flatten(1)
    result = task.step(images, torch.zeros(4).long(), points)
    torch.testing.assert_close(result.loss, (out.points - truth).square().sum(1).mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_verification_is_the_triplet_loss_of_unit_features_and_the_joint_softmax(normalize):
    config = make_config("verification", mining="all", gamma=0.5, alpha=2.0)
    triplet = dataclasses.replace(config.triplet, normalize=normalize)
    task = build_task(dataclasses.replace(config, triplet=triplet), IDENTITIES, make_teacher())
    images, labels, _ = make_batch()
    out = outputs_of(task, images)
    assert task.teacher is not None
    guide = task.teacher(images)
    result = task.step(images, labels)
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


def test_the_triplet_loss_takes_its_weight_and_0_leaves_the_softmax_loss_in_ordinary_batches():
    config = make_config("verification", mining="all", gamma=0.5)
    images, labels, _ = make_batch()
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        triplet = dataclasses.replace(config.triplet, weight=weight)
        weighted = dataclasses.replace(config, triplet=triplet)
        assert weighted.balanced == (weight > 0)
        task = build_task(weighted, IDENTITIES)
        losses[weight] = task.step(images, labels)
    assert set(losses[0.0].terms) == {"hard", "top1"}
    torch.testing.assert_close(losses[0.0].loss, 0.5 * losses[0.0].terms["hard"])
    metric = losses[1.0].terms["triplet"]
    torch.testing.assert_close(losses[1.0].loss - losses[0.0].loss, metric)
    torch.testing.assert_close(losses[3.0].loss - losses[0.0].loss, 3 * metric)
    triplet = dataclasses.replace(config.triplet, weight=0.0)
    target = dataclasses.replace(config.target, gamma=0.0)
    with pytest.raises(ValueError, match=r"triplet\.weight 0 leaves verification without a loss"):
        dataclasses.replace(config, triplet=triplet, target=target)


def test_with_the_triplet_loss_alone_the_classifier_gets_no_gradient():
    task = make_task("verification")
    images, labels, _ = make_batch()
    task.step(images, labels).loss.backward()
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

    from kdtrain.objectives import targets
    from kdtrain.objectives import task as task_module

    record(task_module, "kd_cross_entropy")
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


def test_a_teacher_of_other_identities_is_refused_unless_only_features_are_compared():
    with pytest.raises(ValueError, match="has 9 identities and the data has 6"):
        build_task(make_config("alignment", alpha=1.0), IDENTITIES, make_teacher(9))
    assert build_task(make_config("alignment", beta=1.0), IDENTITIES, make_teacher(9)).teacher


def test_alignment_without_landmarks_is_an_error():
    task = make_task("alignment")
    images, labels, _ = make_batch()
    with pytest.raises(ValueError, match="landmarks are needed"):
        task.step(images, labels)
    bare = [dataclasses.replace(batch, points_original=None) for batch in eval_batches()]
    with pytest.raises(ValueError, match="landmarks are needed"):
        task.evaluate(bare)
