"""The face network: a backbone (models/backbones) with a classifier and a landmark head.

The paper's teacher is ResNet-50; a student has the same depth and 1/2, 1/4 or 1/8 of the kernels of
every layer ("Model Distillation with Knowledge Transfer", arXiv 1709.02929, section 5.1).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kdtrain.config import ConfigError, HeadConfig, ModelConfig, TrainConfig
from kdtrain.models.backbones import build_backbone
from kdtrain.models.backbones.base import Backbone

NUM_POINTS = 5
INPUT_SIZE = 112  # pixels, of published face networks
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Outputs(NamedTuple):
    """Outputs of a forward pass: N images, C classes, K features."""

    hidden: Tensor
    """(N, K) the backbone's feature, not normalised: pooled maps (the paper's hidden layer K), or
    the embedding if the network has one.
    """
    logits: Tensor | None  # (N, C) classifier(hidden), or None
    points: Tensor | None
    """(N, 10) landmarks as (x / W - 0.5, y / H - 0.5), point after point; None without the head."""
    attention: tuple[Tensor, ...] = ()
    """(N, h, w) of each stage, from `attend`; see backbones.base.attention_map."""


class CosineClassifier(nn.Module):
    """Class scores scale * cos(feature, weight_c); weight (C, K), no bias.

    A feature or weight of zeros has cosine 0.
    """

    def __init__(self, width: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.bias = None
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        nn.init.normal_(self.weight, std=0.01)

    def extra_repr(self) -> str:
        """The scale, which is no weight but changes the outputs (teacher_cache.owner_of)."""
        return f"scale={self.scale}"

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, K) -> (N, C) scores."""
        return self.scale * F.linear(F.normalize(hidden, dim=1), F.normalize(self.weight, dim=1))


class FaceNetwork(nn.Module):
    """The backbone of `model`, a classifier and, with `landmarks`, a head for 5 points.

    num_classes: C; 0 with a cosine head, for published weights without a classifier. Both heads
    read the same feature, so that an alignment network has a soft target. head: its kind and scale;
    None is a linear classifier with bias. input_size: side of the images that face networks are
    built for (resnet takes any). Weights depend on torch's seed alone; `landmarks` does not change
    those of backbone and classifier. Raises ValueError for a network that cannot be built.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_classes: int,
        landmarks: bool = False,
        *,
        head: HeadConfig | None = None,
        input_size: int = INPUT_SIZE,
    ) -> None:
        super().__init__()
        cosine = head is not None and head.kind == "cosine"
        if num_classes < (0 if cosine else 1):
            raise ValueError(
                "FaceNetwork: num_classes must be at least 1 (0 with a cosine head), got "
                f"{num_classes}"
            )
        self.backbone: Backbone = build_backbone(model, input_size)
        self.width = self.backbone.width
        self.num_classes = num_classes
        self.classifier: nn.Linear | CosineClassifier
        if head is not None and cosine:
            self.classifier = CosineClassifier(self.width, num_classes, head.scale)
        else:
            self.classifier = nn.Linear(self.width, num_classes)
        self.regressor = nn.Linear(self.width, 2 * NUM_POINTS) if landmarks else None
        self.arrange(channels_last=True)

    def arrange(self, *, channels_last: bool) -> None:
        """Sets the layout of weights and maps: torch.channels_last, or contiguous.

        A training step on a CPU takes 1.1 (224 pixels) to 1.4 times as long in the contiguous
        layout, which is used where channels_last would corrupt memory (`needs_contiguous`).
        """
        self.channels_last = channels_last and not needs_contiguous(self)
        self._format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.to(memory_format=self._format)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> Outputs:
        """Feature, logits and landmarks of raw images (N, 3, H, W) in [0, 255]."""
        return self._heads(self.backbone(images.contiguous(memory_format=self._format)))

    def embed(self, images: Tensor) -> Outputs:
        """The outputs of `forward` without logits."""
        hidden = self.backbone(images.contiguous(memory_format=self._format))
        return self._heads(hidden, scores=False)

    def tap(self, images: Tensor, stage: int) -> Tensor:
        """Maps (N, C, h, w) of stage 1 to 4; see Backbone.maps."""
        return self.backbone.maps(images.contiguous(memory_format=self._format), stage)

    def attend(self, images: Tensor) -> Outputs:
        """The outputs of `forward`, and the attention_map of every stage."""
        images = images.contiguous(memory_format=self._format)
        hidden, attention = self.backbone.attend(images)
        return self._heads(hidden)._replace(attention=attention)

    def _heads(self, hidden: Tensor, scores: bool = True) -> Outputs:
        points = None if self.regressor is None else self.regressor(hidden)
        return Outputs(hidden, self.classifier(hidden) if scores else None, points)


class Passes:
    """Training passes of networks under train.precision (torch.autocast, float32 weights) and
    train.compile. Losses stay outside; evaluation runs in float32.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._dtype = DTYPES.get(train.precision)
        self._compile = train.compile
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, run: Callable[..., Any], images: Tensor, *options: Any) -> Any:
        """run(images, *options); run: a network, or one of its methods.

        Raises ConfigError where train.compile fails.
        """
        # a context per call: its cached casts were made with or without gradient
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype is not None):
            if not self._compile:
                return run(images, *options)
            from torch._dynamo.exc import TorchDynamoException

            try:
                if run not in self._compiled:
                    # static shapes: dynamic kernels would depend on the order of shapes, which
                    # differs in a resumed run
                    self._compiled[run] = torch.compile(run, dynamic=False)
                return self._compiled[run](images, *options)
            except TorchDynamoException as error:
                reason = " ".join(str(error).split("\n\n")[0].split())
                raise ConfigError(
                    f"train.compile: torch.compile cannot compile the network here ({reason}); on "
                    "a processor it needs a C++ compiler, on a GPU Triton. Install it, or set "
                    "train.compile to false"
                ) from error


