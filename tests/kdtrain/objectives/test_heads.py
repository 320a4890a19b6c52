"""Cosine heads, margins, frozen and inherited classifiers, the teacher's classifier beside the
student's, and centres that follow a teacher: each against its formula, written out.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_runs import assert_same_run, stop_after, tiny_config, train
from tiny_tasks import IDENTITIES, make_batch, make_config
from torch.nn import functional as F

from kdtrain.config import Config, ConfigError, TeacherConfig
from kdtrain.config.networks import HeadConfig
from kdtrain.models.network import FaceNetwork, inherit_head, network_from_state, seeded
from kdtrain.objectives import heads
from kdtrain.objectives import task as task_module
from kdtrain.objectives.tasks import build_task
from kdtrain.training import checkpoint, engine


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def head_config(task: str = "classification", *, divide: int = 2, **options) -> Config:
    """options: of the head, those with t_ of the target."""
    target = {key[2:]: value for key, value in options.items() if key.startswith("t_")}
    own = {key: value for key, value in options.items() if not key.startswith("t_")}
    plain = make_config(task, **target)
    model = dataclasses.replace(plain.model, divide=divide)
    asks = own.get("margin") == "distillation" or own.get("update") == "adaptive"
    teacher = TeacherConfig(run="teacher") if asks or plain.teacher.run else TeacherConfig()
    triplet = dataclasses.replace(plain.triplet, weight=0.0 if plain.target.gamma else 1.0)
    return dataclasses.replace(
        plain, head=HeadConfig(**own), model=model, teacher=teacher, triplet=triplet
    )


def teacher_network(config: Config, kind: str = "cosine", divide: int = 1) -> FaceNetwork:
    model = dataclasses.replace(config.model, divide=divide)
    with seeded(9):
        return FaceNetwork(model, IDENTITIES, head=HeadConfig(kind=kind, scale=20.0))


def forward(task, images):
    """The student's feature in training mode, in float64, and the teacher's outputs; running
    statistics are put back.
    """
    state = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    hidden = task.network.train().backbone(images).detach().double()
    task.network.load_state_dict(state)
    if task.teacher is None:
        return hidden, None
    with torch.no_grad():
        return hidden, task.teacher(images)


def cosines(hidden, weight):
    return F.normalize(hidden.double(), dim=1) @ F.normalize(weight.detach().double(), dim=1).T


def soft(student, teacher, tau):
    probs = torch.softmax(teacher.double() / tau, 1)
    return -(probs * torch.log_softmax(student / tau, 1)).sum(1).mean()


def with_angle(values, labels, angles, takes):
    """The label's cosine becomes cos(theta + angle) - takes, by acos."""
    values = values.clone()
    for row, label in enumerate(labels.tolist()):
        theta = math.acos(values[row, label].item())
        values[row, label] = math.cos(theta + float(angles[row])) - float(takes[row])
    return values


MARGINS = {
    "arcface": lambda n: ([0.5] * n, [0.0] * n),
    "cosface": lambda n: ([0.0] * n, [0.35] * n),
    "combined": lambda n: ([0.3] * n, [0.2] * n),
}


