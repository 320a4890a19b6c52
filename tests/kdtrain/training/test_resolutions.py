"""One crop, two resolutions: student and teacher see the same window and flip of an image."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from tiny_runs import assert_same_run, quiet, stop_after, tiny_config, train
from torch.nn import functional as F

from kdtrain.config import ConfigError
from kdtrain.data.run_data import RunData, training_batch
from kdtrain.data.transforms import area_average, augment, center, shrink, to_original
from kdtrain.experiments.estimate import Counts, estimate, network_size
from kdtrain.objectives.task import Task
from kdtrain.training import checkpoint, keys
from kdtrain.training.engine import Interrupted
from kdtrain.training.journal.journal import Screen
from kdtrain.training.preparation import prepare_task

STORE = 20
SHORT = {"optim__phases": [{"epochs": 1, "lr": 0.05}, {"epochs": 1, "lr": 0.01}]}
HALF = {"data__crop_size": 16, "data__input_size": 8, "teacher__input_size": 16}


def student(task: str = "classification", **keys):
    """A student at 8 pixels of a teacher at 16."""
    targets = {"target__alpha": 1.0, "target__beta": 1.0, "target__hidden_reduction": "mean"}
    return tiny_config(task, **{**targets, "teacher": "@teacher", **HALF, **SHORT, **keys})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a teacher's run at 16 pixels and that of a student at 8 that asked it."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_config(**SHORT), root / "teacher")
    train(student(), root / "student")
    return root


def whole_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def averaged(images: torch.Tensor, side: int) -> torch.Tensor:
    """The area average in float64, by pixels so small that both grids consist of them."""
    fine = images.double().repeat_interleave(side, -1).repeat_interleave(side, -2)
    return F.avg_pool2d(fine, images.shape[-1])


def window(stored: torch.Tensor, draw, crop: int, side: int, change: str = "") -> torch.Tensor:
    """What the network should see of stored images, float64, from where the crops lie; `change`
    plants a mistake.
    """
    images = []
    for k, image in enumerate(stored):
        x, y = (int(place) for place in draw.offset[k])
        x += change == "offset"
        cut = image[:, y : y + crop, x : x + crop]
        if bool(draw.flipped[k]) != (change == "flip"):
            cut = cut.flip(-1)
        if change == "no antialiasing":
            images.append(cut[:, :: crop // side, :: crop // side][:, :side, :side].double())
        else:
            images.append(averaged(cut, side))
    return torch.stack(images)


@example_settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 40), side=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_average_is_exact_at_every_ratio_in_any_batch_and_mirrored(size, side, seed):
    size, side = max(size, side), min(size, side)
    images = whole_images(3, size, seed).float()
    small = area_average(images, side)
    # sums of whole numbers are exact, so one rounding is left
    torch.testing.assert_close(small.double(), averaged(images, side), rtol=2**-23, atol=0)
    assert torch.equal(area_average(images[1:2], side), small[1:2])
    assert torch.equal(area_average(images.flip(-1), side), small.flip(-1))


def test_images_are_never_enlarged():
    with pytest.raises(ValueError, match=r"from 1 to the images' 8 pixels.* got 9"):
        area_average(torch.zeros(1, 3, 8, 8), 9)


@example_settings(deadline=None, max_examples=12)
@given(
    sides=st.tuples(st.integers(8, STORE), st.integers(8, STORE), st.integers(8, STORE)),
    seed=st.integers(0, 2**32),
)
def test_student_and_teacher_see_the_same_window_and_flip(sides, seed):
    small, theirs, crop = sides
    crop = max(sides)
    config = student(
        seed=seed,
        data__crop_size=crop,
        data__input_size=small,
        teacher__input_size=theirs,
    )
    stored, indices = whole_images(8, STORE, seed % 97), torch.arange(50, 58)
    views = training_batch(stored, indices, None, indices, config, phase=1, epoch=2)
    _, _, draw = augment(stored, None, indices, config, phase=1, epoch=2)
    rounding = {"rtol": 2**-23, "atol": 0}
    want = window(stored, draw, crop, small)
    torch.testing.assert_close(views.images.double(), want, **rounding)
    if theirs == small:
        assert views.teacher_images is None
    else:
        want = window(stored, draw, crop, theirs)
        torch.testing.assert_close(views.teacher_images.double(), want, **rounding)


@pytest.mark.parametrize("mistake", ["flip", "offset", "no antialiasing"])
def test_the_comparison_of_windows_notices_a_mistake(mistake):
    config, stored, indices = student(), whole_images(8, STORE), torch.arange(8)
    views = training_batch(stored, indices, None, indices, config, phase=0, epoch=0)
    _, _, draw = augment(stored, None, indices, config, phase=0, epoch=0)
    assert torch.equal(views.images.double(), window(stored, draw, 16, 8))
    for image, wrong in zip(views.images, window(stored, draw, 16, 8, mistake), strict=True):
        assert (image.double() - wrong).abs().max() > 1


@pytest.mark.parametrize("crop", ["random", "jitter"])
def test_landmarks_and_frames_follow_the_smaller_image(crop):
    stored, side = whole_images(12, 36), SimpleNamespace(scale_min=0.8, scale_max=0.9)
    how = SimpleNamespace(crop=crop, flip=True, **vars(side))
    points = 4 + 28 * torch.rand(12, 5, 2, generator=torch.Generator().manual_seed(1))
    config = SimpleNamespace(seed=0, augment=how, data=SimpleNamespace(crop_side=32))
    for made in (
        augment(stored, points, torch.arange(12), config, phase=0, epoch=0),
        center(stored, points, 32, how),
    ):
        images, moved, frame = shrink(*made, 12)
        assert images.shape[-1] == frame.input_size == 12
        assert moved is not None
        torch.testing.assert_close(moved, made[1] * 0.375)
        back = to_original(moved, frame, torch.full((12, 2), 36), 36)
        torch.testing.assert_close(back, points, atol=1e-4, rtol=0)
        assert shrink(*made, 32) == made  # nothing is computed where nothing changes


def test_batches_and_evaluations_of_a_run_have_the_student_s_resolution():
    whole, half = RunData(tiny_config("alignment")), RunData(student("alignment"))
    indices = whole.train[:6]
    large, small = (data.batch(indices, 0, 0, None) for data in (whole, half))
    assert large.teacher_images is None
    assert torch.equal(small.teacher_images, large.images)
    torch.testing.assert_close(small.points, large.points / 2)
    assert small.images.shape == (6, 3, 8, 8)
    one, other = (next(data.evaluation(data.test)) for data in (whole, half))
    torch.testing.assert_close(other.images, F.avg_pool2d(one.images, 2), rtol=1e-5, atol=1e-3)
    corners = torch.tensor([[0.0, 0], [8, 8], [4, 2], [1, 7], [3, 3]]).expand(len(one.labels), 5, 2)
    torch.testing.assert_close(other.to_original(corners), one.to_original(2 * corners))


def test_a_run_stopped_between_two_resolutions_resumes_bitwise_identical(root, monkeypatch):
    sides, guide = set(), Task.guide
    monkeypatch.setattr(
        Task, "guide", lambda self, seen: sides.add(seen.shape[-1]) or guide(self, seen)
    )
    with pytest.raises(Interrupted):
        train(student(), root / "parts", stop=stop_after(5))
    train(student(), root / "parts", resume=True)
    assert sides == {16}
    assert_same_run(root / "student", root / "parts")
    results = checkpoint.read_json(root / "parts" / "results.json")
    work = {n: checkpoint.read_json(root / n / "results.json") for n in ("teacher", "student")}
    assert results["multiply_adds"]["teacher"] == work["teacher"]["multiply_adds"]["network"]
    # the same network at a quarter of the pixels; its last stage has one pixel at either
    share = results["multiply_adds"]["teacher"] / work["student"]["multiply_adds"]["student"]
    assert 2 < share < 4


def test_cached_outputs_serve_students_of_every_resolution(root, tmp_path):
    kept = {"teacher__cache": "float32", "teacher__cache_dir": str(tmp_path)}
    said = {}
    for name, own in {"filling": {}, "same": {}, "other": {"data__input_size": 12}}.items():
        screen = Screen("run", io.StringIO())
        train(student(**kept, **own), root / name, screen=screen)
        said[name] = screen._console.file.getvalue()
    assert "0 batches read" in said["filling"]
    assert "batches read, 0 computed" in said["same"]
    assert "batches read, 0 computed" in said["other"]
    assert_same_run(root / "student", root / "filling")
    assert_same_run(root / "student", root / "same")


def test_weights_are_inherited_at_another_resolution(root):
    config = tiny_config(init_from="@teacher", data__crop_size=16, data__input_size=8, **SHORT)
    screen = Screen("run", io.StringIO())
    task = prepare_task(config, RunData(config), root / "kt", screen)
    theirs = checkpoint.load_weights(root / "teacher" / "last")
    ours = task.network.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert screen._console.file.getvalue() == ""
    train(config, root / "kt")


def test_a_teacher_at_another_size_than_its_own_is_logged_once(root):
    for own, expected in (({}, 0), ({"teacher__input_size": None}, 1)):
        screen = Screen("run", io.StringIO())
        config = student(**own)
        prepare_task(config, RunData(config), root / "told", screen)
        said = " ".join(screen._console.file.getvalue().split())
        assert said.count("was trained on images of 16 pixels and runs on the student's 8") == (
            expected
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__crop_size": 24}, r"data.store_size: expected at least data.crop_size \(24\)"),
        ({"data__crop_size": 7}, r"data.crop_size: expected at least data.input_size \(8\)"),
        ({"teacher__input_size": 17}, r"teacher.input_size.* crop's 16 pixels"),
        ({"teacher__input_size": 4}, r"teacher.input_size: expected from 8"),
        (
            {"target__alpha": 0.0, "target__beta": 0.0, "target__gamma": 0.0, "target__hint": 1.0},
            "target.hint needs one input size",
        ),
        ({"teacher__input_size": 12, "target__attention": 1.0}, "differ by a power of two"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changed, message):
    with pytest.raises(ConfigError, match=message):
        student(**changed)


def test_attention_is_transferred_between_resolutions_that_halve(root):
    config = student(target__attention=10.0)
    data = RunData(config)
    task = prepare_task(config, data, root / "attention", quiet())
    batch = data.batch(data.epoch(0)[0], 0, 0, None)
    seen = batch.teacher_images
    terms = task.step(batch.images, batch.labels, teacher_images=seen).terms
    assert terms["attention"] > 0


def test_the_sizes_count_in_a_run_s_key_as_they_are_meant():
    def key(**keys_):
        config = student(**keys_)
        return keys._counted(config)

    plain = {"data__crop_size": None, "data__input_size": 16, "teacher__input_size": None}
    assert key(**plain) == key(**{**plain, "data__crop_size": 16, "teacher__input_size": 16})
    assert len({str(key(**change)) for change in ({}, plain, {"teacher__input_size": 12})}) == 3
    alone = [tiny_config(teacher__input_size=side) for side in (None, 12)]
    assert keys._counted(alone[0]) == keys._counted(alone[1])


def test_the_estimate_counts_the_teacher_at_its_own_size(root):
    config, model = student(), tiny_config().model
    work = (checkpoint.read_json(root / "student" / "results.json") or {})["multiply_adds"]
    teacher = network_size(config, model, 8, config.teacher_side)
    assert teacher.multiply_adds == work["teacher"]
    cost = estimate(config, Counts(8, 16, 8), [model], threads=1)
    assert cost.size.multiply_adds == work["student"] < work["teacher"]
