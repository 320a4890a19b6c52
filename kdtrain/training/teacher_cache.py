"""Teacher outputs of training batches, cached on disk for every student with the same batches.

Crops, flips and the order of images are pure functions of the seed and the epoch, so students of
one seed need the same outputs; the first one stores them as it trains. A subfolder belongs to one
owner: a teacher, its images, crops and environment (`owner_of`). It has a file per output (logits,
hidden), phase, epoch and order of images:

    header   4,096 bytes of JSON: the owner and the file's place
    table    8 bytes per batch: the dtype of its block (0: missing) and the CRC-32 of both
    blocks   one per batch, rows in the order of the batch, float32 or float16

Whole batches are cached, not images: the last bits of a convolution may depend on the number of
images computed together (measured: 64 and 200 agree, 7 does not), so only the output of the same
batch is bitwise identical to the teacher's forward pass.

Several processes may fill a file at once: each writes a block, then its table entry, and all write
the same bytes. A block is valid only with a matching checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdtrain.config import Config
from kdtrain.data.run_data import RunData
from kdtrain.objectives.targets import Guide
from kdtrain.training import checkpoint
from kdtrain.training.checkpoint import amount
from kdtrain.training.environment import environment
from kdtrain.training.keys import source_hash

FORMAT = 2
HEADER_BYTES = 4096
ENTRY = struct.Struct("<II")  # code of the output's dtype; CRC-32 of the block, starting from it
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
STORED = {"float32": torch.float32, "float16": torch.float16}


class CacheError(RuntimeError):
    """Outputs that cannot be cached; the message states the reason and the remedy."""


@contextlib.contextmanager
def using(path: Path, size: int = 0) -> Iterator[None]:
    """Turns an OSError of reading, or writing `size` bytes of, a file into a CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"teacher.cache: {path} cannot be used: {checkpoint.refusal(path, error, size)}; make "
            "room there, set teacher.cache_dir to another folder, or teacher.cache to none"
        ) from None


def owner_of(config: Config, data: RunData, teacher: nn.Module) -> dict[str, Any]:
    """Returns all that a batch's teacher output depends on, beside phase, epoch and images."""
    digest = hashlib.sha256(repr(teacher).encode())
    for name, tensor in teacher.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    train, computing = config.train, environment(config)
    return {
        "teacher": digest.hexdigest(),
        "data": data.key,
        "store_size": config.data.store_size,
        "crop_size": config.data.crop_side,
        "input_size": config.teacher_side,
        "augment": dataclasses.asdict(config.augment),
        "seed": config.seed,
        "sources": source_hash(),
        "precision": train.precision,
        "channels_last": train.channels_last,
        "compile": train.compile,
        "deterministic": train.deterministic,
        "simd": torch.backends.cpu.get_cpu_capability(),
        **{name: computing[name] for name in ("torch", "threads", "device")},
    }


class OwnedFiles:
    """The cache files of one owner."""

    def __init__(
        self,
        folder: Path,
        owner: Mapping[str, Any],
        dtype: str,
        device: torch.device | str,
        say: Callable[[str], None],
    ) -> None:
        """owner: of `owner_of`. dtype: float32 or float16. device: of the outputs."""
        self.owner, self.dtype, self.device, self.say = owner, dtype, torch.device(device), say
        name = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name

    def check_room(self, values: Mapping[str, int]) -> None:
        """Logs the size of the files of these patterns, given their numbers of values; files of
        another student need no more room. Raises CacheError where the disk is too small.
        """
        sizes = {p: count * STORED[self.dtype].itemsize for p, count in values.items()}
        total = sum(sizes.values())
        there = [p for p in sizes if any(self.folder.glob(f"{p}.{self.dtype}"))]
        missing = total - sum(sizes[p] for p in there)
        with using(self.folder, missing):
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.sweep(self.folder.parent, "*/.*.tmp")
            free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise CacheError(
                f"teacher.cache {self.dtype}: {amount(missing)} more are needed in {self.folder} "
                f"and {amount(free)} are free; set teacher.cache none, or teacher.cache_dir to a "
                "folder on a larger disk"
            )
        cached = f", {amount(total - missing)} of it cached already" if there else ""
        self.say(f"teacher cache: {amount(total)} in {self.folder}{cached}")


class TeacherCache:
    """The teacher outputs of one run's batches, an epoch at a time."""

    def __init__(self, files: OwnedFiles, widths: Mapping[str, int]) -> None:
        """widths: values per image of each cached output ("logits", "hidden")."""
        self.files, self.widths = files, widths
        self.read = self.computed = 0
        self._open: dict[str, CacheFile] = {}

    def reserve(self, images: int, phases: Sequence[int]) -> None:
        """Logs and checks the room for a run. images: rows per epoch; phases: epochs of each."""
        places = [_place(phase, e) for phase, epochs in enumerate(phases) for e in range(epochs)]
        self.files.check_room(
            {f"{p}_*.{part}": images * w for part, w in self.widths.items() for p in places}
        )

    def open(self, phase: int, epoch: int, batches: Sequence[Tensor]) -> None:
        """Opens the files of an epoch. batches: its index lists, (B,) int64 each."""
        self.close()
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(struct.pack("<q", len(batch)) + batch.numpy().tobytes())
        order = digest.hexdigest()
        sizes = [len(batch) for batch in batches]
        for part, width in self.widths.items():
            name = f"{_place(phase, epoch)}_{order[:8]}.{part}"
            belongs = {"phase": phase, "epoch": epoch, "order": order, "part": part}
            self._open[part] = CacheFile(self.files, name, belongs, sizes, width)

    def guide(
        self, batch: int, compute: Callable[[], Guide], flipped: Tensor | None = None
    ) -> Guide:
        """Returns the cached outputs of batch number `batch`, else computes and caches them,
        rounded in float16 like cached ones. flipped: only for ViewCache.
        """
        cached = {part: file.get(batch) for part, file in self._open.items()}
        found = {part: v.to(self.files.device) for part, v in cached.items() if v is not None}
        if len(found) == len(cached):
            self.read += 1
        else:
            self.computed += 1
            fresh = compute()
            found = {part: f.put(batch, getattr(fresh, part)) for part, f in self._open.items()}
        return Guide(found.get("logits"), found.get("hidden"))

    def summary(self) -> str:
        """Returns a line with the numbers of cached and computed batches."""
        return f"teacher cache: {self.read} batches read, {self.computed} computed"

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open = {}


