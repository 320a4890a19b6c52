"""A teacher's answers to training batches, kept on disk for every student that meets them too.

Crops and flips are a pure function of (seed, phase, epoch, image), and the order of images of
(seed, epoch). So students of one seed ask one teacher the same questions, and the first to ask
stores the answer: there is no pass of its own for it, and nothing is computed that nobody reads.

A folder below the cache's belongs to one teacher, its images, crops and computing (`identity`).
In it is one file for each output (logits, hidden), phase, epoch and order of images:

    header   4,096 bytes of JSON: what the answers belong to
    table    8 bytes a batch: how to read its block (0: not there yet) and the CRC-32 of both
    blocks   one a batch, its rows in the order of the batch, float32 or float16

Whole batches are kept, not images: the last bits of a convolution may depend on how many images
are computed together (measured: 64 or 200 together agree, 7 do not), so only the answer to the very
same batch is what the teacher would say online, bit for bit.

Any number of processes may fill a file at once: each writes a block and then its table entry, and
all write the same bytes. A block counts only where its checksum stands, so neither a process killed
between the two writes nor a machine that lost some of them leaves an answer that is wrong.
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
ENTRY = struct.Struct("<II")  # code of the answer's dtype, CRC-32 of the block begun with the code
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16}
STORED = {"float32": torch.float32, "float16": torch.float16}


class CacheError(RuntimeError):
    """Answers that cannot be kept; the message says why and what to do."""


@contextlib.contextmanager
def using(path: Path, size: int = 0) -> Iterator[None]:
    """Around reading a file of the cache, or writing `size` bytes to it. Raises CacheError."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            f"teacher.cache: {path} cannot be used: {checkpoint.refusal(path, error, size)}; make "
            "room there, set teacher.cache_dir to another folder, or teacher.cache to none"
        ) from None


