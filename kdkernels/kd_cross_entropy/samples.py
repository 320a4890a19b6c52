"""Calls of kd_cross_entropy that the contract runs: odd shapes, strides, extremes, options."""

import torch

from kdkernels.sample import Sample

INF = float("inf")


def make(
    rows: int,
    classes: int,
    *,
    seed: int = 0,
    spread: float = 2.0,
    device: str = "cpu",
    label_dtype: torch.dtype = torch.int64,
    ignored: int = 0,
    ignore_index: int = -100,
    name: str = "",
    **options: object,
) -> Sample:
    """Normal logits times `spread`, labels; the first `ignored` rows hold ignore_index."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, classes, generator=generator) * spread
    teacher = torch.randn(rows, classes, generator=generator) * spread
    target = torch.randint(classes, (rows,), generator=generator).to(label_dtype)
    target[:ignored] = ignore_index
    tensors = {"student": student, "teacher": teacher, "target": target}
    return Sample(
        name or f"{rows}x{classes}",
        {key: value.to(device) for key, value in tensors.items()},
        {"ignore_index": ignore_index, **options},
        ("student",),
    )


def samples(device: str = "cpu") -> list[Sample]:
    """Float32 calls; the contract casts them to each dtype."""
    found = [
        make(1, 1, device=device),
        make(1, 2, device=device),
        make(5, 1, device=device),
        make(0, 7, device=device),
        make(3, 15, device=device),
        make(3, 16, device=device, label_dtype=torch.int32),
        make(7, 17, device=device),
        make(4, 2047, device=device),
        make(4, 2048, device=device),
        make(4, 2049, device=device),
        make(2, 4096 + 31, device=device, temperature=4.0),
        make(3, 10575, device=device, temperature=2.5),
        make(2, 16411, device=device, temperature=1.0),
        make(1, 93431, device=device),
        make(23, 93431, device=device, name="a gradient past the caches"),
        make(9, 101, device=device, temperature=2.0, tau_squared=True, alpha=0.7),
        make(9, 101, device=device, temperature=7.3, alpha=3.0, reduction="sum"),
        make(9, 101, device=device, ignored=4, name="ignored rows"),
        make(9, 101, device=device, ignored=9, name="all rows ignored"),
        make(9, 101, device=device, ignored=2, ignore_index=5, name="own ignore_index"),
        make(9, 101, device=device, label_smoothing=0.1, ignored=3, name="smoothing"),
        make(
            6, 2500, device=device, label_smoothing=0.3, temperature=1.7, name="smoothing, any tau"
        ),
        make(6, 33, device=device, reduction="none", ignored=1, name="none"),
        make(6, 33, device=device, alpha=0.0, name="alpha 0"),
        make(4, 3000, device=device, spread=64.0, name="logits of scale 64"),
        make(4, 3000, device=device, spread=1e4, name="logits of scale 1e4"),
    ]
    found += [
        _without(make(5, 2100, device=device), "teacher"),
        _without(make(5, 2100, device=device), "target"),
    ]
    found.append(_without(make(5, 300, device=device, spread=1e4), "teacher"))
    found += _strided(device) + _extreme(device)
    return found


def _without(sample: Sample, key: str) -> Sample:
    return Sample(f"no {key}", {**sample.tensors, key: None}, sample.options, sample.differentiable)


def _strided(device: str) -> list[Sample]:
    base = make(6, 2100, device=device)
    wide = torch.randn(6, 2103, generator=torch.Generator().manual_seed(3)).to(device)
    column_major = torch.randn(2100, 6, generator=torch.Generator().manual_seed(4)).to(device).t()
    every_second = torch.randn(6, 4200, generator=torch.Generator().manual_seed(5)).to(device)
    one_row = torch.randn(1, 2100, generator=torch.Generator().manual_seed(6)).to(device)

    def of(name, student, teacher, target=None):
        target = base.tensors["target"] if target is None else target
        tensors = {"student": student, "teacher": teacher, "target": target}
        return Sample(name, tensors, {"temperature": 3.0}, ("student",))

    labels = torch.randint(2100, (12,), generator=torch.Generator().manual_seed(7)).to(device)
    return [
        of("misaligned rows", wide[:, 1:2101], wide[:, 3:2103]),
        of("column-major", column_major, base.tensors["teacher"]),
        of("every second column", base.tensors["student"], every_second[:, ::2]),
        of("expanded teacher", base.tensors["student"], one_row.expand(6, 2100)),
        of("strided labels", base.tensors["student"], base.tensors["teacher"], labels[::2]),
    ]


def _extreme(device: str) -> list[Sample]:
    def edit(name, change, **options):
        sample = make(4, 2100, device=device, **options)
        student, teacher = sample.tensors["student"], sample.tensors["teacher"]
        label = sample.tensors["target"]
        change(student, teacher, label)
        return Sample(name, sample.tensors, sample.options, sample.differentiable)

    def masked_in_both(student, teacher, label):
        label[:] = 5
        student[:, 100:2050] = -INF
        teacher[:, 100:2050] = -INF

    def first_block_masked(student, teacher, label):
        label[:] = 2090
        student[:, :2048] = -INF
        teacher[:, :2048] = -INF

    def impossible_target(student, _teacher, _label):
        student[1, 7] = -INF  # the teacher gives it probability: the loss is +inf

    def ties(student, teacher, _label):
        student[:] = 1.0
        teacher[:] = -3.0

    def teacher_masked(_student, teacher, _label):
        teacher[:, 10:] = -INF

    return [
        edit("-inf in both", masked_in_both),
        edit("-inf in both, any tau", masked_in_both, temperature=2.5),
        edit("first block -inf", first_block_masked),
        edit("+inf loss", impossible_target, reduction="none"),
        edit("ties", ties),
        edit("teacher -inf", teacher_masked),
    ]
