"""`python -m bench.gpu.sanitize [op ...]` calls every op once on each path of its kernels.

The data is small: bench/gpu.sh runs this command under a memory checker and a race checker.

Nothing is compared here: the contract does that, and a checker watches the accesses.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import kdkernels
from kdkernels.backends import backends

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Call = tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]  # name, inputs, wanted, options


def matrix(device: str, rows: int, columns: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Normal numbers; with an offset the rows start that many elements after a boundary, and
    are not a whole number of vectors apart."""
    wide = torch.randn(rows, columns + offset, device=device).to(dtype)
    return wide[:, offset:]


def kd_cross_entropy(device: str) -> Iterator[Call]:
    """A row in registers, in two sweeps, and split over programs; every dtype, option and
    alignment."""
    sizes = ((7, 130), (5000, 37), (3, 10575), (300, 17001), (2, 93431))
    for rows, classes in sizes:
        target = torch.randint(classes, (rows,), device=device)
        target[0] = -100
        for dtype, offset, options in (
            (FP32, 0, {"temperature": 3.0}),
            (FP32, 1, {"temperature": 2.5, "label_smoothing": 0.1, "return_terms": True}),
            (BF16, 1, {"temperature": 3.0, "reduction": "sum"}),
            (FP16, 0, {"temperature": 4.0, "reduction": "none"}),
        ):
            inputs = {
                "student": matrix(device, rows, classes, dtype, offset),
                "teacher": matrix(device, rows, classes, dtype, 2 * offset),
                "target": target,
            }
            name = f"{rows}x{classes} {dtype} offset {offset}"
            yield name, inputs, ("student",), options
        for absent in ("teacher", "target"):
            inputs = {
                "student": matrix(device, rows, classes, FP32),
                "teacher": matrix(device, rows, classes, FP32),
                "target": target,
                absent: None,
            }
            yield f"{rows}x{classes} no {absent}", inputs, ("student",), {}
            yield f"{rows}x{classes} no {absent}, no gradient", inputs, (), {}


def linear_kd_cross_entropy(device: str) -> Iterator[Call]:
    """Both kinds of head with every kind of teacher: a row in registers, in two sweeps, and split
    over programs; in one chunk."""
    for rows, classes, dtype in ((7, 130, FP32), (300, 17001, BF16), (2, 93431, FP16)):
        target = torch.randint(classes, (rows,), device=device)
        target[0] = -100
        features, weight = (matrix(device, n, 24, dtype) for n in (rows, classes))
        teacher = (matrix(device, rows, 40, dtype), matrix(device, classes, 40, dtype))
        bias = torch.randn(classes, device=device)
        cosine = {"normalize": True, "scale": 16.0}
        for kind, extra, options in (
            ("bias", {"bias": bias, "teacher": (*teacher, bias)}, {}),
            ("none", {"teacher": teacher}, {"reduction": "none"}),
            ("margin", {"teacher": teacher}, {**cosine, "margin": kdkernels.ArcFace(0.5)}),
            ("logits", {"teacher": matrix(device, rows, classes, dtype, 1)}, cosine),
            ("alone", {}, {**cosine, "margin": kdkernels.CosFace(0.35), "reduction": "none"}),
        ):
            inputs = {"features": features, "weight": weight, "target": target, **extra}
            name = f"{rows}x{classes} {dtype} {kind}"
            yield name, inputs, ("features", "weight"), {**options, "return_terms": True}
            yield f"{name}, no gradient", inputs, (), options


def triplet_loss(device: str) -> Iterator[Call]:
    """Narrow and wide rows, every dtype, aligned or not."""
    for rows, features, dtype, offset, options in (
        (1, 1, FP32, 0, {}),
        (37, 512, FP32, 0, {}),
        (37, 130, FP32, 1, {"squared": False}),
        (37, 512, BF16, 0, {"reduction": "sum"}),
        (9, 4099, FP16, 3, {"reduction": "none"}),
    ):
        names = ("anchor", "positive", "negative")
        inputs = {name: matrix(device, rows, features, dtype, offset) for name in names}
        name = f"{rows}x{features} {dtype} offset {offset}"
        yield name, inputs, names, {"margin": features**0.5, **options}
        yield f"{name}, no gradient", inputs, (), {"margin": 1.0, **options}


