"""Weights of three projects under the names of our networks.

arcface_torch (insightface): a state dict of an IResNet or MobileFaceNet. AdaFace: a Lightning
checkpoint, the IR network under `model.`, its classifier as `head.kernel`. CVLface: a state dict of
the IR network (or arcface_torch's) under `net.` or `model.net.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdtrain.config import ModelConfig
from kdtrain.config.networks import IRESNETS, IRS, MOBILE
from kdtrain.models.backbones import build_backbone
from kdtrain.models.backbones.iresnet import BLOCKS
from kdtrain.models.backbones.mobilefacenet import SHAPES

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

_UNIT = {"0": "conv", "1": "norm", "2": "slope"}
_PARTS = {"0": "expand", "1": "depthwise", "2": "project"}


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
        if unfit[candidate]:
            continue
        with torch.device("meta"):
            network = build_backbone(ModelConfig(name=candidate, embedding=width), 16 * side)
        shapes = {f"backbone.{n}": tensor.shape for n, tensor in network.state_dict().items()}
        counters = [n for n in shapes if n.endswith(COUNTER) and n not in renamed]
        renamed |= {n: torch.zeros((), dtype=torch.int64) for n in counters}
        unfit[candidate] = _differences(renamed, shapes)
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
        rename = partial(_mobile, plain_first=SHAPES[name].blocks[0] == 1)
    elif name in IRESNETS:
        rename = _iresnet
    else:
        counts = enumerate(BLOCKS[name.removeprefix("ir")])
        rename = partial(_ir, places=[(stage, i) for stage, count in counts for i in range(count)])
    renamed, unknown = {}, []
    for theirs, tensor in weights.items():
        ours = rename(theirs)
        if ours is None:
            unknown.append(f"{theirs}: not in {name}")
        else:  # counters stay whole numbers
            value = tensor.float() if tensor.is_floating_point() else tensor
            renamed[f"backbone.{ours}"] = value.contiguous()
    return renamed, unknown


def _iresnet(theirs: str) -> str | None:
    """Our name of a weight of arcface_torch's IResNet, or None."""
    ends = {"conv1": "stem.conv", "bn1": "stem.norm", "prelu": "stem.slope"}
    ends |= {"bn2": "last_norm", "fc": "embedding", "features": "embedding_norm"}
    head, _, tail = theirs.partition(".")
    if head in ends:
        return f"{ends[head]}.{tail}"
    inside = {"bn1": "norm1", "conv1": "conv1", "bn2": "norm2", "prelu": "slope"}
    inside |= {"conv2": "conv2", "bn3": "norm3"}
    inside |= {"downsample.0": "shortcut.0", "downsample.1": "shortcut.1"}
    match = re.fullmatch(r"layer([1-4])\.(\d+)\.(downsample\.[01]|[a-z]+\d?)\.(\w+)", theirs)
    if match is None or match[3] not in inside:
        return None
    return f"stages.{int(match[1]) - 1}.{match[2]}.{inside[match[3]]}.{match[4]}"


def _ir(theirs: str, places: list[tuple[int, int]]) -> str | None:
    """Our name of a weight of AdaFace's and CVLface's IR, with blocks numbered over all stages."""
    match = re.fullmatch(r"(input_layer|output_layer)\.(\d)\.(\w+)", theirs)
    if match is not None:
        last = {"0": "last_norm", "3": "embedding", "4": "embedding_norm"}
        inside = last if match[1] == "output_layer" else {k: f"stem.{v}" for k, v in _UNIT.items()}
        return f"{inside[match[2]]}.{match[3]}" if match[2] in inside else None
    match = re.fullmatch(r"body\.(\d+)\.(res_layer|shortcut_layer)\.(\d)\.(\w+)", theirs)
    if match is None or int(match[1]) >= len(places):
        return None
    layers = ("norm1", "conv1", "norm2", "slope", "conv2", "norm3")
    if match[2] == "shortcut_layer":
        layers = ("shortcut.0", "shortcut.1")
    if int(match[3]) >= len(layers):
        return None
    stage, block = places[int(match[1])]
    return f"stages.{stage}.{block}.{layers[int(match[3])]}.{match[4]}"


def _mobile(theirs: str, plain_first: bool) -> str | None:
    """Our name of a weight of MobileFaceNet. plain_first: the second layer is a convolution."""
    place, _, tail = theirs.rpartition(".")
    place = place.replace("layers.", "")  # 3.0.1.2 of layers.3.layers.0.layers.1.layers.2
    ends = {"features.2": "embedding.linear", "features.3": "embedding.norm"}
    ends |= {f"features.0.{k}": f"depthwise.{v}" for k, v in _UNIT.items() if v != "slope"}
    ends |= {f"conv_sep.{k}": f"separable.{v}" for k, v in _UNIT.items()}
    ends |= {f"0.{k}": f"stem.{v}" for k, v in _UNIT.items()}
    if plain_first:
        ends |= {f"1.{k}": f"stages.0.0.{v}" for k, v in _UNIT.items()}
    if place in ends:
        return f"{ends[place]}.{tail}"
    match = re.fullmatch(r"(?:([246])|([1357])\.(\d+))\.([012])\.([012])", place)
    if match is None:
        return None
    down, residual, number, part, layer = match.groups()
    if down is not None:
        block = f"stages.{int(down) // 2}.0"
    elif residual == "1":
        block = f"stages.0.0.{number}"
    else:
        block = f"stages.{int(residual) // 2}.{int(number) + 1}"
    return f"{block}.{_PARTS[part]}.{_UNIT[layer]}.{tail}"


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