@pytest.mark.parametrize("margin", ["none", *MARGINS, "adaface", "distillation"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_hard_term_of_a_cosine_head_has_its_margin_and_the_soft_term_none(margin, fused):
    config = head_config(kind="cosine", scale=16.0, margin=margin, t_gamma=0.5, t_alpha=0.25)
    config = dataclasses.replace(config, fused=fused)
    task = build_task(config, IDENTITIES, teacher_network(config))
    images, labels, _ = make_batch()
    hidden, guide = forward(task, images)
    values = cosines(hidden, task.network.classifier.weight)
    if margin in MARGINS:
        angles, takes = MARGINS[margin](len(labels))
    elif margin == "adaface":
        norms = hidden.norm(dim=1).clamp(0.001, 100)
        mean, std = 0.99 * 20 + 0.01 * norms.mean(), 0.99 * 100 + 0.01 * norms.std()
        z = ((norms - mean) / (std + 1e-3) * 0.333).clamp(-1, 1)
        angles, takes = -0.4 * z, 0.4 + 0.4 * z
    elif margin == "distillation":
        theirs = cosines(guide.hidden, task.teacher.classifier.weight)
        own = theirs[torch.arange(len(labels)), labels].clamp(min=0)
        angles, takes = 0.3 * own / own.max() + 0.2, [0.0] * len(labels)
    else:
        angles, takes = [0.0] * len(labels), [0.0] * len(labels)
    hard = F.cross_entropy(16 * with_angle(values, labels, angles, takes), labels)
    expected = 0.5 * hard + 0.25 * soft(16 * values, guide.logits, 3.0)
    result = task.step(images, labels)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.terms["hard"].double(), hard, rtol=1e-4, atol=1e-4)
    result.loss.backward()
    assert task.network.classifier.weight.grad is not None


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_no_scores_are_formed_where_the_loss_comes_from_the_feature(kind, monkeypatch):
    config = head_config(kind=kind, streamed=True, scale=16.0, t_alpha=1.0)
    task = build_task(config, IDENTITIES, teacher_network(config, kind))
    images, labels, _ = make_batch()
    kept = dataclasses.replace(config, head=HeadConfig(kind=kind, scale=16.0))
    expected = build_task(kept, IDENTITIES, teacher_network(config, kind)).step(images, labels)
    for network in (task.network, task.teacher):
        monkeypatch.setattr(network.classifier, "forward", None)
    result = task.step(images, labels)
    torch.testing.assert_close(result.loss, expected.loss)
    assert task.guide_widths == {"hidden": task.teacher.width}
    monkeypatch.undo()
    scores = task.network.eval()(images)
    shown = F.linear(scores.hidden, task.network.classifier.weight, task.network.classifier.bias)
    if kind == "cosine":
        shown = 16 * cosines(scores.hidden, task.network.classifier.weight).float()
    torch.testing.assert_close(scores.logits, shown)


@pytest.mark.parametrize(
    ("own", "theirs"), [("cosine", "linear"), ("linear", "cosine"), ("linear", "linear")]
)
def test_heads_of_two_kinds_are_compared_by_their_logits(own, theirs):
    config = head_config(kind=own, scale=16.0, t_alpha=1.0, t_gamma=0.0)
    task = build_task(config, IDENTITIES, teacher_network(config, theirs))
    assert task.guide_widths == {"logits": IDENTITIES}
    images, labels, _ = make_batch()
    hidden, guide = forward(task, images)
    head = task.network.classifier
    ours = 16 * cosines(hidden, head.weight)
    if own == "linear":
        ours = F.linear(hidden, head.weight.double(), head.bias.double()).detach()
    expected = soft(ours, guide.logits, 3.0)
    torch.testing.assert_close(task.step(images, labels).loss.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("divide", [1, 2])
def test_the_teachers_classifier_beside_the_students(kind, tau_squared, divide):
    config = head_config(
        divide=divide, t_teacher_head=0.5, t_teacher_head_temperature=2.0, t_tau_squared=tau_squared
    )
    task = build_task(config, IDENTITIES, teacher_network(config, kind))
    images, labels, _ = make_batch()
    hidden, guide = forward(task, images)
    theirs = task.teacher.classifier
    assert ("projection.weight" in task.extra["teacher_head"].state_dict()) == (divide == 2)
    mapped = (
        hidden if divide == 1 else hidden @ task.extra["teacher_head"].projection.weight.double().T
    )
    if kind == "cosine":
        seen = 20 * cosines(mapped, theirs.weight)
    else:
        seen = F.linear(mapped, theirs.weight.double(), theirs.bias.double())
    second = soft(seen, guide.logits, 2.0)
    head = task.network.classifier
    hard = F.cross_entropy(F.linear(hidden, head.weight.double(), head.bias.double()), labels)
    expected = hard + 0.5 * second * (4 if tau_squared else 1)
    result = task.step(images, labels)
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        result.terms["teacher_head"].double(), second.detach(), rtol=1e-4, atol=0
    )
    before = theirs.weight.clone()
    result.loss.backward()
    assert theirs.weight.grad is None
    assert torch.equal(before, theirs.weight)
    if divide == 2:
        assert task.extra["teacher_head"].projection.weight.grad.abs().sum() > 0
    # nothing of the second head is in what is saved
    assert set(task.network.state_dict()) == set(
        teacher_network(config, "linear", divide).state_dict()
    )


def test_centres_move_by_the_agreement_of_student_teacher_and_centre():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 5, generator=generator)
    before = weight.double().clone()
    student, teacher = (torch.randn(6, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([2, 0, 2, 2, 3, 0])
    teacher[4] = -student[4]  # disagrees with its student: the centre becomes the teacher's feature
    heads.move_centres(weight, student, teacher, labels)
    for identity in range(4):
        rows = (labels == identity).nonzero()[:, 0].tolist()
        centre = F.normalize(before[identity], dim=0)
        moved = []
        for row in rows:
            of_teacher = F.normalize(teacher[row].double(), dim=0)
            of_student = F.normalize(student[row].double(), dim=0)
            share = (of_student @ of_teacher).clamp(0, 1) * (centre @ of_teacher).clamp(0, 1)
            moved.append(share * centre + (1 - share) * of_teacher)
        expected = torch.stack(moved).mean(0) if rows else before[identity]
        torch.testing.assert_close(weight[identity].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight[3], F.normalize(teacher[4], dim=0))


def test_adaptive_centres_move_before_the_loss_and_get_no_gradient():
    config = head_config(divide=1, kind="cosine", scale=16.0, margin="arcface", update="adaptive")
    task = build_task(config, IDENTITIES, teacher_network(config))
    images, labels, _ = make_batch()
    hidden, guide = forward(task, images)
    expected = task.network.classifier.weight.detach().clone()
    heads.move_centres(expected, hidden, guide.hidden, labels)
    result = task.step(images, labels)
    result.loss.backward()
    torch.testing.assert_close(task.network.classifier.weight.detach(), expected)
    assert task.network.classifier.weight.grad is None
    values = with_angle(cosines(hidden, expected), labels, [0.5] * 12, [0.0] * 12)
    torch.testing.assert_close(
        result.loss.double(), F.cross_entropy(16 * values, labels), rtol=1e-4, atol=0
    )


def test_a_frozen_classifier_gets_no_gradient_and_features_of_another_width_are_refused():
    config = head_config(kind="cosine", update="none", run="somewhere")
    task = build_task(config, IDENTITIES)
    images, labels, _ = make_batch()
    task.step(images, labels).loss.backward()
    assert task.network.classifier.weight.grad is None
    assert task.network.backbone.stem.weight.grad is not None
    wide = head_config(kind="cosine", update="adaptive")
    with pytest.raises(ConfigError, match=r"head\.update adaptive.*model\.embedding"):
        build_task(wide, IDENTITIES, teacher_network(wide))


def test_a_classifier_is_inherited_from_the_same_identities_width_and_kind_only():
    config = head_config(divide=1, kind="cosine", scale=16.0)
    teacher = teacher_network(config)
    student = build_task(config, IDENTITIES).network
    inherit_head(student, teacher, "RUN")
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)
    assert student.classifier.weight is not teacher.classifier.weight
    linear = teacher_network(config, "linear")
    with pytest.raises(ValueError, match=r"head\.run RUN: its head is linear.*head\.kind"):
        inherit_head(student, linear, "RUN")
    narrow = build_task(head_config(kind="cosine"), IDENTITIES).network
    with pytest.raises(ValueError, match=r"reads 256 features.*128.*model\.embedding"):
        inherit_head(narrow, teacher, "RUN")
    few = build_task(config, 3).network
    with pytest.raises(ValueError, match="has 6 identities and the data 3"):
        inherit_head(few, teacher, "RUN")
    again = network_from_state(
        config.model, teacher.state_dict(), head=HeadConfig(kind="cosine", scale=20)
    )
    images, _, _ = make_batch()
    torch.testing.assert_close(again.eval()(images).logits, teacher.eval()(images).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": "arcface"}, "head.margin arcface needs cosines"),
        ({"update": "adaptive"}, "head.update adaptive needs cosines"),
        ({"kind": "cosine", "scale": 0.0}, "head.scale: expected a number, more than 0"),
        (
            {"kind": "cosine", "margin": "arcface", "m": 10.0},
            "head.m: expected an angle of at most",
        ),
        (
            {"kind": "cosine", "margin": "arcface", "m": -0.1},
            "head.m: expected a number, 0 or more",
        ),
        ({"kind": "cosine", "margin": "distillation", "m": 0.1}, "head.m_min: expected at most"),
    ],
)
def test_heads_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        HeadConfig(**options)


