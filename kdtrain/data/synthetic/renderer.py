"""Renders synthetic faces from the cues of parameters.py by the painter's algorithm, at twice the
size and then halved.

Masks are elementwise arithmetic on (N, H, H) planes (no exp, no sin, no reduction), so that an
image's bits do not depend on its batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.data.counter import counter_uniform
from kdtrain.data.synthetic.geometry import (
    VIEW,
    Surface,
    mouth_corner,
    nose_points,
    plane,
    project_to_head_plane,
    rotation,
    trace,
    turn_vectors,
)
from kdtrain.data.synthetic.parameters import colour_parameters

_STREAM_GRAIN = 5
_RED = torch.tensor([1.0, 0.62, 0.60]).reshape(1, 3, 1, 1)


@dataclass(kw_only=True)
class _Scene:
    """A chunk under way: cues (N, 1, 1) float32, colours (N, 3, 1, 1), rotation, surface, pixel."""

    cue: dict[str, Tensor]
    raw: dict[str, Tensor]
    colour: dict[str, Tensor]
    turn: Tensor
    surface: Surface
    pixel: Tensor


def render_faces(
    face: dict[str, Tensor], seed: int, identities: Tensor, images: Tensor, size: int
) -> Tensor:
    """Returns uint8 images (N, 3, size, size), RGB, of all cues `face`, name -> (N,) float64.

    seed, identities, images: keys of the sensor noise.
    """
    side = 2 * size
    turn, colours = rotation(face), colour_parameters(face)
    scene = _Scene(
        cue={name: plane(value) for name, value in face.items()},
        raw=face,
        colour={name: value.float().reshape(-1, 3, 1, 1) for name, value in colours.items()},
        turn=turn,
        surface=trace(face, turn, side),
        pixel=plane(VIEW / side / face["zoom"]),
    )
    image = _background(scene, side)
    _paint_behind(scene, image)
    skin = _painted_face(scene)
    # the discriminant falls by about 2 / half width per unit of length at the outline
    outline = _edge(scene.surface.inside * (0.5 * scene.cue["head_width"]), scene.pixel)
    _blend(image, outline, skin)
    _paint_nose(scene, image, outline)
    _paint_in_front(scene, image, side)
    return _expose(scene, image, seed, identities, images)


def _edge(distance: Tensor, softness: Tensor | float) -> Tensor:
    """Returns coverage in [0, 1] of a signed distance, positive inside, and a soft edge's width."""
    return distance.div(softness).add_(0.5).clamp_(0, 1)


def _blend(image: Tensor, mask: Tensor, colour: Tensor) -> None:
    # in place: a temporary of the image's size costs more than the arithmetic
    mask = mask.unsqueeze(1)
    image.mul_(1 - mask).addcmul_(mask, colour)


def _background(scene: _Scene, side: int) -> Tensor:
    """Two colours in a gradient, a disc of a third, sometimes stripes: (N, 3, H, H)."""
    cue, colour = scene.cue, scene.colour
    ticks = (torch.arange(side, dtype=torch.float32) + 0.5) / side - 0.5
    x, y = ticks.reshape(1, 1, side), ticks.reshape(1, side, 1)
    along_x, along_y = 2 * cue["back_angle"] - 1, 1 - 2 * (2 * cue["back_angle"] - 1).abs()
    ramp = (along_x * x + along_y * y).mul_(1.6).add_(0.5).clamp_(0, 1)
    image = colour["back0"] + ramp.unsqueeze(1) * (colour["back1"] - colour["back0"])
    radius = 0.12 + 0.3 * cue["blob_size"]
    squared = (x - cue["blob_x"] + 0.5) ** 2 + (y - cue["blob_y"] + 0.5) ** 2
    _blend(image, _edge(1 - squared / (radius * radius), 0.25), colour["back2"])
    wave = (along_y * x - along_x * y) * (6 + 10 * cue["blob_size"])
    wave = wave.frac_().abs_().sub_(0.5).abs_()
    amount = ((cue["stripes"] - 0.55) * 1.2).clamp(0, 0.5)
    _blend(image, wave.sub_(0.15).mul_(6).clamp_(0, 1).mul_(amount), colour["back2"])
    return image


def _hair_length(cue: dict[str, Tensor]) -> Tensor:
    return (0.25 + 0.6 * (cue["hair_length"] + 0.3 * cue["hair_now"])).clamp(-0.15, 1.7)


