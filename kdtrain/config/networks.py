"""The networks' names, and how people write them. Knows no torch: the command line reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMM = "timm:"
MOBILE = ("mobilefacenet", "mbf", "mbf_large")
IRESNETS = ("iresnet18", "iresnet34", "iresnet50", "iresnet100")
IRS = ("ir18", "ir34", "ir50", "ir101")
FACE_NETWORKS = (*MOBILE, *IRESNETS, *IRS)
"""Networks of face recognition that end in an embedding and are built for one input size."""
NAMES = ("resnet", *FACE_NETWORKS)
EMBEDDING = 512  # width of every published face network's embedding

_TITLES = {"mobilefacenet": "MobileFaceNet", "mbf": "MBF", "mbf_large": "MBF-large"}


def is_known(name: str) -> bool:
    """Whether model.name can be this: one of NAMES, or timm:NAME."""
    return name in NAMES or (name.startswith(TIMM) and len(name) > len(TIMM))


def network_title(model: Mapping[str, Any]) -> str:
    """'ResNet-50/8', 'IResNet-50', 'timm:convnext_tiny' of the settings under `model`.

    Settings that are missing have their defaults: a folder may hold the run of an older version.
    """
    name: str = model.get("name", "resnet")
    if name == "resnet":
        name = f"ResNet-{model['depth']}"
    elif name in IRESNETS or name in IRS:
        family, layers = name.rstrip("0123456789"), name.lstrip("irenst")
        name = f"{'IResNet' if family == 'iresnet' else 'IR'}-{layers}"
    else:
        name = _TITLES.get(name, name)
    divide = model.get("divide", 1)
    return name + (f"/{divide}" if divide > 1 else "")
