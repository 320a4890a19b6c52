"""Geometry of a synthetic face: head ellipsoid, pose, projection, and its inverse per pixel.

The head is an ellipsoid with half axes (head_width, 1, head_depth), seen orthographically. Object
axes: X to the viewer's right, Y down, Z to the viewer. object -> screen: rotate by yaw and pitch,
narrow the jaw, roll, zoom, shift. Everything painted on the face is addressed by the (X, Y) of the
surface point, so a landmark is exactly where its feature is drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VIEW = 2.15  # side of an image, in head units


def plane(values: Tensor) -> Tensor:
    """Returns (N, 1, 1) float32 of one value per image, (N,) float64."""
    return values.float().reshape(-1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """The surface at each pixel of (N, H, H).

    x, y: head-plane coordinates (roll, zoom, shift and jaw undone). inside: the discriminant,
    positive within the head's outline, where it falls by about 2 / half width per unit of length.
    X, Y, Z: the surface point in object coordinates, meaningless outside.
    """

    x: Tensor
    y: Tensor
    inside: Tensor
    X: Tensor
    Y: Tensor
    Z: Tensor


def rotation(face: dict[str, Tensor]) -> Tensor:
    """Returns (N, 3, 3) float64 rotations object -> view: yaw about Y, then pitch about X."""
    sy, cy = torch.sin(face["yaw_rad"]), torch.cos(face["yaw_rad"])
    sp, cp = torch.sin(face["pitch_rad"]), torch.cos(face["pitch_rad"])
    zero = torch.zeros_like(sy)
    rows = (cy, zero, sy, sp * sy, cp, -sp * cy, -cp * sy, sp, cp * cy)
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def turn_vectors(vectors: Tensor, turn: Tensor) -> Tensor:
    """Returns R v, (N, V, 3), of vectors v (N, V, 3) and rotations R (N, 3, 3).

    Not as a matrix product, whose last bit may depend on the batch.
    """
    return (turn.unsqueeze(1) * vectors.unsqueeze(2)).sum(-1)


def jaw_width(y: Tensor, taper: Tensor, jaw: Tensor) -> Tensor:
    """Returns the factor on the head's width at height y; `jaw` makes it square."""
    low = y.clamp(0, 1.1)
    square = low * low
    return 1 - taper * square + jaw * square * (1.1 - low)


def surface_points(face: dict[str, Tensor], X: Tensor, Y: Tensor) -> Tensor:
    """Returns object points (N, 3) on the front of the head at (X, Y), float64."""
    depth = 1 - (X / face["head_width"]) ** 2 - Y**2
    return torch.stack([X, Y, face["head_depth"] * depth.clamp(min=1e-3).sqrt()], -1)


def project_to_head_plane(points: Tensor, turn: Tensor) -> Tensor:
    """Returns (N, 2) head-plane coordinates of object points (N, 3): the rotation alone."""
    return turn_vectors(points.unsqueeze(1), turn)[:, 0, :2]


def project_to_image(points: Tensor, face: dict[str, Tensor], size: int) -> Tensor:
    """Returns (N, 2) pixel coordinates (pixel i spans [i, i + 1)) of head-plane points (N, 2)."""
    x, y = points.unbind(-1)
    x = x * jaw_width(y, face["taper"], face["jaw"])
    s, c = torch.sin(face["roll_rad"]), torch.cos(face["roll_rad"])
    screen_x = face["zoom"] * (c * x - s * y) + face["shift_x"]
    screen_y = face["zoom"] * (s * x + c * y) + face["shift_y"]
    return (torch.stack([screen_x, screen_y], -1) / VIEW + 0.5) * size


def mouth_corner(face: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns (half width, height of the corners) of the mouth in object coordinates."""
    width = face["mouth_width"] * (1 + 0.13 * face["smile"] - 0.06 * face["open"].clamp(min=0))
    return width, face["mouth_y"] - 0.035 * face["smile"]


def nose_points(face: dict[str, Tensor], turn: Tensor) -> tuple[Tensor, Tensor]:
    """Returns head-plane (N, 2) positions of the nose's root and of its tip."""
    zero = torch.zeros_like(face["nose_y"])
    lift = torch.stack([zero, zero, face["nose_length"]], -1)
    root = surface_points(face, zero, face["eye_y"] - 0.02) + 0.25 * lift
    tip = surface_points(face, zero, face["nose_y"]) + lift
    return project_to_head_plane(root, turn), project_to_head_plane(tip, turn)


def landmarks(face: dict[str, Tensor], size: int) -> Tensor:
    """Returns the five points (N, 5, 2), float64 pixel coordinates, in FaceSource's order."""
    turn = rotation(face)
    width, corner_y = mouth_corner(face)
    on_surface = [
        surface_points(face, -face["eye_x"], face["eye_y"]),
        surface_points(face, face["eye_x"], face["eye_y"]),
        surface_points(face, -width, corner_y),
        surface_points(face, width, corner_y),
    ]
    in_plane = [project_to_head_plane(point, turn) for point in on_surface]
    in_plane.insert(2, nose_points(face, turn)[1])
    return torch.stack([project_to_image(point, face, size) for point in in_plane], 1)


def trace(face: dict[str, Tensor], turn: Tensor, side: int) -> Surface:
    """Returns the Surface at each pixel of a side x side grid, float32.

    With P = R^T (x, y, t) on the ellipsoid P^T D^-2 P = 1 and M = R D^-2 R^T:
        M33 t^2 + 2 (M13 x + M23 y) t + (M11 x^2 + 2 M12 x y + M22 y^2 - 1) = 0,
    the larger root is the visible one.
    Elementwise arithmetic and square roots only: bitwise identical in any batch.
    """
    axes = torch.stack(
        [face["head_width"], torch.ones_like(face["head_width"]), face["head_depth"]], -1
    )
    form = turn_vectors(turn / axes[:, None] ** 2, turn)

    ticks = ((torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5) * VIEW
    screen_x = ticks.float().reshape(1, 1, side) - plane(face["shift_x"])
    screen_y = ticks.float().reshape(1, side, 1) - plane(face["shift_y"])
    s = plane(torch.sin(face["roll_rad"]) / face["zoom"])
    c = plane(torch.cos(face["roll_rad"]) / face["zoom"])
    y = c * screen_y - s * screen_x
    x = (c * screen_x + s * screen_y) / jaw_width(y, plane(face["taper"]), plane(face["jaw"]))

    linear = plane(form[:, 0, 2]) * x + plane(form[:, 1, 2]) * y
    rest = (plane(form[:, 0, 0]) * x + plane(2 * form[:, 0, 1]) * y) * x
    rest += plane(form[:, 1, 1]) * y * y
    inside = linear * linear - plane(form[:, 2, 2]) * (rest - 1)
    depth = (inside.clamp(min=0).sqrt() - linear) / plane(form[:, 2, 2])
    X, Y, Z = (
        plane(turn[:, 0, k]) * x + plane(turn[:, 1, k]) * y + plane(turn[:, 2, k]) * depth
        for k in range(3)
    )
    return Surface(x=x, y=y, inside=inside, X=X, Y=Y, Z=Z)
