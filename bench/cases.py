"""The cases: inputs, contenders and floor of every table row. Promises stand in targets.py."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import kdkernels
from bench import baselines
from kdkernels.nearest_neighbor.op import TILE_GALLERY, TILE_QUERIES

Inputs = dict[str, Any]  # tensors and lists of tensors, by the op's parameter names
OWN = "native"


@dataclass(frozen=True)
class Contender:
    """One way to compute a case's result: `call(**inputs, **options)`."""

    name: str
    call: Callable[..., Any]
    truth: Callable[..., Any] | None = (
        None  # what it computes, where that is not the case's definition
    )
    inputs: Callable[..., Inputs] | None = None  # where it runs on other inputs than the case's
    modules: tuple[str, ...] = ()  # must be importable
    install: str = ""  # how they are installed
    compiles: bool = False  # the first call at a shape compiles, by a C++ compiler

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        absent = [m for m in self.modules if importlib.util.find_spec(m) is None]
        if absent:
            return f"{', '.join(absent)} not installed: {self.install}"
        if self.compiles and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "clang++"])):
            return "torch.compile needs a C++ compiler"
        return ""


@dataclass(frozen=True)
class Floor:
    """Work that the result cannot do without; `prepare(inputs)` preallocates, returns the call."""

    name: str
    prepare: Callable[[Inputs], Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """An op on inputs of one kind and size against its contenders, its own kernel first."""

    op: str
    name: str
    about: str
    inputs: Callable[..., Inputs]  # inputs(seed, **sizes)
    sizes: dict[str, Any]
    quick: dict[str, Any]  # sizes for --quick and for warm-up before memory is measured
    contenders: tuple[Contender, ...]
    floor: Floor
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()  # inputs whose gradient is taken; none: forward alone
    gradients: tuple[float, ...] = (1.0, 0.37)
    rounds: int = 40
    isa: str = ""  # a fixed instruction-set level; empty: the highest, or --isa
    check_rows: int = 0  # compare so many results, evenly spaced, with float64; 0: all
    one_by_one: bool = False  # the truth is a sum over the pairs of two lists, taken one by one

    def truth(self) -> Callable[..., Any]:
        """The specification: kdkernels' eager backend, given float64 inputs."""
        return op_call(self.op, "eager")

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)


def op_call(op: str, backend: str) -> Callable[..., Any]:
    """kdkernels' op on a named backend, looked up when called: an op may not be there yet."""

    def call(**arguments: Any) -> Any:
        return getattr(kdkernels, op)(**arguments, backend=backend)

    return call


def own(op: str, name: str = OWN, inputs: Callable[..., Inputs] | None = None) -> Contender:
    """kdkernels' kernel as a contender."""
    return Contender(name, op_call(op, "native"), inputs=inputs)


def logits(
    seed: int, rows: int, classes: int, dtype: torch.dtype = torch.float32, spread: float = 0.0
) -> Inputs:
    """Student and teacher logits and labels: normal times 3, or uniform in +-spread."""
    g = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        values = torch.empty(rows, classes)
        if spread:
            return values.uniform_(-spread, spread, generator=g).to(dtype)
        return values.normal_(0, 3, generator=g).to(dtype)

    target = torch.randint(classes, (rows,), generator=g)
    return {"student": one(), "teacher": one(), "target": target}


def on_grid(x: Tensor) -> Tensor:
    """Rows of about unit norm with entries in multiples of 2^-11.

    Squared distances up to 4 are then exact in float32, whatever the order of the sums, so every
    correct way of mining selects the same rows and a gradient can be compared with the float64 one
    tightly.
    """
    unit = x / x.norm(dim=1, keepdim=True) * 0.99
    return (unit * 2048).round() / 2048