def identity(config: Config, data: RunData, teacher: nn.Module) -> dict[str, Any]:
    """What the answer to a batch depends on, beside phase, epoch and the images in it."""
    # what is computed with the weights, the order of colours too
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
    """The files of one owner in the cache."""

    def __init__(
        self,
        folder: Path,
        owner: Mapping[str, Any],
        dtype: str,
        device: torch.device | str,
        say: Callable[[str], None],
    ) -> None:
        """folder: holds the folders of all teachers. owner: what `identity` gives. dtype: float32,
        or float16. device: where answers are wanted. say: takes lines to print.
        """
        self.owner, self.dtype, self.device, self.say = owner, dtype, torch.device(device), say
        name = hashlib.sha256(json.dumps(owner, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / name

    def check_room(self, values: Mapping[str, int]) -> None:
        """Say once how much room the files of these patterns take, by the values of each; those
        that another student kept already take none. Raises CacheError where the disk has it not.
        """
        total = missing = 0
        for pattern, count in values.items():
            size = count * STORED[self.dtype].itemsize
            total += size
            missing += 0 if any(self.folder.glob(f"{pattern}.{self.dtype}")) else size
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
        there = f", {amount(total - missing)} of it there already" if missing < total else ""
        self.say(f"teacher's answers: {amount(total)} in {self.folder}{there}")


class TeacherCache:
    """The answers of one teacher to the batches of one run, an epoch at a time."""

    def __init__(self, files: OwnedFiles, widths: Mapping[str, int]) -> None:
        """widths: which outputs are kept ("logits", "hidden"), and their values an image."""
        self.files, self.widths = files, widths
        self.read = self.computed = 0
        self._open: dict[str, KeptFile] = {}

    def reserve(self, images: int, phases: Sequence[int]) -> None:
        """Say once how much room a whole run takes. Raises CacheError where the disk has it not.

        images: rows of an epoch; phases: epochs of each.
        """
        places = [_place(phase, e) for phase, epochs in enumerate(phases) for e in range(epochs)]
        self.files.check_room(
            {f"{p}_*.{part}": images * w for part, w in self.widths.items() for p in places}
        )

    def open(self, phase: int, epoch: int, batches: Sequence[Tensor]) -> None:
        """Turn to an epoch. batches: its index lists, (B,) int64 each."""
        self.close()
        digest = hashlib.sha256()
        for batch in batches:
            digest.update(struct.pack("<q", len(batch)) + batch.numpy().tobytes())
        order = digest.hexdigest()
        sizes = [len(batch) for batch in batches]
        for part, width in self.widths.items():
            name = f"{_place(phase, epoch)}_{order[:8]}.{part}"
            belongs = {"phase": phase, "epoch": epoch, "order": order, "part": part}
            self._open[part] = KeptFile(self.files, name, belongs, sizes, width)

    def guide(
        self, batch: int, ask: Callable[[], Guide | None], flipped: Tensor | None = None
    ) -> Guide:
        """The answer to batch number `batch` of the epoch: the kept one, else the teacher's own,
        which is kept. Only outputs that are kept are in it. flipped: of no use here, as the place
        of a batch says how its images lie.

        In float16 a fresh answer is rounded too, so that it does not matter who asked first.
        """
        kept = {part: file.get(batch) for part, file in self._open.items()}
        found = {part: v.to(self.files.device) for part, v in kept.items() if v is not None}
        if len(found) == len(kept):
            self.read += 1
        else:
            self.computed += 1
            fresh = ask()
            assert fresh is not None
            found = {part: f.put(batch, getattr(fresh, part)) for part, f in self._open.items()}
        return Guide(found.get("logits"), found.get("hidden"))

    def summary(self) -> str:
        """How often the teacher was asked."""
        return f"teacher's answers: {self.read} batches read, {self.computed} computed"

    def close(self) -> None:
        """Let go of the epoch's files."""
        for file in self._open.values():
            file.close()
        self._open = {}


class KeptFile:
    """One output of the teacher for the batches of one epoch, or for groups of images."""

    def __init__(
        self,
        files: OwnedFiles,
        name: str,
        belongs: Mapping[str, Any],
        sizes: Sequence[int],
        width: int,
    ) -> None:
        """belongs: what the header says beside the owner. sizes: rows of each batch or group."""
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
        """The kept answer (B, width) in the dtype that the teacher gave it, or None."""
        table = bytearray(ENTRY.size)
        with using(self.path):
            _read(self.fd, memoryview(table), HEADER_BYTES + ENTRY.size * batch)
        code, checksum = ENTRY.unpack(table)
        if code == 0:
            return None
        # a tensor of torch's own, so that the kept answer lies in memory as a fresh one does
        value = torch.empty(self.sizes[batch], self.width, dtype=self.dtype)
        content = _bytes(value)
        with using(self.path):
            whole = _read(self.fd, content, self.places[batch])
        if code not in DTYPES or not whole or zlib.crc32(content, code) != checksum:
            if not self.complained:
                text = f"the answer to batch {batch} is damaged and is computed again"
                self.say(f"teacher's answers: {self.path}: {text}")
            self.complained = True
            return None
        return value.to(DTYPES[code])

    def put(self, batch: int, answer: Tensor) -> Tensor:
        """Keep an answer (B, width); returns it as `get` will. Raises CacheError."""
        codes = [code for code, dtype in DTYPES.items() if dtype == answer.dtype]
        expected = (self.sizes[batch], self.width)
        if not codes or answer.shape != expected:
            raise CacheError(
                f"teacher.cache: the answer to batch {batch} should be {expected} of 16 or 32 "
                f"bits, got {tuple(answer.shape)} {answer.dtype}; set teacher.cache none"
            )
        kept = answer.detach().to("cpu", self.dtype).contiguous()
        if self.dtype == torch.float16 and bool((kept.isinf() & answer.cpu().isfinite()).any()):
            raise CacheError(
                f"teacher.cache float16: an answer of {answer.abs().max().item():.3g} is more than "
                "it can hold (65504); set teacher.cache float32"
            )
        content = _bytes(kept)
        entry = ENTRY.pack(codes[0], zlib.crc32(content, codes[0]))
        with using(self.path, len(content)):
            _write(self.fd, content, self.places[batch])
            # the entry comes last: a block without one is not there
            _write(self.fd, memoryview(entry), HEADER_BYTES + ENTRY.size * batch)
        return kept.to(answer.device, answer.dtype)

    def close(self) -> None:
        os.close(self.fd)

    def _open(self, header: bytes, size: int) -> int:
        """The file of this header and size; another in its place is replaced."""
        for replace in (False, True):
            if replace or not self.path.exists():
                # of two makers at once the later wins; the other keeps its answers for itself
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
            self.say(f"teacher's answers: {self.path} is not what belongs there and is made anew")
        raise OSError(f"{self.path.name} changes while it is opened")


def _place(phase: int, epoch: int) -> str:
    return f"phase{phase}_epoch{epoch:03d}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().reshape(-1).data.cast("B")


def _read(fd: int, into: memoryview, offset: int) -> bool:
    """Fill `into`; false where the file ends before."""
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
