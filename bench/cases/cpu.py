"""The cases on the CPU. Their targets are in targets.py."""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.case import OWN, Case, Contender, Floor, Inputs, as_list, op_call
from bench.cases import baselines, libraries
from bench.cases.inputs import feature_maps, identities, logits, search, triplets
from kdkernels.nearest_neighbor.native import TILE_GALLERY, TILE_QUERIES


def own(op: str, name: str = OWN["cpu"], inputs: Callable[..., Inputs] | None = None) -> Contender:
    """kdkernels' kernel as a contender."""
    return Contender(name, op_call(op, "native"), inputs=inputs)


def copies(*names: str) -> Floor:
    """One and a half plain copies of the inputs: three sweeps, as two reads and one write are."""

    def prepare(inputs: Inputs) -> Callable[[], None]:
        sources = [t for name in names for t in as_list(inputs[name])]
        sources = [t.detach().reshape(-1) for t in sources]
        buffers = [torch.zeros_like(t) for t in sources]

        def run() -> None:
            for source, buffer in zip(sources, buffers, strict=True):
                half = source.numel() // 2
                buffer.copy_(source)
                buffer[:half].copy_(source[:half])

        return run

    return Floor("floor: copies", prepare)


def gram_gemms(count: int) -> Floor:
    """The Gram matrix into a buffer, and (count 2) that matrix times the embeddings."""

    def prepare(inputs: Inputs) -> Callable[[], None]:
        embeddings = inputs["embeddings"].detach()
        gram = torch.zeros(len(embeddings), len(embeddings))
        product = torch.zeros_like(embeddings)

        def run() -> None:
            torch.mm(embeddings, embeddings.T, out=gram)
            if count == 2:
                torch.mm(gram, embeddings, out=product)

        return run

    return Floor("floor: GEMM" if count == 1 else "floor: two GEMMs", prepare)


def gemm_tiles(inputs: Inputs) -> Callable[[], None]:
    """The op's own tiles of queries @ gallery.T in a preallocated buffer; nothing is read back."""
    queries, gallery = inputs["queries"], inputs["gallery"]
    buffer = torch.zeros(TILE_QUERIES * TILE_GALLERY)

    def run() -> None:
        for columns in gallery.split(TILE_GALLERY):
            for rows in queries.split(TILE_QUERIES):
                out = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
                torch.mm(rows, columns.T, out=out)

    return run


KD_TORCH = Contender("torch", baselines.kd_cross_entropy)
KD_COMPILED = Contender("torch.compile", baselines.kd_cross_entropy_compiled, compiles=True)
KD = Case(
    "kd_cross_entropy",
    "256x10575",
    "N=256 C=10,575 (CASIA-WebFace), float32, tau=3",
    logits,
    {"rows": 256, "classes": 10575},
    {"rows": 5, "classes": 130},
    (own("kd_cross_entropy"), KD_TORCH, KD_COMPILED),
    (copies("student"),),
    {"temperature": 3.0},
    ("student",),
    rounds=60,
)


def spread(seed: int, device: str, rows: int, classes: int) -> Inputs:
    return logits(seed, device, rows, classes, spread=64.0)


def in_bfloat16(seed: int, device: str, rows: int, classes: int) -> Inputs:
    return logits(seed, device, rows, classes, dtype=torch.bfloat16)


def batch_triplet(mining: str, rounds: int) -> Case:
    """One mining of batch_triplet_loss: 256 identities of 4 images."""
    if mining == "all":
        second = Contender("torch, masked", baselines.batch_triplet_loss_masked)
    else:
        second = Contender("torch, mined apart", baselines.batch_triplet_loss_mined_apart)
    return Case(
        "batch_triplet_loss",
        mining,
        f"{mining} triplets, N=1024, 4 images per identity, D=512, float32",
        identities,
        {"count": 256, "images": 4, "features": 512},
        {"count": 8, "images": 4, "features": 16},
        (
            own("batch_triplet_loss"),
            Contender("torch", baselines.batch_triplet_loss),
            second,
            libraries.pytorch_metric_learning(mining),
        ),
        (gram_gemms(2 if mining == "all" else 1),),
        {"margin": 0.4, "mining": mining},
        ("embeddings",),
        rounds=rounds,
    )


CASES = (
    KD,
    replace(
        KD,
        name="64x93431",
        about="N=64 C=93,431 (MS1MV3), float32, tau=3",
        sizes={"rows": 64, "classes": 93431},
        rounds=40,
    ),
    replace(
        KD,
        name="256x10575-tau2.5",
        about="the first case at tau=2.5: two exponentials for the student",
        options={"temperature": 2.5},
    ),
    replace(
        KD,
        name="256x10575-spread64",
        about="the first case, logits uniform in +-64 (denormal exponentials), against itself",
        inputs=spread,
        contenders=(
            own("kd_cross_entropy"),
            own("kd_cross_entropy", "native, ordinary logits", logits),
            KD_TORCH,
        ),
    ),
    replace(
        KD,
        name="256x10575-bf16",
        about="the first case in bfloat16",
        inputs=in_bfloat16,
    ),
    replace(
        KD,
        name="256x10575-avx2",
        about="the first case at the AVX2 level, torch too",
        isa="v3",
    ),
    Case(
        "triplet_loss",
        "1024x512",
        "B=1024 D=512, float32",
        triplets,
        {"rows": 1024, "features": 512},
        {"rows": 9, "features": 24},
        (own("triplet_loss"), Contender("torch", baselines.triplet_loss)),
        (copies("anchor", "positive"),),
        {"margin": 0.4},
        ("anchor", "positive", "negative"),
        rounds=200,
    ),
    batch_triplet("hard", rounds=40),
    batch_triplet("semihard", rounds=10),
    batch_triplet("all", rounds=10),
    Case(
        "hidden_l2",
        "resnet50-batch32",
        "16 feature maps of a ResNet-50 at batch 32 (177 M elements), float32",
        feature_maps,
        {"batch": 32, "shapes": [(3, 256, 56), (4, 512, 28), (6, 1024, 14), (3, 2048, 7)]},
        {"batch": 2, "shapes": [(2, 8, 7), (1, 12, 3)]},
        (own("hidden_l2"), Contender("torch", baselines.hidden_l2)),
        (copies("students"),),
        {"reduction": "mean"},
        ("students",),
        rounds=15,
        one_by_one=True,
    ),
    Case(
        "nearest_neighbor",
        "20000x20000",
        "20,000 queries in 20,000 gallery rows, D=128, float32",
        search,
        {"queries": 20000, "gallery": 20000, "features": 128},
        {"queries": 40, "gallery": 50, "features": 16},
        (own("nearest_neighbor"), Contender("torch.cdist", baselines.nearest_neighbor)),
        (Floor("GEMM tiles", gemm_tiles),),
        gradients=(),
        rounds=10,
        check_rows=500,
    ),
)