def _paint_behind(scene: _Scene, image: Tensor) -> None:
    """Hair behind the head, neck, clothes, the far ears, all below the head."""
    cue, colour, surface = scene.cue, scene.colour, scene.surface
    x, y = surface.x, surface.y
    sin, cos = torch.sin(scene.raw["yaw_rad"]), torch.cos(scene.raw["yaw_rad"])
    half = ((scene.raw["head_width"] * cos) ** 2 + (scene.raw["head_depth"] * sin) ** 2).sqrt()
    half = plane(half)
    grow = 1 + (cue["hair_volume"] + 0.05 * cue["hair_now"]).clamp(min=0.02)
    shift = -0.08 * plane(sin)
    squared = ((x - shift) / (half * grow)) ** 2 + (y.clamp(max=0) / grow) ** 2
    lie = 0.5 + 0.3 * surface.y.clamp(-1, 1)
    hair = _edge((1 - squared) * (0.5 * half), scene.pixel)
    hair *= _edge(_hair_length(cue) - y, 0.12)
    _blend(image, hair, colour["hair"] * (1.05 - 0.45 * lie).unsqueeze(1))

    neck = _edge(0.47 * cue["head_width"] / 0.76 - x.abs(), scene.pixel * 2) * _edge(y - 0.45, 0.1)
    _blend(image, neck, colour["skin"] * 0.62)
    collar = 1.12 + 0.2 * cue["collar"]
    cloth = _edge(y - collar + 0.30 * (x.abs() - 0.35).clamp(min=0) - 0.15 * (0.4 - x.abs()), 0.06)
    _blend(image, cloth, colour["cloth"])

    beside, down = 0.98 * scene.raw["head_width"], scene.raw["ear_y"]
    for across in (-beside, beside):
        spot = torch.stack([across, down, torch.full_like(down, -0.05)], -1)
        at = project_to_head_plane(spot, scene.turn).float().reshape(-1, 2, 1, 1)
        squared = ((x - at[:, 0]) / (0.6 * cue["ear"])) ** 2 + ((y - at[:, 1]) / cue["ear"]) ** 2
        _blend(image, _edge((1 - squared) * 0.06, scene.pixel), colour["skin"] * 0.74)


def _painted_face(scene: _Scene) -> Tensor:
    """Returns the lit colour of the head's surface, (N, 3, H, H)."""
    cue, colour, surface = scene.cue, scene.colour, scene.surface
    X, Y, Z, pixel = surface.X, surface.Y, surface.Z, scene.pixel
    across = X.abs()
    skin = colour["skin"] * torch.ones_like(X).unsqueeze(1)

    blush = ((across - 0.40) ** 2 + (Y - 0.24) ** 2).mul_(-14).add_(1).clamp_(min=0)
    _blend(skin, blush * (0.16 + 0.10 * cue["blush"]).clamp(0, 0.4), colour["skin"] * _RED)
    ear = ((Z + 0.10) / (0.6 * cue["ear"])) ** 2 + ((Y - cue["ear_y"]) / cue["ear"]) ** 2
    _blend(skin, _edge((1 - ear) * 0.06, pixel) * 0.55, colour["skin"] * 0.7)
    speck = (X * 11 + cue["freckle_phase"]).frac_().abs_().sub_(0.5).abs_()
    speck = speck + (Y * 9.5 + X * 3 + 2 * cue["freckle_phase"]).frac_().abs_().sub_(0.5).abs_()
    speck = speck.sub_(0.62).mul_(5).clamp_(0, 1) * (1 - (Y - 0.15).abs() * 2.2).clamp(min=0)
    _blend(skin, speck * (0.35 * cue["freckles"]).clamp(0, 0.5), colour["skin"] * 0.6)
    for mole in ("mole", "mole2"):
        squared = (X - cue[f"{mole}_x"]) ** 2 + (Y - cue[f"{mole}_y"]) ** 2
        strength = (0.4 * cue[mole]).clamp(0, 0.8)
        _blend(skin, _edge(0.035 - squared / 0.035, pixel) * strength, colour["skin"] * 0.3)
    _paint_beard(scene, skin, across)
    crease = across - cue["nose_width"] - 0.03 - (Y - cue["nose_y"]) * 0.5
    crease = (1 - crease.abs() * 22).clamp_(min=0) * _edge(Y - cue["nose_y"], 0.1)
    crease *= _edge(cue["mouth_y"] + 0.02 - Y, 0.1)
    _blend(
        skin, crease * (cue["fold"] * (1 + 0.8 * cue["smile"])).clamp(0, 0.6), colour["skin"] * 0.5
    )
    _paint_mouth(scene, skin)
    _paint_eyes(scene, skin, across)
    hair = _paint_hair(scene, skin, across)

    aside, down = scene.raw["light_x"], scene.raw["light_y"]
    light = torch.stack([aside, down, torch.ones_like(down)], -1)
    light = light / light.norm(dim=-1, keepdim=True)
    light = turn_vectors(light.unsqueeze(1), scene.turn.transpose(1, 2))
    light = light.float().reshape(-1, 3, 1, 1)
    facing = (light[:, 0] / cue["head_width"] ** 2) * X + light[:, 1] * Y
    facing = facing.add_((light[:, 2] / cue["head_depth"] ** 2) * Z).clamp_(0, 1.15)
    shade = cue["ambient"] + (1.12 - cue["ambient"]) * facing
    socket = ((across - cue["eye_x"] + 0.04) / 0.26) ** 2 + ((Y - cue["eye_y"] + 0.05) / 0.17) ** 2
    shade *= 1 - cue["socket"].clamp(min=0) * (1 - socket).clamp_(min=0)
    # the rim of hair does not darken as skin does
    shade += 0.6 * hair * (0.85 - shade)
    return skin.mul_(shade.unsqueeze(1))


