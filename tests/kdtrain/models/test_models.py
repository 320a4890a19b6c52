"""The face network: sizes of the paper's teacher and students, shapes, initialisation,
inheritance."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny_runs import environment
from torch import nn

from kdtrain.config import HeadConfig, ModelConfig
from kdtrain.models import network as network_module
from kdtrain.models.network import (
    FaceNetwork,
    count_parameters,
    inherit,
    is_limited_to_avx2,
    multiply_adds,
    needs_contiguous,
    network_from_state,
    seeded,
)

SMALL = ModelConfig(depth=14, width=8, divide=2, stem="small")


@pytest.fixture(autouse=True)
def _one_thread():
    """On networks this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


def network(model: ModelConfig = SMALL, classes: int = 7, landmarks: bool = False, seed: int = 0):
    with seeded(seed):
        return FaceNetwork(model, classes, landmarks)


# Millions of parameters and GMAC at 224 pixels and 10,575 classes. The literature rounds the /4
# head up to 5.43.
@pytest.mark.parametrize(
    ("divide", "backbone", "head", "giga"),
    [
        (1, "23.51", "21.67", "4.11"),
        (2, "5.89", "10.84", "1.06"),
        (4, "1.48", "5.42", "0.28"),
        (8, "0.37", "2.72", "0.08"),
    ],
)
def test_sizes_are_those_of_resnet_50_and_its_divided_students(divide, backbone, head, giga):
    model = ModelConfig(depth=50, width=64, divide=divide, stem="imagenet")
    with torch.device("meta"):
        made = FaceNetwork(model, 10_575)
    assert f"{count_parameters(made.backbone) / 1e6:.2f}" == backbone
    assert f"{count_parameters(made.classifier) / 1e6:.2f}" == head
    assert f"{multiply_adds(made, 224) / 1e9:.2f}" == giga


def test_the_smallest_student_to_three_digits():
    with torch.device("meta"):
        made = FaceNetwork(ModelConfig(depth=50, width=64, divide=8, stem="imagenet"), 10_575)
    assert count_parameters(made.backbone) == 374_158
    assert f"{multiply_adds(made, 224) / 1e9:.3f}" == "0.079"


