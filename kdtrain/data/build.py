"""From the data section of a config to the source that it describes: synthetic faces, or images
in one of two layouts.
"""

from __future__ import annotations

from pathlib import Path

from kdtrain.config import DataConfig
from kdtrain.data.lists import Listed, assemble, read_table
from kdtrain.data.source import DataError, FaceSource, Issues
from kdtrain.data.synthetic.source import synthetic_faces

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def build_source(config: DataConfig) -> FaceSource:
    """Returns the FaceSource that a config's data section describes. Raises DataError or ValueError
    naming what is missing or malformed.
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
    """The images of a folder in CelebA's layout, and the file of their landmarks:
    img_align_celeba beside identity_CelebA and list_landmarks_align_celeba; lists may be .txt
    (CelebA's own) or .csv (the mirrors').

    The identity list decides which images there are; ids need not be contiguous.
    """
    identity_file = _list_file(root, "identity_CelebA")
    if identity_file is None:
        raise DataError(
            f"{root}: expected identity_CelebA.txt or identity_CelebA.csv in this folder"
        )
    folder = root / "img_align_celeba"
    if (folder / "img_align_celeba").is_dir():  # one mirror's archive nests the folder in itself
        folder = folder / "img_align_celeba"
    if not folder.is_dir():
        raise DataError(f"{root}: expected the images in the folder img_align_celeba")

    listed = {}
    for name, (number, parts) in read_table(identity_file, issues, fields=1).rows.items():
        where = f"{identity_file}:{number}"
        if parts[0].isdecimal():
            listed[name] = Listed(str(int(parts[0])), folder / name, where)
        else:
            issues.report(f"{where}: expected an integer identity for {name}, got {parts[0]!r}")
    if landmark_file is None:
        return listed, _list_file(root, "list_landmarks_align_celeba")
    if not (root / landmark_file).exists():
        raise DataError(f"{root / landmark_file}: no such landmark file (data.landmark_file)")
    return listed, root / landmark_file


def _list_file(root: Path, stem: str) -> Path | None:
    """root/stem.txt or root/stem.csv, whichever is there first."""
    return next((p for p in (root / f"{stem}.txt", root / f"{stem}.csv") if p.exists()), None)


def _folder(root: Path, issues: Issues) -> dict[str, Listed]:
    """The images root/<identity>/<image>, in sorted order; other files and hidden ones are
    ignored. A folder without an image is an issue, as torchvision's ImageFolder has it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    listed = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(
            p
            for p in folder.iterdir()
            if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
        )
        if not files:
            issues.report(f"{folder}: no image in this identity's folder")
        for path in files:
            listed[f"{folder.name}/{path.name}"] = Listed(folder.name, path, str(folder))
    return listed
