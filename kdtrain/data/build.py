"""From the data section of a config to the source that it describes."""

from __future__ import annotations

from kdtrain.config import DataConfig
from kdtrain.data.celeba import read_celeba
from kdtrain.data.folder import read_folder
from kdtrain.data.source import FaceSource
from kdtrain.data.synthetic.source import synthetic_faces


def build_source(config: DataConfig) -> FaceSource:
    """Returns the FaceSource that a config's data section describes (its attributes as in
    DataConfig).

    kind: "synthetic" (identities, images_per_identity, synthetic_seed, store_size), "celeba" or
    "folder" (root, landmark_file, split, on_error, workers). Raises DataError or ValueError naming
    what is missing or malformed.
    """
    if config.kind == "synthetic":
        if config.split.startswith("file:"):
            raise ValueError(
                f"data.split: synthetic faces have no split file, got {config.split!r}"
            )
        return synthetic_faces(
            identities=config.identities,
            images_per_identity=config.images_per_identity,
            seed=config.synthetic_seed,
            size=config.store_size,
        )
    readers = {"celeba": read_celeba, "folder": read_folder}
    if config.kind not in readers:
        raise ValueError(f"data.kind: expected synthetic, celeba or folder, got {config.kind!r}")
    if not config.root:
        raise ValueError(f"data.root: kind {config.kind!r} needs the folder of the pictures")
    split_file = config.split.split(":")[1] if config.split.startswith("file:") else None
    return readers[config.kind](
        config.root,
        landmark_file=config.landmark_file,
        split_file=split_file,
        on_error=config.on_error,
        workers=config.workers,
    )
