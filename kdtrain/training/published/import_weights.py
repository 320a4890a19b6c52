"""Published weights as a run directory, to be a teacher or an initialisation."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from kdtrain.config import ConfigError, settings
from kdtrain.config.networks import EMBEDDING
from kdtrain.models.network import count_parameters, multiply_adds, network_from_state
from kdtrain.models.published.layouts import inner, published, split_state
from kdtrain.training import checkpoint
from kdtrain.training.run_directory import clear, has_files

COLORS = {"arcface_torch": "rgb", "adaface": "bgr"}
SCALE = 64.0  # of the cosines, in the recipes of all three projects
# rank of a shard in the projects' file names
RANK = re.compile(r"(checkpoint_gpu_|softmax_fc_gpu_|rank_|_rank)(\d+)")
# entries of the shards
HEAD_NAMES = ("weight", "partial_fc.weight", "classifier.weight", "kernel")
# running statistics of AdaFace's margin, beside the weight
HEAD_STATISTICS = ("t", "batch_mean", "batch_std")


class PublishedError(ValueError):
    """A weights file that cannot be read as the given layout."""


class _Inert:
    """Replaces objects in a checkpoint other than tensors and plain values."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def write_run(
    weights: Path,
    layout: str,
    out: Path,
    *,
    name: str | None = None,
    head: Path | None = None,
    classes: int | None = None,
    scale: float = SCALE,
    color: str | None = None,
) -> list[str]:
    """Writes a published weights file as run directory `out`; returns the lines to print.

    layout: one of layouts.PREFIXES. name: the expected network, or None. head, classes: see
    read_head; without a head the imported run has no classes. scale: of the cosines. color: the
    channel order of the weights, None for the project's own.

    Raises PublishedError for files of another layout or network, ConfigError for a used folder.
    """
    _check_empty(out)  # before a large file is read
    file = read_file(weights)
    try:
        network, own_head = split_state(file, layout)
        found = published(network, name)
    except ValueError as error:
        raise PublishedError(f"{weights}, read as --layout {layout}: {error}") from None
    lines = [f"{weights}: {found.name}, {found.embedding} values, {16 * found.side} pixels a side"]
    lines += found.notes
    if head is not None or own_head:
        classifier, files = read_head(head, own_head, weights, found.embedding, classes)
        lines.append(f"head: {len(classifier):,} identities, of {', '.join(map(str, files))}")
        dropped = sorted(set(own_head) & set(HEAD_STATISTICS)) if head is None else []
        if dropped:
            lines.append(f"omitted statistics of the head's own training: {', '.join(dropped)}")
    else:
        classifier, files = torch.zeros(0, found.embedding), []
        lines.append("no head: features and relations can be targets, soft targets cannot")
    order = color or COLORS.get(layout) or _color_beside(weights)
    lines.append(f"colours: {order}")
    config = settings.build(
        {
            # so that eval runs on any images
            "task": "verification",
            "triplet.weight": 0.0,
            "optim.batch_size": 2,
            "model.name": found.name,
            "model.embedding": None if found.embedding == EMBEDDING else found.embedding,
            "model.color": order,
            "head.kind": "cosine",
            "head.scale": scale,
            "data.split": "identity",
            "data.input_size": 16 * found.side,
            "data.store_size": 16 * found.side,
        }
    )
    state = {**found.weights, "classifier.weight": classifier}
    made = network_from_state(
        config.model, state, head=config.head, input_size=config.data.input_size
    )
    with checkpoint.lock(out), contextlib.ExitStack() as undo:
        _check_empty(out)
        undo.callback(clear, out)
        checkpoint.save(out / checkpoint.LAST, state)
        text = settings.to_yaml(config)
        stored = (out / checkpoint.LAST / checkpoint.WEIGHTS).read_bytes()
        checkpoint.write_text(out / "config.yaml", text)
        results = {
            "status": "finished",
            "task": config.task,
            "metric": {"name": "nn_top1", "higher_is_better": True},
            "metrics": {},
            "floors": {},
            "untrained": {},
            "phases": [],
            "parameters": {"network": count_parameters(made)},
            "multiply_adds": {"network": multiply_adds(made, 16 * found.side)},
            "imported": {
                "layout": layout,
                "weights": weights.name,
                "head": [file.name for file in files],
            },
            "key": hashlib.sha256(stored + text.encode()).hexdigest()[:16],
        }
        checkpoint.write_json(out / "results.json", results)
        undo.pop_all()
    return [*lines, f"written: {out}"]


def _check_empty(out: Path) -> None:
    if has_files(out):
        raise ConfigError(f"--out {out}: not empty; choose another folder")


