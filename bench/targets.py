"""What the project set out to reach on two AVX-512 cores, as data that every run is held to."""

from dataclasses import dataclass

FASTER = "faster"  # at least `value` times as fast as the contender `against`
SLOWER = "slower"  # at most `value` times the time of the contender `against`
FLOOR = "floor"  # at most `value` times the case's floor
MEMORY = "memory"  # at most `value` MB beyond the inputs


@dataclass(frozen=True)
class Target:
    """One promise about one case, at one instruction-set level."""

    op: str
    case: str
    kind: str
    against: str
    value: float
    isa: str = "v4"

    def text(self) -> str:
        """The promise in the words of the tables."""
        return {
            FASTER: f">= {self.value:g}x",
            SLOWER: f"<= {self.value:g}x its time",
            FLOOR: f"<= {self.value:g}x floor",
            MEMORY: f"<= {self.value:g} MB",
        }[self.kind]


KD, BATCH = "kd_cross_entropy", "batch_triplet_loss"
PML = "pytorch-metric-learning"
# Flags of all triplets at N=1024 would be 1024 MB at one byte each: 64 MB is far from N^3 and
# generous to N^2 (4 MB).
N3_MB = 64

TARGETS = (
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
)


def targets_of(op: str, case: str) -> list[Target]:
    """The promises about one case."""
    return [t for t in TARGETS if (t.op, t.case) == (op, case)]
