"""The face network: a backbone of any name (models/backbones) with a classifier and a landmark head
side by side.

The paper's teacher is ResNet-50; a student keeps the depth and divides the number of kernels of
every layer by 2, 4 or 8 ("Model Distillation with Knowledge Transfer", arXiv 1709.02929, section
5.1).
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
INPUT_SIZE = 112  # pixels: what published face networks read
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Outputs(NamedTuple):
    """What one pass of the network gives. N images, C classes, K features."""

    hidden: Tensor
    """(N, K) the backbone's feature before it is scaled to any length: pooled maps (the paper's
    hidden layer K), or the embedding where the network has one.
    """
    logits: Tensor | None
    """(N, C) class scores a = classifier(hidden); None where they were not asked for."""
    points: Tensor | None
    """(N, 10) landmarks as (x / W - 0.5, y / H - 0.5), x before y, point after point; None without
    a landmark head.
    """
    attention: tuple[Tensor, ...] = ()
    """(N, h, w) of each stage, where they were asked for; see backbones.base.attention_map."""


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
        """The scale, which is in no weight and changes every answer (teacher_cache.identity)."""
        return f"scale={self.scale}"

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, K) -> (N, C) scores."""
        return self.scale * F.linear(F.normalize(hidden, dim=1), F.normalize(self.weight, dim=1))


class FaceNetwork(nn.Module):
    """The backbone that `model` names, a classifier and, if asked, a landmark head.

    model: the settings of config.ModelConfig. num_classes: C; 0 for published weights without
    their classifier, whose head is then a cosine one for nobody. landmarks: whether to add the head
    for 5 points. Both heads read the same feature, so an alignment network still predicts classes
    (its soft target). head: the settings of config.HeadConfig, of which kind and scale count; None
    is a linear classifier with bias. input_size: side of the images, which face networks are
    built for (resnet takes any); the default is that of published weights. Weights depend on
    torch's seed alone, and those of backbone and classifier do not change with `landmarks` (see
    `seeded`). Raises ValueError for a network that cannot be built.
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
                "FaceNetwork: num_classes must be at least 1 (0 with a cosine head, for a network "
                f"that has none), got {num_classes}"
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
        """Keep weights and maps in torch.channels_last, or in torch's contiguous layout.

        A training step on a CPU takes 1.1 (224 pixels) to 1.4 times as long in the contiguous
        layout. Where torch would corrupt memory in channels_last (`needs_contiguous`), the layout
        stays contiguous; `channels_last` tells.
        """
        self.channels_last = channels_last and not needs_contiguous(self)
        self._format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.to(memory_format=self._format)  # pyright: ignore[reportCallIssue]

    def forward(self, images: Tensor) -> Outputs:
        """Feature, class scores and landmarks of raw images (N, 3, H, W) in [0, 255]."""
        return self._heads(self.backbone(images.contiguous(memory_format=self._format)))

    def embed(self, images: Tensor) -> Outputs:
        """What `forward` gives without the class scores (None), for losses that need the feature
        alone.
        """
        hidden = self.backbone(images.contiguous(memory_format=self._format))
        return self._heads(hidden, scores=False)

    def tap(self, images: Tensor, stage: int) -> Tensor:
        """Output (N, C, h, w) of stage 1 to 4 for raw images; see Backbone.maps."""
        return self.backbone.maps(images.contiguous(memory_format=self._format), stage)

    def attend(self, images: Tensor) -> Outputs:
        """What `forward` gives, and the attention_map of every stage."""
        images = images.contiguous(memory_format=self._format)
        hidden, attention = self.backbone.attend(images)
        return self._heads(hidden)._replace(attention=attention)

    def _heads(self, hidden: Tensor, scores: bool = True) -> Outputs:
        points = None if self.regressor is None else self.regressor(hidden)
        return Outputs(hidden, self.classifier(hidden) if scores else None, points)


class Passes:
    """Calls networks under train.precision (torch.autocast: weights stay float32) and
    train.compile.

    For training: evaluation runs networks as they are, in float32. Losses stay outside and take
    what comes out as it is.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._dtype = DTYPES.get(train.precision)
        self._compile = train.compile
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, run: Callable[..., Any], images: Tensor, *options: Any) -> Any:
        """run(images, *options); run: a network, or one of its methods.

        Raises ConfigError where train.compile fails.
        """
        # a context of its own for each call: the casts it keeps were made with or without gradient
        with torch.autocast(images.device.type, self._dtype, enabled=self._dtype is not None):
            if not self._compile:
                return run(images, *options)
            from torch._dynamo.exc import TorchDynamoException

            try:
                if run not in self._compiled:
                    # static shapes: kernels for any shape would depend on which ones came first,
                    # and a resumed run meets them in another order. The network is wrapped, not
                    # changed, so that its state dict keeps its names.
                    self._compiled[run] = torch.compile(run, dynamic=False)
                return self._compiled[run](images, *options)
            except TorchDynamoException as error:
                said = " ".join(str(error).split("\n\n")[0].split())  # the rest is advice to torch
                raise ConfigError(
                    f"train.compile: torch.compile cannot compile the network here ({said}); on a "
                    "processor it needs a C++ compiler, on a GPU Triton. Install it, or set "
                    "train.compile to false"
                ) from error


