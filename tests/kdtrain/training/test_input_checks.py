"""What configs and run directories tell is checked before the first image is read."""

import pytest
from tiny_runs import quiet, tiny_config, train

from kdtrain.cli import main
from kdtrain.config import settings
from kdtrain.data import run_data
from kdtrain.training import checkpoint, engine

SHORT = {"optim__phases": [{"epochs": 1, "lr": 0.01}]}
KINDS = {
    "teacher": {"teacher": "@{}", "target__alpha": 1.0},
    "init_from": {"init_from": "@{}"},
    "head": {"head__run": "@{}"},
    "gallery": {"task": "verification", "eval__gallery": "@{}"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, and one that is not; the finished one has 256 features."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config(**SHORT), root / "finished")
    (root / "unfinished").mkdir()
    for name in ("config.yaml", "last"):
        (root / "unfinished" / name).symlink_to(root / "finished" / name)
    return root


@pytest.fixture
def no_image(monkeypatch):
    def refuse(_):
        raise AssertionError("an image is read")

    monkeypatch.setattr(run_data, "build_source", refuse)


def naming(kind, name, **more):
    keys = {k: v.format(name) if isinstance(v, str) else v for k, v in KINDS[kind].items()}
    return tiny_config(**{**SHORT, **keys, **more})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no trained weights there"), ("unfinished", "not finished")]
)
def test_a_run_that_is_missing_or_unfinished_is_reported_before_images_are_read(
    runs, no_image, kind, name, message
):
    with pytest.raises(checkpoint.CheckpointError, match=f"{name}: .*{message}"):
        train(naming(kind, name), runs / "new")
    assert not (runs / "new").exists()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "gallery",
            {"model__divide": 2},
            "eval.gallery .*features have 256 numbers .*network's 128",
        ),
        ("head", {"model__divide": 2}, "head.run .*reads 256 features and this network has 128"),
        ("head", {"head__kind": "cosine"}, "head.run .*its head is linear, this one cosine"),
        ("init_from", {"model__width": 16}, "inherit: none of the .* weights .* fits"),
        ("teacher", {"model__divide": 2, "head__update": "adaptive"}, "head.update adaptive"),
    ],
)
def test_a_network_that_does_not_fit_is_reported_before_images_are_read(
    runs, no_image, kind, more, message
):
    with pytest.raises(ValueError, match=message):
        train(naming(kind, "finished", **more), runs / "new")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_fits_lets_images_be_read(runs, no_image, kind):
    for name in ("finished", "finished/best"):
        with pytest.raises(AssertionError, match="an image is read"):
            train(naming(kind, name), runs / "new")


def test_evaluate_looks_at_weights_and_gallery_first(runs, no_image, tmp_path, capsys):
    config = tiny_config("verification", eval__gallery=str(tmp_path / "absent"))
    with pytest.raises(checkpoint.CheckpointError, match="absent: no trained weights"):
        engine.evaluate(config, runs / "finished")
    (tmp_path / "config.yaml").write_text(settings.to_yaml(tiny_config()))
    assert main(["eval", str(tmp_path)]) == 1
    assert "no trained weights there" in capsys.readouterr().err


def test_a_broken_data_root_is_reported_after_a_missing_teacher(runs, tmp_path):
    data = {"data__kind": "folder", "data__root": str(tmp_path / "nowhere")}
    with pytest.raises(checkpoint.CheckpointError, match="absent"):
        engine.train(naming("teacher", "absent", **data), runs / "new", screen=quiet())
