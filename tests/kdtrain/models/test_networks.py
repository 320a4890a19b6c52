"""Networks by name: their published sizes, their shapes and gradients, and how they join the
trainer."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from tiny_runs import assert_same_run, stop_after, tiny_config, train
from torch import nn

from kdtrain.config import ConfigError, ModelConfig
from kdtrain.config.networks import network_title
from kdtrain.experiments.dryrun import network_name
from kdtrain.models.network import (
    FaceNetwork,
    count_parameters,
    multiply_adds,
    network_from_state,
    seeded,
)
from kdtrain.training import keys
from kdtrain.training.engine import Interrupted
from kdtrain.training.input_runs import load_network

SMALL = ("mobilefacenet", "mbf", "mbf_large", "iresnet18", "ir18")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def network(name: str, size: int = 32, classes: int = 7, landmarks: bool = False, **keys):
    model = ModelConfig(name=name, **{"divide": 8, "embedding": 24, **keys})
    with seeded(0):
        return FaceNetwork(model, classes, landmarks, input_size=size)


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 255


# Millions of parameters and GMAC of backbone and 512-d embedding at 112 pixels. The IRs: without
# the first shortcut's 64 x 64 convolution, of 64 x 64 x 56 x 56 multiply-adds, and both layers'
# normalisations.
@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("mobilefacenet", "1.20", "0.22"),
        ("mbf", "2.06", "0.44"),
        ("mbf_large", "6.31", "1.82"),
        ("iresnet18", "24.03", "2.61"),
        ("iresnet34", "34.14", "4.46"),
        ("iresnet50", "43.59", "6.31"),
        ("iresnet100", "65.16", "12.09"),
        ("ir18", "24.02", "2.60"),
        ("ir34", "34.13", "4.45"),
        ("ir50", "43.59", "6.30"),
        ("ir101", "65.15", "12.08"),
    ],
)
def test_sizes_are_the_published_ones(name, parameters, giga):
    with torch.device("meta"):
        made = FaceNetwork(ModelConfig(name=name), 1)
    assert made.width == 512
    assert f"{count_parameters(made.backbone) / 1e6:.2f}" == parameters
    assert f"{(multiply_adds(made, 112) - 512) / 1e9:.2f}" == giga


@pytest.mark.parametrize("name", [*SMALL, "resnet"])
def test_a_pass_gives_every_output_and_its_gradient_reaches_every_parameter(name):
    made = network(name, landmarks=True, depth=14, stem="small").train()
    out = made.attend(images())
    assert out.hidden.shape == (4, 24)
    assert out.logits.shape == (4, 7)
    assert out.points is not None
    assert len(out.attention) == len(made.backbone.widths) == 4
    weights = torch.randn(4, 24, generator=torch.Generator().manual_seed(2))
    (
        out.logits.square().sum() + out.points.square().sum() + (weights * out.hidden).sum()
    ).backward()
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            # a bias before a batch normalisation moves nothing
            assert parameter.grad.abs().sum() > 0 or key == "backbone.embedding.bias", key
        else:
            assert name == "iresnet18"
            assert key == "backbone.embedding_norm.weight"


@pytest.mark.parametrize("name", [*SMALL, "resnet"])
def test_stages_have_the_widths_and_sides_of_the_network(name):
    made = network(name, depth=14, stem="small").eval()
    for stage, width in enumerate(made.backbone.widths):
        side = 16 >> stage
        assert made.tap(images(2), stage + 1).shape == (2, width, side, side)


@pytest.mark.parametrize("name", SMALL)
def test_a_image_is_judged_by_itself_in_evaluation_and_by_its_batch_in_training(name):
    made, seen = network(name), images()
    made.eval()
    with torch.no_grad():
        alone, together = made(seen[:2]).hidden, made(seen).hidden
        torch.testing.assert_close(alone, together[:2], rtol=1e-4, atol=1e-4)
        made.train()
        assert (made(seen[:2]).hidden - made(seen).hidden[:2]).abs().max() > 0.01


@pytest.mark.parametrize("name", SMALL)
def test_a_face_network_is_built_for_its_input_size_and_reports_it(name):
    made = network(name, size=40).eval()  # maps of 3 x 3
    with torch.no_grad():
        for size in (33, 48):
            assert made(images(1, size)).hidden.shape == (1, 24)
        with pytest.raises(ValueError, match=r"33 to 48 pixels.*maps of 2 x 2 where 3 x 3"):
            made(images(1, 32))
        with pytest.raises(ValueError, match=r"maps of 3 x 4 where 3 x 3"):
            made(torch.zeros(1, 3, 48, 64))


@pytest.mark.parametrize("name", ["mobilefacenet", "resnet"])
def test_bgr_weights_see_bgr(name):
    rgb, bgr = (network(name, depth=14, stem="small", color=c).eval() for c in ("rgb", "bgr"))
    bgr.load_state_dict(rgb.state_dict())
    seen = images()
    with torch.no_grad():
        expected = rgb(seen[:, [2, 1, 0]])
        torch.testing.assert_close(bgr(seen).hidden, expected.hidden)
        torch.testing.assert_close(bgr.tap(seen, 2), rgb.tap(seen[:, [2, 1, 0]], 2))
        assert (rgb.tap(seen, 1) - bgr.tap(seen, 1)).abs().max() > 0.01


def test_face_networks_scale_their_input_themselves():
    made = network("iresnet18").eval()
    conv = made.backbone.get_submodule("stem.conv")
    found = []
    conv.register_forward_hook(lambda module, read, out: found.append(read[0]))
    with torch.no_grad():
        made(torch.tensor([0.0, 127.5, 255.0]).reshape(1, 3, 1, 1).expand(1, 3, 32, 32))
    assert found[0].amin((0, 2, 3)).tolist() == found[0].amax((0, 2, 3)).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("name", [*SMALL, "resnet"])
def test_a_network_is_rebuilt_from_its_weights(name):
    made = network(name, landmarks=True, depth=14, stem="small").eval()
    model = ModelConfig(name=name, divide=8, embedding=24, depth=14, stem="small")
    copy = network_from_state(model, made.state_dict(), input_size=32).eval()
    with torch.no_grad():
        assert torch.equal(copy(images()).logits, made(images()).logits)


def test_weights_for_another_input_size_are_refused():
    state = network("mobilefacenet").state_dict()
    with pytest.raises(
        ValueError,
        match=r"mobilefacenet, divide 8, embedding 24 for images of 64 pixels.*\(64, 1",
    ):
        network_from_state(
            ModelConfig(name="mobilefacenet", divide=8, embedding=24), state, input_size=64
        )


def test_the_names_of_the_default_network_s_weights_have_not_changed():
    # runs of earlier versions are loaded by them
    made = FaceNetwork(ModelConfig(depth=14, width=8, stem="small"), 3)
    names = list(made.state_dict())
    assert len(names) == 109
    assert names[0] == "backbone.input_norm.weight"
    assert names[5] == "backbone.stem.weight"
    assert names[11] == "backbone.stages.0.0.conv1.weight"
    assert names[-1] == "classifier.bias"


def test_a_face_network_trains_distils_and_resumes_exactly(tmp_path):
    own = {"model__name": "iresnet18", "model__divide": 8, "model__embedding": 16}
    short = {"optim__phases": [{"epochs": 1, "lr": 0.01}], "data__identities": 5}
    train(tiny_config(model__color="bgr", optim__ema=0.9, **own, **short), tmp_path / "teacher")
    assert load_network(tmp_path / "teacher").backbone.color == "bgr"
    config = tiny_config(
        teacher=str(tmp_path / "teacher"),
        target__embedding_l2=1.0,
        target__alpha=1.0,
        optim__clip_norm=1.0,
        **own,
        **short,
    )
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop=stop_after(2))
    train(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    scale = load_network(tmp_path / "parts").backbone.get_parameter("embedding_norm.weight")
    assert scale.tolist() == [1.0] * 16


@pytest.mark.parametrize("change", [{"name": "mbf"}, {"color": "bgr"}, {"embedding": 8}])
def test_another_network_is_another_run(change):
    changed = tiny_config(**{f"model__{key}": value for key, value in change.items()})
    assert keys.run_key(changed, {}, "") != keys.run_key(tiny_config(), {}, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "iresnet51"}, "model.name.*mobilefacenet.*timm:NAME.*iresnet51"),
        ({"name": "timm:"}, "model.name"),
        ({"embedding": 0}, "model.embedding"),
    ],
)
def test_settings_that_name_no_network_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change)


def test_networks_are_shown_by_the_names_identities_know():
    assert network_name(ModelConfig(depth=14, width=32, divide=8)) == "ResNet-14 w32/8"
    assert network_name(ModelConfig(name="iresnet100")) == "IResNet-100"
    assert network_name(ModelConfig(name="ir101", divide=2)) == "IR-101/2"
    assert network_name(ModelConfig(name="mbf_large")) == "MBF-large"
    assert network_name(ModelConfig(name="timm:convnext_tiny")) == "timm:convnext_tiny"
    assert network_title({"depth": 50, "width": 64, "divide": 1}) == "ResNet-50"


class Toy(nn.Module):
    """What TimmNetwork asks of a timm model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.num_features = size, 6
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.4)}
        self.feature_info = [{"num_chs": 5, "reduction": 1}, {"num_chs": 6, "reduction": 2}]
        self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1, 2)

    def forward_head(self, maps):
        return maps.mean((2, 3))

    def forward_intermediates(self, seen, *, indices, output_fmt):
        assert (indices, output_fmt) == (2, "NCHW")
        first = self.first(seen)
        second = self.second(first)
        return second, [first, second]

    def forward(self, seen):
        assert seen.shape[-1] == self.size
        return self.forward_head(self.second(self.first(seen)))