def needs_contiguous(network: nn.Module) -> bool:
    """True where training `network` in channels_last would corrupt this process' memory.

    torch 2.13's oneDNN, limited to AVX2, writes past its buffer in the weight gradient of a
    strided 1 x 1 convolution with 2 to 7 input channels (jit_avx2_1x1_convolution_bwd_weights).
    Grouped convolutions, stride 1, 8 channels and more, and the contiguous layout are right.
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
    """True where oneDNN has no AVX-512 kernels: by the processor, or by ONEDNN_MAX_CPU_ISA."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
    limit = next(filter(None, limits), "ALL").upper()
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512" not in capability or not limit.startswith(("ALL", "DEFAULT", "AVX512", "AVX10"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`, and torch's own CPU random state is as before afterwards.

    A student is therefore initialised alike whether or not a teacher was built before it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; every module is in the mode it was in afterwards."""
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
    """A network with exactly the weights in `state`; classes and landmark head are read off the
    weights' shapes. head, input_size: as it was built, see FaceNetwork.

    Raises ValueError when `model` describes another network than the one that was saved.
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
    """Copies every weight of `state` that has a namesake of the same shape; returns what was not
    taken, with the reason.

    Listed are entries of `state` that found no place and weights of `network` that keep their
    initial values (a head for other classes, a new landmark head). Raises ValueError when no
    convolution or linear weight of the backbone was taken: then nothing was learnt from `state`,
    whatever small vectors happen to agree.
    """
    own = network.state_dict()
    taken = {name for name in own if name in state and own[name].shape == state[name].shape}
    if not any(name.startswith("backbone.") and own[name].dim() > 1 for name in taken):
        raise ValueError(
            f"inherit: none of the {len(state)} weights offered fits a backbone weight here; "
            "the settings under model must be those of the run that is inherited from; "
            f"differences begin with: {'; '.join(_differences(own, state)[:3])}"
        )
    with torch.no_grad():
        for name in taken:
            own[name].copy_(state[name])
    return _differences(own, state)


def inherit_head(network: FaceNetwork, other: FaceNetwork, run: object) -> None:
    """Start the classifier as another network's. Raises ValueError, naming `run`, where kind,
    identities or width differ.
    """
    ours, theirs = network.classifier, other.classifier
    kinds = ["cosine" if isinstance(c, CosineClassifier) else "linear" for c in (ours, theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"head.run {run}: its head is {kinds[1]}, this one {kinds[0]}; set head.kind to "
            f"{kinds[1]}"
        )
    if ours.weight.shape[0] != theirs.weight.shape[0]:
        raise ValueError(
            f"head.run {run}: its classifier has {theirs.weight.shape[0]} identities and the data "
            f"{ours.weight.shape[0]}; name a run on the same identities"
        )
    if ours.weight.shape[1] != theirs.weight.shape[1]:
        raise ValueError(
            f"head.run {run}: its classifier reads {theirs.weight.shape[1]} features and this "
            f"network has {ours.weight.shape[1]}; give both the same model.embedding"
        )
    ours.load_state_dict(theirs.state_dict())


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters of `module`; running statistics do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def multiply_adds(network: FaceNetwork, input_size: int, *, heads: bool = True) -> int:
    """Multiply-adds of convolutions and matrix products for one (3, input_size, input_size) image;
    heads: classifier and landmark head included.

    The usual "MACs" or, loosely, "FLOPs" of the field, as torch.utils.flop_counter counts them;
    normalisation, activation and pooling do not count. Shapes alone are computed (meta tensors): no
    memory, no arithmetic, no change to `network`.
    """
    counted = network if heads else network.backbone
    state = {n: t.to("meta") for n, t in (*counted.named_parameters(), *counted.named_buffers())}
    image = torch.empty(1, 3, input_size, input_size, device="meta")
    with evaluating(network), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(counted, state, (image,))
    return counter.get_total_flops() // 2


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line per name that only one side has or whose shapes differ."""
    lines = []
    for name, tensor in state.items():
        if name not in own:
            lines.append(f"{name}: has no place in this network")
        elif own[name].shape != tensor.shape:
            lines.append(f"{name}: {tuple(tensor.shape)} offered, {tuple(own[name].shape)} needed")
    lines += [f"{name}: not offered, keeps its initial values" for name in own if name not in state]
    return lines
