"""Fused distillation losses for networks with very many identities, as PyTorch ops.

`python -m kdkernels` prints which backend each op has here, and why the rest is missing.
"""

from kdkernels.kd_cross_entropy.eager import KDTerms
from kdkernels.kd_cross_entropy.op import (
    CrossEntropyLoss,
    KDCrossEntropyLoss,
    kd_cross_entropy,
)
from kdkernels.library import backends, isa, isa_levels, set_isa

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "KDCrossEntropyLoss",
    "KDTerms",
    "backends",
    "isa",
    "isa_levels",
    "kd_cross_entropy",
    "set_isa",
]