def read_file(path: Path) -> Any:
    """Returns the content of a weights file without running its code. Raises PublishedError.

    By safetensors, or torch.load(weights_only=True) with inert stand-ins for further classes, as
    Lightning's checkpoints have them.
    """
    if not path.is_file():
        raise PublishedError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load(path.read_bytes())
        named: list[Any] = []
        with path.open("rb") as file:
            begin = file.read(16)
        if begin.startswith(b"PK\x03\x04"):  # a zip file, as torch writes since 1.6
            named = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]
        elif not begin.startswith(b"\x80"):  # nor a pickle, as it wrote before
            raise PublishedError(
                f"{path}: not a weights file: torch.save writes other first bytes than "
                f"{begin!r}, and a safetensors file must be named .safetensors"
            )
        with safe_globals(named):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except PublishedError:
        raise
    except checkpoint.UNREADABLE as error:
        # torch's last line points to its documentation
        lines = [line for line in str(error).splitlines() if line and "documentation" not in line]
        message = lines[-1] if lines else type(error).__name__
        raise PublishedError(f"{path}: cannot be read as weights ({message})") from None
    if isinstance(held, _Inert):
        raise PublishedError(
            f"{path}: a whole pickled model, which needs its own code; open it in its project and "
            "save model.state_dict()"
        )
    return held


def read_head(
    path: Path | None,
    own: Mapping[str, Tensor],
    weights: Path,
    width: int,
    classes: int | None,
) -> tuple[Tensor, list[Path]]:
    """Returns the classifier (identities, width) of a file and its shards by rank, and the files.

    own: the head in the weights file, used if path is None. width: of the features. classes:
    identities without padding rows (CVLface pads to equal shards); None: every row. Raises
    PublishedError for a shard that is missing, does not fit, or holds NaN or infinity.
    """
    if path is None:
        parts, files = [_head_weight(own, weights)], [weights]
    else:
        files = shards(path)
        parts = [_head_weight(read_file(file), file) for file in files]
    for part, file in zip(parts, files, strict=True):
        if part.dim() != 2 or part.shape[1] != width:
            raise PublishedError(
                f"{file}: a classifier of {tuple(part.shape)}, and the network has {width} values: "
                f"(identities, {width}) is needed"
            )
    # identities are split evenly, one more in the first shards
    sizes = [len(part) for part in parts]
    if sizes != sorted(sizes, reverse=True) or sizes[0] - sizes[-1] > 1:
        raise PublishedError(f"{files[0]}: shards of {sizes} identities are not of one head")
    weight = torch.cat(parts).float().contiguous()
    if classes is not None:
        if not len(weight) - len(files) < classes <= len(weight):
            raise PublishedError(
                f"--classes {classes}: {len(files)} files hold {len(weight)} rows, and at most one "
                "per file but the first is padding"
            )
        weight = weight[:classes].clone()
    finite = weight.isfinite().all(1)
    if not finite.all():
        raise PublishedError(
            f"{files[0]}: the classifier holds NaN or infinity, first in its row "
            f"{int(finite.int().argmin())} of {len(weight)} (rows over all files, from 0)"
        )
    return weight, files


def shards(path: Path) -> list[Path]:
    """Returns the files of a head by rank. Raises PublishedError for a missing one."""
    match = RANK.search(path.name)
    if match is None:
        return [path]
    before, after = path.name[: match.start(2)], path.name[match.end(2) :]
    pattern = re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")
    named = [(pattern.fullmatch(file.name), file) for file in path.parent.glob("*")]
    found = {int(match[1]): file for match, file in named if match}
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        name = f"{before}{missing[0]}{after}"
        raise PublishedError(f"{path.parent / name}: this shard of the head is missing")
    return [found[rank] for rank in sorted(found)]


def _head_weight(file: object, path: Path) -> Tensor:
    """The weight (C, K) in a file of a head."""
    if isinstance(file, Tensor):
        return file
    state = inner(file, "state_dict_softmax_fc", "state_dict")
    entries = state if isinstance(state, Mapping) else {}
    for name in HEAD_NAMES:
        for key in (name, f"head.{name}"):
            if isinstance(weight := entries.get(key), Tensor):
                # AdaFace's kernel has a column per identity
                return weight.T if name == "kernel" else weight
    raise PublishedError(f"{path}: no classifier in it (one of {', '.join(HEAD_NAMES)})")


def _color_beside(weights: Path) -> str:
    """The channel order beside CVLface's weights: color_space in model.yaml."""
    files = [weights.with_suffix(".yaml"), weights.with_name("config.json")]
    for file in filter(Path.is_file, files):
        tree = settings.read_yaml(file)
        inside = tree.get("conf", tree)
        space = inside.get("color_space") if isinstance(inside, Mapping) else None
        if str(space).lower() in ("rgb", "bgr"):
            return str(space).lower()
    raise PublishedError(
        f"{weights}: no file beside it states the channel order ({files[0].name} or "
        f"{files[1].name}: color_space); pass --color rgb or --color bgr"
    )
