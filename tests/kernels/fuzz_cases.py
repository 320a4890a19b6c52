"""Random calls of every op, each made from (seed, op, number) alone.

`draw(op, seed, number)` returns a Case: named tensors, options, the gradient that arrives, and the
tensors whose gradient is wanted. Shapes are small and often odd, so that a case is cheap; a few
cross the kernels' block of 2,048 classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import kdkernels

OPS = (
    "kd_cross_entropy",
    "linear_kd_cross_entropy",
    "triplet_loss",
    "batch_triplet_loss",
    "hidden_l2",
    "nearest_neighbor",
)
HALVES = (torch.bfloat16, torch.float16)
LARGEST_HALF = 6e4  # float16 ends at 65,504
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class Case:
    """One call. `wanted` names the tensors whose gradient is computed. `exact`: squared distances
    are exact in float32, so that equal ones tie in every arithmetic."""

    op: str
    seed: int
    number: int
    tensors: dict[str, Tensor]
    options: dict[str, object]
    wanted: tuple[str, ...]
    incoming: Tensor
    exact: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether the call is in float64, which only eager takes."""
        return any(t.dtype == torch.float64 for t in self.tensors.values())

    @property
    def repro(self) -> str:
        """The options of fuzz.py that run this case."""
        return f"--op {self.op} --seed {self.seed} --first {self.number} --cases 1"


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int, op: str, number: int) -> None:
        self.rng = np.random.default_rng([seed, OPS.index(op), number])
        kind = self.rng.random()
        self.dtypes: Sequence[torch.dtype]
        if kind < 0.5:
            self.dtypes = (torch.float32,)
        elif kind < 0.62:
            self.dtypes = (torch.bfloat16,)
        elif kind < 0.74:
            self.dtypes = (torch.float16,)
        elif kind < 0.95:
            self.dtypes = (torch.float32, *HALVES)
        else:
            self.dtypes = (torch.float64,)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def among(self, *choices: tuple[float, object]):
        """One of (share, choice), where the shares add up to 1; a callable choice is called."""
        at = self.rng.random()
        chosen = choices[-1][1]
        for share, choice in choices:
            at -= share
            if at < 0:
                chosen = choice
                break
        return chosen() if callable(chosen) else chosen

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def log_between(self, low: float, high: float) -> float:
        return float(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def dtype(self) -> torch.dtype:
        return self.dtypes[self.whole(0, len(self.dtypes) - 1)]

    def tensor(self, values: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """The values in a dtype and a layout: contiguous, offset, permuted, every other row or
        column of a larger tensor, or the first row expanded to all (which changes the values)."""
        dtype = dtype or self.dtype()
        if dtype == torch.float16:
            finite = np.isfinite(values)
            values = np.where(finite, values.clip(-LARGEST_HALF, LARGEST_HALF), values)
        t = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        kind = self.rng.random()
        if kind < 0.6 or t.dim() == 0 or t.numel() == 0:
            return t
        if kind < 0.7:
            before, after = self.whole(0, 3), self.whole(0, 3)
            room = torch.full((*t.shape[:-1], before + t.shape[-1] + after), 7.0).to(dtype)
            view = room[..., before : before + t.shape[-1]]
        elif kind < 0.8:
            axes = tuple(int(a) for a in self.rng.permutation(t.dim()))
            back = tuple(int(a) for a in np.argsort(axes))
            return t.permute(axes).contiguous().permute(back)
        elif kind < 0.88:
            view = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0).to(dtype)[..., ::2]
        elif kind < 0.96:
            view = torch.full((2 * t.shape[0], *t.shape[1:]), 7.0).to(dtype)[::2]
        else:
            return t[:1].expand(t.shape)
        return view.copy_(t)

    def integers(self, values: np.ndarray) -> Tensor:
        """The values as int32 or int64, in a layout."""
        return self.tensor(values, torch.int32 if self.chance(0.3) else torch.int64)

    def incoming(self, shape: tuple[int, ...]) -> Tensor:
        """The gradient that arrives at the loss: 1 or another number; per row where it has rows."""
        dtype = torch.float64 if self.dtypes == (torch.float64,) else torch.float32
        number = self.among(
            (0.4, 1.0), (0.25, lambda: self.between(-2, 2)), (0.1, 65536.0), (0.05, 0.0),
            (0.1, 2.0**-10), (0.1, lambda: self.log_between(1e-6, 1e6)),
        )  # fmt: skip
        if shape and self.chance(0.8):
            return self.tensor(number * self.rng.uniform(-1.5, 2.0, shape), dtype)
        return torch.full((), number, dtype=dtype).expand(shape)

    def wanted(self, *names: str) -> tuple[str, ...]:
        """The names whose gradient is computed: mostly all, sometimes some or none."""
        if self.chance(0.75):
            return names
        return tuple(name for name in names if self.chance(0.6))


def _rows(draw: Draw, most: int = 9) -> int:
    return draw.among((0.02, 0), (0.18, 1), (0.8, lambda: draw.whole(2, most)))


def _logits(draw: Draw, rows: int, classes: int) -> np.ndarray:
    """Normal numbers of a random size; ties; an offset; masked classes; rows with NaN or inf."""
    spread = draw.among(
        (0.55, lambda: draw.between(0.5, 4)), (0.1, 0.01), (0.15, 12.0), (0.08, 64.0),
        (0.04, 1e3), (0.04, 1e4), (0.04, 0.0),
    )  # fmt: skip
    found = draw.rng.standard_normal((rows, classes)) * spread
    if draw.chance(0.12):
        found = np.round(found)  # ties, at the maximum too
    if draw.chance(0.06):
        found += draw.among((0.5, 100.0), (0.5, -3000.0))
    if rows and draw.chance(0.06):
        found[draw.rng.random((rows, classes)) < draw.between(0, 0.9)] = -INF
    if rows and draw.chance(0.03):
        row, at = draw.whole(0, rows - 1), draw.whole(0, classes - 1)
        bad = draw.among((0.4, NAN), (0.3, INF), (0.3, -INF))
        found[row, slice(None) if bad == -INF else at] = bad
    return found


def _row_options(draw: Draw) -> dict[str, object]:
    """Options that both cross-entropy ops take."""
    options: dict[str, object] = {
        "temperature": draw.among(
            (0.5, lambda: float(draw.whole(1, 4))), (0.38, lambda: draw.between(0.5, 10)),
            (0.09, lambda: draw.log_between(1e-2, 1e2)),
            (0.03, lambda: draw.log_between(1e-6, 1e6)),
        ),
        "alpha": draw.among(
            (0.07, 0.0), (0.4, 1.0), (0.43, lambda: draw.between(0, 3)),
            (0.05, lambda: draw.between(-2, 0)), (0.05, lambda: draw.log_between(1e-3, 1e3)),
        ),
        "tau_squared": draw.chance(0.3),
        "label_smoothing": draw.among(
            (0.6, 0.0), (0.2, 0.1), (0.18, lambda: draw.between(0, 1)), (0.02, 1.0)
        ),
        "reduction": draw.among((0.45, "mean"), (0.2, "sum"), (0.35, "none")),
        "return_terms": draw.chance(0.6),
    }  # fmt: skip
    return options


def _labels(
    draw: Draw, labels: np.ndarray, tensors: dict, options: dict, ignored_value: int
) -> None:
    """target and ignore_index: the labels, some rows ignored."""
    share = draw.among((0.6, 0.0), (0.3, 0.3), (0.1, 1.0))
    labels[draw.rng.random(len(labels)) < share] = ignored_value
    options["ignore_index"] = ignored_value
    tensors["target"] = draw.integers(labels)


def _loss_shape(options: dict, rows: int) -> tuple[int, ...]:
    return (rows,) if options["reduction"] == "none" else ()


def _kd_cross_entropy(draw: Draw) -> tuple:
    rows = _rows(draw)
    classes = draw.among(
        (0.04, 1), (0.06, 2), (0.7, lambda: draw.whole(3, 40)), (0.17, lambda: draw.whole(41, 300)),
        (0.02, lambda: draw.whole(2040, 2060)), (0.01, lambda: draw.whole(4090, 5000)),
    )  # fmt: skip
    options = _row_options(draw)
    tensors = {"student": draw.tensor(_logits(draw, rows, classes))}
    use = draw.among((0.75, "both"), (0.12, "teacher"), (0.13, "target"))
    if use != "target":
        same = draw.chance(0.05)
        values = tensors["student"].double().numpy() if same else _logits(draw, rows, classes)
        tensors["teacher"] = draw.tensor(values)
    if use != "teacher":
        ignored = draw.among((0.7, -100), (0.15, -1), (0.15, lambda: draw.whole(0, classes - 1)))
        _labels(draw, draw.rng.integers(0, classes, rows), tensors, options, ignored)
    return tensors, options, draw.wanted("student"), draw.incoming(_loss_shape(options, rows))


def _head(
    draw: Draw, rows: int, classes: int, is_normalized: bool, near: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features and weight. Without normalization logits of ordinary size; with it rows of any norm,
    some zero, some at a small angle to the weight of class `near`, (N,), or to its opposite."""
    depth = draw.among(
        (0.08, 1), (0.7, lambda: draw.whole(2, 20)), (0.22, lambda: draw.whole(21, 80))
    )
    x, w = draw.rng.standard_normal((rows, depth)), draw.rng.standard_normal((classes, depth))
    size = draw.among((0.8, lambda: draw.between(0.3, 3)), (0.2, 10.0))
    if not is_normalized:
        return x * size, w / math.sqrt(depth)
    if draw.chance(0.2):
        size = draw.log_between(1e-30, 1e25)
    if draw.chance(0.1) and rows:
        x[draw.whole(0, rows - 1)] = 0.0
    if draw.chance(0.06):
        w[draw.whole(0, classes - 1)] = 0.0
    if near is not None and draw.chance(0.25):
        noise = draw.among((0.3, 0.0), (0.7, lambda: draw.log_between(1e-6, 0.1)))
        some = draw.rng.random(rows) < 0.5
        x[some] = (w[near] * draw.among((0.7, 2.0), (0.3, -1.0)) + noise * x)[some]
    return x * size, w * draw.among((0.7, 1.0), (0.3, lambda: draw.log_between(1e-3, 1e3)))


def _sparse_teacher(draw: Draw, rows: int, classes: int, tensors: dict) -> None:
    k = draw.among((0.2, 1), (0.7, lambda: draw.whole(1, min(classes, 8))), (0.1, classes))
    indices = np.argsort(draw.rng.random((rows, classes)), axis=1)[:, :k]
    logits = draw.rng.standard_normal((rows, classes)) * draw.among((0.7, 2.0), (0.3, 10.0))
    if draw.chance(0.05):
        logits[draw.rng.random((rows, classes)) < 0.3] = -INF
        logits[:, 0] = 0.0
    largest = logits.max(axis=1, keepdims=True) if rows else logits[:, :1]
    total = np.log(np.exp(logits - largest).sum(axis=1, keepdims=True)) + largest
    log_probs = np.take_along_axis(logits - total, indices, axis=1)
    tensors["indices"] = draw.integers(indices)
    # float16 and bfloat16 round up too: a sum of probabilities above 1 is rejected
    tensors["log_probs"] = draw.tensor(log_probs * (1 + 2.0**-7))


def _margin(draw: Draw, rows: int, tensors: dict, options: dict) -> None:
    for name, low, high in (("m2", -0.4, 0.7), ("m3", -0.2, 0.5)):
        if draw.chance(0.3):
            continue
        if draw.chance(0.3):
            tensors[name] = draw.tensor(draw.rng.uniform(low, high, rows))
        else:
            options[name] = draw.among(
                (0.75, lambda low=low, high=high: draw.between(low, high)), (0.1, 0.0),
                (0.15, lambda: draw.between(-math.pi, math.pi)),
            )  # fmt: skip
    options["margin_grad"] = draw.among((0.7, "exact"), (0.3, "straight_through"))


def _linear_kd_cross_entropy(draw: Draw) -> tuple:
    rows = _rows(draw)
    classes = draw.among(
        (0.03, 1), (0.8, lambda: draw.whole(2, 40)), (0.17, lambda: draw.whole(41, 150))
    )
    options = _row_options(draw)
    is_normalized = options["normalize"] = draw.chance(0.5)
    chosen: Sequence[int] = range(classes)
    kind = draw.among((0.2, None), (0.2, "logits"), (0.35, "head"), (0.25, "sparse"))
    if kind != "sparse" and draw.chance(0.2):
        chosen = sorted(int(c) for c in draw.rng.permutation(classes)[: draw.whole(1, classes)])
    labels = np.asarray(chosen, dtype=np.int64)[draw.rng.integers(0, len(chosen), rows)]
    features, weight = _head(draw, rows, classes, is_normalized, labels)
    if rows and draw.chance(0.01):
        features[draw.whole(0, rows - 1), 0] = NAN
    tensors = {"features": draw.tensor(features), "weight": draw.tensor(weight)}
    if is_normalized:
        options["scale"] = draw.among((0.6, lambda: draw.between(1, 64)), (0.4, 1.0))
    elif draw.chance(0.5):
        tensors["bias"] = draw.tensor(draw.rng.standard_normal(classes))
    has_target = kind is None or draw.chance(0.85)
    if kind == "logits":
        tensors["teacher"] = draw.tensor(
            draw.rng.standard_normal((rows, classes)) * draw.between(0.5, 8)
        )
    elif kind == "head":
        features, weight = _head(draw, rows, classes, is_normalized)
        tensors["teacher_features"] = draw.tensor(features)
        tensors["teacher_weight"] = draw.tensor(weight)
        if not is_normalized and draw.chance(0.4):
            tensors["teacher_bias"] = draw.tensor(draw.rng.standard_normal(classes))
        if is_normalized and draw.chance(0.3):
            options["teacher_scale"] = draw.between(1, 64)
    elif kind == "sparse":
        _sparse_teacher(draw, rows, classes, tensors)
    if len(chosen) < classes:
        found = draw.integers(np.asarray(chosen, dtype=np.int64))
        # an expanded layout would repeat a class
        tensors["classes"] = found if 0 not in found.stride() else torch.tensor(chosen)
    if has_target:
        _labels(draw, labels, tensors, options, draw.among((0.8, -100), (0.2, classes - 1)))
        if is_normalized and draw.chance(0.6):
            _margin(draw, rows, tensors, options)
    wanted = draw.wanted("features", "weight", *(("bias",) if "bias" in tensors else ()))
    return tensors, options, wanted, draw.incoming(_loss_shape(options, rows))


def _points(draw: Draw, rows: int, depth: int, is_exact: bool) -> np.ndarray:
    """Points on a grid of eighths, or normal ones of a random size and distance from the origin."""
    if is_exact:
        reach = draw.among((0.5, 2), (0.5, 32))
        return draw.rng.integers(-reach, reach + 1, (rows, depth)) / 8.0
    found = draw.rng.standard_normal((rows, depth))
    if draw.chance(0.5):
        found /= np.sqrt((found * found).sum(axis=1, keepdims=True)) + 1e-9
    found *= draw.among((0.75, 1.0), (0.15, lambda: draw.log_between(1e-35, 1e15)), (0.1, 30.0))
    if draw.chance(0.12):
        found += draw.rng.standard_normal(depth) * draw.among((0.5, 10.0), (0.5, 1000.0))
    if rows > 1 and draw.chance(0.3):  # rows that are the same
        found[draw.rng.integers(0, rows, rows // 2)] = found[draw.whole(0, rows - 1)]
    return found


def _depth(draw: Draw, most: int = 32) -> int:
    return draw.among(
        (0.1, 1), (0.7, lambda: draw.whole(2, 20)), (0.2, lambda: draw.whole(17, most))
    )


def _margin_of_hinge(draw: Draw, is_exact: bool) -> float:
    if is_exact and draw.chance(0.7):
        return draw.whole(-8, 16) / 8.0  # hinges of exactly 0
    return draw.among((0.6, 0.4), (0.1, 0.0), (0.25, lambda: draw.between(-1, 3)), (0.05, 100.0))


def _triplet_loss(draw: Draw) -> tuple:
    rows, depth, is_exact = _rows(draw), _depth(draw, 70), draw.chance(0.25)
    names = ("anchor", "positive", "negative")
    everything = _points(draw, 3 * rows, depth, is_exact).reshape(3, rows, depth)
    tensors = {name: draw.tensor(part) for name, part in zip(names, everything, strict=True)}
    if rows and not is_exact and draw.chance(0.02):
        tensors["positive"] = tensors["positive"].clone()
        tensors["positive"][draw.whole(0, rows - 1), 0] = NAN
    options = {
        "margin": _margin_of_hinge(draw, is_exact),
        "squared": draw.chance(0.6),
        "reduction": draw.among((0.4, "mean"), (0.25, "sum"), (0.35, "none")),
    }
    incoming = draw.incoming(_loss_shape(options, rows))
    return tensors, options, draw.wanted(*names), incoming, is_exact


def _batch_triplet_loss(draw: Draw) -> tuple:
    rows = draw.among(
        (0.02, 0), (0.05, 1), (0.85, lambda: draw.whole(2, 16)), (0.08, lambda: draw.whole(17, 40))
    )
    depth, is_exact = _depth(draw), draw.chance(0.3)
    identities = draw.among(
        (0.7, lambda: draw.whole(1, 1 + rows // 2)), (0.2, 1), (0.1, lambda: 1 + rows)
    )
    tensors = {
        "embeddings": draw.tensor(_points(draw, rows, depth, is_exact)),
        "labels": draw.integers(
            draw.rng.integers(0, identities, rows) * draw.among((0.8, 1), (0.2, 1000)) - 2
        ),
    }
    options = {
        "margin": _margin_of_hinge(draw, is_exact),
        "mining": draw.among((0.34, "hard"), (0.33, "semihard"), (0.33, "all")),
        "squared": draw.chance(0.6),
        "reduction": draw.among((0.3, "mean"), (0.2, "nonzero"), (0.2, "sum"), (0.3, "none")),
    }
    incoming = draw.incoming(_loss_shape(options, rows))
    return tensors, options, draw.wanted("embeddings"), incoming, is_exact


def _hidden_l2(draw: Draw) -> tuple:
    pairs = draw.whole(1, 4)
    tensors, names = {}, []
    for i in range(pairs):
        dims = draw.among((0.04, 0), (0.16, 1), (0.3, 2), (0.15, 3), (0.35, 4))
        shape = tuple(
            draw.among((0.03, 0), (0.12, 1), (0.85, lambda: draw.whole(2, 7))) for _ in range(dims)
        )
        if draw.chance(0.03):
            shape = (2, draw.whole(2000, 2100))
        size = draw.among((0.75, 1.0), (0.15, lambda: draw.log_between(1e-25, 1e12)), (0.1, 0.05))
        student = draw.rng.standard_normal(shape) * size
        near = draw.chance(0.2)
        teacher = student + draw.rng.standard_normal(shape) * size * (0.01 if near else 1.0)
        tensors[f"student{i}"] = draw.tensor(np.asarray(student))
        tensors[f"teacher{i}"] = draw.tensor(np.asarray(teacher))
        names.append(f"student{i}")
    options: dict[str, object] = {
        "reduction": draw.among((0.4, "batchmean"), (0.3, "mean"), (0.3, "sum")),
        "return_terms": draw.chance(0.5),
    }
    weights = [
        draw.among((0.1, 0.0), (0.8, lambda: draw.between(-1, 4)), (0.1, 1e-3))
        for _ in range(pairs)
    ]
    for i, weight in enumerate(weights):  # where the weight is 0, no result is NaN
        if weight == 0 and draw.chance(0.2):
            tensors[f"teacher{i}"] = tensors[f"teacher{i}"] * NAN
    kind = draw.among((0.4, None), (0.3, "numbers"), (0.3, "tensor"))
    if kind == "tensor":
        tensors["weights"] = draw.tensor(np.asarray(weights), torch.float32)
    elif kind == "numbers":
        options["weights"] = weights
    return tensors, options, draw.wanted(*names), draw.incoming(())


def _nearest_neighbor(draw: Draw) -> tuple:
    is_exact, depth = draw.chance(0.4), _depth(draw, 70)
    alone = draw.chance(0.4)
    rows = draw.whole(2, 20) if alone else _rows(draw, 14)
    count = draw.among(
        (0.1, 1), (0.75, lambda: draw.whole(2, 40)), (0.15, lambda: draw.whole(41, 150))
    )
    points = _points(draw, rows + count, depth, is_exact)
    tensors = {"queries": draw.tensor(points[:rows])}
    if not alone:
        tensors["gallery"] = draw.tensor(points[rows:])
    return tensors, {}, (), torch.ones(()), is_exact


_DRAWS: dict[str, Callable[[Draw], tuple]] = {
    "kd_cross_entropy": _kd_cross_entropy,
    "linear_kd_cross_entropy": _linear_kd_cross_entropy,
    "triplet_loss": _triplet_loss,
    "batch_triplet_loss": _batch_triplet_loss,
    "hidden_l2": _hidden_l2,
    "nearest_neighbor": _nearest_neighbor,
}


def draw(op: str, seed: int, number: int) -> Case:
    """The case of that number."""
    return Case(op, seed, number, *_DRAWS[op](Draw(seed, op, number)))


def arguments(case: Case, tensors: dict[str, Tensor]) -> dict[str, object]:
    """The arguments of the op's public function, from the case's named tensors."""
    options, t = dict(case.options), dict(tensors)
    if case.op == "kd_cross_entropy":
        return {"teacher": None, "target": None, **t, **options}
    if case.op == "nearest_neighbor":
        return t
    if case.op == "hidden_l2":
        found: dict[str, object] = {
            f"{who}s": [value for name, value in t.items() if name.startswith(who)]
            for who in ("student", "teacher")
        }
        if "weights" in t:
            options["weights"] = t["weights"]
        return {**found, **options}
    if case.op == "linear_kd_cross_entropy":
        if "indices" in t:
            t["teacher"] = kdkernels.SparseTeacher(t.pop("indices"), t.pop("log_probs"))
        head = [t.pop(f"teacher_{part}", None) for part in ("features", "weight", "bias")]
        if head[0] is not None:
            t["teacher"] = tuple(part for part in head if part is not None)
        m2 = t.pop("m2", options.pop("m2", None))
        m3 = t.pop("m3", options.pop("m3", None))
        if m2 is not None and m3 is not None:
            options["margin"] = kdkernels.CombinedMargin(m2, m3)
        elif m2 is not None:
            options["margin"] = kdkernels.ArcFace(m2)
        elif m3 is not None:
            options["margin"] = kdkernels.CosFace(m3)
        return {"target": None, **t, **options}
    return {**t, **options}
