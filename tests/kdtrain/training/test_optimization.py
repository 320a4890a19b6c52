"""The learning rate of a step, the parameters that decay, and the running average of the
weights.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kdtrain.config import OptimConfig, Phase
from kdtrain.config.settings import build
from kdtrain.models.network import FaceNetwork
from kdtrain.training.optimization import Average, Optimisation, learning_rate, parameter_groups

PHASES = [Phase(epochs=4, lr=0.1), Phase(epochs=2, lr=0.01)]


def test_the_rate_is_the_phase_s_own_by_default():
    optim = OptimConfig(phases=PHASES)
    assert learning_rate(optim, 0, 0, 0.0, 0.5) == 0.1
    assert learning_rate(optim, 0, 3, 0.5, 0.5) == 0.1
    assert learning_rate(optim, 1, 1, 0.5, 0.5) == 0.01


def test_a_cosine_falls_from_each_phase_s_rate_to_its_fraction():
    optim = OptimConfig(phases=PHASES, schedule="cosine", final_lr_fraction=0.2)
    assert learning_rate(optim, 0, 0, 0.0, 0.5) == 0.1
    assert learning_rate(optim, 0, 2, 0.0, 0.5) == pytest.approx(0.1 * 0.6)  # half way
    assert learning_rate(optim, 1, 0, 0.0, 0.5) == 0.01
    at_a_quarter = 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(optim, 1, 0, 0.5, 0.5) == pytest.approx(0.01 * at_a_quarter)
    ends = learning_rate(optim, 1, 1, 1 - 1e-9, 1e-9)
    assert ends == pytest.approx(0.01 * 0.2)


def test_the_warm_up_rises_linearly_over_phases_and_meets_the_cosine():
    optim = OptimConfig(phases=PHASES, warmup_epochs=2.5)
    rates = [learning_rate(optim, 0, e, k / 4, 1 / 4) for e in range(3) for k in range(4)]
    expected = [0.1 * min(1.0, (k + 1) / 10) for k in range(12)]
    assert rates == pytest.approx(expected)
    late = OptimConfig(phases=PHASES, warmup_epochs=5, schedule="cosine")
    assert learning_rate(late, 1, 0, 0.0, 0.5) == pytest.approx(0.01 * 4.5 / 5)


@pytest.fixture
def network() -> FaceNetwork:
    config = build({"model.depth": 14, "model.width": 8, "model.stem": "small"})
    torch.manual_seed(3)
    return FaceNetwork(config.model, 5, landmarks=True)


def test_normalisations_and_biases_alone_are_exempt_from_the_decay(network):
    named = dict(network.named_parameters())
    decayed, exempt = parameter_groups(
        network.parameters(), OptimConfig(no_decay="norm_and_bias", weight_decay=0.5)
    )
    assert exempt["weight_decay"] == 0.0
    assert "weight_decay" not in decayed
    ids = {id(p) for p in exempt["params"]}
    names = {name for name, p in named.items() if id(p) in ids}
    modules = dict(network.named_modules())
    expected = {
        name
        for name in named
        if name.endswith(".bias") or isinstance(modules[name.rpartition(".")[0]], nn.BatchNorm2d)
    }
    assert names == expected
    assert "classifier.bias" in names
    assert len(decayed["params"]) + len(names) == len(named)
    (only,) = parameter_groups(network.parameters(), OptimConfig())
    assert [id(p) for p in only["params"]] == [id(p) for p in named.values()]


def test_an_exempt_parameter_stays_where_no_gradient_moves_it(network):
    optim = OptimConfig(no_decay="norm_and_bias", weight_decay=0.5, ema=None)
    optimisation = Optimisation(network, nn.ModuleDict(), optim)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimisation.begin(0.1)
    optimisation.backward(sum(0.0 * p.sum() for p in network.parameters()))  # type: ignore[arg-type]
    optimisation.step(1)
    for name, p in network.named_parameters():
        moved = p.dim() > 1
        assert torch.equal(p, before[name]) != moved, name


def test_the_average_is_the_written_recurrence_and_copies_buffers(network):
    average = Average(network, 0.9)
    expected = {n: p.detach().double().clone() for n, p in network.named_parameters()}
    for step in range(1, 90):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
            network.backbone.stem_norm.running_mean += 1  # type: ignore[operator]
        average.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        for name, p in network.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    assert (1 + 89) / (10 + 89) > 0.9  # both branches of the minimum were met
    weights = average.weights()
    assert list(weights) == list(network.state_dict())
    for name, value in expected.items():
        # float32: 89 roundings of values near 1
        torch.testing.assert_close(weights[name].double(), value, rtol=0, atol=2e-6)
    name = "backbone.stem_norm.running_mean"
    assert torch.equal(weights[name], network.state_dict()[name])


def test_the_trained_weights_come_back_bit_by_bit_from_a_measurement(network):
    average = Average(network, 0.5)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    average.update(1)
    own = {n: p.detach().clone() for n, p in network.named_parameters()}

    def measure() -> None:
        with average.applied():
            for name, p in network.named_parameters():
                assert torch.equal(p, average.weights()[name])
            assert not torch.equal(network.classifier.weight, own["classifier.weight"])
            raise KeyError("stopped inside")

    with pytest.raises(KeyError):
        measure()
    assert all(torch.equal(p, own[n]) for n, p in network.named_parameters())
