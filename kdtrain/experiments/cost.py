"""The cost of an arm: training in epochs and images, parameters, multiply-adds and images per
second of its network.

Verification drops the classifier, so its parameters are counted apart and it is not timed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from kdtrain.config import Config
from kdtrain.config.networks import network_title
from kdtrain.experiments import dryrun
from kdtrain.experiments.estimate import batch_images, batches_of_epoch, now
from kdtrain.experiments.pipeline import Stage
from kdtrain.experiments.study import Run, Study, inputs_of
from kdtrain.models.network import FaceNetwork, count_parameters, multiply_adds
from kdtrain.training import checkpoint
from kdtrain.training.environment import environment
from kdtrain.training.input_runs import load_network

BATCHES = (1, 64)
ROUNDS = 15
LEAST_ROUNDS = 5
CALL_S = 0.02  # least time of one network before the next one is timed
ALL_S = 120.0  # time after which no further round begins
FILE = "speed.json"


class Length(NamedTuple):
    """Length of the training of an arm."""

    epochs: int
    images: int  # seen in training, with repetition
    start_epochs: int  # of the run that it is initialised from, and of that run's own start
    needs: tuple[str, ...]  # every other run that it needs, inputs first


class Size(NamedTuple):
    """Size of a network."""

    name: str
    side: int
    backbone: int  # parameters without the heads
    multiply_adds: int  # of the backbone, for one image


class Quartiles(NamedTuple):
    """Images per second over the rounds."""

    low: float
    median: float
    high: float


Speeds = Mapping[int, Quartiles]  # by images of a call


def lengths(study: Study, stages: Mapping[Run, Stage]) -> dict[Run, Length]:
    """Length of the training of each run of the first seed."""
    count = dryrun.counter({})
    found: dict[Run, Length] = {}
    for run, stage in stages.items():
        if run.seed != study.seeds[0]:
            continue
        config = stage.config
        epochs = sum(phase.epochs for phase in config.optim.phases)
        images = epochs * batches_of_epoch(config, count(config)) * batch_images(config)
        *needed, _ = study.chain(run)  # which come before
        first = inputs_of(study.flat[run.arm], ("init_from",))
        before = [found[one].epochs + found[one].start_epochs for one in needed if one.arm in first]
        needs = tuple(dict.fromkeys(one.arm for one in needed))
        found[run] = Length(epochs, images, before[-1] if before else 0, needs)
    return found


def other_lengths(found: Mapping[str, Length]) -> dict[str, str]:
    """A note for each arm whose own training is longer or shorter than most."""
    usual = statistics.median_low([length.epochs for length in found.values()] or [0])
    return {
        name: f"{'longer' if length.epochs > usual else 'shorter'} training: "
        f"{length.epochs} epochs, most have {usual}"
        for name, length in found.items()
        if length.epochs != usual
    }


def network_key(config: Config) -> str:
    """Names the networks that cost the same: those of one `model` and input size."""
    return json.dumps([asdict(config.model), config.data.input_size], sort_keys=True)


def size_of(folder: Path, config: Config) -> Size:
    """The size of a finished run's network."""
    network, side = load_network(folder), config.data.input_size
    return Size(
        network_title(asdict(config.model)),
        side,
        count_parameters(network.backbone),
        multiply_adds(network, side, heads=False),
    )


def speeds(
    root: Path, runs: Mapping[str, tuple[Path, Config]], say: Callable[[str], None]
) -> tuple[Mapping[str, Speeds], str]:
    """Images per second of each network, by its key, and how they were measured.

    runs: a finished run directory of each network, with its config. Measured again, all together,
    when one of them is not in root/speed.json, or another machine or thread count wrote it.
    """
    if not runs:
        return {}, ""
    _, config = next(iter(runs.values()))
    threads = torch.get_num_threads()
    where = dict(sorted(environment(config).items())) | {"timing threads": threads}
    kept = checkpoint.read_json(root / FILE) or {}
    if kept.get("where") != where or not set(runs) <= set(kept.get("networks", {})):
        say(f"timing the inference of {len(runs)} networks, {threads} threads")
        loaded = {
            key: (load_network(folder), own.data.input_size) for key, (folder, own) in runs.items()
        }
        networks = {
            key: {str(batch): one._asdict() for batch, one in by.items()}
            for key, by in measure(loaded, torch.device(config.train.device)).items()
        }
        kept = {"where": where, "networks": networks}
        checkpoint.write_json(root / FILE, kept)
    known = {
        key: {int(batch): Quartiles(**one) for batch, one in kept["networks"][key].items()}
        for key in runs
    }
    return known, (
        f"inference on {config.train.device} with {threads} threads, float32, backbone alone, "
        "eval mode; the networks take turns; median of the rounds [quartiles]"
    )


def measure(
    networks: Mapping[str, tuple[FaceNetwork, int]], device: torch.device
) -> Mapping[str, Speeds]:
    """Images per second of networks (network, input side), which take turns."""
    calls = {}
    for key, (network, side) in networks.items():
        network.eval().to(device)
        for batch in BATCHES:
            images = torch.rand(batch, 3, side, side, device=device) * 255
            _timed(network, images, 2)
            once_s = _timed(network, images, 1)
            calls[key, batch] = network, images, max(1, round(CALL_S / max(once_s, 1e-6)))
    rates: dict[tuple[str, int], list[float]] = {place: [] for place in calls}
    began = time.monotonic()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.monotonic() - began > ALL_S:
            break
        for place, (network, images, count) in calls.items():
            rates[place].append(count * len(images) / _timed(network, images, count))
    found: dict[str, dict[int, Quartiles]] = {}
    for (key, batch), values in rates.items():
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
        found.setdefault(key, {})[batch] = Quartiles(*quartiles)
    return found


def _timed(network: FaceNetwork, images: torch.Tensor, count: int) -> float:
    """Seconds of `count` calls."""
    with torch.inference_mode():
        start = now(images.device)
        for _ in range(count):
            network.embed(images)
        return now(images.device) - start
