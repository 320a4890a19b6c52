"""Published weights: every layout gives the outputs of its own network, nothing is lost unsaid, and
what is written serves as a teacher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from published_networks import IR, ArcfaceIResNet, ArcfaceMobileFaceNet, disturbed
from safetensors.torch import save_file
from tiny_runs import tiny_config, train

from kdtrain.cli import main
from kdtrain.config import ConfigError
from kdtrain.models.published.layouts import published
from kdtrain.training import checkpoint, keys
from kdtrain.training.input_runs import load_network, run_config
from kdtrain.training.published.import_weights import PublishedError, read_file, shards, write_run

WIDTH = 16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def networks():
    """Networks of the three projects, most for images of at most 16 or 32 pixels."""
    torch.manual_seed(0)
    return {
        "iresnet18": disturbed(ArcfaceIResNet(18, WIDTH, 2)),
        "mobilefacenet": disturbed(ArcfaceMobileFaceNet((1, 4, 6, 2), 1, WIDTH, 1)),
        "mbf": disturbed(ArcfaceMobileFaceNet((1, 4, 6, 2), 2, 512, 7)),
        "mbf_large": disturbed(ArcfaceMobileFaceNet((2, 8, 12, 4), 4, WIDTH, 1)),
        "ir18": disturbed(IR(18, WIDTH, 1)),
    }


def write(folder: Path, state, name: str = "model.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def under(prefix: str, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def unit(features):
    return torch.nn.functional.normalize(features)


def assert_same_features(network, run: Path, *, size: int, bgr: bool) -> None:
    images = torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(3))
    theirs = (images.float() / 255 - 0.5) / 0.5
    ours = load_network(run).eval()
    with torch.no_grad():
        expected = network(theirs.flip(1) if bgr else theirs)
        features = ours(images.float()).hidden
        assert expected.std() > 1e-2
        torch.testing.assert_close(unit(features), unit(expected), rtol=0, atol=1e-5)
        # and at its length, which AdaFace gives beside the direction
        torch.testing.assert_close(features.norm(dim=1), expected.norm(dim=1), rtol=1e-5, atol=0)
        other = network(theirs if bgr else theirs.flip(1))
        assert (unit(other) - unit(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "mbf", "mbf_large"])
def test_arcface_torch_s_weights_give_its_outputs(name, networks, tmp_path):
    file = write(tmp_path, networks[name].state_dict())
    said = write_run(file, "arcface_torch", tmp_path / "run")
    config = run_config(tmp_path / "run")
    places = {"iresnet18": 2, "mbf": 7}.get(name, 1)
    assert config.model.name == name
    assert config.model.embedding == (None if name == "mbf" else WIDTH)
    assert config.data.input_size == 16 * places
    assert "no head: features and relations can be targets, soft targets cannot" in said
    assert_same_features(networks[name], tmp_path / "run", size=16 * places, bgr=False)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_adaface_s_weights_give_its_outputs_and_logits(prefix, networks, tmp_path):
    kernel = torch.randn(WIDTH, 5)
    head = {"head.kernel": kernel, "head.t": torch.zeros(1), "head.batch_mean": torch.ones(1)}
    state = under(prefix, networks["ir18"].state_dict()) | (head if prefix else {})
    file = write(tmp_path, {"state_dict": state, "epoch": 3}, "adaface.ckpt")
    said = write_run(file, "adaface", tmp_path / "run", name="ir18")
    assert run_config(tmp_path / "run").model.color == "bgr"
    assert_same_features(networks["ir18"], tmp_path / "run", size=16, bgr=True)
    network = load_network(tmp_path / "run").eval()
    assert network.num_classes == (5 if prefix else 0)
    if prefix:
        assert f"head: 5 identities, of {file}" in said
        assert any("statistics of the head's own training: batch_mean, t" in line for line in said)
        with torch.no_grad():
            out = network(torch.rand(2, 3, 16, 16) * 255)
            cosines = unit(out.hidden) @ torch.nn.functional.normalize(kernel, dim=0)
            torch.testing.assert_close(out.logits, 64 * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prefix", "name"), [("net.", "ir18"), ("model.net.", "mobilefacenet")])
def test_cvlface_s_weights_give_its_outputs_in_its_channel_order(prefix, name, networks, tmp_path):
    state = under(prefix, networks[name].state_dict())
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    with pytest.raises(
        PublishedError, match=r"model.yaml.*color_space.*--color rgb or --color bgr"
    ):
        write_run(file, "cvlface", tmp_path / "run")
    (tmp_path / "model.yaml").write_text("name: ir18\ncolor_space: 'BGR'\n")
    write_run(file, "cvlface", tmp_path / "run")
    assert_same_features(networks[name], tmp_path / "run", size=16, bgr=True)
    write_run(file, "cvlface", tmp_path / "other", color="rgb")
    assert_same_features(networks[name], tmp_path / "other", size=16, bgr=False)
    # the same weights, but not the same teacher
    assert keys.input_key(tmp_path / "run") != keys.input_key(tmp_path / "other")


def test_a_layer_under_another_s_name_would_be_seen(networks, tmp_path):
    state = networks["mobilefacenet"].state_dict()
    place = "layers.3.layers.{}.layers.0.layers.1"
    for key in ("weight", "bias", "running_mean", "running_var"):
        one, other = (f"{place.format(block)}.{key}" for block in (1, 2))
        state[one], state[other] = state[other], state[one]
    write_run(write(tmp_path, state), "arcface_torch", tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same_features(networks["mobilefacenet"], tmp_path / "run", size=16, bgr=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer5.0.bn1.weight": 1}, r"1 differences from iresnet18.*layer5.0.bn1.weight: not in"),
        ({"layer1.0.bn1.weight": None}, r"stages.0.0.norm1.weight: not in the file"),
        ({"layer1.0.prelu.weight": 3}, r"stages.0.0.slope.weight: \(3,\) where \(64,\) is needed"),
        ({"layer1.0.se.weight": 3}, r"layer1.0.se.weight: not in"),
        ({"fc.weight": 4}, r"the last layers' sizes do not fit"),
    ],
)
def test_a_name_or_shape_that_does_not_fit_is_refused(change, message, networks):
    state = dict(networks["iresnet18"].state_dict())
    for key, size in change.items():
        state.pop(key, None)
        if size is not None:
            state[key] = torch.zeros(size)
    with pytest.raises(ValueError, match=message):
        published(state, None)


def test_files_that_are_something_else_are_refused(networks, tmp_path):
    state = networks["mobilefacenet"].state_dict()
    file = write(tmp_path, state)
    with pytest.raises(PublishedError, match="weights are those of mobilefacenet, not mbf"):
        write_run(file, "arcface_torch", tmp_path / "run", name="mbf")
    mixed = write(tmp_path, under("model.", state) | {"other.weight": torch.ones(1)}, "mixed.ckpt")
    with pytest.raises(PublishedError, match=r"other.weight: neither of the network \(model.\)"):
        write_run(mixed, "adaface", tmp_path / "run")
    with pytest.raises(PublishedError, match=r"of no known layout.*\['weight'\]"):
        write_run(write(tmp_path, {"weight": torch.ones(1)}, "x.pt"), "cvlface", tmp_path / "run")
    with pytest.raises(PublishedError, match="it holds no state dict, but list"):
        write_run(write(tmp_path, [1], "y.pt"), "adaface", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "rubbish.pt").write_bytes(b"PK\x03\x04 no weights")
    with pytest.raises(PublishedError, match="rubbish.pt: cannot be read as weights"):
        read_file(tmp_path / "rubbish.pt")
    with pytest.raises(PublishedError, match="no such file"):
        read_file(tmp_path / "missing.pt")


@pytest.mark.parametrize(
    ("layout", "network", "prefix", "message"),
    [
        (
            "adaface",
            "iresnet18",
            "",
            r"adaface, whose networks are ir\*; .*--layout arcface_torch$",
        ),
        ("cvlface", "iresnet18", "", r"no network of cvlface.*--layout arcface_torch$"),
        ("adaface", "mobilefacenet", "", r"no network of adaface.*--layout arcface_torch$"),
        ("adaface", "mobilefacenet", "model.", r"no network of adaface.*no layout has them$"),
        ("arcface_torch", "ir18", "", r"networks are iresnet\*.*--layout adaface or cvlface$"),
        ("arcface_torch", "ir18", "model.", r"model.input_layer.* of --layout adaface$"),
        ("adaface", "ir18", "model.net.", r"they are of --layout cvlface$"),
    ],
)
def test_a_network_of_another_layout_is_refused_and_its_own_named(
    layout, network, prefix, message, networks, tmp_path
):
    file = write(tmp_path, under(prefix, networks[network].state_dict()))
    with pytest.raises(PublishedError, match=message):
        write_run(file, layout, tmp_path / "run", color="rgb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, networks, tmp_path):
    state = {
        name: tensor.clone() for name, tensor in networks["mobilefacenet"].state_dict().items()
    }
    good = write(tmp_path, state, "good.pt")
    later = next(n for n in reversed(state) if n.endswith("running_var"))
    first = next(n for n in state if n.startswith("layers.3") and n.endswith(".weight"))
    state[first].view(-1)[3], state[later][1] = value, value
    with pytest.raises(PublishedError, match=f"{first}: 1 of its .* are NaN or infinite"):
        write_run(write(tmp_path, state), "arcface_torch", tmp_path / "run")
    rows = torch.randn(6, WIDTH)
    rows[4, 2] = value
    for rank in (0, 1):
        write(tmp_path, rows[3 * rank : 3 * rank + 3].clone(), f"rank_{rank}_softmax_weight.pt")
    head = tmp_path / "rank_0_softmax_weight.pt"
    with pytest.raises(PublishedError, match="the classifier holds NaN or infinity.*row 4 of 6"):
        write_run(good, "arcface_torch", tmp_path / "run", head=head)
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_state_dict_are_rejected_in_plain_words(tmp_path):
    (tmp_path / "text.pth").write_text("epoch 1, loss 2\n")
    with pytest.raises(PublishedError, match=r"not a weights file.*b'epoch 1, loss 2.*safetensors"):
        read_file(tmp_path / "text.pth")
    whole = write(tmp_path, torch.nn.Sequential(torch.nn.Linear(1, 1)), "whole.pt")
    with pytest.raises(PublishedError, match=r"whole pickled model.*save model.state_dict\(\)"):
        read_file(whole)
    inside = write(tmp_path, {"epoch": 1, "state_dict": torch.nn.Linear(1, 1)}, "inside.pt")
    with pytest.raises(PublishedError, match="epoch: not a tensor"):
        write_run(inside, "adaface", tmp_path / "run")


def test_missing_counters_start_at_zero_and_are_logged(networks):
    state = networks["mbf"].state_dict()
    found = published({n: t for n, t in state.items() if "num_batches" not in n}, None)
    counters = [n for n in found.weights if n.endswith("num_batches_tracked")]
    assert found.notes == [f"{len(counters)} counters of batches are missing and start at 0"]
    assert len(found.weights) == len(state)


class Harmful:
    """What a file of weights must never be able to do."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


