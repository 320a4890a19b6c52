"""Cues of synthetic identities and images, from counter-based random numbers.

An identity has many weak continuous cues (geometry, colours, hair, marks), in clusters of similar
identities. An image has its own pose, expression, light and background. Lengths are in head units:
1 is half a head's height.
"""

import math

import torch
from torch import Tensor

from kdtrain.data.counter import counter_normal, counter_uniform

CLUSTER = 5  # similar identities per cluster
LIKENESS = 0.65  # share of a cue's variance that is the cluster's
_STREAM_CLUSTER, _STREAM_IDENTITY, _STREAM_IMAGE, _STREAM_IMAGE_UNIFORM = 1, 2, 3, 4

# name: (mean, standard deviation) over identities
IDENTITY = {
    "head_width": (0.76, 0.058),
    "head_depth": (0.84, 0.032),
    "taper": (0.20, 0.069),
    "jaw": (0.10, 0.088),
    "eye_x": (0.325, 0.018),
    "eye_y": (-0.06, 0.019),
    "eye_width": (0.158, 0.013),
    "eye_height": (0.090, 0.011),
    "eye_tilt": (0.02, 0.11),
    "iris": (0.070, 0.0056),
    "brow_gap": (0.205, 0.024),
    "brow_thickness": (0.042, 0.011),
    "brow_slope": (-0.05, 0.16),
    "brow_curve": (2.0, 0.88),
    "brow_length": (0.19, 0.019),
    "brow_tone": (0.0, 0.08),
    "nose_y": (0.30, 0.024),
    "nose_length": (0.17, 0.036),
    "nose_width": (0.125, 0.019),
    "bridge_width": (0.055, 0.011),
    "mouth_y": (0.575, 0.021),
    "mouth_width": (0.235, 0.021),
    "lip_upper": (0.050, 0.011),
    "lip_lower": (0.066, 0.014),
    "ear": (0.17, 0.024),
    "ear_y": (0.05, 0.036),
    "hairline": (-0.6, 0.15),
    "hair_curve": (0.55, 0.48),
    "hair_part": (0, 0.37),
    "hair_volume": (0.12, 0.069),
    "hair_length": (0.1, 1.1),
    "hair_side": (0, 0.12),
    "skin_tone": (0.0, 1.1),
    "skin_red": (0.0, 1.1),
    "hair_tone": (0.0, 1.1),
    "hair_red": (0.0, 1.1),
    "eye_tone": (0.0, 0.8),
    "lip_red": (0.0, 0.8),
    "blush": (0.0, 0.8),
    "socket": (0.20, 0.064),
    "beard": (-0.4, 0.8),
    "beard_height": (0.36, 0.048),
    "fold": (0.10, 0.072),
    "freckles": (-0.6, 0.8),
    "freckle_phase": (0.0, 0.8),
    "mole_x": (0.0, 0.24),
    "mole_y": (0.28, 0.21),
    "mole": (0.0, 0.8),
    "mole2_x": (0.0, 0.21),
    "mole2_y": (0.20, 0.24),
    "mole2": (0.0, 0.8),
    "glasses": (-0.7, 0.8),
    "glasses_shape": (0.0, 0.8),
}

# name: (mean, standard deviation, largest distance from the mean in deviations) over images
IMAGE_NORMAL = {
    "yaw_rad": (0.0, math.radians(15), 2.0),
    "pitch_rad": (0.0, math.radians(8), 2.0),
    "roll_rad": (0.0, math.radians(7), 2.2),
    "zoom": (0.98, 0.06, 2.0),
    "shift_x": (0.0, 0.05, 2.0),
    "shift_y": (0.0, 0.05, 2.0),
    "smile": (0.25, 0.600, 2.0),
    "frown": (0.0, 0.900, 2.0),
    "open": (-0.5, 1.000, 2.3),
    "lids": (0.95, 0.200, 2.0),
    "gaze_x": (0.0, 0.032, 2.0),
    "gaze_y": (0.0, 0.014, 2.0),
    "light_x": (0.0, 0.33, 2.2),
    "light_y": (-0.35, 0.25, 2.0),
    "ambient": (0.52, 0.06, 2.0),
    "exposure": (0.0, 0.11, 2.2),
    "warmth": (0.0, 0.05, 2.2),
    "tint": (0.0, 0.02, 2.2),
    "tan": (0.0, 0.2, 2.0),
    "hair_now": (0.0, 0.2, 2.0),
    "hair_shade": (0.0, 0.2, 2.0),
    "hair_lie": (0.0, 0.050, 2.0),
    "make_up": (0.0, 0.500, 2.0),
    "stubble": (0.0, 0.350, 2.0),
}