def _grey(level: float) -> Tensor:
    return torch.full((1, 3, 1, 1), level)


def _paint_beard(scene: _Scene, skin: Tensor, across: Tensor) -> None:
    cue, Y = scene.cue, scene.surface.Y
    line = cue["beard_height"] + 0.11 - 0.75 * (across - 0.25).clamp(min=0)
    cover = ((Y - line) * 8).clamp_(0, 1) * (0.5 + 1.2 * (across - 0.18).abs()).clamp(max=1)
    density = (0.34 * (cue["beard"] + cue["stubble"])).clamp(0, 0.75)
    _blend(skin, cover * density, scene.colour["hair"])


def _paint_mouth(scene: _Scene, skin: Tensor) -> None:
    cue, colour, pixel = scene.cue, scene.colour, scene.pixel
    X, Y = scene.surface.X, scene.surface.Y
    width, corner = (plane(value) for value in mouth_corner(scene.raw))
    along = X / width
    arch = (1 - along * along).clamp_(min=-0.2)
    line = Y - corner - (cue["mouth_y"] - corner) * arch
    gap = 0.062 * cue["open"].clamp(min=0) * arch
    bow = 1 - 0.25 * (1 - along.abs() * 5).clamp_(min=0)
    lips = _edge(line + gap + cue["lip_upper"] * bow * arch, pixel)
    lips *= _edge(cue["lip_lower"] * arch + gap - line, pixel)
    _blend(skin, lips, colour["lip"])
    shadow = (1 - ((Y - cue["mouth_y"] - cue["lip_lower"] - 0.06) / 0.035) ** 2).clamp_(min=0)
    _blend(skin, shadow * (1 - along * along * 2).clamp_(min=0) * 0.3, colour["skin"] * 0.55)
    within = _edge(gap + 0.010 - line.abs(), pixel) * _edge(arch, 0.1)
    _blend(skin, within, _grey(0.16))
    teeth = _edge(gap - 0.012 - line.abs(), pixel) * _edge(0.3 * gap - line, pixel)
    _blend(skin, teeth * (0.4 + 0.5 * cue["smile"]).clamp(0, 0.95), _grey(0.86))


