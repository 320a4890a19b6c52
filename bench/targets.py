"""The performance targets of the project, on two AVX-512 cores and on an H200, as data: they judge
every run."""

from dataclasses import dataclass
from typing import Any

FASTER = "faster"  # at least `value` times as fast as the contender `against`
SLOWER = "slower"  # at most `value` times the time of the contender `against`
FLOOR = "floor"  # at most `value` times the case's floor
SHARE = "share"  # the case's floor at least `value` of the time
MICROSECONDS = "microseconds"  # at most `value` microseconds
MEMORY = "memory"  # at most `value` MB beyond the inputs

WALL = "wall"  # the timing that includes launch and dispatch


@dataclass(frozen=True)
class Target:
    """One target of one case, at one instruction-set level ("": a GPU)."""

    op: str
    case: str
    kind: str
    against: str
    value: float
    isa: str = "v4"
    wall: bool = False  # about the wall time of eager calls, not about the work on the device
    gradient: float | None = None  # about this incoming gradient alone

    def text(self) -> str:
        """The target as the tables show it."""
        words = {
            FASTER: f">= {self.value:g}x",
            SLOWER: f"<= {self.value:g}x its time",
            FLOOR: f"<= {self.value:g}x floor",
            SHARE: f">= {self.value:.0%} of floor",
            MICROSECONDS: f"<= {self.value:g} us",
            MEMORY: f"<= {self.value:g} MB",
        }[self.kind]
        return f"{words} wall" if self.wall else words

    def is_about(self, timing: str, gradient: float | None) -> bool:
        """Whether the target applies to rows of this timing and incoming gradient."""
        return self.wall == (timing == WALL) and self.gradient in (None, gradient)


KD, BATCH, HEAD = "kd_cross_entropy", "batch_triplet_loss", "linear_kd_cross_entropy"
HEADS = tuple(
    f"{rows}x{classes}{teacher}"
    for classes in (10575, 93431, 360232)
    for rows in (256, 1024)
    for teacher in ("-teacher", "")
)
PML = "pytorch-metric-learning"
# Flags of all triplets at N=1024 would be 1024 MB at one byte each: 64 MB is far from N^3 and
# generous to N^2 (4 MB).
N3_MB = 64
GRADIENT_MB, ROW_MB = 704, 360_232 * 4 / 2**20  # of C = 360,232, D = 512; MB of 2^20 bytes

CPU_TARGETS = (
    Target(KD, "256x10575", FASTER, "torch", 9),
    Target(KD, "256x10575", FASTER, "torch.compile", 5),
    Target(KD, "256x10575", FLOOR, "", 2.2),
    Target(KD, "64x93431", FASTER, "torch", 7),
    Target(KD, "64x93431", FASTER, "torch.compile", 5),
    Target(KD, "64x93431", FLOOR, "", 2.2),
    Target(KD, "256x10575-tau2.5", FASTER, "torch", 5),
    Target(KD, "256x10575-tau2.5", FLOOR, "", 3),
    Target(KD, "256x10575-spread64", SLOWER, "native, ordinary logits", 1.3),
    Target(KD, "256x10575-bf16", FASTER, "torch", 6),
    Target(KD, "256x10575-avx2", FASTER, "torch", 4, isa="v3"),
    Target("triplet_loss", "1024x512", FASTER, "torch", 3),
    Target(BATCH, "hard", FASTER, "torch", 3),
    Target(BATCH, "hard", FASTER, PML, 1),
    Target(BATCH, "hard", MEMORY, "", N3_MB),
    Target(BATCH, "semihard", FASTER, "torch", 4),
    Target(BATCH, "semihard", FASTER, PML, 1),
    Target(BATCH, "semihard", MEMORY, "", N3_MB),
    Target(BATCH, "all", FASTER, "torch", 4),
    Target(BATCH, "all", FASTER, PML, 1),
    Target(BATCH, "all", FLOOR, "", 2.5),
    Target(BATCH, "all", MEMORY, "", N3_MB),
    Target("hidden_l2", "resnet50-batch32", FASTER, "torch", 2),
    Target("hidden_l2", "resnet50-batch32", FLOOR, "", 1.6),
    Target("nearest_neighbor", "20000x20000", FASTER, "GEMM tiles", 0.7),
    Target("nearest_neighbor", "20000x20000", MEMORY, "", 64),
    *(Target(HEAD, case, FASTER, "torch", 1.5) for case in HEADS),
    *(Target(HEAD, case, FLOOR, "", 1.15) for case in HEADS),
    # The weight's gradient, and a tenth of eager's memory before that gradient exists: three
    # matrices of all rows and classes, seven with a teacher (its peak at every size).
    *(
        Target(HEAD, f"{rows}x360232{what}", MEMORY, "", GRADIENT_MB + round(0.1 * kept * rows))
        for rows in (256, 1024)
        for what, kept in (("-teacher", 7 * ROW_MB), ("", 3 * ROW_MB))
    ),
)


def gpu(op: str, case: str, kind: str, value: float, against: str = "", **about: Any) -> Target:
    """A target of a GPU case."""
    return Target(op, case, kind, against, value, isa="", **about)


def share(op: str, case: str, value: float) -> Target:
    """The share of the copy floor: three sweeps, so at an incoming gradient of 1, as any other is
    multiplied in by two sweeps more."""
    return gpu(op, case, SHARE, value, gradient=1.0)


# Four float32 copies of 16,384 x 512 embeddings; N^2 would be 256 MB at one byte each.
ND_MB = 128

GPU_TARGETS = (
    *(
        target
        for case, least in (("1024x10575-fp32", 0.8), ("1024x10575-bf16", 0.7))
        for target in (
            share(KD, case, least),
            gpu(KD, case, FASTER, 8, "torch"),
            gpu(KD, case, FASTER, 2.5, "torch.compile"),
        )
    ),
    share(KD, "1024x93431-fp32", 0.58),
    share(KD, "1024x93431-bf16", 0.7),
    share(KD, "256x93431-fp32", 0.58),
    share(KD, "256x93431-bf16", 0.7),
    gpu(KD, "128x10575-fp32", MICROSECONDS, 12, gradient=1.0),
    gpu(KD, "128x10575-fp32", FASTER, 1, "torch", wall=True),
    share("triplet_loss", "8192x512", 0.85),
    share("hidden_l2", "resnet50-batch128-bf16", 0.85),
    gpu(BATCH, "hard-16384", FLOOR, 1.3),
    gpu(BATCH, "hard-16384", MEMORY, ND_MB),
    *(gpu(BATCH, f"hard-{rows}", FASTER, 1, PML) for rows in (1024, 4096, 16384)),
    gpu("nearest_neighbor", "100000x100000-bf16", SHARE, 0.6),
    *(gpu(HEAD, f"{case}-bf16", FLOOR, 1.25) for case in HEADS),
)
TARGETS = CPU_TARGETS + GPU_TARGETS


def targets_of(op: str, case: str) -> list[Target]:
    """The targets of one case."""
    return [t for t in TARGETS if (t.op, t.case) == (op, case)]