def test_a_sample_of_the_identities_is_random_and_holds_those_of_the_batch(monkeypatch):
    config = head_config(kind="cosine", scale=16.0, sample=0.5, t_alpha=1.0)
    drawn = []
    sample = task_module.sample_classes
    monkeypatch.setattr(
        task_module, "sample_classes", lambda *a: drawn.append(sample(*a)) or drawn[-1]
    )
    with seeded(3):
        task = build_task(config, 40, FaceNetwork(config.model, 40, head=config.head))
    images, labels, _ = make_batch()
    hidden, guide = forward(task, images)
    torch.manual_seed(5)
    results = [task.step(images, labels) for _ in range(2)]
    assert [len(classes) for classes in drawn] == [20, 20]
    assert not torch.equal(*drawn)
    assert all(torch.isin(labels, classes).all() for classes in drawn)
    values = 16 * cosines(hidden, task.network.classifier.weight)[:, drawn[0]]
    places = torch.searchsorted(drawn[0], labels)
    theirs = 16 * cosines(guide.hidden, task.teacher.classifier.weight)[:, drawn[0]]
    expected = F.cross_entropy(values, places) + soft(values, theirs, 3.0)
    torch.testing.assert_close(results[0].loss.double(), expected, rtol=1e-4, atol=0)
    with pytest.raises(ConfigError, match="head.sample 0.5 needs a head that stores no logits"):
        HeadConfig(sample=0.5)


