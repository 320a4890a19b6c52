"""Any network of timm by its name (extra `timm`): pooled features and stage maps."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from kdtrain.models.backbones.base import Backbone, attention_map, embedding_layer

NEEDS_TIMM = 'model.name timm:... needs the timm extra: pip install ".[timm]"'
STAGES = 4  # the last ones, as many as the other networks have


class TimmNetwork(Backbone):
    """timm.create_model(name, num_classes=0), untrained; `embedding` adds a layer of that width.

    Images are scaled by the mean and deviation of the model's configuration; a network of a fixed
    input size (ViTs) is built for input_size. Raises ValueError without timm or such a model.
    """

    def __init__(self, name: str, *, embedding: int | None, input_size: int, color: str) -> None:
        super().__init__(color)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise ValueError(f"FaceNetwork: {NEEDS_TIMM} ({error})") from error
        if not timm.is_model(name):
            known = timm.list_models(f"*{name.split('_')[0]}*")
            raise ValueError(
                f"FaceNetwork: model.name timm:{name}: timm {timm.__version__} has no such model; "
                f"near it: {', '.join(known[:8]) or 'none, see timm.list_models()'}"
            )
        options: dict[str, Any] = {}
        if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
            options["img_size"] = input_size
        self.name = name
        self.network: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        scaling = self.network.pretrained_cfg
        for key in ("mean", "std"):
            values = 255 * torch.tensor(scaling[key]).reshape(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)
        channels = getattr(self.network, "head_hidden_size", None) or self.network.num_features
        self.embedding = embedding_layer(channels, embedding)
        self.width = channels if embedding is None else embedding
        stages = list(getattr(self.network, "feature_info", []))
        self.widths = [stage["num_chs"] for stage in stages][-STAGES:]

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.network(self._scaled(images)))

    def maps(self, images: Tensor, stage: int) -> Tensor:
        """Maps of one of the last four stages; later layers run too. Raises ValueError without."""
        return self._stages(images)[1][stage - 1]

    def attend(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        last, maps = self._stages(images)
        return self.embedding(self.network.forward_head(last)), tuple(map(attention_map, maps))

    def _stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last layer's output, and the stages' maps."""
        if not self.widths or not hasattr(self.network, "forward_intermediates"):
            raise ValueError(
                f"FaceNetwork: timm's {self.name} has no stage maps, which target.hint and "
                "target.attention compare; set these to 0, or take another model"
            )
        return self.network.forward_intermediates(
            self._scaled(images), indices=len(self.widths), output_fmt="NCHW"
        )

    def _scaled(self, images: Tensor) -> Tensor:
        mean, deviation = self.get_buffer("mean"), self.get_buffer("std")
        return (self._ordered(images) - mean) / deviation
