"""Several teachers as one: their softened predictions averaged, for the soft target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtrain.models.network import FaceNetwork, Outputs


def mixed_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Logits whose softened prediction is the weighted mean of the teachers': float32 (N, C)

        l = tau log sum_i w_i softmax(l_i / tau),    softmax(l / tau) = sum_i w_i softmax(l_i / tau)

    by logsumexp, so that no probability is rounded to 0. logits: (N, C) of each teacher; weights:
    more than 0, sum 1. At another temperature l softens to another prediction.
    """
    parts = [
        math.log(weight) + torch.log_softmax(own.float() / temperature, dim=1)
        for own, weight in zip(logits, weights, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(parts), dim=0)


class TeacherMixture(FaceNetwork):
    """Networks that tell the same identities apart, answering as one teacher: mixed_logits at one
    temperature, and the first one's feature. weights: more than 0, sum 1.

    Its other methods, backbone, classifier and width are the first network's, and no target with
    weight reads them (Config sees to it). Weights and temperature are part of its state, as an
    answer depends on them. Raises ValueError for networks of different identities.
    """

    def __init__(
        self, networks: Sequence[FaceNetwork], weights: Sequence[float], temperature: float
    ) -> None:
        nn.Module.__init__(self)
        classes = [network.num_classes for network in networks]
        if len(set(classes)) > 1:
            raise ValueError(
                f"teacher.more: the teachers tell {', '.join(map(str, classes))} identities apart; "
                "train all of them on the same identities"
            )
        first = networks[0]
        self.networks = nn.ModuleList(networks)
        self.backbone, self.classifier, self.regressor = first.backbone, first.classifier, None
        self.width, self.num_classes = first.width, first.num_classes
        self.weights, self.temperature = list(weights), temperature
        mixed_by = torch.tensor([*weights, temperature], dtype=torch.float64)
        self.register_buffer("mixed_by", mixed_by)
        self.arrange(channels_last=True)

    def forward(self, images: Tensor) -> Outputs:
        """Answer to raw images (N, 3, H, W) in [0, 255], without landmarks."""
        images = images.contiguous(memory_format=self._format)
        answers: list[Outputs] = [network(images) for network in self.networks]
        logits = [answer.logits for answer in answers if answer.logits is not None]
        mixed = mixed_logits(logits, self.weights, self.temperature)
        return Outputs(answers[0].hidden, mixed, None)
