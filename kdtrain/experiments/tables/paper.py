"""Tables 1 to 5 of arXiv 1709.02929 as printed: cells, the paper's numbers, and its claims.

Cells name kinds of runs (parts.py). "Scratch" of tables 1 and 2 is the student with the soft target
(the paper cites Hinton et al. there) at the end of its first learning rate; "Ours" starts from the
student of eq. 3 and goes on at the second rate. The drop of the rate alone gains more than any
target at small scale, so the same schedules without a teacher, and the soft target through both
rates, stand beside them as controls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kdtrain.reports.tables.data import RowKind

WIDTHS = (2, 4, 8)
FULL = 1  # the width of teachers
NARROWEST = 8  # the width of tables 1 and 3
LAST = -1  # the end of a run; 0 is the end of its first phase
SOURCE = "arXiv 1709.02929"
RAW, UNTRAINED = "raw pixels", "untrained network"
OTHER_VIDEO = "nn_top1_other_video"


@dataclass(frozen=True)
class At:
    """Where a number comes from: a kind of run, its width, the end of which phase."""

    part: str
    width: int
    paper: float | None = None
    """In percent."""
    phase: int = LAST


Place = At | None
"""None: the table has no such cell."""


@dataclass(frozen=True)
class Line:
    """A row: one place for each column of its block."""

    name: str
    kind: RowKind
    places: tuple[Place, ...]


@dataclass(frozen=True)
class BlockSpec:
    """Rows that share columns and a metric."""

    title: str
    columns: tuple[str, ...]
    metric: str
    lines: tuple[Line, ...]
    second: bool = False
    """On the second data source."""


@dataclass(frozen=True)
class Claim:
    """A trend as a comparison: `better` should beat `worse`, or equal it where `neutral`.

    Of several pairs, each one of `better` beside one of `worse`, the mean counts.
    """

    code: str
    text: str
    better: tuple[At, ...]
    worse: tuple[At, ...]
    metric: str
    neutral: bool = False
    second: bool = False


def claim(
    code: str, text: str, better: At, worse: At, metric: str, *, neutral: bool = False,
    second: bool = False,
) -> Claim:  # fmt: skip
    """A comparison of two cells."""
    return Claim(code, text, (better,), (worse,), metric, neutral, second)


def over_all(code: str, text: str, found: Sequence[Claim]) -> Claim:
    """The claims of several widths and starts as one."""
    better = tuple(at for one in found for at in one.better)
    worse = tuple(at for one in found for at in one.worse)
    first = found[0]
    return Claim(code, text, better, worse, first.metric, first.neutral, first.second)


@dataclass(frozen=True)
class TableSpec:
    """One table of the paper."""

    name: str
    title: str
    blocks: tuple[BlockSpec, ...]
    claims: tuple[Claim, ...]


def table1() -> TableSpec:
    """Targets from scratch, and initialisations with the soft target, of the narrowest student."""
    width = NARROWEST

    def at(part: str, paper: float | None = None, phase: int = LAST) -> At:
        return At(part, width, paper, phase)

    teacher = At("cls_teacher", FULL)
    targets = BlockSpec(
        f"targets, 1/{width} of the kernels, from scratch",
        ("softmax alone", "hidden", "logits", "soft", "soft x tau^2"),
        "top1",
        (
            Line("teacher", "teacher", (teacher, None, None, None, None)),
            Line(
                "first rate", "paper",
                (at("cls_scratch"), at("cls_hidden", 60.08, 0), at("cls_logits", 59.77, 0),
                 at("cls_soft", 61.27, 0), at("cls_soft_tau2", None, 0)),
            ),
            Line(
                "both rates", "control",
                (at("cls_control"), at("cls_hidden"), at("cls_logits"), at("cls_soft"),
                 at("cls_soft_tau2")),
            ),
            Line(
                "both rates, target without labels", "extra",
                (None, at("cls_hidden_alone"), at("cls_logits_alone"), at("cls_soft_alone"), None),
            ),
        ),
    )  # fmt: skip
    starts = BlockSpec(
        f"initialisations, 1/{width} of the kernels",
        ("scratch", "FitNet", "full (ours)"),
        "top1",
        (
            Line(
                "soft target", "paper",
                (at("cls_soft", 64.49, 0), at("cls_fitnet", 69.88), at("cls_distilled", 75.06)),
            ),
            Line("softmax alone, same rates", "control",
                 (at("cls_scratch"), None, at("cls_control"))),
            Line("soft target at both rates", "control", (at("cls_soft"), None, None)),
            Line("soft x tau^2", "extra",
                 (at("cls_soft_tau2", None, 0), None, at("cls_distilled_tau2"))),
            Line("logits", "extra",
                 (at("cls_logits", None, 0), None, at("cls_distilled_logits"))),
        ),
    )  # fmt: skip
    claims = [
        claim("T1", f"soft > hidden, {rates}", at("cls_soft", 61.27 if phase == 0 else None, phase),
              at("cls_hidden", 60.08 if phase == 0 else None, phase), "top1")
        for phase, rates in ((0, "first rate"), (LAST, "both rates"))
    ]  # fmt: skip
    claims += [
        claim("T1", f"hidden > logits, {rates}",
              at("cls_hidden", 60.08 if phase == 0 else None, phase),
              at("cls_logits", 59.77 if phase == 0 else None, phase), "top1")
        for phase, rates in ((0, "first rate"), (LAST, "both rates"))
    ]  # fmt: skip
    ours, fitnet = at("cls_distilled", 75.06), at("cls_fitnet", 69.88)
    claims += [
        claim("T2", "full initialisation > FitNet", ours, fitnet, "top1"),
        claim("T2", "FitNet > scratch", fitnet, at("cls_soft", 64.49, 0), "top1"),
        claim("T2", "full initialisation > scratch", ours, at("cls_soft", 64.49, 0), "top1"),
        claim("control", "full > softmax alone, same rates", ours,
              at("cls_control"), "top1"),
        claim("control", "full > soft target at both rates", ours,
              at("cls_soft"), "top1"),
        claim("control", "FitNet > soft target at both rates", fitnet, at("cls_soft"), "top1"),
    ]  # fmt: skip
    return TableSpec("table1", "targets and initialisations", (targets, starts), tuple(claims))


_TABLE2 = {
    # (second source, metric): teacher, Scratch at /2 /4 /8, Ours at /2 /4 /8
    (False, "top1"): (88.61, (82.25, 79.36, 66.12), (91.01, 87.21, 75.06)),
    (False, "pair_accuracy"): (97.67, (97.27, 96.7, 95.12), (98.2, 97.57, 96.18)),
    (True, "top1"): (90.53, (84.59, 81.94, 57.84), (88.38, 85.26, 70.98)),
    (True, "pair_accuracy"): (99.11, (98.61, 98.03, 96.33), (98.88, 98.18, 96.98)),
}


def table2(second: bool) -> TableSpec:
    """Three widths with both initialisations; on a second data source too, if `second`."""
    blocks, claims = [], []
    for (other, metric), (teacher, scratch, ours) in _TABLE2.items():
        if other and not second:
            continue
        words = "pair accuracy in ten folds" if metric == "pair_accuracy" else "top-1"

        def line(name: str, kind: RowKind, part: str, papers: Sequence[float | None] = (),
                 phase: int = LAST) -> Line:  # fmt: skip
            papers = papers or [None] * len(WIDTHS)
            pairs = zip(WIDTHS, papers, strict=True)
            return Line(name, kind, tuple(At(part, w, paper, phase) for w, paper in pairs))

        blocks.append(
            BlockSpec(
                f"{words}, {'second' if other else 'first'} data source",
                tuple(f"1/{w}" for w in WIDTHS),
                metric,
                (
                    Line("teacher", "teacher", (At("cls_teacher", FULL, teacher), None, None)),
                    line("Scratch (soft target, first rate)", "paper", "cls_soft", scratch, 0),
                    line("Ours (eq. 3, then eq. 4)", "paper", "cls_distilled", ours),
                    line("softmax alone, first rate", "control", "cls_scratch"),
                    line("softmax alone, same rates as Ours", "control", "cls_control"),
                    line("soft target at both rates", "control", "cls_soft"),
                ),
                other,
            )
        )
        if metric != "top1":
            continue
        where = ", second source" if other else ""
        mine = {w: At("cls_distilled", w, paper) for w, paper in zip(WIDTHS, ours, strict=True)}
        plain = {w: At("cls_soft", w, p, 0) for w, p in zip(WIDTHS, scratch, strict=True)}
        for wide, narrow in ((2, 4), (4, 8)):
            text = f"Ours: 1/{wide} > 1/{narrow}{where}"
            claims.append(claim("T3", text, mine[wide], mine[narrow], metric, second=other))
        for width in WIDTHS:
            text = f"1/{width}: Ours > Scratch{where}"
            claims.append(claim("T3", text, mine[width], plain[width], metric, second=other))
        for width in WIDTHS:
            for part, words in (
                ("cls_control", "softmax alone, same rates"),
                ("cls_soft", "soft target at both rates"),
            ):
                text = f"1/{width}: Ours > {words}{where}"
                control = At(part, width)
                claims.append(claim("control", text, mine[width], control, metric, second=other))
    return TableSpec("table2", "widths of the student", tuple(blocks), tuple(claims))


_STARTS = ("Pretrain", "Distill")
_TARGETS = ("none", "hidden", "soft")
_COLUMNS = ("no target", "hidden", "soft")


def _transferred(
    prefix: str, width: int, papers: Sequence[Sequence[float | None]]
) -> dict[tuple[str, str], At]:
    """The six students of a task by start and target."""
    return {
        (start, target): At(f"{prefix}_{start.lower()}_{target}", width, papers[i][j])
        for i, start in enumerate(_STARTS)
        for j, target in enumerate(_TARGETS)
    }


def _plain(prefix: str, width: int) -> At:
    """From the classification student that went the same way without a teacher."""
    return At(f"{prefix}_plain_none", width)


def _plain_line(prefix: str, width: int) -> Line:
    places = (_plain(prefix, width), None, None)
    return Line("Distill, but classification without a teacher", "control", places)


def _start_lines(cells: dict[tuple[str, str], At]) -> Iterator[Line]:
    for start in _STARTS:
        yield Line(start, "paper", tuple(cells[start, target] for target in _TARGETS))


def table3() -> TableSpec:
    """Alignment: two initialisations x three targets."""
    width = NARROWEST
    cells = _transferred("ali", width, ((3.36, 3.24, 3.60), (3.29, 3.21, 3.54)))
    scratch = Line(
        "the start of Pretrain itself", "control", (At("ali_scratch", width), None, None)
    )
    block = BlockSpec(
        f"alignment, 1/{width} of the kernels",
        _COLUMNS,
        "nrmse",
        (
            Line("teacher", "teacher", (At("ali_teacher", FULL, 3.02), None, None)),
            *_start_lines(cells),
            scratch,
            _plain_line("ali", width),
        ),
    )
    claims = []
    for start in _STARTS:
        none, hidden, soft = (cells[start, target] for target in _TARGETS)
        claims.append(claim("T4", f"{start}: the hidden target helps", hidden, none, "nrmse"))
        claims.append(claim("T4", f"{start}: the soft target hurts", none, soft, "nrmse"))
    for target in _TARGETS:
        better, worse = cells["Distill", target], cells["Pretrain", target]
        claims.append(
            claim("T4", f"Distill beats Pretrain, target {target}", better, worse, "nrmse")
        )
    text = "Distill beats the same start without a teacher"
    claims.append(claim("control", text, cells["Distill", "none"], _plain("ali", width), "nrmse"))
    return TableSpec("table3", "face alignment", (block,), tuple(claims))


_VERIFICATION = {
    "triplet": {
        2: ((63.98, 60.66, 66.50), (71.29, 68.74, 71.23)),
        4: ((61.74, 61.71, 62.64), (68.17, 66.74, 68.12)),
        8: ((51.03, 49.19, 51.76), (56.69, 53.99, 56.52)),
    },
    "joint": {
        2: ((72.38, 70.54, 73.62), (79.51, 77.63, 79.96)),
        4: ((66.64, 65.08, 68.24), (72.01, 70.31, 72.82)),
        8: ((51.86, 51.43, 53.45), (57.66, 56.87, 57.78)),
    },
}
_VERIFICATION_TEACHERS = {"triplet": 73.81, "joint": 74.16}


def _verification(loss: str, width: int) -> dict[tuple[str, str], At]:
    return _transferred(f"ver_{loss}", width, _VERIFICATION[loss][width])


def _verification_table(loss: str, name: str, title: str) -> TableSpec:
    blocks = []
    hidden_hurts: list[Claim] = []
    soft_claims: list[Claim] = []
    starts_claims: list[Claim] = []
    lifts: list[Claim] = []
    controls: list[Claim] = []
    for width in WIDTHS:
        cells = _verification(loss, width)
        plain = {key: At(at.part, at.width) for key, at in cells.items()}
        teacher = _VERIFICATION_TEACHERS[loss]
        start = Line("the start of Pretrain itself", "control",
                     (At(f"ver_{loss}_scratch", width), None, None))  # fmt: skip
        for metric, found, number in (("nn_top1", cells, teacher), (OTHER_VIDEO, plain, None)):
            words = "nearest neighbour"
            words += ", without mates from the same video" if metric == OTHER_VIDEO else ""
            guide = Line(
                "teacher", "teacher", (At(f"ver_{loss}_teacher", FULL, number), None, None)
            )
            lines = (guide, *_start_lines(found), start, _plain_line(f"ver_{loss}", width))
            blocks.append(BlockSpec(f"{words}, 1/{width}", _COLUMNS, metric, lines))
        for begin in _STARTS:
            none, hidden, soft = (cells[begin, target] for target in _TARGETS)
            where = f"1/{width} {begin}"
            hidden_hurts.append(
                claim("T5", f"{where}: the hidden target hurts", none, hidden, "nn_top1")
            )
            if loss == "triplet" and begin == "Distill":  # under Pretrain it gains in the paper too
                text = f"{where}: the soft target is neutral"
                soft_claims.append(claim("T5", text, soft, none, "nn_top1", neutral=True))
            elif loss == "joint":
                text = f"{where}: the soft target helps"
                soft_claims.append(claim("T5", text, soft, none, "nn_top1"))
        for target in _TARGETS:
            text = f"1/{width}: Distill beats Pretrain, target {target}"
            better, worse = cells["Distill", target], cells["Pretrain", target]
            starts_claims.append(claim("T5", text, better, worse, "nn_top1"))
        text = f"1/{width}: Distill beats the same start without a teacher"
        distilled = cells["Distill", "none"]
        controls.append(claim("control", text, distilled, _plain(f"ver_{loss}", width), "nn_top1"))
        if loss == "joint":
            alone = _verification("triplet", width)
            for begin in _STARTS:
                text = f"1/{width} {begin}: the joint softmax lifts"
                better, worse = cells[begin, "none"], alone[begin, "none"]
                lifts.append(claim("T5", text, better, worse, "nn_top1"))
    soft_text = "is neutral" if loss == "triplet" else "helps"
    kinds = (
        ("the hidden target hurts", hidden_hurts),
        (f"the soft target {soft_text}", soft_claims),
        ("Distill beats Pretrain", starts_claims),
        ("the joint softmax lifts", lifts),
    )
    every = [over_all("T5", f"over all: {text}", found) for text, found in kinds if found]
    each = [one for _, found in kinds for one in found]
    return TableSpec(name, title, tuple(blocks), (*every, *each, *controls))


def table_specs(second: bool = False) -> dict[str, TableSpec]:
    """Every table, by name; second: there is a second data source."""
    return {
        "table1": table1(),
        "table2": table2(second),
        "table3": table3(),
        "table4": _verification_table("triplet", "table4", "verification, triplet loss alone"),
        "table5": _verification_table("joint", "table5", "verification, triplet and softmax loss"),
    }