@pytest.fixture
def timm(monkeypatch):
    module = types.ModuleType("timm")
    module.__version__ = "0"  # pyright: ignore[reportAttributeAccessIssue]

    def create_model(name, *, pretrained, num_classes, img_size=32):
        assert (name, pretrained, num_classes) == ("toy", False, 0)
        return Toy(img_size)

    known = {
        "create_model": create_model,
        "is_model": lambda name: name == "toy",
        "list_models": lambda pattern: ["toy"],
        "get_pretrained_cfg": lambda name: types.SimpleNamespace(fixed_input_size=True),
    }
    for name, value in known.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("timm")
def test_a_network_of_timm_by_its_name():
    model = ModelConfig(name="timm:toy", embedding=3)
    with seeded(0):
        made = FaceNetwork(model, 4, input_size=16).eval()
    seen = images(2, 16)
    with torch.no_grad():
        out = made.attend(seen)
        assert made.backbone.widths == [5, 6]
        assert torch.equal(out.hidden, made(seen).hidden)
        assert [tuple(a.shape) for a in out.attention] == [(2, 16, 16), (2, 8, 8)]
        toy = made.backbone.get_submodule("network")
        mean, deviation = (torch.tensor(toy.pretrained_cfg[k]) for k in ("mean", "std"))
        scaled = (seen / 255 - mean.reshape(3, 1, 1)) / deviation.reshape(3, 1, 1)
        torch.testing.assert_close(made.tap(seen, 1), toy.first(scaled))
        copy = network_from_state(model, made.state_dict(), input_size=16).eval()
        assert torch.equal(copy(seen).logits, out.logits)
    plain = FaceNetwork(ModelConfig(name="timm:toy"), 4, input_size=16)
    assert plain.width == 6
    with pytest.raises(ValueError, match="timm:other: timm 0 has no such model; near it: toy"):
        FaceNetwork(ModelConfig(name="timm:other", divide=8), 4)  # the name is the first mistake
    with pytest.raises(ValueError, match="model.divide: expected 1 for timm:toy; got 8"):
        FaceNetwork(ModelConfig(name="timm:toy", divide=8), 4)


@pytest.mark.usefixtures("timm")
def test_a_network_of_timm_without_maps_says_so(monkeypatch):
    monkeypatch.delattr(Toy, "forward_intermediates")
    made = FaceNetwork(ModelConfig(name="timm:toy"), 4, input_size=16)
    with pytest.raises(ValueError, match="timm's toy has no stage maps"):
        made.tap(images(2, 16), 1)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r'the timm extra: pip install "\.\[timm\]"'):
        FaceNetwork(ModelConfig(name="timm:resnet18"), 4)


@pytest.mark.parametrize("name", SMALL)
def test_every_layer_but_the_embedding_is_divided(name):
    with torch.device("meta"):
        whole, part = (FaceNetwork(ModelConfig(name=name, divide=d), 1) for d in (1, 8))
    assert part.backbone.widths == [width // 8 for width in whole.backbone.widths]
    assert part.width == whole.width == 512