class Noisy:
    """A class of the project that saved the file."""

    def __setstate__(self, state):
        raise AssertionError("it was built")


def test_what_a_checkpoint_names_beside_tensors_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noisy = Noisy()
    noisy.value = 1
    held = {"state_dict": {"model.weight": torch.ones(2)}, "callbacks": {Noisy: noisy}}
    file = write(tmp_path, held | {"at": Path("x")}, "lightning.ckpt")
    assert torch.equal(read_file(file)["state_dict"]["model.weight"], torch.ones(2))
    harmful = write(tmp_path, held | {"hyper_parameters": Harmful()}, "harmful.ckpt")
    with pytest.raises(PublishedError, match=r"harmful.ckpt: cannot be read as weights.*mkdir"):
        read_file(harmful)
    assert not (tmp_path / "harmed").exists()


def test_shards_of_a_head_are_joined_by_rank(networks, tmp_path):
    file = write(tmp_path, {"state_dict_backbone": networks["mobilefacenet"].state_dict()})
    rows = torch.randn(23, WIDTH)
    for rank, part in enumerate(rows.tensor_split(11)):  # 10 comes before 2 in the alphabet
        write(tmp_path, {"state_dict_softmax_fc": {"weight": part}}, f"checkpoint_gpu_{rank}.pt")
    asked = tmp_path / "checkpoint_gpu_0.pt"
    write_run(file, "arcface_torch", tmp_path / "run", head=asked)
    weights = checkpoint.load_weights(tmp_path / "run" / "last")
    assert torch.equal(weights["classifier.weight"], rows)
    results = checkpoint.read_json(tmp_path / "run" / "results.json")
    assert results is not None
    assert results["imported"]["head"] == [f"checkpoint_gpu_{rank}.pt" for rank in range(11)]
    (tmp_path / "checkpoint_gpu_3.pt").unlink()
    with pytest.raises(PublishedError, match="checkpoint_gpu_3.pt: this shard of the head is miss"):
        shards(asked)


