"""Counted memory traffic of the Triton kernels: `python -m bench.gpu.traffic [op ...]`.

The method and the columns: bench/gpu/meter.py.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from bench.cases.inputs import RESNET50_TAPS
from bench.gpu.meter import MULTIPROCESSORS, Case, Inputs, Make, Result, count
from kdkernels.backends import OPS, is_interpreted


def kd(rows: int, classes: int, dtype: torch.dtype) -> Case:
    def make(n: int, new: Make) -> Inputs:
        return {
            "student": new(n, classes, dtype=dtype),
            "teacher": new(n, classes, dtype=dtype, seed=1),
            "target": torch.arange(n) * 7 % classes,
        }

    # about whole multiprocessors at every instance
    first = max(1, round(rows / MULTIPROCESSORS)) if rows < 512 else 2
    instances = (first, 2 * first, 3 * first) if rows < 512 else (2, 3, 4)
    name = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"
    return Case("kd_cross_entropy", name, rows, instances, make, differentiable=("student",))


def triplets(rows: int, features: int, dtype: torch.dtype) -> Case:
    names = ("anchor", "positive", "negative")

    def make(n: int, new: Make) -> Inputs:
        return {k: new(n, features, dtype=dtype, seed=i) for i, k in enumerate(names)}

    name = f"{rows}x{features} {str(dtype).removeprefix('torch.')}"
    options = {"margin": 900.0}
    return Case(
        "triplet_loss", name, rows, (64, 128, 192), make, options, names, same_constants=False
    )


def hidden(batch: int, dtype: torch.dtype, taps: Sequence[tuple[int, int]] = RESNET50_TAPS) -> Case:
    def make(n: int, new: Make) -> Inputs:
        maps = [[new(n, c, side, side, dtype=dtype, seed=s) for c, side in taps]
                for s in (0, 1)]  # fmt: skip
        return {"students": maps[0], "teachers": maps[1]}

    name = f"{len(taps)} taps, batch {batch}, {str(dtype).removeprefix('torch.')}"
    return Case("hidden_l2", name, batch, (1, 2, 3), make, {}, ("students",))


def batch(rows: int, instances: tuple[int, int, int], features: int = 512) -> Case:
    def make(n: int, new: Make) -> Inputs:
        return {"embeddings": new(n, features), "labels": torch.arange(n) // 4}

    tiled = "kdkernels.batch_triplet_loss.triton_kernel"
    return Case(
        "batch_triplet_loss",
        f"hard {rows}x{features} float32",
        rows,
        instances,
        make,
        {"margin": 1000.0},
        ("embeddings",),
        lambda n: 2.0 * n * n * features,
        ((tiled, "TILED_ROWS", 2048 if rows <= 2048 else 0),),
        same_constants=False,
    )


def nearest(rows: int, dtype: torch.dtype, features: int = 512) -> Case:
    from kdkernels.nearest_neighbor import triton_kernel

    def make(n: int, new: Make) -> Inputs:
        return {
            "queries": new(n, features, dtype=dtype),
            "gallery": new(n, features, dtype=dtype, seed=1),
        }

    is_float = dtype == torch.float32
    tiles = triton_kernel.tiles("9", not is_float, is_float)
    return Case(
        "nearest_neighbor",
        f"{rows}x{rows}x{features} {str(dtype).removeprefix('torch.')}",
        rows,
        (256, 512, 768),
        make,
        products=lambda n: 2.0 * n * n * features,
        constants=((triton_kernel.__name__, "tiles", lambda *_: tiles),),
        proportional=("rescan", "merge"),
    )


def cases() -> list[Case]:
    """The shapes that the GPU kernels have targets for."""
    single, half = torch.float32, torch.bfloat16
    return [
        *(kd(n, c, d) for n, c in ((1024, 10575), (128, 10575), (256, 93431), (1024, 93431),
                                    (64, 100_000)) for d in (single, half)),
        triplets(8192, 512, single),
        triplets(8192, 512, half),
        hidden(128, half),
        batch(1024, (32, 48, 64)),
        batch(4096, (128, 256, 384)),
        batch(16_384, (128, 256, 384)),
        nearest(100_000, half),
        nearest(100_000, single),
    ]  # fmt: skip


def show(results: list[Result], detail: bool = False) -> None:
    """The table; with `detail` also the bytes of every kernel argument."""
    print(f"{'op':20}{'case':32}{'launches':>9}{'floor MB':>10}{'moved MB':>10}"
          f"{'over floor':>11}{'again MB':>10}{'GFLOP':>10}{'over floor':>11}")  # fmt: skip
    for r in results:
        line = f"{r.case.op:20}{r.case.name:32}{r.launches:9}{r.floor / 1e6:10.2f}"
        line += f"{r.moved / 1e6:10.2f}{r.over_floor:11.3f}{r.again / 1e6:10.2f}"
        if r.case.products:
            least = r.case.products(r.case.rows)
            line += f"{r.products / 1e9:10.1f}{r.products / least:11.3f}"
        print(line)
        for (kernel, argument, direction), size in r.parts if detail else ():
            print(f"    {kernel:24}{argument:24}{direction:8}{size / 1e6:12.3f} MB")


def main(arguments: list[str]) -> int:
    """The command; restarts itself in Triton's interpreter where needed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.traffic", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help="ops to count; default: all")
    parser.add_argument("--detail", action="store_true", help="the bytes of every kernel argument")
    options = parser.parse_args(arguments)
    if not is_interpreted():
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "bench.gpu.traffic", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode
    chosen = [c for c in cases() if not options.ops or c.op in options.ops]
    if not chosen:
        parser.error(f"no op {' '.join(options.ops)}; there are {', '.join(OPS)}")
    show([count(case) for case in chosen], options.detail)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
