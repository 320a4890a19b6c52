"""Reads the list files beside images: identities, landmarks, partitions, index tables.

.txt is CelebA's form (runs of spaces, CRLF; landmarks begin with a count and a header), .csv the
mirrors' (commas, a header). Blank lines and a byte order mark are ignored.
"""

import csv
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from kdtrain.config import DataConfig
from kdtrain.config.program import regular
from kdtrain.data.source import (
    LANDMARKS,
    DataError,
    FaceSource,
    Issues,
    decode_image,
    number_classes,
    probe_images,
)

FLOAT32_MAX = torch.finfo(torch.float32).max  # landmarks are stored in float32
POINT_COLUMNS = tuple(f"{point}_{axis}" for point in LANDMARKS for axis in "xy")


class Table(NamedTuple):
    """A list file: image name -> (line number, the other fields), and the names of these fields."""

    columns: list[str]
    rows: dict[str, tuple[int, list[str]]]


class Listed(NamedTuple):
    """An image of a source, and the file and line that list it."""

    identity: str
    path: Path
    where: str


def read_table(path: Path, issues: Issues, *, fields: int | None = None) -> Table:
    """Returns the Table in a list file.

    fields: number of fields after the image's name (None: as in the header). A header is a line
    without a number after its first field; a first line that is a lone integer is the row count.
    Raises DataError with file and line, or reports to `issues`, a wrong number of fields, a
    repeated image, or a wrong count.
    """
    try:
        text = regular(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot read this list: {error}") from error
    split: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            parts = _fields(line, f"{path}:{number}") if path.suffix == ".csv" else line.split()
            split.append((number, parts))

    announced = None
    if split and len(split[0][1]) == 1 and split[0][1][0].isdecimal():
        announced = (split[0][0], int(split[0][1][0]))
        split = split[1:]
    columns: list[str] = []
    if split and len(split[0][1]) > 1 and not any(_is_number(f) for f in split[0][1][1:]):
        first = split.pop(0)[1]
        # unlike a .csv header, CelebA's landmark header omits the image's column
        columns = first if len(first) == fields else first[1:]
    if fields is None:
        if not columns:
            raise DataError(f"{path}: expected a header line that names the columns")
        fields = len(columns)
    rows: dict[str, tuple[int, list[str]]] = {}
    for number, parts in split:
        if len(parts) != fields + 1:
            expected = f"expected an image and {fields} field(s)"
            issues.report(
                f"{path}:{number}: {expected}, got {len(parts)} in {' '.join(parts)[:80]!r}"
            )
        elif parts[0] in rows:
            issues.report(f"{path}:{number}: {parts[0]} is already on line {rows[parts[0]][0]}")
        else:
            rows[parts[0]] = (number, parts[1:])
    if announced is not None and announced[1] != len(split):
        issues.report(
            f"{path}:{announced[0]}: announces {announced[1]} rows, the file has {len(split)}"
        )
    return Table(columns=columns, rows=rows)


def read_points(path: Path, issues: Issues) -> dict[str, list[float]]:
    """Returns five landmarks per image: name -> 10 floats in POINT_COLUMNS' order.

    Columns are found by name if the header has all ten names, else by that order. Raises DataError
    as read_table, and for a field that is not a finite float32 number.
    """
    table = read_table(path, issues, fields=10)
    order = list(range(10))
    if set(POINT_COLUMNS) <= set(table.columns):
        order = [table.columns.index(column) for column in POINT_COLUMNS]
    points: dict[str, list[float]] = {}
    for name, (number, parts) in table.rows.items():
        wrong = [part for part in parts if not _is_number(part, FLOAT32_MAX)]
        if wrong:
            issues.report(
                f"{path}:{number}: expected 10 finite numbers of float32, got {wrong[0]!r}"
            )
        else:
            points[name] = [float(parts[k]) for k in order]
    return points


def assemble(
    config: DataConfig, listed: dict[str, Listed], point_file: Path | None, issues: Issues
) -> FaceSource:
    """Returns the FaceSource of listed images, after the checks that all file sources share.

    point_file: their landmark list. index.csv in data.root and the file that data.split names give
    their columns as splits, index.csv also the groups (column `video`, within an identity); the
    first column of each is the image's name. An image without file, landmarks or table row is an
    issue. With on_error "skip" every image is decoded once, so that the rest can be read.
    """
    points = None if point_file is None else read_points(point_file, issues)
    root = Path(config.root or "")
    files = {config.split.split(":")[1]} if config.split.startswith("file:") else set()
    if (root / "index.csv").exists():
        files.add("index.csv")
    tables = {
        file: read_table(root / file, issues, fields=1 if file.endswith(".txt") else None)
        for file in sorted(files)
    }
    needed = [(root / file, set(table.rows)) for file, table in tables.items()]
    if point_file is not None and points is not None:
        needed.append((point_file, set(points)))

    probed = probe_images(
        [image.path for image in listed.values()],
        full=config.on_error == "skip",
        workers=config.workers,
    )
    names: list[str] = []
    sizes: list[tuple[int, int]] = []
    for (name, (_, _, where)), size in zip(listed.items(), probed, strict=True):
        missing = [path for path, rows in needed if name not in rows]
        if isinstance(size, str):
            issues.report(f"{where}: {size}")
        elif missing:
            issues.report(f"{missing[0]}: no row for {name}, which is listed in {where}")
        else:
            names.append(name)
            sizes.append(size)
    if not names:
        problem = next(iter(issues.messages), f"{point_file or root} lists no image")
        raise DataError(f"{root}: no usable image; first problem: {problem}")

    identities = [listed[name].identity for name in names]
    labels, class_names = number_classes(identities)
    splits = {file: _columns(table, names) for file, table in tables.items()}
    videos = splits.get("index.csv", {}).get("video")
    groups = None
    if videos is not None:
        keys = list(zip(identities, videos, strict=True))
        number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
        groups = torch.tensor([number[key] for key in keys], dtype=torch.int64)
    landmarks = None
    if points is not None:  # the lists hold pixel indices; see FaceSource
        landmarks = torch.tensor([points[name] for name in names]).reshape(-1, 5, 2) + 0.5
    paths = [listed[name].path for name in names]
    return FaceSource(
        name=config.kind,
        names=names,
        labels=labels,
        class_names=class_names,
        landmarks=landmarks,
        sizes=torch.tensor(sizes, dtype=torch.int64),
        groups=groups,
        skipped=issues.messages,
        splits=splits,
        read=lambda image: decode_image(paths[image]),
    )


def _columns(table: Table, names: list[str]) -> dict[str, list[str]]:
    columns = table.columns or ["partition"]  # list_eval_partition.txt has no header
    return {column: [table.rows[name][1][k] for name in names] for k, column in enumerate(columns)}


def _fields(line: str, where: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line.strip()]))]
    except csv.Error as error:
        raise DataError(f"{where}: cannot read this line: {error}") from None


def _is_number(text: str, limit: float = sys.float_info.max) -> bool:
    try:
        return abs(float(text)) <= limit
    except ValueError:
        return False