def persons(seed: int, count: int, pictures: int, features: int) -> Inputs:
    """Shuffled embeddings; squared distances about 1.6 inside a person, 2 between persons."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count).repeat_interleave(pictures)
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = torch.randn(count, features, generator=g)
    noise = torch.randn(len(labels), features, generator=g)
    return {"embeddings": on_grid(0.2**0.5 * centres[labels] + 0.8**0.5 * noise), "labels": labels}


def triplets(seed: int, rows: int, features: int) -> Inputs:
    """Anchors with a related positive and an unrelated negative: half of the hinges active."""
    g = torch.Generator().manual_seed(seed)
    anchor, noise, negative = (torch.randn(rows, features, generator=g) for _ in range(3))
    positive = 0.2 * anchor + 0.96**0.5 * noise
    return {name: on_grid(x) for name, x in
            [("anchor", anchor), ("positive", positive), ("negative", negative)]}  # fmt: skip


def feature_maps(seed: int, batch: int, shapes: list[tuple[int, int, int]]) -> Inputs:
    """Normal feature maps: (count, channels, side) for each stage of a network."""
    g = torch.Generator().manual_seed(seed)

    def maps() -> list[Tensor]:
        return [
            torch.randn(batch, channels, side, side, generator=g)
            for count, channels, side in shapes
            for _ in range(count)
        ]

    return {"students": maps(), "teachers": maps()}


def search(seed: int, queries: int, gallery: int, features: int) -> Inputs:
    """Unrelated query and gallery rows."""
    g = torch.Generator().manual_seed(seed)
    return {
        "queries": on_grid(torch.randn(queries, features, generator=g)),
        "gallery": on_grid(torch.randn(gallery, features, generator=g)),
    }


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


def as_list(value: Any) -> list[Tensor]:
    """A tensor or a list of tensors as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


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
    copies("student"),
    {"temperature": 3.0},
    ("student",),
    rounds=60,
)


def spread(seed: int, rows: int, classes: int) -> Inputs:
    return logits(seed, rows, classes, spread=64.0)


def in_bfloat16(seed: int, rows: int, classes: int) -> Inputs:
    return logits(seed, rows, classes, dtype=torch.bfloat16)


def batch_triplet(mining: str, rounds: int) -> Case:
    """One mining of batch_triplet_loss: 256 persons of 4 pictures."""
    if mining == "all":
        second = Contender("torch, masked", baselines.batch_triplet_loss_masked)
    else:
        second = Contender("torch, mined apart", baselines.batch_triplet_loss_mined_apart)
    library = Contender(
        "pytorch-metric-learning",
        baselines.batch_triplet_loss_metric_learning,
        truth=baselines.semihard_inside_margin if mining == "semihard" else None,
        modules=("pytorch_metric_learning", "tqdm", "sklearn"),
        install="pip install --no-deps pytorch-metric-learning tqdm; pip install scikit-learn",
    )
    return Case(
        "batch_triplet_loss",
        mining,
        f"{mining} triplets, N=1024, 4 pictures a person, D=512, float32",
        persons,
        {"count": 256, "pictures": 4, "features": 512},
        {"count": 8, "pictures": 4, "features": 16},
        (
            own("batch_triplet_loss"),
            Contender("torch", baselines.batch_triplet_loss),
            second,
            library,
        ),
        gram_gemms(2 if mining == "all" else 1),
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
        copies("anchor", "positive"),
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
        copies("students"),
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
        Floor("GEMM tiles", gemm_tiles),
        gradients=(),
        rounds=10,
        check_rows=500,
    ),
)


def find_cases(ops: list[str], names: list[str]) -> list[Case]:
    """The cases of the named ops and names (all without any); ValueError for an unknown one."""
    known_ops = sorted({c.op for c in CASES})
    known_names = sorted({c.name for c in CASES})
    for given, known, what in ((ops, known_ops, "op"), (names, known_names, "case")):
        for name in given:
            if name not in known:
                raise ValueError(f"bench: no {what} {name!r}; there are {', '.join(known)}")
    return [c for c in CASES if (not ops or c.op in ops) and (not names or c.name in names)]
