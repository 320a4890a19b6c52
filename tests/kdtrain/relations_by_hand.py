"""RKD's two losses a pair and a triple at a time, as the paper states them."""

from __future__ import annotations

import itertools

import numpy as np


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) <= 1 else abs(x) - 0.5


def distance_by_hand(student: np.ndarray, teacher: np.ndarray) -> float:
    """Section 3.2.1, a pair at a time."""
    pairs = list(itertools.permutations(range(len(student)), 2))
    mu = [np.mean([np.linalg.norm(f[i] - f[j]) for i, j in pairs]) for f in (student, teacher)]
    terms = []
    for i, j in pairs:
        ours, theirs = (
            np.linalg.norm(f[i] - f[j]) / m for f, m in zip((student, teacher), mu, strict=True)
        )
        terms.append(huber(ours - theirs))
    return float(np.mean(terms))


def angle_by_hand(student: np.ndarray, teacher: np.ndarray) -> float:
    """Section 3.2.2, a triple at a time; a side without length has cosine 0."""

    def cosine(f: np.ndarray, i: int, j: int, k: int) -> float:
        one, other = f[i] - f[j], f[k] - f[j]
        lengths = np.linalg.norm(one) * np.linalg.norm(other)
        return float(one @ other / lengths) if lengths else 0.0

    triples = itertools.permutations(range(len(student)), 3)
    return float(np.mean([huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples]))