IMAGE_UNIFORM = (
    *(f"back{i}_{c}" for i in range(3) for c in "rgb"),
    *(f"cloth_{c}" for c in "rgb"),
    *(f"cover_{c}" for c in "rgb"),
    *("back_angle", "blob_x", "blob_y", "blob_size", "stripes", "wear_glasses"),
    *("cover", "cover_angle", "cover_reach", "cover_size", "collar", "blur", "grain"),
)


def identity_parameters(seed: int, identities: Tensor) -> dict[str, Tensor]:
    """Returns the cues of identities (N,) int64: name -> (N,) float64, a function of (seed,
    identity).

    cue = mean + deviation * (sqrt(LIKENESS) * cluster's normal + sqrt(1 - LIKENESS) * own normal),
    clamped at 2.3 deviations; identity p belongs to cluster p // CLUSTER.
    """
    shared = counter_normal(seed, _STREAM_CLUSTER, identities // CLUSTER, draws=len(IDENTITY))
    own = counter_normal(seed, _STREAM_IDENTITY, identities, draws=len(IDENTITY))
    normal = math.sqrt(LIKENESS) * shared + math.sqrt(1 - LIKENESS) * own  # (N, cues)
    normal = normal.clamp(-2.3, 2.3)
    return {
        name: mean + deviation * normal[:, k]
        for k, (name, (mean, deviation)) in enumerate(IDENTITY.items())
    }


def image_parameters(seed: int, identities: Tensor, images: Tensor) -> dict[str, Tensor]:
    """Returns the cues of single images: name -> (N,) float64. identities, images: (N,) int64."""
    normal = counter_normal(seed, _STREAM_IMAGE, identities, images, draws=len(IMAGE_NORMAL))
    found = {
        name: mean + deviation * normal[:, k].clamp(-limit, limit)
        for k, (name, (mean, deviation, limit)) in enumerate(IMAGE_NORMAL.items())
    }
    uniform = counter_uniform(
        seed, _STREAM_IMAGE_UNIFORM, identities, images, draws=len(IMAGE_UNIFORM)
    ).double()
    found.update({name: uniform[:, k] for k, name in enumerate(IMAGE_UNIFORM)})
    return found


def colour_parameters(face: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the colours of faces, name -> (N, 3) float64 reflectance in [0, 1], from all cues."""

    def ramp(position: Tensor, *stops: tuple[float, float, float]) -> Tensor:
        table = torch.tensor(stops, dtype=torch.float64)
        place = position.clamp(0, 1) * (len(stops) - 1)
        low = place.long().clamp(max=len(stops) - 2)
        part = (place - low).unsqueeze(1)
        return table[low] * (1 - part) + table[low + 1] * part

    def squash(normal: Tensor) -> Tensor:  # keeps the ends of a ramp from filling up
        return 0.5 + 0.5 * torch.tanh(0.9 * normal)

    def muted(colour: Tensor) -> Tensor:  # towards grey, without black and white
        return 0.25 + 0.2 * colour + 0.2 * colour.mean(1, keepdim=True)

    skin = ramp(
        squash(face["skin_tone"] + face["tan"]),
        (0.98, 0.84, 0.75),
        (0.93, 0.74, 0.60),
        (0.80, 0.58, 0.43),
        (0.58, 0.39, 0.28),
    )
    red = face["skin_red"].unsqueeze(1) * torch.tensor([0.012, -0.014, -0.018], dtype=torch.float64)
    skin = (skin + red).clamp(0.05, 1)
    hair = ramp(
        squash(face["hair_tone"] + face["hair_shade"]),
        (0.09, 0.07, 0.06),
        (0.20, 0.13, 0.09),
        (0.40, 0.26, 0.15),
        (0.78, 0.60, 0.36),
    )
    red = face["hair_red"].unsqueeze(1) * torch.tensor([0.035, -0.012, -0.025], dtype=torch.float64)
    hair = (hair + red).clamp(0.03, 1)
    iris = ramp(
        squash(face["eye_tone"]),
        (0.16, 0.09, 0.05),
        (0.36, 0.24, 0.12),
        (0.30, 0.42, 0.30),
        (0.35, 0.52, 0.68),
    )
    lip_mix = (0.42 + 0.14 * face["lip_red"] + 0.14 * face["make_up"]).clamp(0.1, 0.9).unsqueeze(1)
    lip = skin * (1 - lip_mix) + torch.tensor([0.66, 0.20, 0.22], dtype=torch.float64) * lip_mix
    colours = {"skin": skin, "hair": hair, "iris": iris, "lip": lip}
    for name in ("back0", "back1", "back2", "cloth", "cover"):
        colours[name] = muted(torch.stack([face[f"{name}_{c}"] for c in "rgb"], 1))
    return colours
