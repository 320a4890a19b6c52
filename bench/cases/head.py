"""The cases of linear_kd_cross_entropy on the CPU and on a GPU: features and a classifier's weight
in, the gradients of both out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.case import OWN, Case, Contender, Floor, Inputs, op_call
from bench.cases import baselines, libraries
from bench.cases.inputs import heads

OP = "linear_kd_cross_entropy"
BF16 = torch.bfloat16
PART = 128  # rows


def products(inputs: Inputs) -> Callable[[], None]:
    """The products that every implementation must do, each of all rows into an existing buffer:
    logits of each network, gradients of features and of weight."""
    x, w = inputs["features"].detach(), inputs["weight"].detach()
    teacher = inputs.get("teacher")
    logits = x.new_zeros(len(x), len(w))
    by_x, by_w = torch.zeros_like(x), torch.zeros_like(w)

    def run() -> None:
        torch.mm(x, w.t(), out=logits)
        if teacher is not None:
            torch.mm(teacher[0], teacher[1].t(), out=logits)
        torch.mm(logits, w, out=by_x)
        torch.mm(logits.t(), x, out=by_w)

    return run


def by_rows(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    teacher: list[Tensor] | None = None,
    *,
    temperature: float,
) -> Tensor:
    """The specification on some rows at a time, whose logits backward computes again: in float64
    each matrix of 1,024 x 360,232 is 3 GB, and autograd stores several."""

    def part(x: Tensor, y: Tensor, t: Tensor | None) -> Tensor:
        given = None if t is None or teacher is None else (t, *teacher[1:])
        options = {"teacher": given, "temperature": temperature, "reduction": "sum"}
        return op_call(OP, "eager")(features=x, weight=weight, target=y, **options)

    total = features.new_zeros(())
    for begin in range(0, len(features), PART):
        rows = slice(begin, begin + PART)
        t = None if teacher is None else teacher[0][rows]
        found = checkpoint(part, features[rows], target[rows], t, use_reentrant=False)
        assert isinstance(found, Tensor)
        total = total + found
    return total / len(features)


def operations(inputs: Inputs) -> tuple[float, str]:
    """The operations of these products."""
    number = 3 if inputs.get("teacher") is None else 4
    return 2.0 * number * inputs["features"].numel() * len(inputs["weight"]), "TFLOP/s"


def case(
    device: str, rows: int, classes: int, with_teacher: bool, dtype: torch.dtype, rounds: int
) -> Case:
    """One size, without a teacher or with one of the student's width."""
    name = f"{rows}x{classes}" + ("-teacher" if with_teacher else "")
    if with_teacher:
        plain, compiled = baselines.linear_kd, baselines.linear_kd_compiled
        others = (libraries.LIGER_HEAD_DISTILLATION,)
    else:
        plain, compiled = baselines.linear_cross_entropy, baselines.linear_cross_entropy_compiled
        others = (
            Contender("F.linear_cross_entropy", baselines.linear_cross_entropy_of_torch),
            Contender("F.linear_cross_entropy, chunked", baselines.linear_cross_entropy_chunked),
            libraries.LIGER_HEAD,
        )
        if not hasattr(torch.nn.functional, "linear_cross_entropy"):
            others = others[2:]
    if device == "cpu":
        others = tuple(c for c in others if not c.modules)  # Liger's kernels need a GPU
    sizes = {"rows": rows, "classes": classes, "features": 512}
    quick = {"rows": 5, "classes": 130, "features": 16}
    shared = {"with_teacher": with_teacher, "dtype": dtype}
    kind = "bfloat16" if dtype == BF16 else "float32"
    about = f"N={rows} C={classes:,} D=512, {kind}, {'tau=3' if with_teacher else 'no teacher'}"
    return Case(
        OP,
        name if device == "cpu" else f"{name}-bf16",
        about,
        heads,
        {**sizes, **shared},
        {**quick, **shared},
        (
            Contender(OWN[device], op_call(OP, "native" if device == "cpu" else None)),
            Contender("torch", plain),
            Contender("torch.compile", compiled, compiles=True),
            *others,
        ),
        (Floor("floor: GEMMs", products),),
        {"temperature": 3.0},
        ("features", "weight"),
        rounds=rounds,
        device=device,
        work=operations,
        in_parts=by_rows,
    )


SIZES = [(rows, classes) for classes in (10575, 93431, 360232) for rows in (256, 1024)]
CPU_CASES = tuple(
    case("cpu", rows, classes, with_teacher, torch.float32, 10 if classes < 50_000 else 5)
    for rows, classes in SIZES
    for with_teacher in (True, False)
)
CUDA_CASES = tuple(
    case("cuda", rows, classes, with_teacher, BF16, 30)
    for rows, classes in SIZES
    for with_teacher in (True, False)
)