@pytest.mark.parametrize(
    ("names", "entry"),
    [
        ("softmax_fc_gpu_{}.pt", lambda part: {"weight": part}),
        ("rank_{}_softmax_weight.pt", lambda part: part),
        ("classifier_rank{}.pt", lambda part: {"partial_fc.weight": part}),
    ],
)
def test_heads_of_every_project_are_read(names, entry, networks, tmp_path):
    file = write(tmp_path, networks["mobilefacenet"].state_dict())
    rows = torch.randn(6, WIDTH)
    for rank in (0, 1):
        write(tmp_path, entry(rows[3 * rank : 3 * rank + 3]), names.format(rank))
    head = tmp_path / names.format(1)
    write_run(file, "arcface_torch", tmp_path / "run", head=head, classes=5, scale=30.0)
    network = load_network(tmp_path / "run")
    assert torch.equal(network.classifier.weight, rows[:5])
    assert run_config(tmp_path / "run").head.scale == 30
    with pytest.raises(PublishedError, match=r"--classes 4: 2 files hold 6 rows"):
        write_run(file, "arcface_torch", tmp_path / "no", head=head, classes=4)
    write(tmp_path, entry(rows[:5]), names.format(1))
    with pytest.raises(PublishedError, match=r"shards of \[3, 5\] identities are not of one head"):
        write_run(file, "arcface_torch", tmp_path / "no", head=head)
    write(tmp_path, entry(rows[:3, :4]), names.format(1))
    with pytest.raises(PublishedError, match=r"\(3, 4\), and the network has 16 values"):
        write_run(file, "arcface_torch", tmp_path / "no", head=head)


