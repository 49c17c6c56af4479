"""Disks and image files as fuzzers want them: only the blocks that hold something, in a few KiB.

    size u64 | number u64, repeats u64, 512 bytes | number u64, repeats u64, 512 bytes | ...

Block ``number`` and the ``repeats - 1`` behind it hold these bytes; later ones win; all else is zeros.  A disk of
terabytes whose structures are intact is as small an input as any.
"""

from __future__ import annotations

import bz2
import gzip
import os
import struct
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from ferrotype.block import Traits
from ferrotype.errors import ReadError
from ferrotype.extents import ExtentMap

BLOCK: Final = 512
_SIZE: Final = struct.Struct("<Q")
_HEAD: Final = struct.Struct("<QQ")
_STEP: Final = _HEAD.size + BLOCK


@dataclass(slots=True)
class Run:
    """``repeats`` equal blocks from ``number`` on."""

    number: int
    repeats: int
    data: bytearray

    @property
    def end(self) -> int:
        return self.number + self.repeats


@dataclass(slots=True)
class Sparse:
    """A disk or file, by its blocks."""

    size: int
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def decode(cls, data: bytes) -> Sparse:
        """Any bytes at all mean some disk; numbers are taken as they come."""
        size = int.from_bytes(data[: _SIZE.size].ljust(_SIZE.size, b"\0"), "little")
        runs = []
        for at in range(_SIZE.size, len(data), _STEP):
            number, repeats = _HEAD.unpack(data[at : at + _HEAD.size].ljust(_HEAD.size, b"\0"))
            block = bytearray(data[at + _HEAD.size : at + _STEP].ljust(BLOCK, b"\0"))
            runs.append(Run(number, repeats, block))
        return cls(size, runs)

    def encode(self) -> bytes:
        whole = 0xFFFFFFFFFFFFFFFF
        parts = [_SIZE.pack(self.size & whole)]
        parts += [_HEAD.pack(r.number & whole, r.repeats & whole) + r.data for r in self.runs]
        return b"".join(parts)

    @classmethod
    def of(cls, content: bytes, size: int | None = None) -> Sparse:
        """The blocks of ``content`` that are not zeros, equal neighbours joined."""
        padded = content.ljust(-(-len(content) // BLOCK) * BLOCK, b"\0")
        blocks = np.frombuffer(padded, np.uint8).reshape(-1, BLOCK)
        made = cls(len(content) if size is None else size)
        for number in np.flatnonzero(blocks.any(axis=1)).tolist():
            made.append(number, blocks[number].tobytes())
        return made

    def append(self, number: int, block: bytes) -> None:
        if self.runs and self.runs[-1].end == number and self.runs[-1].data == block:
            self.runs[-1].repeats += 1
        else:
            self.runs.append(Run(number, 1, bytearray(block)))

    @classmethod
    def load(cls, path: Path, storage: str = "plain", *, most: int = 1 << 30) -> Sparse:
        """A file's blocks, unpacked piece by piece."""
        opener: Any = {"gz": gzip.open, "bz2": bz2.open, "plain": open}[storage]
        made, at = cls(0), 0
        with opener(path, "rb") as file:
            while (piece := file.read(1 << 20)) and at < most:
                if piece.count(0) != len(piece):
                    for run in cls.of(piece).runs:
                        for i in range(run.repeats):
                            made.append(at // BLOCK + run.number + i, bytes(run.data))
                at += len(piece)
        made.size = at
        return made

    def block(self, number: int) -> bytearray | None:
        """The block itself, to be changed in place; a block inside a run of equal ones is taken out of it first."""
        for i in range(len(self.runs) - 1, -1, -1):
            run = self.runs[i]
            if run.number <= number < run.end:
                if run.repeats > 1:
                    own = Run(number, 1, bytearray(run.data))
                    self.runs.append(own)
                    return own.data
                return run.data
        return None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk, zeros where there are none."""
        out, end = bytearray(length), offset + length
        for run in self.runs:
            low, high = max(run.number * BLOCK, offset), min(run.end * BLOCK, end)
            if low < high:
                skip = low % BLOCK
                repeats = 1 + (skip + high - low - 1) // BLOCK
                out[low - offset : high - offset] = (bytes(run.data) * repeats)[skip : skip + high - low]
        return bytes(out)

    def write(self, offset: int, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, skip = divmod(offset + at, BLOCK)
            take = min(BLOCK - skip, len(data) - at)
            block = self.block(number)
            if block is None:
                block = bytearray(BLOCK)
                self.runs.append(Run(number, 1, block))
            block[skip : skip + take] = data[at : at + take]
            at += take

    def save(self, path: Path, most: int) -> None:
        """As a file with holes, cut to ``most`` bytes."""
        size = min(self.size, most)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, size)
            for run in self.runs:
                repeats = min(run.repeats, max(-(-size // BLOCK) - run.number, 0), 1 << 14)
                if repeats > 0:
                    data = bytes(run.data) * repeats
                    os.pwrite(fd, data[: size - run.number * BLOCK], run.number * BLOCK)
        finally:
            os.close(fd)


class SparseDisk:
    """A Source over the blocks; nothing is known of it without reading."""

    def __init__(self, content: Sparse, sector_size: int = BLOCK, *, sector_known: bool = False) -> None:
        self.size = content.size
        self.traits = Traits(sector_size=sector_size, sector_known=sector_known)
        self._runs: list[tuple[int, int, bytes]] = []  # (first, behind, bytes), ascending and apart
        for run in reversed(content.runs):
            self._add(run.number, min(run.end, -(-self.size // BLOCK)), bytes(run.data))
        self._starts = [first for first, _, _ in self._runs]

    def _add(self, first: int, behind: int, data: bytes) -> None:
        """Enter what no later run covers."""
        at = bisect_left(self._runs, (first,))
        if at and self._runs[at - 1][1] > first:
            first = self._runs[at - 1][1]
        while first < behind:
            stop = self._runs[at][0] if at < len(self._runs) else behind
            if first < stop:
                self._runs.insert(at, (first, min(stop, behind), data))
                at += 1
            if at == len(self._runs):
                return
            first, at = max(first, self._runs[at][1]), at + 1

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        end = offset + len(buf)
        if offset < 0 or end > self.size:
            raise ReadError("disk", offset, len(buf), "outside the disk")
        out = np.frombuffer(buf, np.uint8)
        out[:] = 0
        index = max(bisect_right(self._starts, offset // BLOCK) - 1, 0)
        for first, behind, data in self._runs[index:]:
            low, high = max(first * BLOCK, offset), min(behind * BLOCK, end)
            if first * BLOCK >= end:
                break
            if low >= high:
                continue
            repeats = -(-high // BLOCK) - low // BLOCK
            skip = low % BLOCK
            out[low - offset : high - offset] = np.frombuffer(data * repeats, np.uint8)[skip : skip + high - low]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        pass