def _paint_eyes(scene: _Scene, skin: Tensor, across: Tensor) -> None:
    cue, colour, pixel, Y = scene.cue, scene.colour, scene.pixel, scene.surface.Y
    side = across - cue["eye_x"]  # mirrored: both eyes are painted at once
    up = Y - cue["eye_y"] + cue["eye_tilt"] * side
    arch = (1 - (side / cue["eye_width"]) ** 2).clamp_(min=-0.3)
    upper = cue["eye_height"] * cue["lids"] * arch
    opening = _edge(up + upper, pixel) * _edge(0.75 * upper.clamp(max=0.05) - up, pixel)
    _blend(skin, opening, _grey(0.90))
    gaze = torch.copysign(cue["gaze_x"].abs(), scene.surface.X)
    gaze = gaze * torch.sign(cue["gaze_x"])
    squared = (side - gaze) ** 2 + (up + 0.012 - cue["gaze_y"]) ** 2
    _blend(skin, opening * _edge((1 - squared / cue["iris"] ** 2) * 0.035, pixel), colour["iris"])
    pupil = 0.45 * cue["iris"]
    _blend(skin, opening * _edge((1 - squared / pupil**2) * 0.015, pixel), _grey(0.04))
    lash = (1 - (up + upper).abs() * 38).clamp_(min=0) * _edge(arch + 0.1, 0.2)
    _blend(skin, lash * 0.75, _grey(0.10))
    fold = (1 - (up + upper + 0.045).abs() * 40).clamp_(min=0) * _edge(arch, 0.3)
    _blend(skin, fold * 0.35, colour["skin"] * 0.45)

    bend = cue["brow_slope"] * side - cue["brow_curve"] * (side - 0.03) ** 2
    line = Y - cue["eye_y"] + cue["brow_gap"] + bend + 0.06 * cue["frown"] * (side - 0.05)
    thick = cue["brow_thickness"].clamp(min=0.012) * (1 - 1.6 * side).clamp(0.5, 1.2)
    brow = _edge(thick - line.abs(), pixel) * _edge(cue["brow_length"] - side.abs(), pixel)
    tone = (0.75 + cue["brow_tone"]).clamp(0.4, 1.1).unsqueeze(1)
    _blend(skin, brow * 0.85, colour["hair"] * tone)


def _paint_hair(scene: _Scene, skin: Tensor, across: Tensor) -> Tensor:
    """Hair above the hairline and down the sides, sometimes a hat over it; returns its mask."""
    cue, colour, surface = scene.cue, scene.colour, scene.surface
    line = cue["hairline"] + 0.04 * cue["hair_now"] - surface.Y
    line += (cue["hair_curve"] * across + cue["hair_part"] + 2 * cue["hair_lie"]) * surface.X.mul(
        torch.sign(surface.X) * 0.6
    )
    line += (cue["hair_part"] + cue["hair_lie"]) * surface.X * 0.8
    hair = _edge(line, 0.05)
    side = _edge(0.20 + cue["hair_side"] - surface.Z, 0.08)
    hair = torch.maximum(hair, side * _edge(_hair_length(cue) - 0.1 - surface.Y, 0.1))
    strand = (surface.X * 7 + surface.Y * 2).frac_().abs_().sub_(0.5).abs_().mul_(0.36).add_(0.90)
    _blend(skin, hair, colour["hair"] * strand.unsqueeze(1))
    hat = ((cue["cover"] > 0.13) & (cue["cover"] < 0.16)).float()
    _blend(skin, hat * _edge(cue["hairline"] + 0.12 - surface.Y, 0.04), colour["cover"])
    return hair


def _paint_nose(scene: _Scene, image: Tensor, outline: Tensor) -> None:
    """The nose, in the head plane between its projected root and tip, as it rises from the head."""
    cue, surface, pixel = scene.cue, scene.surface, scene.pixel
    root, tip = (point.float().reshape(-1, 2, 1, 1) for point in nose_points(scene.raw, scene.turn))
    along_x, along_y = tip[:, 0] - root[:, 0], tip[:, 1] - root[:, 1]
    length = (along_x * along_x + along_y * along_y).sqrt()
    from_x, from_y = surface.x - root[:, 0], surface.y - root[:, 1]
    part = ((from_x * along_x + from_y * along_y) / (length * length)).clamp_(0, 1)
    beside = ((from_x - part * along_x) * along_y - (from_y - part * along_y) * along_x) / length
    beyond = (from_x - part * along_x) ** 2 + (from_y - part * along_y) ** 2
    width = cue["bridge_width"] + (cue["nose_width"] - cue["bridge_width"]) * part * part
    body = (1 - beyond / (width * width)).clamp_(min=0)
    lean = (0.55 * cue["light_x"] - 1.6 * along_x).clamp(-1, 1)
    relief = body * (beside / width) * lean * (0.45 + 0.55 * part) * 0.9
    flank = (1 - ((beside.abs() - width) / 0.05) ** 2).clamp_(min=0) * (part * (1 - part) * 2.4)
    ridge = (1 - beside.abs() / (0.8 * width)).clamp_(min=0) * body * part * 0.16
    change = (relief + ridge - 0.16 * flank) * outline
    image.mul_((1 + change).clamp_(0.35, 1.5).unsqueeze(1))

    off_x = (surface.x - tip[:, 0]).abs()
    off_y = surface.y - tip[:, 1]
    reach = cue["nose_width"]
    hole = ((off_x - 0.5 * reach) / (0.36 * reach)) ** 2 + ((off_y - 0.075) / 0.030) ** 2
    dark = _edge((1 - hole) * 0.03, pixel) * 0.55 * outline
    under = (off_x / (1.15 * reach)) ** 2 + ((off_y - 0.11) / 0.05) ** 2
    dark += (1 - under).clamp_(min=0) * 0.16 * outline
    wing = ((off_x - 0.95 * reach) / 0.035) ** 2 + ((off_y - 0.03) / 0.07) ** 2
    dark += (1 - wing).clamp_(min=0) * 0.30 * outline
    image.mul_((1 - dark).unsqueeze(1))