class CacheFile:
    """One teacher output of the batches of one epoch, or of groups of images."""

    def __init__(
        self,
        files: OwnedFiles,
        name: str,
        belongs: Mapping[str, Any],
        sizes: Sequence[int],
        width: int,
    ) -> None:
        """belongs: entries of the header beside the owner. sizes: rows of each batch or group."""
        self.path, self.say = files.folder / f"{name}.{files.dtype}", files.say
        self.sizes, self.width, self.dtype = sizes, width, STORED[files.dtype]
        shape = {"width": width, "dtype": files.dtype}
        header = json.dumps({"format": FORMAT, **belongs, **shape, **files.owner}).encode()
        assert len(header) <= HEADER_BYTES, "a longer header needs more room"
        blocks = [size * width * self.dtype.itemsize for size in sizes]
        begin = HEADER_BYTES + ENTRY.size * len(sizes)
        *self.places, end = accumulate(blocks, initial=begin)
        with using(self.path, end):
            self.fd = self._open(header.ljust(HEADER_BYTES), end)
        self.complained = False

    def get(self, batch: int) -> Tensor | None:
        """Returns the cached output (B, width) in the teacher's dtype, or None."""
        table = bytearray(ENTRY.size)
        with using(self.path):
            _read(self.fd, memoryview(table), HEADER_BYTES + ENTRY.size * batch)
        code, checksum = ENTRY.unpack(table)
        if code == 0:
            return None
        # allocated by torch, so that it is aligned in memory like a computed one
        value = torch.empty(self.sizes[batch], self.width, dtype=self.dtype)
        content = _bytes(value)
        with using(self.path):
            whole = _read(self.fd, content, self.places[batch])
        if code not in DTYPES or not whole or zlib.crc32(content, code) != checksum:
            if not self.complained:
                text = f"the output of batch {batch} is damaged and computed again"
                self.say(f"teacher cache: {self.path}: {text}")
            self.complained = True
            return None
        return value.to(DTYPES[code])

    def put(self, batch: int, output: Tensor) -> Tensor:
        """Stores an output (B, width); returns it as `get` will. Raises CacheError."""
        codes = [code for code, dtype in DTYPES.items() if dtype == output.dtype]
        expected = (self.sizes[batch], self.width)
        if not codes or output.shape != expected:
            raise CacheError(
                f"teacher.cache: the output of batch {batch} should be {expected} of 16 or 32 "
                f"bits, got {tuple(output.shape)} {output.dtype}; set teacher.cache none"
            )
        stored = output.detach().to("cpu", self.dtype).contiguous()
        if self.dtype == torch.float16 and bool((stored.isinf() & output.cpu().isfinite()).any()):
            raise CacheError(
                f"teacher.cache float16: an output of {output.abs().max().item():.3g} is above its "
                "largest number (65504); set teacher.cache float32"
            )
        content = _bytes(stored)
        entry = ENTRY.pack(codes[0], zlib.crc32(content, codes[0]))
        with using(self.path, len(content)):
            _write(self.fd, content, self.places[batch])
            # the entry last: a block without an entry is missing
            _write(self.fd, memoryview(entry), HEADER_BYTES + ENTRY.size * batch)
        return stored.to(output.device, output.dtype)

    def close(self) -> None:
        os.close(self.fd)

    def _open(self, header: bytes, size: int) -> int:
        """Opens the file of this header and size; replaces any other in its place."""
        for replace in (False, True):
            if replace or not self.path.exists():
                # of two processes at once the later one wins; the other writes to a removed file
                with checkpoint.replacing(self.path, sync=False) as file:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
                    file.write(header)
            fd = os.open(self.path, os.O_RDWR)
            found = bytearray(HEADER_BYTES)
            _read(fd, memoryview(found), 0)
            if found == header and os.fstat(fd).st_size == size:
                return fd
            os.close(fd)
            self.say(f"teacher cache: {self.path} has another header or size and is replaced")
        raise OSError(f"{self.path.name} changes while it is opened")


def _place(phase: int, epoch: int) -> str:
    return f"phase{phase}_epoch{epoch:03d}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().reshape(-1).data.cast("B")


def _read(fd: int, into: memoryview, offset: int) -> bool:
    """Fills `into`; False if the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _write(fd: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset + done)