def needs_contiguous(network: nn.Module) -> bool:
    """True if training `network` in channels_last would corrupt this process' memory.

    torch 2.13's oneDNN, limited to AVX2, writes past its buffer in the weight gradient of a
    strided 1 x 1 convolution with 2 to 7 input channels (jit_avx2_1x1_convolution_bwd_weights),
    but not if grouped, of stride 1, or contiguous.
    """
    return is_limited_to_avx2() and any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and layer.groups == 1
        and 2 <= layer.in_channels <= 7
        for layer in network.modules()
    )


def is_limited_to_avx2() -> bool:
    """True if oneDNN has no AVX-512 kernels, by the processor or by ONEDNN_MAX_CPU_ISA."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    limit = next(filter(None, limits), "ALL").upper()
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512" not in capability or not limit.startswith(("ALL", "DEFAULT", "AVX512", "AVX10"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU random state and restores it afterwards, so that a student's initial
    weights do not depend on a teacher built before it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Sets eval mode without gradient, and restores every module's mode afterwards."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def network_from_state(
    model: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    head: HeadConfig | None = None,
    input_size: int = INPUT_SIZE,
) -> FaceNetwork:
    """Returns a network with exactly the weights in `state`, whose shapes give classes and landmark
    head. head, input_size: see FaceNetwork. Raises ValueError if `model` is another network.
    """
    if "classifier.weight" not in state:
        raise ValueError(
            "network_from_state: the weights hold no 'classifier.weight', so they are not a "
            f"FaceNetwork's; their first names are {list(state)[:3]}"
        )
    with seeded(0):
        network = FaceNetwork(
            model,
            len(state["classifier.weight"]),
            "regressor.weight" in state,
            head=head,
            input_size=input_size,
        )
    refused = _differences(network.state_dict(), state)
    if refused:
        raise ValueError(
            f"network_from_state: {len(refused)} weights do not fit {model.describe()} for "
            f"images of {input_size} pixels; the first: {refused[0]}"
        )
    network.load_state_dict(dict(state))
    return network


def inherit(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Copies every weight of `state` with the same name and shape; returns a line per other one.

    These are entries of `state` without a counterpart, and weights of `network` that keep their
    initial values. Raises ValueError if no convolution or linear weight of the backbone fits.
    """
    own = network.state_dict()
    taken = {name for name in own if name in state and own[name].shape == state[name].shape}
    if not any(name.startswith("backbone.") and own[name].dim() > 1 for name in taken):
        raise ValueError(
            f"inherit: none of the {len(state)} weights offered fits a backbone weight here; set "
            "the settings under model to those of the run that is inherited from; the first "
            f"differences: {'; '.join(_differences(own, state)[:3])}"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(state[name])
    return _differences(own, state)


def inherit_head(network: FaceNetwork, other: FaceNetwork, run: object) -> None:
    """Copies another network's classifier. Raises ValueError for one of another shape or kind."""
    ours, theirs = network.classifier, other.classifier
    kinds = ["cosine" if isinstance(c, CosineClassifier) else "linear" for c in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"head.run {run}: its head is {kinds[1]}, this one {kinds[0]}; set head.kind to "
            f"{kinds[1]}"
        )
    if ours.weight.shape != theirs.weight.shape:
        identities, features = zip(theirs.weight.shape, ours.weight.shape, strict=True)
        raise ValueError(
            f"head.run {run}: its classifier has {identities[0]} identities and the data "
            f"{identities[1]}, it reads {features[0]} features and this network has {features[1]}; "
            "name a run on the same identities with the same model.embedding"
        )
    ours.load_state_dict(theirs.state_dict())


def count_parameters(module: nn.Module) -> int:
    """Returns the number of parameters, trainable and frozen; running statistics do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(network: FaceNetwork, input_size: int, *, heads: bool = True) -> int:
    """Returns the multiply-adds (MACs) of convolutions and matrix products for one image, by
    torch.utils.flop_counter on meta tensors. heads: with classifier and landmark head.
    """
    counted = network if heads else network.backbone
    state = {n: t.to("meta") for n, t in (*counted.named_parameters(), *counted.named_buffers())}
    image = torch.empty(1, 3, input_size, input_size, device="meta")
    with evaluating(network), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(counted, state, (image,))
    return counter.get_total_flops() // 2


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """A line per name that only one side has, or whose shapes differ."""
    lines = []
    for name, tensor in state.items():
        if name not in own:
            lines.append(f"{name}: not in this network")
        elif own[name].shape != tensor.shape:
            lines.append(f"{name}: {tuple(tensor.shape)} offered, {tuple(own[name].shape)} needed")
    lines += [f"{name}: not offered, keeps its initial values" for name in own if name not in state]
    return lines