def test_a_head_that_needs_a_teacher_or_freezes_random_weights_is_refused_without_a_run():
    with pytest.raises(ConfigError, match="need a teacher: set teacher.run"):
        Config(head=HeadConfig(kind="cosine", margin="distillation"))
    with pytest.raises(ConfigError, match="freezes a random classifier"):
        Config(head=HeadConfig(update="none"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A teacher with a cosine head and what is trained with its classifier."""
    root = tmp_path_factory.mktemp("heads")
    cosine = {"head__kind": "cosine", "head__scale": 16.0, "head__margin": "arcface"}
    train(tiny_config(**cosine), root / "teacher")
    return root, cosine


def test_a_run_with_the_teachers_frozen_classifier_keeps_its_bits(chain):
    root, cosine = chain
    config = tiny_config(**cosine, head__run="@teacher", head__update="none")
    train(config, root / "proxyless")
    theirs = checkpoint.load_weights(root / "teacher" / "last")
    ours = checkpoint.load_weights(root / "proxyless" / "last")
    assert torch.equal(ours["classifier.weight"], theirs["classifier.weight"])
    assert not torch.equal(ours["backbone.stem.weight"], theirs["backbone.stem.weight"])


@pytest.mark.parametrize("name", ["adaptive", "adaface", "th_kd"])
def test_state_beside_the_weights_survives_a_stop(chain, name):
    root, cosine = chain
    options = {
        "adaptive": {"head__update": "adaptive", "teacher": "@teacher"},
        "adaface": {"head__margin": "adaface", "head__sample": 0.5},
        "th_kd": {"target__teacher_head": 0.5, "teacher": "@teacher", "model__divide": 2},
    }[name]
    config = tiny_config(**{**cosine, **options}, train__save_every=2)
    train(config, root / f"{name}_whole")
    with pytest.raises(engine.Interrupted):
        train(config, root / f"{name}_parts", stop=stop_after(3))
    train(config, root / f"{name}_parts", resume=True)
    assert_same_run(root / f"{name}_whole", root / f"{name}_parts")
