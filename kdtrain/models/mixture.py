"""Several teachers as one: the mean of their softened predictions, for the soft target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdtrain.models.network import FaceNetwork, Outputs


def mixed_logits(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Returns float32 logits (N, C) whose softened prediction is the weighted mean of the
    teachers':

        l = tau log sum_i w_i softmax(l_i / tau),    softmax(l / tau) = sum_i w_i softmax(l_i / tau)

    By logsumexp, so that no probability is rounded to 0; for this temperature alone. logits: (N, C)
    of each teacher. weights: positive, sum 1.
    """
    parts = [
        math.log(weight) + torch.log_softmax(own.float() / temperature, dim=1)
        for own, weight in zip(logits, weights, strict=True)
    ]
    return temperature * torch.logsumexp(torch.stack(parts), dim=0)


class TeacherMixture(FaceNetwork):
    """Networks of the same identities as one teacher: mixed_logits at one temperature, and the
    first one's feature. weights: positive, sum 1.

    Other methods, backbone, classifier and width are the first network's; Config rejects targets
    that read them. Weights and temperature are in its state, as outputs depend on them. Raises
    ValueError for networks of different identities.
    """

    def __init__(
        self, networks: Sequence[FaceNetwork], weights: Sequence[float], temperature: float
    ) -> None:
        nn.Module.__init__(self)
        classes = [network.num_classes for network in networks]
        if len(set(classes)) > 1:
            raise ValueError(
                f"teacher.more: the teachers have {', '.join(map(str, classes))} identities; train "
                "all of them on the same ones"
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
        """Outputs of raw images (N, 3, H, W) in [0, 255], without landmarks."""
        images = images.contiguous(memory_format=self._format)
        outputs: list[Outputs] = [network(images) for network in self.networks]
        logits = [one.logits for one in outputs if one.logits is not None]
        mixed = mixed_logits(logits, self.weights, self.temperature)
        return Outputs(outputs[0].hidden, mixed, None)
