"""The calls whose kernels are compiled without a GPU: the shapes that the speed targets name, and
beside them every option that makes another kernel.

Tensors are uninitialized and only their dtype, shape and address are looked at, so large ones cost
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases.inputs import RESNET50_TAPS
from kdkernels import ArcFace
from kdkernels.sample import Sample

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    op: str
    name: str
    sample: Sample
    incoming: str = "one"


def kd(
    rows: int,
    classes: int,
    dtype: torch.dtype = FP32,
    *,
    teacher: torch.dtype | None = FP32,
    labels: torch.dtype | None = torch.int64,
    incoming: str = "one",
    gradient: bool = True,
    offset: int = 0,
    teacher_offset: int = 0,
    name: str = "",
    **options: Any,
) -> Case:
    """A call of kd_cross_entropy; the offsets start rows that many elements after a boundary."""

    def logits(of: torch.dtype | None, after: int) -> Tensor | None:
        if of is None:
            return None
        return torch.empty(rows, classes + after, dtype=of)[:, after:]

    tensors: dict[str, Any] = {
        "student": logits(dtype, offset),
        "teacher": logits(teacher, teacher_offset),
        "target": None if labels is None else torch.zeros(rows, dtype=labels),
    }
    sample = Sample("", tensors, options, ("student",) if gradient else ())
    kinds = _names(dtype, teacher)
    return Case("kd_cross_entropy", f"{rows}x{classes} {kinds} {name}".strip(), sample, incoming)


def _names(*dtypes: torch.dtype | None) -> str:
    short = {FP32: "fp32", BF16: "bf16", FP16: "fp16", None: "none"}
    return "/".join(dict.fromkeys(short[d] for d in dtypes))


def _kd_cases() -> list[Case]:
    found = []
    for dtype in (FP32, BF16):
        for rows, classes in ((1024, 10575), (1024, 93431)):
            found.append(kd(rows, classes, dtype, teacher=dtype))
        for rows, classes in ((128, 10575), (256, 93431), (64, 100_000)):
            found.append(kd(rows, classes, dtype, teacher=dtype))
    everything = {"label_smoothing": 0.1, "return_terms": True, "temperature": 2.5}
    # A row in registers, a row in two sweeps. What takes less than all else is compiled with fewer
    # tiles where a row is in registers: Triton's time grows with their square.
    for classes, light in ((10575, 2000), (93431, 93431)):
        found += [
            kd(1024, light, teacher=None, name="no teacher"),
            kd(1024, light, labels=None, temperature=1.0, name="no target, tau 1"),
            kd(1024, light, gradient=False, return_terms=True, name="terms alone"),
            kd(
                1024,
                classes,
                temperature=7.0,
                reduction="sum",
                labels=torch.int32,
                name="tau 7, sum, int32 labels",
            ),
            kd(1024, classes, temperature=2.5, name="any tau"),
            kd(1024, classes, reduction="none", incoming="rows", name="none"),
            kd(1024, classes, FP16, teacher=FP16),
            kd(1024, classes, BF16, teacher=BF16, reduction="none", incoming="rows", name="none"),
            kd(1024, classes, BF16, teacher=FP32, name="mixed"),
            kd(1024, classes, FP32, teacher=BF16, offset=1, name="mixed, misaligned student"),
            kd(1024, classes, BF16, teacher=BF16, temperature=2.5, name="any tau"),
            kd(1024, classes, BF16, teacher=BF16, **everything, name="smoothing, terms, any tau"),
            kd(1024, classes, label_smoothing=0.1, return_terms=True, name="smoothing, terms"),
            kd(1024, classes, offset=1, teacher_offset=1, name="misaligned"),
            kd(1024, classes, BF16, teacher=BF16, offset=1, name="misaligned student"),
            kd(8192, classes, BF16, teacher=BF16, name="many rows"),
        ]
    found += [  # long rows that several programs share
        kd(64, 93431, teacher=None, name="no teacher"),
        kd(64, 93431, **everything, name="smoothing, terms, any tau"),
        kd(64, 93431, gradient=False, return_terms=True, name="terms alone"),
        kd(64, 93431, FP32, teacher=BF16, offset=1, name="mixed, misaligned student"),
        kd(64, 93431, labels=None, reduction="none", incoming="rows", name="no target, none"),
    ]
    found += [kd(1024, classes) for classes in (1, 1000, 4097, 16384, 16385)]
    found.append(kd(1024, 1000, BF16, teacher=BF16))
    any_tau = {"temperature": 2.5, "reduction": "sum", "name": "any tau, sum"}
    found.append(kd(1024, 16384, **any_tau))
    found.append(kd(1024, 16384, BF16, teacher=BF16, **any_tau))
    return found


def _head_cases() -> list[Case]:
    """Row kernels with a margin, in place, and what scales rows and columns."""

    def of(
        rows: int,
        classes: int,
        name: str,
        dtype: torch.dtype = FP32,
        *,
        margin: bool = True,
        teacher: bool = True,
        sparse: bool = False,
        incoming: str = "one",
        gradient: bool = True,
        **options: Any,
    ) -> Case:
        def head() -> list[Tensor]:
            return [torch.zeros(rows, 16, dtype=dtype), torch.zeros(classes, 16, dtype=dtype)]

        features, weight = head()
        tensors: dict[str, Any] = {
            "features": features,
            "weight": weight,
            "teacher": head() if teacher else None,
            "target": torch.zeros(rows, dtype=torch.int64),
        }
        if sparse:
            indices = torch.arange(4).expand(rows, 4)
            tensors["teacher"] = [indices, torch.full((rows, 4), -2.0)]
        if margin:
            options = {"normalize": True, "scale": 64.0, "margin": ArcFace(0.5), **options}
        wanted = ("features", "weight") if gradient else ()
        label = f"{rows}x{classes} {_names(dtype)} {name}"
        return Case(
            "linear_kd_cross_entropy", label, Sample("", tensors, options, wanted), incoming
        )

    return [
        of(1024, 10575, "margin"),
        of(1024, 10575, "margin", BF16),
        of(256, 93431, "margin"),
        of(64, 93431, "margin"),
        of(
            *(1024, 10575, "margin, smoothing, terms, any tau"),
            label_smoothing=0.1,
            return_terms=True,
            temperature=2.5,
        ),
        of(1024, 2000, "none", BF16, margin=False, reduction="none", incoming="rows"),
        of(1024, 2000, "no margin", BF16, margin=False),
        of(1024, 2000, "sparse teacher", margin=False, sparse=True),
        of(1024, 2000, "sparse teacher", BF16, margin=False, sparse=True),
    ]


def _triplet_cases() -> list[Case]:
    def of(
        rows: int,
        features: int,
        dtypes: Sequence[torch.dtype],
        name: str = "",
        *,
        wanted: Sequence[str] = ("anchor", "positive", "negative"),
        incoming: str = "one",
        **options: Any,
    ) -> Case:
        members = [torch.empty(rows, features, dtype=d) for d in dtypes]
        tensors: dict[str, Any] = dict(
            zip(("anchor", "positive", "negative"), members, strict=True)
        )
        sample = Sample("", tensors, options, tuple(wanted))
        label = f"{rows}x{features} {_names(*dtypes)} {name}".strip()
        return Case("triplet_loss", label, sample, incoming)

    found = [of(8192, 512, [d] * 3) for d in (FP32, BF16)]
    found += [
        of(8192, 512, [FP16] * 3),
        of(8192, 512, [FP32, BF16, FP16], "mixed"),
        of(1024, 512, [FP32] * 3),
        of(8192, 512, [FP32] * 3, "not squared", squared=False),
        of(8192, 512, [FP32] * 3, "none", reduction="none", incoming="rows"),
        of(8192, 512, [FP16] * 3, "none", reduction="none", incoming="rows"),
        of(8192, 512, [FP32] * 3, "sum", reduction="sum"),
        of(8192, 512, [FP32] * 3, "no gradient", wanted=()),
        of(8192, 512, [FP32] * 3, "one gradient", wanted=("anchor",)),
        of(8192, 512, [FP32] * 3, "two gradients", wanted=("positive", "negative")),
        of(1000, 127, [FP32] * 3, "misaligned"),
        of(1000, 4099, [BF16] * 3, "misaligned"),
        of(64, 30_000, [FP32] * 3, "long rows"),
        of(64, 30_000, [FP16] * 3, "long rows"),
    ]
    return found


def _batch_cases() -> list[Case]:
    def of(rows: int, features: int, dtype: torch.dtype, *, incoming: str = "one",
           gradient: bool = True, **options: Any) -> Case:  # fmt: skip
        tensors: dict[str, Any] = {
            "embeddings": torch.empty(rows, features, dtype=dtype),
            "labels": torch.zeros(rows, dtype=torch.int64),
        }
        sample = Sample("", tensors, options, ("embeddings",) if gradient else ())
        words = " ".join(str(v) for v in options.values())
        label = f"{rows}x{features} {_names(dtype)} {words}"
        return Case("batch_triplet_loss", label, sample, incoming)

    found = []
    for mining in ("hard", "semihard", "all"):
        for rows in (1024, 4096, 16_384):
            found.append(of(rows, 512, FP32, mining=mining))
            found.append(of(rows, 512, BF16, mining=mining))
        for rows in (1024, 16_384):
            found += [
                of(rows, 512, FP32, mining=mining, reduction="none", incoming="rows"),
                of(rows, 512, FP32, mining=mining, squared=False, reduction="nonzero"),
                of(rows, 512, FP16, mining=mining, reduction="sum"),
                of(rows, 512, FP32, mining=mining, gradient=False),
            ]
        found.append(of(1000, 127, FP32, mining=mining))
    return found


def _hidden_cases() -> list[Case]:
    def of(
        name: str,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype = FP32,
        teacher: torch.dtype | None = None,
        *,
        gradient: bool = True,
        formats: tuple[torch.memory_format, torch.memory_format] = (torch.contiguous_format,) * 2,
        columns: slice = slice(None),
        **options: Any,
    ) -> Case:
        students, teachers = (
            [torch.empty(s, dtype=d, memory_format=f)[..., columns] for s in shapes]
            for d, f in zip((dtype, teacher or dtype), formats, strict=True)
        )
        tensors: dict[str, Any] = {"students": students, "teachers": teachers}
        sample = Sample("", tensors, options, ("students",) if gradient else ())
        return Case("hidden_l2", f"{name} {_names(dtype, teacher or dtype)}", sample)

    taps = [(128, channels, side, side) for channels, side in RESNET50_TAPS]
    last = torch.channels_last
    return [
        of("50 taps", taps, BF16),
        of("50 taps", taps),
        of("50 taps", taps, FP16),
        of("50 taps", taps, BF16, FP32),
        of("50 taps, no gradient", taps, BF16, gradient=False),
        of("one pair", [(128, 2048)], reduction="mean", return_terms=True),
        of("odd sizes", [(3, 101), (17, 241), (1,)], weights=[1.0, 0.5, 2.0]),
        of("misaligned", [(128, 2049)] * 3, columns=slice(1, None)),
        of("misaligned", [(128, 2049)] * 3, FP16, columns=slice(1, None)),
        of("past 2^31 elements", [(2**20 + 1, 2049)], BF16, columns=slice(1, None)),
        of("past 2^31 elements", [(2**20 + 1, 2049)], FP16, columns=slice(1, None)),
        of("every second column", [(128, 2048)] * 3, columns=slice(None, None, 2)),
        of("weight tensor", [(3, 101), (17, 241)], weights=torch.ones(2)),
        of("channels-last", taps[:4], BF16, formats=(last, last)),
        of("channels-last student", taps[:4], BF16, formats=(last, torch.contiguous_format)),
        of("channels-last teacher", taps[:4], FP32, formats=(torch.contiguous_format, last)),
    ]


def _nearest_cases() -> list[Case]:
    def of(rows: int, gallery: int | None, features: int, dtype: torch.dtype) -> Case:
        tensors: dict[str, Any] = {
            "queries": torch.empty(rows, features, dtype=dtype),
            "gallery": None if gallery is None else torch.empty(gallery, features, dtype=dtype),
        }
        label = f"{rows}x{gallery}x{features} {_names(dtype)}"
        return Case("nearest_neighbor", label, Sample("", tensors))

    return [
        of(100_000, 100_000, 512, BF16),
        of(100_000, 100_000, 512, FP32),
        of(100_000, 100_000, 512, FP16),
        of(100_000, None, 512, BF16),
        of(100_000, None, 512, FP32),
        of(20_000, 20_000, 128, FP32),
        of(16, 100_000, 512, BF16),
        of(1000, 999, 127, BF16),
        of(1000, 999, 127, FP32),
        of(100, 5000, 4100, BF16),
    ]


MAKERS = {
    "kd_cross_entropy": _kd_cases,
    "linear_kd_cross_entropy": _head_cases,
    "hidden_l2": _hidden_cases,
    "triplet_loss": _triplet_cases,
    "batch_triplet_loss": _batch_cases,
    "nearest_neighbor": _nearest_cases,
}


def cases(op: str) -> list[Case]:
    """The calls of an op."""
    return MAKERS[op]()
