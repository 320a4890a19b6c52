"""ImageFolder's layout: root/<identity>/<picture>."""

from pathlib import Path

from kdtrain.data.lists import assemble, read_points
from kdtrain.data.source import DataError, FaceSource, Issues

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"})


def read_folder(
    root: str | Path,
    *,
    landmark_file: str | None = None,
    split_file: str | None = None,
    on_error: str = "raise",
    workers: int = 0,
) -> FaceSource:
    """Returns the FaceSource of root/<identity>/<picture>, in sorted order; other files and hidden
    ones are ignored.

    landmark_file and split_file name tables within root whose first column is
    "<identity>/<picture>". A folder without a picture is an issue, as torchvision's ImageFolder has
    it. Raises DataError naming the file.
    """
    issues = Issues(on_error=on_error)
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (data.root)")
    pictures = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        files = sorted(
            p
            for p in folder.iterdir()
            if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")
        )
        if not files:
            issues.report(f"{folder}: no picture in this identity's folder")
        for path in files:
            pictures[f"{folder.name}/{path.name}"] = (folder.name, path, str(folder))
    points = None
    if landmark_file is not None:
        points = (root / landmark_file, read_points(root / landmark_file, issues))
    return assemble(
        "folder",
        root,
        pictures,
        points=points,
        split_file=split_file,
        issues=issues,
        workers=workers,
    )