def _paint_in_front(scene: _Scene, image: Tensor, side: int) -> None:
    """Glasses, sunglasses and objects in front of the face."""
    cue, surface, pixel = scene.cue, scene.surface, scene.pixel
    across = surface.X.abs()
    wide, high = 0.215 + 0.02 * cue["glasses_shape"], 0.155 + 0.025 * cue["glasses_shape"]
    aside, down = across - cue["eye_x"] - 0.01, surface.Y - cue["eye_y"] - 0.015
    squared = (aside / wide) ** 2 + (down / high) ** 2
    rim = _edge(0.018 - (squared - 1).abs() * (0.5 * high), pixel)
    bar = _edge(0.016 - (down + 0.03).abs(), pixel) * _edge((squared - 1) * 0.1, pixel)
    worn = (cue["wear_glasses"] < (0.30 + 0.45 * cue["glasses"]).clamp(0.02, 0.92)).float()
    sun = ((cue["cover"] > 0.10) & (cue["cover"] < 0.13)).float()
    front = _edge(surface.inside, 0.1) * (surface.Z > 0)
    frame = torch.maximum(rim, bar) * torch.maximum(worn, sun) * front
    _blend(image, _edge((1 - squared) * 0.08, pixel) * (0.92 * sun * front), 0.10 * _RED)
    _blend(image, frame, _grey(0.10))

    ticks = ((torch.arange(side, dtype=torch.float32) + 0.5) / side - 0.5) * VIEW
    x, y = ticks.reshape(1, 1, side), ticks.reshape(1, side, 1)
    # a diamond of directions, without a sine
    towards_x = ((2 * cue["cover_angle"] - 1) * 1.9).clamp(-1, 1)
    towards_y = 1.05 - towards_x.abs()
    towards_y = torch.where(cue["collar"] < 0.3, -towards_y, towards_y)
    depth = towards_x * x + towards_y * y - (0.30 + 0.55 * cue["cover_reach"])
    band = _edge(depth, 0.05) * _edge(0.25 + 0.5 * cue["cover_size"] - depth, 0.05)
    _blend(image, band * (cue["cover"] < 0.10).float(), scene.colour["cover"])


def _expose(scene: _Scene, image: Tensor, seed: int, identities: Tensor, images: Tensor) -> Tensor:
    """Exposure, white balance, halving, blur, sensor noise, rounding: uint8 (N, 3, size, size)."""
    raw = scene.raw
    gain = torch.exp2(raw["exposure"]).unsqueeze(1)
    balance = torch.stack([1 + raw["warmth"], 1 + raw["tint"], 1 - raw["warmth"]], 1)
    image = image.clamp_(0, 1.2).mul_((245 * gain * balance).float().reshape(-1, 3, 1, 1))
    image = image[..., ::2] + image[..., 1::2]
    image = (image[:, :, ::2] + image[:, :, 1::2]).mul_(0.25)
    size = image.shape[-1]
    amount = ((scene.cue["blur"] - 0.35) * 2.0).clamp(0, 1).unsqueeze(1)
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    soft = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]).mul_(1 / 16)
    image = image + amount * (soft - image)
    grain = counter_uniform(seed, _STREAM_GRAIN, identities, images, draws=2 * 3 * size * size)
    grain = grain.reshape(len(identities), 2, 3, size, size).sum(1).sub_(1)
    image += grain * (18 * scene.cue["grain"] ** 2).unsqueeze(1)
    return image.clamp_(0, 255).round_().to(torch.uint8)
