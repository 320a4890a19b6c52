"""Weights of three projects under the names of our networks.

arcface_torch (insightface): a state dict of an IResNet or MobileFaceNet. AdaFace: a Lightning
checkpoint, the IR network under `model.`, its classifier as `head.kernel`. CVLface: a state dict of
the IR network (or arcface_torch's) under `net.` or `model.net.`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdtrain.config import ModelConfig
from kdtrain.config.networks import IRESNETS, IRS, MOBILE
from kdtrain.models.backbones import build_backbone, iresnet, mobilefacenet

PREFIXES = {
    "arcface_torch": dict.fromkeys(("module.", ""), (IRESNETS, MOBILE)),
    "adaface": dict.fromkeys(("model.", ""), (IRS,)),
    # without a prefix arcface_torch's networks are that project's own, in its channel order
    "cvlface": {**dict.fromkeys(("model.net.", "net."), (IRS, IRESNETS, MOBILE)), "": (IRS,)},
}
"""Prefixes of each layout, and the networks under each."""
HEAD = "head."
NETWORKS = {
    "arcface_torch": "iresnet* and the MobileFaceNets",
    "adaface": "ir*",
    "cvlface": "ir*, and arcface_torch's under net.",
}
"""Each layout's networks, for messages."""
FIRST = {
    "input_layer.0.weight": IRS,
    "layers.0.layers.0.weight": MOBILE,
    "conv1.weight": IRESNETS,
}
"""The networks with a first layer of this name."""
LAST_CHANNELS = 512  # of the last maps of every network here
COUNTER = "num_batches_tracked"

_UNIT = ("conv", "norm", "slope")
_PARTS = ("expand", "depthwise", "project")


class Published(NamedTuple):
    """A backbone's weights under our names, and its shape."""

    name: str  # model.name
    embedding: int
    side: int  # Side of the last maps: input sizes 16 side - 15 to 16 side
    weights: dict[str, Tensor]  # By the names of a FaceNetwork
    notes: list[str]  # Lines about the file for the user


def inner(file: object, *keys: str) -> object:
    """Returns the content of a loaded file below those of the nested `keys` that it has."""
    for key in keys:
        if isinstance(file, Mapping) and isinstance(file.get(key), Mapping):
            file = file[key]
    return file


