"""The kinds of runs that tables 1 to 5 of arXiv 1709.02929 are made of, whatever width and seed.

paper.py names them in its cells; reproduce.py makes stages of them. Nothing here trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "hidden": {"target.beta": 1.0},
    "soft": {"target.alpha": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of run: a recipe of the preset, its schedule, where it starts, and what is added."""

    name: str
    recipe: str
    schedule: str | None = None
    """Names phases in the preset's _tables.yaml, as classification.scratch; None: the recipe's."""
    start: str | None = None
    """Part whose last weights start the network; None: from scratch."""
    teacher: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    full_width: bool = False
    """A teacher: never divided, one a seed for all widths."""


def _classification() -> Iterator[Part]:
    scratch, initialised = "classification.scratch", "classification.initialised"
    both = "classification.both"
    yield Part(name="cls_teacher", recipe="cls_teacher", schedule=both, full_width=True)
    yield Part(name="cls_scratch", recipe="cls_student", schedule=scratch)
    yield Part(name="cls_control", recipe="cls_student", schedule=initialised, start="cls_scratch")

    def student(name: str, schedule: str, start: str | None, **settings: Any) -> Part:
        dotted = {f"target.{key}": value for key, value in settings.items()}
        return Part(
            name=name, recipe="cls_student", schedule=schedule, start=start,
            teacher="cls_teacher", settings=dotted,
        )  # fmt: skip

    yield student("cls_distilled", initialised, "cls_scratch", alpha=1.0)
    yield student("cls_distilled_tau2", initialised, "cls_scratch", alpha=1.0, tau_squared=True)
    yield student("cls_distilled_logits", initialised, "cls_scratch", logits=1.0)
    yield student("cls_soft", both, None, alpha=1.0)
    yield student("cls_soft_tau2", both, None, alpha=1.0, tau_squared=True)
    yield student("cls_hidden", both, None, beta=1.0)
    yield student("cls_logits", both, None, logits=1.0)
    yield student("cls_soft_alone", both, None, alpha=1.0, gamma=0.0)
    yield student("cls_hidden_alone", both, None, beta=1.0, gamma=0.0)
    yield student("cls_logits_alone", both, None, logits=1.0, gamma=0.0)
    yield Part(
        name="cls_hint", recipe="tables/cls_hint", schedule="classification.hint",
        teacher="cls_teacher",
    )  # fmt: skip
    yield student("cls_fitnet", "classification.fitnet", "cls_hint", alpha=1.0)


def _transferred(
    task: str, prefix: str, teacher: Part, settings: Mapping[str, Any]
) -> Iterator[Part]:
    """A task's teacher, the start of Pretrain, and six students: two starts x three targets."""
    yield teacher
    recipe = f"{teacher.recipe.removesuffix('_teacher')}_scratch"
    yield Part(
        name=f"{prefix}_scratch", recipe=recipe, schedule=f"{task}.scratch", settings=settings
    )
    starts = (
        ("pretrain", f"{prefix}_scratch"),
        ("distill", "cls_distilled"),
        ("plain", "cls_control"),
    )
    for start, weights in starts:
        # "plain" starts from the classification student without a teacher: the control of "distill"
        for target in ("none",) if start == "plain" else ("none", "hidden", "soft"):
            yield Part(
                name=f"{prefix}_{start}_{target}",
                recipe=recipe,
                schedule=f"{task}.initialised",
                start=weights,
                teacher=None if target == "none" else teacher.name,
                settings={**settings, **TARGETS[target]},
            )


def _alignment() -> Iterator[Part]:
    teacher = Part(
        name="ali_teacher", recipe="ali_teacher", schedule="alignment.initialised",
        start="cls_teacher", full_width=True,
    )  # fmt: skip
    yield from _transferred("alignment", "ali", teacher, {})


def _verification() -> Iterator[Part]:
    for loss, gamma in (("triplet", 0.0), ("joint", 1.0)):
        settings = {"target.gamma": gamma}
        teacher = Part(
            name=f"ver_{loss}_teacher", recipe="ver_teacher", schedule="verification.initialised",
            start="cls_teacher", settings=settings, full_width=True,
        )  # fmt: skip
        yield from _transferred("verification", f"ver_{loss}", teacher, settings)


PARTS: Mapping[str, Part] = {
    part.name: part for part in (*_classification(), *_alignment(), *_verification())
}
