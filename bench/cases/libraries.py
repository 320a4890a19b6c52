"""Other libraries' implementations of a case, measured where they are installed.

cut-cross-entropy is not included: it leaves out small gradients, which no op of kdkernels does.
"""

from functools import cache

import torch
from torch import Tensor

import kdkernels
from bench.case import Contender
from bench.cases.baselines import label_masks, squared_distances


@cache
def metric_learning(margin: float, mining: str):
    """pytorch-metric-learning's TripletMarginLoss on squared distances with its miner for `mining`.

    Its semi-hard miner returns every negative inside the margin, not the nearest one:
    semihard_inside_margin is its truth.
    """
    from pytorch_metric_learning import (  # pyright: ignore[reportMissingImports]
        distances,
        losses,
        miners,
        reducers,
    )

    squared = distances.LpDistance(normalize_embeddings=False, p=2, power=2)
    loss = losses.TripletMarginLoss(margin=margin, distance=squared, reducer=reducers.MeanReducer())
    miner = {
        "hard": lambda: miners.BatchHardMiner(distance=squared),
        "semihard": lambda: miners.TripletMarginMiner(
            margin=margin, type_of_triplets="semihard", distance=squared
        ),
        "all": lambda: None,
    }[mining]()
    return loss, miner


def batch_triplet_loss_metric_learning(
    embeddings: Tensor, labels: Tensor, *, margin: float, mining: str
) -> Tensor:
    """The same loss by pytorch-metric-learning."""
    loss, miner = metric_learning(margin, mining)
    return loss(embeddings, labels, None if miner is None else miner(embeddings, labels))


def semihard_inside_margin(
    embeddings: Tensor, labels: Tensor, *, margin: float, mining: str
) -> Tensor:
    """The mean hinge over every triplet with d(a,p) < d(a,n) <= d(a,p) + margin."""
    assert mining == "semihard"
    positives, negatives = label_masks(labels)
    index = positives.nonzero()[:, 1].view(len(labels), -1)  # (N, K-1)
    distances = squared_distances(embeddings)
    gap = distances[:, None, :] - distances.gather(1, index)[:, :, None]  # (N, K-1, N)
    return (margin - gap[negatives[:, None, :] & (gap > 0) & (gap <= margin)]).mean()


def pytorch_metric_learning(mining: str, tolerance: float = 0.0) -> Contender:
    """pytorch-metric-learning with one kind of mining. It takes a root and squares it again, so of
    two rows at equal distances but for rounding it may select the other one."""
    return Contender(
        "pytorch-metric-learning",
        batch_triplet_loss_metric_learning,
        truth=semihard_inside_margin if mining == "semihard" else None,
        modules=("pytorch_metric_learning", "tqdm", "sklearn"),
        install="pip install --no-deps pytorch-metric-learning tqdm; pip install scikit-learn",
        tolerance=tolerance,
        waits=True,  # it reads the indices of its triplets on the host
    )


@cache
def liger():
    """Liger's cross entropy and its Kullback-Leibler divergence."""
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerCrossEntropyLoss,
        LigerKLDIVLoss,
    )

    return LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean")


def kd_cross_entropy_liger(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """Both of Liger's losses on logits, which have no temperature: softmax is torch's.

    The clone is needed because its cross entropy writes the gradient over its input.
    """
    cross_entropy, divergence = liger()
    log_probs = torch.log_softmax(student / temperature, dim=1)
    soft_target = torch.softmax(teacher / temperature, dim=1)
    return cross_entropy(student.clone(), target) + divergence(log_probs, soft_target)


def kd_with_divergence(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """The sum of Liger's two losses: kd_cross_entropy without the teacher's entropy, which has the
    same gradient."""
    loss, terms = kdkernels.kd_cross_entropy(
        student, teacher, target, temperature=temperature, return_terms=True, backend="eager"
    )
    return loss - terms.entropy


LIGER = Contender(
    "Liger, CE and KL",
    kd_cross_entropy_liger,
    truth=kd_with_divergence,
    modules=("liger_kernel",),
    install="pip install --no-deps liger-kernel",
    waits=True,  # it counts the rows and compares the incoming gradient on the host
)


@cache
def liger_heads(temperature: float):
    """Liger's linear cross entropy, and its chunked distillation with both terms at full weight;
    at beta 0 the soft one is the divergence from the teacher."""
    from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDLoss,
    )
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    distillation = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0, weight_soft_loss=1.0, beta=0.0, temperature=temperature
    )
    return LigerFusedLinearCrossEntropyLoss(), distillation


def linear_cross_entropy_liger(
    features: Tensor, weight: Tensor, target: Tensor, *, temperature: float
) -> Tensor:
    """Liger's linear cross entropy."""
    return liger_heads(temperature)[0](weight, features, target)


def linear_kd_liger(
    features: Tensor, weight: Tensor, target: Tensor, teacher: list[Tensor], *, temperature: float
) -> Tensor:
    """Liger's chunked distillation."""
    distillation = liger_heads(temperature)[1]
    return distillation(features, weight, teacher[0], teacher[1], target, None, None)


def linear_kd_with_divergence(
    features: Tensor, weight: Tensor, target: Tensor, teacher: list[Tensor], *, temperature: float
) -> Tensor:
    """linear_kd_cross_entropy without the teacher's entropy, which has the same gradient."""
    loss, terms = kdkernels.linear_kd_cross_entropy(
        *(features, weight, target),
        teacher=(teacher[0], teacher[1]),
        temperature=temperature,
        return_terms=True,
        backend="eager",
    )
    return loss - terms.entropy


LIGER_HEAD = Contender(
    "Liger, linear cross entropy",
    linear_cross_entropy_liger,
    modules=("liger_kernel",),
    install="pip install --no-deps liger-kernel",
    waits=True,  # as LIGER
)
LIGER_HEAD_DISTILLATION = Contender(
    "Liger, chunked distillation",
    linear_kd_liger,
    truth=linear_kd_with_divergence,
    modules=("liger_kernel",),
    install="pip install --no-deps liger-kernel",
    waits=True,  # it compiles chunk by chunk, and counts the rows on the host
)