def batch_triplet_loss(device: str) -> Iterator[Call]:
    """Every mining and reduction on a few rows, and hard mining on more rows than a stored
    matrix covers."""
    for mining in ("hard", "semihard", "all"):
        for rows, features, dtype, offset, reduction in (
            (48, 33, FP32, 1, "mean"),
            (70, 64, BF16, 0, "nonzero"),
            (70, 64, FP16, 0, "sum"),
            (131, 128, FP32, 0, "none"),
        ):
            inputs = {
                "embeddings": matrix(device, rows, features, dtype, offset),
                "labels": torch.arange(rows, device=device) // 4,
            }
            options = {"mining": mining, "reduction": reduction, "margin": float(features)}
            name = f"{mining} {rows}x{features} {dtype} {reduction}"
            yield name, inputs, ("embeddings",), options
    for rows, dtype in ((2500, FP32), (5000, FP32), (5000, BF16)):
        if device == "cpu":
            rows //= 20
        inputs = {
            "embeddings": matrix(device, rows, 64, dtype),
            "labels": torch.arange(rows, device=device) // 4,
        }
        yield f"hard {rows}x64 {dtype}", inputs, ("embeddings",), {"mining": "hard"}


def hidden_l2(device: str) -> Iterator[Call]:
    """Many pairs at once: odd lengths, mixed dtypes and memory formats, gaps, an empty pair."""
    shapes = ((1,), (4, 3, 5, 5), (2, 64, 7, 7), (3, 1001), (0, 4), (2, 70_001))
    for dtypes in ((FP32, FP32), (BF16, BF16), (FP16, FP32)):
        students = [torch.randn(shape, device=device).to(dtypes[0]) for shape in shapes]
        teachers = [torch.randn(shape, device=device).to(dtypes[1]) for shape in shapes]
        students[2] = students[2].to(memory_format=torch.channels_last)
        teachers[3] = matrix(device, 3, 1001, dtypes[1], 1)
        inputs = {"students": students, "teachers": teachers}
        yield f"{len(shapes)} pairs of {dtypes}", inputs, ("students",), {}
    many = [torch.randn(33 + i, device=device) for i in range(150)]
    inputs = {"students": many, "teachers": [t.flip(0) for t in many]}
    yield "150 pairs", inputs, ("students",), {"reduction": "mean"}


def nearest_neighbor(device: str) -> Iterator[Call]:
    """With and without a gallery, aligned for bulk loads or not, one tile and many."""
    for queries, gallery, features, dtype, offset in (
        (3, 5, 17, FP32, 1),
        (150, 700, 64, FP32, 0),
        (150, 700, 64, BF16, 0),
        (150, 700, 65, FP16, 1),
        (300, 3000, 512, BF16, 0),
    ):
        inputs = {
            "queries": matrix(device, queries, features, dtype, offset),
            "gallery": matrix(device, gallery, features, dtype, offset),
        }
        name = f"{queries}x{gallery}x{features} {dtype}"
        yield name, inputs, (), {}
        yield f"{name}, leave one out", {"queries": inputs["gallery"]}, (), {}


CALLS = {
    "kd_cross_entropy": kd_cross_entropy,
    "linear_kd_cross_entropy": linear_kd_cross_entropy,
    "batch_triplet_loss": batch_triplet_loss,
    "nearest_neighbor": nearest_neighbor,
    "hidden_l2": hidden_l2,
    "triplet_loss": triplet_loss,
}


def run(op: str, device: str) -> int:
    """Runs every call of an op, forward and backward with an incoming gradient other than 1, and
    returns their number.

    The host waits for the device after each call, so that an error appears with the name of its
    call.
    """
    count = 0
    for name, inputs, wanted, options in CALLS[op](device):
        print(f"{op}: {name}", flush=True)
        leaves = []
        for key in wanted:
            value = inputs[key]
            of_list = isinstance(value, list)
            fresh = [t.detach().requires_grad_() for t in (value if of_list else [value])]
            inputs = {**inputs, key: fresh if of_list else fresh[0]}
            leaves += fresh
        result = getattr(kdkernels, op)(**inputs, **options)
        if leaves:
            loss = result[0] if isinstance(result, tuple) else result
            torch.autograd.grad(loss, leaves, torch.full_like(loss.detach(), 0.37))
        if device == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count


def main(arguments: list[str]) -> int:
    """Runs the command. Returns 2 where the device has no kernels, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.sanitize",
        description="Calls the kernels of each op with little data, for a memory or race checker.",
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to call; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in CALLS]
    if unknown:
        parser.error(f"no op {unknown[0]!r}; there are {', '.join(CALLS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu.sanitize: there is no GPU here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    for op in options.ops or CALLS:
        backend = backends(op, options.device)[0]
        if backend == "eager":
            print(f"bench.gpu.sanitize: {op} has no kernel on {options.device}", file=sys.stderr)
            return 2
        print(f"{op}: {run(op, options.device)} calls on {backend}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
