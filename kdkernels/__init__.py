"""Fused distillation losses for networks with very many identities, as PyTorch ops.

`python -m kdkernels` prints the backends of each op here, and the reasons for missing ones.
"""

from kdkernels.backends import backends, isa, isa_levels, set_isa
from kdkernels.batch_triplet_loss.op import BatchTripletLoss, batch_triplet_loss
from kdkernels.checks import validate
from kdkernels.hidden_l2.op import HiddenL2Loss, hidden_l2
from kdkernels.kd_cross_entropy.eager import KDTerms
from kdkernels.kd_cross_entropy.op import (
    CrossEntropyLoss,
    KDCrossEntropyLoss,
    kd_cross_entropy,
)
from kdkernels.linear_kd_cross_entropy.arguments import SparseTeacher
from kdkernels.linear_kd_cross_entropy.margins import (
    ArcFace,
    CombinedMargin,
    CosFace,
    adaface_margin,
)
from kdkernels.linear_kd_cross_entropy.op import (
    LinearKDCrossEntropyLoss,
    linear_kd_cross_entropy,
)
from kdkernels.linear_kd_cross_entropy.sampling import sample_classes
from kdkernels.native import empty_cache
from kdkernels.nearest_neighbor.eager import Nearest
from kdkernels.nearest_neighbor.op import nearest_neighbor
from kdkernels.registration import register_types
from kdkernels.triplet_loss.op import TripletLoss, TripletMarginLoss, triplet_loss

register_types(KDTerms, SparseTeacher, Nearest, ArcFace, CosFace, CombinedMargin)

__version__ = "0.1.0"

__all__ = [
    "ArcFace",
    "BatchTripletLoss",
    "CombinedMargin",
    "CosFace",
    "CrossEntropyLoss",
    "HiddenL2Loss",
    "KDCrossEntropyLoss",
    "KDTerms",
    "LinearKDCrossEntropyLoss",
    "Nearest",
    "SparseTeacher",
    "TripletLoss",
    "TripletMarginLoss",
    "adaface_margin",
    "backends",
    "batch_triplet_loss",
    "empty_cache",
    "hidden_l2",
    "isa",
    "isa_levels",
    "kd_cross_entropy",
    "linear_kd_cross_entropy",
    "nearest_neighbor",
    "sample_classes",
    "set_isa",
    "triplet_loss",
    "validate",
]
