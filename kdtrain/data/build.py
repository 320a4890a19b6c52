"""Builds the source of a data section: synthetic faces, or image files in one of two layouts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from PIL import Image

from kdtrain.config import DataConfig
from kdtrain.data.lists import Listed, assemble, read_table
from kdtrain.data.source import DataError, FaceSource, Issues
from kdtrain.data.synthetic.source import synthetic_faces

NO_IDENTITIES = "unknown, as there is no identity_CelebA"
_NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow only identifies, or decodes by another program."""


def build_source(config: DataConfig) -> FaceSource:
    """Returns the FaceSource of a data section. Raises DataError or ValueError.

    celeba: img_align_celeba beside identity_CelebA and list_landmarks_align_celeba, .txt (CelebA's
    own) or .csv (mirrors); ids need not be contiguous. Without the identity list the landmark list
    names the images, and all are one identity, which serves task alignment alone. folder: as
    torchvision's ImageFolder.
    """
    if config.kind == "synthetic":
        return synthetic_faces(config)
    issues, root = Issues(on_error=config.on_error), Path(config.root or "")
    if config.kind == "celeba":
        listed, point_file = _celeba(root, config.landmark_file, issues)
    elif config.kind == "folder":
        listed = _folder(root, issues)
        point_file = None if config.landmark_file is None else root / config.landmark_file
    else:
        raise ValueError(f"build_source: no reader for data.kind {config.kind!r}")
    return assemble(config, listed, point_file, issues)


def _celeba(
    root: Path, landmark_file: str | None, issues: Issues
) -> tuple[dict[str, Listed], Path | None]:
    """The images of CelebA's layout and the landmark list; without identities all are of one."""
    identity_file = list_file(root, "identity_CelebA")
    points = list_file(root, "list_landmarks_align_celeba")
    if landmark_file is not None:
        points = root / landmark_file
        if not points.exists():
            raise DataError(f"{points}: no such landmark file (data.landmark_file)")
    if identity_file is None and points is None:
        raise DataError(
            f"{root}: expected identity_CelebA.txt or identity_CelebA.csv in this folder (task "
            "alignment needs a landmark list alone)"
        )
    folder = root / "img_align_celeba"
    if (folder / "img_align_celeba").is_dir():  # as one mirror's archive has it
        folder = folder / "img_align_celeba"
    if not folder.is_dir():
        raise DataError(f"{root}: expected the images in the folder img_align_celeba")

    listed = {}
    if identity_file is None:
        assert points is not None
        bad_rows = Issues(on_error="skip")  # `assemble` reads the file again and reports them
        for name, (number, _) in read_table(points, bad_rows, fields=10).rows.items():
            listed[name] = Listed(NO_IDENTITIES, folder / name, f"{points}:{number}")
    else:
        for name, (number, parts) in read_table(identity_file, issues, fields=1).rows.items():
            where = f"{identity_file}:{number}"
            if parts[0].isdecimal():
                listed[name] = Listed(str(int(parts[0])), folder / name, where)
            else:
                issues.report(f"{where}: expected an integer identity for {name}, got {parts[0]!r}")
    _leave_out(folder, listed, f"not in {identity_file or points}", issues)
    return listed, points


def list_file(root: Path, stem: str) -> Path | None:
    """Returns root/stem.txt or else root/stem.csv; None where neither exists."""
    return next((p for p in (root / f"{stem}.txt", root / f"{stem}.csv") if p.exists()), None)


def _folder(root: Path, issues: Issues) -> dict[str, Listed]:
    """Returns the images root/<identity>/<image>, sorted; other files are skipped by name."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    listed = {}
    for folder in _visible(root):
        if not folder.is_dir():
            if folder.suffix.lower() in _suffixes():
                reason = "expected root/<identity>/<image>, got an image directly in data.root"
                issues.messages.append(f"{folder}: {reason}")
            continue
        files = [p for p in _visible(folder) if p.suffix.lower() in _suffixes()]
        if not files:
            issues.report(f"{folder}: no image in this identity's folder")
        own = {path.name: Listed(folder.name, path, str(folder)) for path in files}
        listed |= {f"{folder.name}/{name}": image for name, image in own.items()}
        reason = "not an image (by its suffix), or a folder inside an identity's folder"
        _leave_out(folder, own, reason, issues)
    return listed


def _leave_out(folder: Path, taken: Mapping[str, Listed], reason: str, issues: Issues) -> None:
    """Counts and names everything else in `folder`, for any data.on_error."""
    left = [path for path in _visible(folder) if path.name not in taken]
    issues.messages.extend(f"{path}: {reason}" for path in left)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


@cache
def _suffixes() -> frozenset[str]:
    """Suffixes of the image formats that Pillow reads."""
    known = Image.registered_extensions().items()
    return frozenset(s for s, name in known if name in Image.OPEN and name not in _NOT_DECODED)