def test_an_import_is_a_teacher_by_its_features_and_with_its_head_by_its_logits(
    networks, tmp_path, capsys
):
    file = write(tmp_path, networks["mobilefacenet"].state_dict())
    head = write(tmp_path, torch.randn(4, WIDTH), "rank_0_softmax_weight.pt")
    command = ["import", str(file), "--layout", "arcface_torch", "--out"]
    assert main([*command, str(tmp_path / "bare")]) == 0
    assert main([*command, str(tmp_path / "whole"), "--head", str(head)]) == 0
    assert "head: 4 identities" in capsys.readouterr().out
    short = {
        "optim__phases": [{"epochs": 1, "lr": 0.01}],
        "data__identities": 4,
        "target__gamma": 1.0,
    }
    bare, whole = str(tmp_path / "bare"), str(tmp_path / "whole")
    config = tiny_config(teacher=bare, target__embedding_cosine=1.0, target__rkd_angle=1.0, **short)
    results = train(config, tmp_path / "features")
    assert results["parameters"]["teacher"] > 900_000
    with pytest.raises(ValueError, match=r"the teacher has no classifier.*--head"):
        train(tiny_config(teacher=bare, target__alpha=1.0, **short), tmp_path / "refused")
    train(tiny_config(teacher=whole, target__alpha=1.0, **short), tmp_path / "soft")
    capsys.readouterr()
    assert main(["eval", bare, "--data.identities", "6", "--data.test_fraction", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "nn_top1" in shown
    assert "the classifier, which has 0 identities" in shown


def test_an_import_starts_a_run_of_the_same_network(networks, tmp_path):
    file = write(tmp_path, networks["mobilefacenet"].state_dict())
    write_run(file, "arcface_torch", tmp_path / "start")
    own = {"model__name": "mobilefacenet", "model__embedding": WIDTH}
    short = {"optim__phases": [{"epochs": 1, "lr": 1e-9}], "data__identities": 4}
    train(tiny_config(init_from=str(tmp_path / "start"), **own, **short), tmp_path / "run")
    name = "backbone.stages.3.1.project.conv.weight"
    begun, ended = (checkpoint.load_weights(tmp_path / r / "last")[name] for r in ("start", "run"))
    torch.testing.assert_close(ended, begun, rtol=0, atol=1e-6)


def test_an_import_that_is_cut_short_leaves_nothing_and_can_be_repeated(
    networks, tmp_path, monkeypatch
):
    file, run = write(tmp_path, networks["mobilefacenet"].state_dict()), tmp_path / "run"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_run(file, "arcface_torch", run)
    assert not run.exists()
    write_run(file, "arcface_torch", run)
    with pytest.raises(ConfigError, match="not empty"):
        write_run(file, "arcface_torch", run)


def test_wrong_commands_say_what_is_wrong(tmp_path, capsys):
    cases = [
        (["x.pt", "--out", "run"], "missing: --layout"),
        (["x.pt", "--layout", "facenet", "--out", "r"], "--layout: expected one of arcface_torch"),
        (["x.pt", "--layout", "adaface"], "missing: --out"),
        (
            ["x.pt", "--layout", "adaface", "--out", "r", "--name", "r50"],
            "expected one of resnet",
        ),
        (
            ["x.pt", "--layout", "adaface", "--out", "r", "--color", "grb"],
            "expected one of rgb, bgr",
        ),
    ]
    for words, message in cases:
        assert main(["import", *words]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        write_run(tmp_path / "x.pt", "adaface", tmp_path)
