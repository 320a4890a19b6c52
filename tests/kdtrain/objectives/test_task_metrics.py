"""Evaluation of the three tasks: metrics, floors, samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_tasks import (
    IDENTITIES,
    NAMES,
    eval_batches,
    make_batch,
    make_config,
    make_task,
    to_original,
)
from torch.nn import functional as F

from kdtrain.config import EvalConfig
from kdtrain.objectives import evaluate
from kdtrain.objectives.tasks import build_task


@pytest.fixture(autouse=True)
def _one_thread():
    """On networks this small a second thread only waits, for long where the machine is shared."""
    torch.set_num_threads(1)


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
    with pytest.raises(ValueError, match="no image to look at"):
        make_task(name).evaluate([])


def test_classification_top1_is_the_share_of_right_labels():
    task = make_task("classification")
    batches = eval_batches()
    task.network.eval()
    with torch.no_grad():
        logits = torch.cat([task.network(batch.images).logits for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    metrics = task.evaluate(batches)
    assert metrics["top1"] == (logits.argmax(1) == labels).double().mean().item()
    assert metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item())


def test_alignment_is_measured_in_the_original_pixel_frame():
    config = make_config("alignment")
    batches = eval_batches()
    for kind in ("interocular", "diagonal", "side"):
        task = build_task(dataclasses.replace(config, eval=EvalConfig(normalizer=kind)), IDENTITIES)
        task.network.eval()
        with torch.no_grad():
            points = torch.cat([task.network(batch.images).points for batch in batches])
        predicted = to_original((points.reshape(-1, 5, 2) + 0.5) * 16, 4.0)
        true = torch.cat([batch.points_original for batch in batches])
        sizes = torch.cat([batch.sizes for batch in batches])
        expected = evaluate.nrmse_per_image(predicted, true, sizes, kind).mean().item()
        assert task.evaluate(batches)["nrmse"] == pytest.approx(expected, rel=1e-6)


def test_the_mean_shape_is_the_floor_of_alignment():
    train, test = eval_batches(), eval_batches(24)
    floor = make_task("alignment").floors(train, test)
    shape = torch.cat([batch.points_original for batch in train]).mean(0)  # one frame for all here
    true = torch.cat([batch.points_original for batch in test])
    sizes = torch.cat([batch.sizes for batch in test])
    expected = evaluate.nrmse_per_image(shape.expand_as(true), true, sizes).mean().item()
    assert floor["nrmse"] == pytest.approx(expected, rel=1e-5)


def test_raw_pixels_are_the_floor_of_the_identity_tasks():
    train, test = eval_batches(), eval_batches(24)
    # identities here differ by their mean colour, which raw pixels see
    assert make_task("classification").floors(train, test)["top1"] > 0.9
    pixels = torch.cat([batch.images.flatten(1) for batch in test])
    labels = torch.cat([batch.labels for batch in test])
    floor = make_task("verification").floors(train, test)
    assert floor == evaluate.nn_shares(evaluate.nn_hits(pixels, labels))
    assert floor["nn_queries"] == 24


def test_neighbours_outside_the_video_are_measured_with_videos():
    task = make_task("verification")
    assert "nn_top1_other_video" not in task.evaluate(eval_batches())
    metrics = task.evaluate(eval_batches(groups=True))
    # a video here is one image of each identity
    assert metrics["nn_queries_other_video"] == 48
    items = task.items()
    for name in ("nn_top1", "nn_top1_other_video"):
        assert np.nanmean(items[name], dtype=np.float64) == metrics[name]


def test_a_lone_query_is_no_number_among_the_images_results():
    task = make_task("verification")
    batch = eval_batches(48, 48)[0]
    labels = batch.labels.where((batch.labels != 5) | (torch.arange(48) == 5), 4)
    metrics = task.evaluate([dataclasses.replace(batch, labels=labels)])
    found = task.items()["nn_top1"]
    assert np.flatnonzero(np.isnan(found)).tolist() == [5]
    assert np.nanmean(found, dtype=np.float64) == metrics["nn_top1"]


def test_the_untrained_network_is_the_one_before_its_first_step_for_any_later_training():
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


def test_pair_accuracy_appears_once_ten_folds_have_identities_enough():
    task = build_task(make_config("verification"), 40)
    images, _, _ = make_batch(1, 80)
    batch = dataclasses.replace(
        eval_batches(80, 80)[0], images=images, labels=torch.arange(80) // 2
    )
    metrics = task.evaluate([batch])
    assert metrics["pairs"] == 2 * 10 * 4
    assert 0 <= metrics["pair_accuracy"] <= 1
    assert {"roc_far", "roc_tar"} <= set(task.samples)
    assert task.untrained([batch]) == metrics
    features = build_task(make_config("classification"), 40).untrained([batch])
    pairs = {n for n in metrics if not n.startswith("nn_") and not n.endswith("_all")}
    assert set(features) == pairs
    assert "pair_accuracy" not in make_task("verification").evaluate(eval_batches())


def test_samples_of_identity_tasks_are_queries_with_their_nearest_neighbours():
    for name in ("classification", "verification"):
        task = make_task(name)
        assert task.samples == {}
        task.evaluate(eval_batches())
        samples = task.samples
        assert samples["queries"].shape == samples["neighbours"].shape == (12, 3, 16, 16)
        assert samples["queries"].dtype == np.uint8
        assert int(samples["gallery"]) == 48
        assert (samples["distances"] >= 0).all()
        same = (samples["queries"] == samples["neighbours"]).all((1, 2, 3))
        assert not same.any()  # an image is not its own neighbour


def test_samples_of_alignment_are_in_the_pixels_of_the_image_shown():
    task = make_task("alignment")
    task.evaluate(eval_batches())
    samples = task.samples
    images, _, points = make_batch(1, 48)
    chosen = torch.linspace(0, 47, 12, dtype=torch.float64).round().long()
    np.testing.assert_allclose(samples["true"], points[chosen], atol=1e-4)
    np.testing.assert_array_equal(samples["images"], images[chosen].round().byte())
    assert samples["ced_share"].shape == samples["ced_threshold"].shape


def test_large_images_are_shrunk_for_the_report_and_their_points_with_them():
    task = make_task("alignment")
    batch = eval_batches(4)[0]
    large = F.interpolate(batch.images, size=(192, 192))
    task.evaluate([dataclasses.replace(batch, images=large)])
    samples = task.samples
    assert samples["images"].shape == (4, 3, 96, 96)
    # the frame maps crop pixels to the original by 4, whatever the crop's size
    expected = (batch.points_original[:, :, 0] - 4.0) / 4.0 / 2
    np.testing.assert_allclose(samples["true"][:, :, 0], expected, atol=1e-4)


def test_landmarks_are_required_where_needed_and_every_task_has_its_metric():
    assert [name for name in NAMES if make_task(name).needs_landmarks] == ["alignment"]
    assert {make_task(name).metric for name in NAMES} == {
        ("top1", 1),
        ("nrmse", -1),
        ("nn_top1", 1),
    }
