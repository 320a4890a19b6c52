"""The cases on a GPU, the most important first. Their targets are in targets.py."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.case import OWN, Case, Contender, Floor, Inputs, op_call, tensors_of
from bench.cases import baselines
from bench.cases.inputs import RESNET50_TAPS, feature_maps, identities, logits, search, triplets
from bench.cases.libraries import LIGER, pytorch_metric_learning

BF16 = torch.bfloat16


def own(op: str) -> Contender:
    """kdkernels by its default choice of backend, as a user calls it."""
    return Contender(OWN["cuda"], op_call(op, None))


def compiled(call: Callable) -> Contender:
    """A baseline under torch.compile."""
    return Contender("torch.compile", call, compiles=True)


def swept(*names: str) -> Callable[[Inputs], tuple[float, str]]:
    """The bytes of three sweeps over the named inputs: two reads and the gradient's write."""

    def work(inputs: Inputs) -> tuple[float, str]:
        return 3.0 * sum(t.nbytes for t in tensors_of(inputs, names)), "GB/s"

    return work


def copies(*names: str) -> tuple[Floor, ...]:
    """A device-to-device copy that moves as many bytes as three sweeps over the named inputs, half
    of them read and half written: by the driver's memory copy, and by an elementwise kernel."""

    def buffers(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = tensors_of(inputs, names)
        words = 3 * sum(t.nbytes for t in tensors) // 2 // 4
        source = torch.empty(words, dtype=torch.int32, device=tensors[0].device)
        return source.random_(), torch.zeros_like(source)  # equal bits would draw less power

    def memory_copy(inputs: Inputs) -> Callable[[], object]:
        source, target = buffers(inputs)
        return lambda: target.copy_(source)

    def kernel(inputs: Inputs) -> Callable[[], object]:
        source, target = buffers(inputs)
        return lambda: torch.neg(source, out=target)

    return Floor("floor: memory copy", memory_copy), Floor("floor: copying kernel", kernel)


def gram_work(inputs: Inputs) -> tuple[float, str]:
    """The operations of the Gram matrix."""
    rows, features = inputs["embeddings"].shape
    return 2.0 * rows * rows * features, "TFLOP/s"


def gram_gemm(inputs: Inputs) -> Callable[[], object]:
    """The Gram matrix into a buffer, in the embeddings' own precision."""
    embeddings = inputs["embeddings"].detach()
    gram = embeddings.new_zeros(len(embeddings), len(embeddings))
    return lambda: torch.mm(embeddings, embeddings.T, out=gram)


def search_work(inputs: Inputs) -> tuple[float, str]:
    """The operations of queries @ gallery.T."""
    queries, gallery = inputs["queries"], inputs["gallery"]
    return 2.0 * queries.numel() * len(gallery), "TFLOP/s"


def search_gemm(inputs: Inputs) -> Callable[[], None]:
    """queries @ gallery.T by chunks of queries into one buffer; nothing is read back."""
    queries, gallery = inputs["queries"], inputs["gallery"]
    chunks = queries.split(baselines.SEARCH_CHUNK)
    buffer = queries.new_zeros(len(chunks[0]), len(gallery))

    def run() -> None:
        for rows in chunks:
            torch.mm(rows, gallery.T, out=buffer[: len(rows)])

    return run


def kd(rows: int, classes: int, dtype: torch.dtype, rounds: int = 60) -> Case:
    """kd_cross_entropy at one size in one precision."""
    short = "bf16" if dtype == BF16 else "fp32"
    return Case(
        "kd_cross_entropy",
        f"{rows}x{classes}-{short}",
        f"N={rows} C={classes:,}, {'bfloat16' if dtype == BF16 else 'float32'}, tau=3",
        logits,
        {"rows": rows, "classes": classes, "dtype": dtype},
        {"rows": 5, "classes": 130, "dtype": dtype},
        (
            own("kd_cross_entropy"),
            Contender("torch", baselines.kd_cross_entropy),
            compiled(baselines.kd_cross_entropy_compiled),
            LIGER,
        ),
        copies("student"),
        {"temperature": 3.0},
        ("student",),
        rounds=rounds,
        device="cuda",
        work=swept("student"),
    )


def batch_hard(rows: int, rounds: int) -> Case:
    """Hard mining at one size, 4 images per identity."""
    return Case(
        "batch_triplet_loss",
        f"hard-{rows}",
        f"hard triplets, N={rows:,}, 4 images per identity, D=512, float32",
        identities,
        {"count": rows // 4, "images": 4, "features": 512},
        {"count": 8, "images": 4, "features": 16},
        (
            own("batch_triplet_loss"),
            Contender("torch", baselines.batch_triplet_loss, waits=True),
            Contender("torch, mined apart", baselines.batch_triplet_loss_mined_apart, waits=True),
            Contender("torch, static shapes", baselines.batch_hard_static),
            compiled(baselines.batch_hard_compiled),
            pytorch_metric_learning("hard", tolerance=0.03),  # a few of 16,384 partners may differ
        ),
        (Floor("floor: GEMM", gram_gemm),),
        {"margin": 0.4, "mining": "hard"},
        ("embeddings",),
        rounds=rounds,
        device="cuda",
        work=gram_work,
    )


TRIPLET = Case(
    "triplet_loss",
    "8192x512",
    "B=8192 D=512, float32",
    triplets,
    {"rows": 8192, "features": 512},
    {"rows": 9, "features": 24},
    (
        own("triplet_loss"),
        Contender("torch", baselines.triplet_loss),
        compiled(baselines.triplet_loss_compiled),
    ),
    copies("anchor", "positive"),  # three reads and three writes
    {"margin": 0.4},
    ("anchor", "positive", "negative"),
    rounds=60,
    device="cuda",
    work=swept("anchor", "positive"),
)
HIDDEN = replace(
    TRIPLET,
    op="hidden_l2",
    name="resnet50-batch128-bf16",
    about="50 layers of a ResNet-50 on 112 x 112 faces, batch 128 (295 M elements), bfloat16",
    inputs=feature_maps,
    sizes={"batch": 128, "shapes": [(1, *tap) for tap in RESNET50_TAPS], "dtype": BF16},
    quick={"batch": 2, "shapes": [(2, 8, 7), (1, 12, 3)], "dtype": BF16},
    contenders=(
        own("hidden_l2"),
        Contender("torch", baselines.hidden_l2),
        compiled(baselines.hidden_l2_compiled),
    ),
    floors=copies("students"),
    options={"reduction": "mean"},
    wanted=("students",),
    rounds=40,
    one_by_one=True,
    work=swept("students"),
)
SEARCH = Case(
    "nearest_neighbor",
    "100000x100000-bf16",
    "100,000 queries in 100,000 gallery rows, D=512, bfloat16",
    search,
    {"queries": 100_000, "gallery": 100_000, "features": 512, "dtype": BF16},
    {"queries": 40, "gallery": 50, "features": 16, "dtype": BF16},
    (
        own("nearest_neighbor"),
        Contender("torch, GEMM and minimum", baselines.nearest_neighbor_gemm),
        compiled(baselines.nearest_neighbor_compiled),
    ),
    (Floor("floor: GEMM", search_gemm),),
    gradients=(),
    rounds=10,
    device="cuda",
    check_rows=500,
    work=search_work,
)

CASES = (
    kd(1024, 10575, torch.float32),
    kd(1024, 10575, BF16),
    kd(1024, 93431, torch.float32, rounds=30),
    kd(1024, 93431, BF16, rounds=40),
    kd(256, 93431, torch.float32, rounds=40),
    kd(256, 93431, BF16),
    kd(128, 10575, torch.float32, rounds=100),
    batch_hard(16384, rounds=10),
    batch_hard(4096, rounds=30),
    batch_hard(1024, rounds=60),
    SEARCH,
    HIDDEN,
    TRIPLET,
)
