"""CelebA's layout: img_align_celeba/*.jpg beside identity_CelebA, list_landmarks_align_celeba,
list_eval_partition.
"""

from pathlib import Path

from kdtrain.data.lists import assemble, find_list, read_points, read_table
from kdtrain.data.source import DataError, FaceSource, Issues


def read_celeba(
    root: str | Path,
    *,
    landmark_file: str | None = None,
    split_file: str | None = None,
    on_error: str = "raise",
    workers: int = 0,
) -> FaceSource:
    """Returns the FaceSource of a folder in CelebA's layout; lists may be .txt (CelebA's own) or
    .csv (the mirrors').

    The identity list decides which pictures there are; ids need not be contiguous. Landmarks come
    from landmark_file (a name within root), else from list_landmarks_align_celeba if it is there.
    list_eval_partition and index.csv, where present, can be named by data.split. Raises DataError
    naming file and line; on_error "skip" leaves the picture out.
    """
    issues = Issues(on_error=on_error)
    root = Path(root)
    identity_file = find_list(root, "identity_CelebA")
    if identity_file is None:
        raise DataError(
            f"{root}: expected identity_CelebA.txt or identity_CelebA.csv in this folder"
        )
    folder = root / "img_align_celeba"
    if (folder / "img_align_celeba").is_dir():  # one mirror's archive nests the folder in itself
        folder = folder / "img_align_celeba"
    if not folder.is_dir():
        raise DataError(f"{root}: expected the pictures in the folder img_align_celeba")

    pictures = {}
    for name, (number, parts) in read_table(identity_file, issues, fields=1).rows.items():
        where = f"{identity_file}:{number}"
        if parts[0].isdecimal():
            pictures[name] = (str(int(parts[0])), folder / name, where)
        else:
            issues.report(f"{where}: expected an integer identity for {name}, got {parts[0]!r}")

    if landmark_file is not None:
        point_file = root / landmark_file
        if not point_file.exists():
            raise DataError(f"{point_file}: no such landmark file (data.landmark_file)")
    else:
        point_file = find_list(root, "list_landmarks_align_celeba")
    points = None if point_file is None else (point_file, read_points(point_file, issues))
    return assemble(
        "celeba",
        root,
        pictures,
        points=points,
        split_file=split_file,
        issues=issues,
        workers=workers,
    )
