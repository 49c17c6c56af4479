"""What has to be read and stored of a disk, told by partclone, the kernel and hashlib: nothing here is ours."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from tests import disks
from tests.disks import Disk, Runs
from tests.engine.images import CHUNK


@dataclass(frozen=True)
class Truth:
    """A disk, and what must be done for it."""

    disk: Disk

    @property
    def path(self) -> Path:
        return self.disk.path

    @cached_property
    def regions(self) -> list[tuple[int, int]]:
        """(start, end) of each partition and each gap: a grid of chunks begins at each start."""
        borders = {0, self.disk.size, *(v.start for v in self.disk.volumes), *(v.end for v in self.disk.volumes)}
        return list(pairwise(sorted(borders)))

    @cached_property
    def allocated(self) -> Runs:
        """(start, end), ascending: what is neither a hole of the file nor free in its file system."""
        sector = self.disk.sector_size
        used = np.zeros(self.disk.size // sector, np.int8)
        for start, end in self.stored:
            used[start // sector : end // sector] = 1
        for volume in self.disk.volumes:
            for start, end in disks._free_runs(volume):
                used[(volume.start + start) // sector : (volume.start + end) // sector] = 0
        edges = np.flatnonzero(np.diff(used, prepend=0, append=0)) * sector
        return [(start, end) for start, end in edges.reshape(-1, 2).tolist()]

    @cached_property
    def stored(self) -> Runs:
        """(start, end), ascending: what is no hole of the file."""
        ends = [0, *(border for hole in _holes(self.path) for border in hole), self.disk.size]
        return [(start, end) for start, end in zip(ends[::2], ends[1::2], strict=True) if start < end]

    @cached_property
    def to_read(self) -> Runs:
        """(start, end), ascending: the cells of the grid that hold an allocated byte."""
        wanted: list[tuple[int, int]] = []
        for start, end in self.regions:
            cells = {
                cell
                for low, high in self.allocated
                if low < end and high > start
                for cell in range((max(low, start) - start) // CHUNK, -(-(min(high, end) - start) // CHUNK))
            }
            wanted += [(start + c * CHUNK, min(start + (c + 1) * CHUNK, end)) for c in sorted(cells)]
        return wanted

    @cached_property
    def cells(self) -> list[tuple[int, bytes, int]]:
        """Start, hash and length of each cell that does not hold zeros only, free space being zeros."""
        content = memoryview(disks.without_free(self.disk))
        found = []
        for start, end in self.regions:
            for at in range(start, end, CHUNK):
                cell = content[at : min(at + CHUNK, end)]
                if bytes(cell).count(0) < len(cell):
                    found.append((at, hashlib.sha256(cell).digest(), len(cell)))
        return found

    @property
    def cell_bytes(self) -> int:
        return sum(length for _, _, length in self.cells)

    @property
    def different(self) -> dict[bytes, int]:
        """Hash and length of each content that a cell has."""
        return {digest: length for _, digest, length in self.cells}

    @property
    def pages(self) -> int:
        """Pages of the chunk maps: one for each region that is not all zeros, all regions being small."""
        return sum(any(start <= at < end for at, _, _ in self.cells) for start, end in self.regions)


def _holes(path: Path) -> Iterator[tuple[int, int]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            start = os.lseek(fd, at, os.SEEK_HOLE)
            try:
                at = os.lseek(fd, start, os.SEEK_DATA)
            except OSError:  # nothing but a hole to the end
                at = size
            if start < at:
                yield start, at
    finally:
        os.close(fd)