def test_multiply_adds_of_a_network_small_enough_to_count_by_hand():
    made = FaceNetwork(ModelConfig(depth=14, width=1, divide=1, stem="small"), 3, landmarks=True)
    stem = 3 * 9 * 4 * 4  # 8 pixels become 4
    stages = 0
    channels, side = 1, 4
    for inner, stride in ((1, 1), (2, 2), (4, 2), (8, 2)):
        out = -(-side // stride)
        stages += channels * inner * side**2  # 1x1 before the stride
        stages += inner * inner * 9 * out**2 + inner * 4 * inner * out**2
        stages += channels * 4 * inner * out**2  # the shortcut
        channels, side = 4 * inner, out
    assert multiply_adds(made, 8) == stem + stages + 32 * 3 + 32 * 10


def test_a_cosine_classifier_counts_as_a_linear_one():
    model = ModelConfig(depth=14, width=1, stem="small")
    cosine = FaceNetwork(model, 100, head=HeadConfig(kind="cosine"))
    assert multiply_adds(cosine, 8) == multiply_adds(FaceNetwork(model, 100), 8)
    assert multiply_adds(cosine, 8) - multiply_adds(cosine, 8, heads=False) == 32 * 100


def test_counting_leaves_the_network_as_it_was():
    made = network().train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    multiply_adds(made, 32)
    assert made.training
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert all(not module._forward_hooks for module in made.modules())


@pytest.mark.parametrize("side", [8, 31, 32, 48])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_any_input_size_gives_one_feature_per_image(side, stem):
    made = network(ModelConfig(depth=14, width=8, divide=2, stem=stem), landmarks=True).eval()
    out = made(torch.rand(3, 3, side, side) * 255)
    assert out.hidden.shape == (3, 32 * 4)
    assert out.logits.shape == (3, 7)
    assert out.points is not None
    assert out.points.shape == (3, 10)


def test_without_a_landmark_head_there_are_no_points():
    assert network()(torch.rand(2, 3, 16, 16)).points is None


def test_in_training_brightness_and_contrast_of_the_whole_batch_do_not_matter():
    # batch normalisation on the raw image stands in for mean subtraction
    made = network().train()
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 100
    torch.testing.assert_close(made(images).logits, made(2 * images + 40).logits, rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_weights_and_leaves_torchs_own_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = network(), network(), network(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_a_landmark_head_does_not_change_the_other_weights():
    plain, both = network().state_dict(), network(landmarks=True).state_dict()
    assert all(torch.equal(tensor, both[name]) for name, tensor in plain.items())


def test_a_network_is_rebuilt_from_its_weights_alone():
    made = network(classes=5, landmarks=True).eval()
    copy = network_from_state(SMALL, made.state_dict()).eval()
    images = torch.rand(2, 3, 16, 16)
    assert copy.num_classes == 5
    assert torch.equal(copy(images).points, made(images).points)


def test_weights_of_another_width_are_refused_by_name_and_shape():
    state = network(ModelConfig(depth=14, width=8, stem="small")).state_dict()
    with pytest.raises(ValueError, match=r"width 8, divide 2.*stem.weight: \(8, 3, 3, 3\) offered"):
        network_from_state(SMALL, state)
    with pytest.raises(ValueError, match=r"no 'classifier\.weight'"):
        network_from_state(SMALL, {"weight": torch.ones(1)})


def test_inheriting_takes_the_backbone_and_lists_heads_that_do_not_fit():
    source, made = network(classes=7), network(classes=9, landmarks=True, seed=1)
    head = made.classifier.weight.clone()
    left = inherit(made, source.state_dict())
    assert torch.equal(made.backbone.stem.weight, source.backbone.stem.weight)
    assert torch.equal(made.classifier.weight, head)
    assert [line.split(":")[0] for line in left] == [
        "classifier.weight",
        "classifier.bias",
        "regressor.weight",
        "regressor.bias",
    ]
    assert "(7, 128) offered, (9, 128) needed" in left[0]
    assert "keeps its initial values" in left[2]


def test_inheriting_everything_leaves_nothing_to_list():
    source, made = network(), network(seed=1)
    source.backbone.input_norm.running_mean.fill_(3.0)
    assert inherit(made, source.state_dict()) == []
    assert all(map(torch.equal, made.state_dict().values(), source.state_dict().values()))


def test_inheriting_from_another_width_is_an_error_although_small_vectors_agree():
    # the input normalisation has three channels in every network
    with pytest.raises(ValueError, match="none of the .* weights offered fits a backbone weight"):
        inherit(network(), network(ModelConfig(depth=14, width=8, stem="small")).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "resnet50"}, "model.name: expected one of resnet, "),
        ({"color": "gbr"}, "model.color: expected one of rgb, bgr; got 'gbr'"),
        ({"name": "mbf", "divide": 3}, "model.divide: expected one of 1, 2, 4, 8; got 3"),
        ({"depth": 18}, "model.depth: expected one of 50, 14; got 18"),
        ({"stem": "large"}, "model.stem: expected one of imagenet, small; got 'large'"),
        ({"width": 6, "divide": 4}, "model.width: expected a multiple of model.divide"),
    ],
)
def test_a_size_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


@pytest.mark.parametrize(
    ("layer", "corrupts"),
    [
        (nn.Conv2d(2, 8, 1, stride=2), True),
        (nn.Conv2d(7, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(1, 8, 1, stride=2), False),
        (nn.Conv2d(8, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), False),
        (nn.Conv2d(4, 4, 1, stride=2, groups=2), False),
        (nn.Linear(4, 8), False),
    ],
)
def test_strided_1x1_convolutions_of_few_channels_keep_the_contiguous_layout(
    layer, corrupts, monkeypatch
):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    for limited in (True, False):
        monkeypatch.setattr(network_module, "is_limited_to_avx2", lambda limited=limited: limited)
        assert needs_contiguous(network) == (limited and corrupts)


@pytest.mark.parametrize(
    ("capability", "limit", "limited"),
    [
        ("AVX2", "", True),
        ("DEFAULT", "", True),
        ("AVX512", "", False),
        ("AVX512", "AVX2", True),
        ("AVX512", "avx2_vnni", True),
        ("AVX512", "AVX512_CORE", False),
        ("AVX512", "ALL", False),
    ],
)
def test_the_limit_is_the_processors_or_onednns_own(capability, limit, limited, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert is_limited_to_avx2() == limited
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not is_limited_to_avx2()


def test_a_narrow_network_trains_on_a_processor_without_avx512():
    code = """
        import torch
        from kdtrain.config import ModelConfig
        from kdtrain.models import FaceNetwork
        torch.set_num_threads(1)
        network = FaceNetwork(ModelConfig(depth=14, width=8, divide=8, stem="small"), 6)
        assert not network.channels_last
        images = 255 * torch.rand(8, 3, 32, 32)
        for _ in range(20):
            network(images).logits.square().sum().backward()
        wide = FaceNetwork(ModelConfig(depth=14, width=8, divide=1, stem="small"), 6)
        assert wide.channels_last
    """
    limited = {**os.environ, **environment(), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=limited, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
