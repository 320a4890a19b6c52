"""What the methods' papers claim of each other, fixed here before anything is run."""

from __future__ import annotations

from typing import NamedTuple


class Claim(NamedTuple):
    """One method does better than another, or at least as well."""

    code: str
    """The system that it is about, as design and docs number them."""
    better: str
    worse: str
    at_least: bool = False
    """Claimed is no more than "not worse": held within verdicts.MARGIN_POINTS."""

    @property
    def text(self) -> str:
        """'th_kd > soft'."""
        return f"{self.better} {'≥' if self.at_least else '>'} {self.worse}"


CLAIMS = (
    Claim("B1", "th_kd", "soft"),
    Claim("B2", "sh_kd", "soft"),
    Claim("E", "soft", "student"),
    Claim("D", "proxyless", "student"),
    Claim("F", "adadistill", "student"),
    Claim("C", "kt", "scratch"),
    Claim("C", "kd", "scratch"),
    Claim("C", "kt_kd", "kt", at_least=True),
    Claim("C", "kt_kd", "kd", at_least=True),
)

ITEMS = ("nn_top1", "nn_top1_other_video", "pair_accuracy")
"""Metrics by which a claim is judged: right or wrong for each picture, and for each pair."""