def split_state(file: object, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the weights of network and head in a loaded file, without prefixes. Raises ValueError
    without a state dict, for other entries in it, and for a network of another layout.
    """
    state = inner(file, "state_dict", "state_dict_backbone")
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"it holds no state dict, but {type(state).__name__}")
    # every layout's last prefix is empty, as a network may be saved alone
    prefix = next(p for p in PREFIXES[layout] if any(str(key).startswith(p) for key in state))
    network, head = {}, {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key}: not a tensor, so this is not the state dict of a network")
        part = network if str(key).startswith(prefix) else head
        if part is head and not key.startswith(HEAD):
            raise ValueError(f"{key}: neither of the network ({prefix}) nor of a head ({HEAD})")
        part[key.removeprefix(prefix if part is network else HEAD)] = value
    fitting = _layouts(state)
    known = any(first in network for first in FIRST)
    if layout not in fitting and (known or fitting):
        advice = f"they are of --layout {' or '.join(fitting)}" if fitting else "no layout has them"
        raise ValueError(
            f"weights as {next(iter(state))} are in no network of {layout}, whose networks are "
            f"{NETWORKS[layout]}; {advice}"
        )
    return network, head


def _layouts(state: Mapping[str, Tensor]) -> list[str]:
    """Layouts with a network of these names."""
    return [
        layout
        for layout, prefixes in PREFIXES.items()
        for prefix, families in prefixes.items()
        for first, names in FIRST.items()
        if f"{prefix}{first}" in state and names in families
    ]


def published(weights: Mapping[str, Tensor], name: str | None) -> Published:
    """Returns the weights of split_state under our names, as the network that all names and shapes
    fit. name: the expected network, or None. Raises ValueError for any other name or shape.
    """
    unfit = {}
    for candidate in _candidates(weights):
        renamed, unfit[candidate] = _renamed(weights, candidate)
        width, side = _sizes(renamed, candidate)
        if not width or not side:
            unfit[candidate].append("the last layers' sizes do not fit")
            continue
        with torch.device("meta"):
            network = build_backbone(ModelConfig(name=candidate, embedding=width), 16 * side)
        shapes = {f"backbone.{n}": tensor.shape for n, tensor in network.state_dict().items()}
        counters = [n for n in shapes if n.endswith(COUNTER) and n not in renamed]
        renamed |= {n: torch.zeros((), dtype=torch.int64) for n in counters}
        unfit[candidate] += _differences(renamed, shapes)
        if unfit[candidate]:
            continue
        if name not in (None, candidate):
            raise ValueError(f"its weights are those of {candidate}, not {name}")
        _require_finite(weights)
        notes = [f"{len(counters)} counters of batches are missing and start at 0"]
        return Published(candidate, width, side, renamed, notes if counters else [])
    nearest = name if name in unfit else min(unfit, key=lambda candidate: len(unfit[candidate]))
    lines = unfit[nearest]
    raise ValueError(
        f"its weights are of no network of ours; {len(lines)} differences from {nearest}, the "
        f"first: {'; '.join(lines[:3])}"
    )


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError for the first weight with NaN or infinity, as float32."""
    for name, tensor in weights.items():
        if bad := int((~tensor.float().isfinite()).sum()):
            raise ValueError(
                f"{name}: {bad:,} of its {tensor.numel():,} values are NaN or infinite, so the "
                "file is damaged or its training diverged; take another"
            )


def _candidates(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Networks whose first layer has this name. Raises ValueError."""
    for first, names in FIRST.items():
        if first in weights:
            return names
    raise ValueError(
        "its names are of no known layout (an IResNet or MobileFaceNet of arcface_torch, an IR of "
        f"AdaFace or CVLface); the first are {list(weights)[:3]}"
    )


def _renamed(weights: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under our names, and a line for each that has none."""
    if name in MOBILE:
        layers = _mobile(mobilefacenet.BLOCKS[name])
    else:
        counts = iresnet.BLOCKS[name.lstrip("irenst")]
        blocks = [f"{stage}.{k}" for stage, count in enumerate(counts) for k in range(count)]
        layers = _iresnet(blocks) if name in IRESNETS else _ir(blocks)
    renamed, unknown = {}, []
    for theirs, tensor in weights.items():
        layer, _, tail = theirs.rpartition(".")
        layer = layer.replace("layers.", "")
        if layer not in layers:
            unknown.append(f"{theirs}: not in {name}")
        else:  # counters stay whole numbers
            value = tensor.float() if tensor.is_floating_point() else tensor
            renamed[f"backbone.{layers[layer]}.{tail}"] = value.contiguous()
    return renamed, unknown


def _iresnet(blocks: Sequence[str]) -> dict[str, str]:
    """Our name of each layer of arcface_torch's IResNet, by its name there."""
    layers = {"conv1": "stem.conv", "bn1": "stem.norm", "prelu": "stem.slope"}
    layers |= {"bn2": "last_norm", "fc": "embedding", "features": "embedding_norm"}
    inside = {"bn1": "norm1", "conv1": "conv1", "bn2": "norm2", "prelu": "slope"}
    inside |= {"conv2": "conv2", "bn3": "norm3"}
    inside |= {"downsample.0": "shortcut.0", "downsample.1": "shortcut.1"}
    for block in blocks:
        there = f"layer{int(block[0]) + 1}{block[1:]}"
        layers |= {f"{there}.{theirs}": f"stages.{block}.{ours}" for theirs, ours in inside.items()}
    return layers


def _ir(blocks: Sequence[str]) -> dict[str, str]:
    """The same for AdaFace's and CVLface's IR, whose blocks are numbered over all stages."""
    last = {"0": "last_norm", "3": "embedding", "4": "embedding_norm"}
    layers = {f"output_layer.{k}": v for k, v in last.items()}
    layers |= {f"input_layer.{k}": f"stem.{layer}" for k, layer in enumerate(_UNIT)}
    inside = ("norm1", "conv1", "norm2", "slope", "conv2", "norm3")
    for n, block in enumerate(blocks):
        layers |= {f"body.{n}.res_layer.{k}": f"stages.{block}.{v}" for k, v in enumerate(inside)}
        layers |= {f"body.{n}.shortcut_layer.{k}": f"stages.{block}.shortcut.{k}" for k in range(2)}
    return layers


def _mobile(blocks: Sequence[int]) -> dict[str, str]:
    """The same for MobileFaceNet, of so many residual blocks in each stage, without "layers."."""
    layers = {"features.2": "embedding.linear", "features.3": "embedding.norm"}
    units = {"0": "stem", "features.0": "depthwise", "conv_sep": "separable"}
    units |= {"1": "stages.0.0"} if blocks[0] == 1 else {}
    inverted = {f"{2 * stage}": f"stages.{stage}.0" for stage in (1, 2, 3)}
    inverted |= {f"1.{k}": f"stages.0.0.{k}" for k in range(blocks[0])}
    for stage in (1, 2, 3):
        row = range(blocks[stage])
        inverted |= {f"{2 * stage + 1}.{k}": f"stages.{stage}.{k + 1}" for k in row}
    for theirs, ours in inverted.items():
        units |= {f"{theirs}.{k}": f"{ours}.{part}" for k, part in enumerate(_PARTS)}
    for theirs, ours in units.items():
        layers |= {f"{theirs}.{k}": f"{ours}.{layer}" for k, layer in enumerate(_UNIT)}
    return layers


def _sizes(renamed: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Width of the embedding, and side of the last maps; 0 if unknown."""
    if name in MOBILE:
        embedding = renamed.get("backbone.embedding.linear.weight")
        depthwise = renamed.get("backbone.depthwise.conv.weight")
        if embedding is None or depthwise is None:
            return 0, 0
        return len(embedding), depthwise.shape[-1]
    embedding = renamed.get("backbone.embedding.weight")
    if embedding is None:
        return 0, 0
    side = math.isqrt(embedding.shape[-1] // LAST_CHANNELS)
    return len(embedding), side if side * side * LAST_CHANNELS == embedding.shape[-1] else 0


def _differences(renamed: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    lines = [f"{name}: not in the network" for name in renamed if name not in shapes]
    for name, shape in shapes.items():
        if name not in renamed:
            lines.append(f"{name}: not in the file")
        elif renamed[name].shape != shape:
            lines.append(f"{name}: {tuple(renamed[name].shape)} where {tuple(shape)} is needed")
    return lines
