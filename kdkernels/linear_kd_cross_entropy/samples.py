"""Calls of linear_kd_cross_entropy that the contract runs: odd sizes, heads, margins, options."""

from typing import Any

import torch

from kdkernels.linear_kd_cross_entropy.margins import (
    ArcFace,
    CombinedMargin,
    CosFace,
    adaface_margin,
)
from kdkernels.sample import Argument, Sample


def make(
    rows: int,
    classes: int,
    features: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    spread: float = 1.0,
    teacher: int | str | None = "head",
    bias: bool = False,
    frozen: tuple[str, ...] = (),
    ignored: int = 0,
    label_dtype: torch.dtype = torch.int64,
    top: int = 4,
    classes_of: tuple[int, ...] = (),
    name: str = "",
    **options: Any,
) -> Sample:
    """Normal features and weights, whose labels are not far off: a third of a label's class is
    added to its row. teacher: "head" of 5 features more, "biased", "logits", "sparse" of the `top`
    classes, or None. The last `ignored` rows hold ignore_index. classes_of: those beside the labels
    that take part."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = normal(classes, features)
    target = torch.randint(classes, (rows,), generator=generator)
    tensors: dict[str, Argument] = {
        "features": spread * (normal(rows, features) + 0.3 * weight[target]),
        "weight": weight,
    }
    differentiable = ["features", "weight"]
    if bias:
        tensors["bias"] = normal(classes)
        differentiable.append("bias")
    if teacher == "logits":
        tensors["teacher"] = 2.0 * normal(rows, classes)
    elif teacher == "sparse":
        tensors["teacher"] = _likeliest(2.0 * normal(rows, classes), target, top, options)
    elif teacher is not None:
        head = [normal(rows, features + 5), normal(classes, features + 5)]
        tensors["teacher"] = [*head, normal(classes)] if teacher == "biased" else head
    if classes_of:
        tensors["classes"] = torch.cat((torch.tensor(classes_of), target)).unique()
    target = target.to(label_dtype)
    if ignored:
        target[-ignored:] = -100
    tensors["target"] = target

    def moved(value: Argument) -> Argument:
        if isinstance(value, list):
            return [t.to(device) for t in value]
        return None if value is None else value.to(device)

    return Sample(
        name or f"{rows}x{classes}x{features}",
        {key: moved(value) for key, value in tensors.items()},
        options,
        tuple(key for key in differentiable if key not in frozen),
    )


def _likeliest(
    logits: torch.Tensor, target: torch.Tensor, top: int, options: dict[str, Any]
) -> list[torch.Tensor]:
    """A sparse teacher's indices, in no order, and log-probabilities; it is sure of every second
    label, and has the others in its tail where there is one."""
    sure = torch.where(torch.arange(len(target)) % 2 == 0, 8.0, -30.0)
    logits = logits.scatter_add(1, target[:, None], sure[:, None])
    log_probs = torch.log_softmax(logits / options.get("temperature", 3.0), dim=1)
    found = log_probs.topk(top)
    return [found.indices.flip(1), found.values.flip(1)]


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""
    cosine: dict[str, Any] = {"normalize": True, "scale": 16.0, "device": device}
    plain: dict[str, Any] = {"device": device}
    amounts = torch.linspace(-0.4, 0.9, 7).to(device)
    adaptive = make(7, 53, 12, device=device)
    norms_of = adaptive.tensors["features"]
    assert isinstance(norms_of, torch.Tensor)
    margin_of_norms = adaface_margin(norms_of)
    found = [
        make(3, 3, 5, teacher=None, **plain),
        make(1, 1, 3, **plain),
        make(0, 3, 2, bias=True, teacher=None, **plain),
        make(5, 33, 16, bias=True, teacher="biased", **plain, label_dtype=torch.int32),
        make(17, 101, 24, teacher="logits", temperature=2.5, return_terms=True, **plain),
        make(2, 2049, 33, bias=True, frozen=("features",), label_smoothing=0.1, **plain),
        make(6, 4200, 8, frozen=("weight",), tau_squared=True, temperature=2.0, **plain),
        make(9, 65, 20, reduction="none", ignored=2, bias=True, **plain, name="none"),
        make(9, 65, 20, ignored=3, alpha=0.0, reduction="sum", **plain, name="alpha 0, sum"),
        make(4, 65, 20, ignored=4, bias=True, **plain, name="all rows ignored"),
        make(5, 40, 7, spread=20.0, **plain, name="logits of scale 100"),
        _without_target(make(6, 77, 9, **plain)),
        make(5, 37, 11, teacher=None, **cosine),
        make(19, 130, 16, teacher_scale=4.0, temperature=4.0, **cosine),
        make(6, 37, 11, reduction="none", **cosine, name="cosines, none"),
        make(7, 53, 12, margin=ArcFace(0.5), return_terms=True, **cosine),
        make(1, 1, 3, margin=ArcFace(0.5), **cosine),
        make(7, 2100, 12, margin=CosFace(0.35), label_smoothing=0.1, **cosine),
        make(7, 53, 12, margin=CombinedMargin(0.3, 0.2), teacher="logits", **cosine),
        make(7, 53, 12, margin=ArcFace(amounts), teacher=None, **cosine, name="m a row"),
        make(7, 53, 12, margin=margin_of_norms, temperature=2.5, **cosine, name="AdaFace"),
        make(7, 53, 12, margin=ArcFace(3.0), ignored=2, **cosine, name="beyond pi"),
        make(
            *(7, 53, 12),
            margin=ArcFace(0.5),
            margin_grad="straight_through",
            reduction="none",
            **cosine,
            name="straight through, none",
        ),
        make(
            *(5, 70, 12),
            margin=ArcFace(0.4),
            normalize=True,
            scale=64.0,
            spread=50.0,
            temperature=1.0,
            **plain,
            name="scale 64",
        ),
    ]
    found += [
        make(7, 53, 12, teacher="sparse", return_terms=True, **plain),
        make(3, 9, 4, teacher="sparse", top=9, **plain, name="all classes named"),
        make(4, 1, 3, teacher="sparse", top=1, ignored=1, **plain, name="one class named"),
        make(6, 2100, 8, teacher="sparse", top=7, temperature=2.5, label_smoothing=0.1, **plain),
        make(9, 61, 20, teacher="sparse", reduction="none", ignored=2, bias=True, **plain),
        _without_target(make(6, 41, 9, teacher="sparse", tau_squared=True, **plain)),
        make(6, 41, 9, teacher="sparse", alpha=0.0, **plain, name="sparse, alpha 0"),
        make(5, 40, 7, teacher="sparse", spread=20.0, **plain, name="sparse, scale 100"),
        make(7, 53, 12, teacher="sparse", margin=ArcFace(0.5), return_terms=True, **cosine),
        make(
            *(7, 53, 12),
            teacher="sparse",
            margin=ArcFace(amounts),
            label_smoothing=0.1,
            label_dtype=torch.int32,
            reduction="none",
            **cosine,
            name="sparse, m a row, none",
        ),
        make(6, 90, 9, classes_of=(0, 3, 4, 60, 89), bias=True, ignored=1, **plain),
        make(6, 90, 9, classes_of=(1, 2, 5), teacher="logits", return_terms=True, **plain),
        make(7, 53, 12, classes_of=(7, 8, 9), margin=ArcFace(0.5), **cosine),
    ]
    return found + _strided(device) + _zeros(device)


def _without_target(sample: Sample) -> Sample:
    tensors = {**sample.tensors, "target": None}
    return Sample("no target", tensors, sample.options, sample.differentiable)


def _strided(device: str) -> list[Sample]:
    base = make(6, 50, 16, device=device)
    generator = torch.Generator().manual_seed(9)

    def memory(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    changes: dict[str, dict[str, Argument]] = {
        "transposed weight": {"weight": memory(16, 50).t()},
        "pitched weight": {"weight": memory(50, 19)[:, 2:18]},
        "every second feature": {"features": memory(6, 32)[:, ::2]},
        "expanded features": {"features": memory(1, 16).expand(6, 16)},
        "strided labels": {"target": torch.arange(12, device=device)[::2]},
    }
    return [
        Sample(name, {**base.tensors, **change}, base.options, base.differentiable)
        for name, change in changes.items()
    ]


def _zeros(device: str) -> list[Sample]:
    sample = make(*(5, 37, 11), device=device, normalize=True, scale=16.0, margin=ArcFace(0.5))
    for name in ("features", "weight"):
        value = sample.tensors[name]
        assert isinstance(value, torch.Tensor)
        value[2] = 0.0
    return [Sample("rows of zeros", sample.tensors, sample.options, sample.differentiable)]
