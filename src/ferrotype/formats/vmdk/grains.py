"""Making hosted sparse extents of VMDK.

| header | descriptor | redundant directory | its tables | directory | tables | up to 64 KiB | grain | grain | ...

All tables are there from the beginning, twice, as VMware's own have them: most of them holes of the file.  Grains are
added behind them in the order in which they come.  Written from VMware's "Virtual Disk Format 5.0", section "Hosted
Sparse Extents".
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block.file import FileSink
from ferrotype.errors import WriteError
from ferrotype.formats.vmdk.descriptor import SECTOR
from ferrotype.formats.vmdk.sparse import (
    MAGIC,
    NEWLINE_TEST,
    NEWLINES,
    PER_TABLE,
    REDUNDANT,
    SparseExtentHeader,
)
from ferrotype.units import KiB, MiB

__all__ = ["GRAIN", "GrainFile", "embedded", "grow"]

GRAIN: Final = 64 * KiB
_GRAIN_SECTORS: Final = GRAIN // SECTOR
_TABLE_SECTORS: Final = PER_TABLE * 4 // SECTOR
_DESCRIPTOR_SECTORS: Final = 20
_ROW: Final = 1024  # tables written at a time
_STEP: Final = 256 * MiB  # by which a file grows while it is written
_MOST_SECTORS: Final = 1 << 32  # of a sparse file: grain tables have 32 bits for a sector


def embedded(descriptor: bytes) -> bytes:
    """A descriptor, filled up to the sectors it has inside a sparse extent."""
    return descriptor.ljust(_DESCRIPTOR_SECTORS * SECTOR, b"\0")


class GrainFile:
    """A hosted sparse extent.  ``write`` may be called from many threads, for whole grains, each once."""

    def __init__(self, file: FileSink, size: int, descriptor: bytes) -> None:
        """``descriptor``: to be embedded, whole sectors; nothing where it is elsewhere."""
        self.file = file
        self._descriptor = descriptor
        self._capacity = -(-size // SECTOR)
        grains = -(-size // GRAIN)
        tables = -(-grains // PER_TABLE)
        directory = -(-tables * 4 // SECTOR)
        self._redundant = 1 + len(descriptor) // SECTOR
        self._directory = self._redundant + directory + tables * _TABLE_SECTORS
        self._count = tables
        self._tables: dict[int, NDArray[np.uint32]] = {}  # those with grains
        end = self._directory + directory + tables * _TABLE_SECTORS
        self._overhead = -(-end // _GRAIN_SECTORS) * _GRAIN_SECTORS
        self._next = self._overhead  # sector of the next grain
        self._lock = Lock()

    def write(self, offset: int, data: memoryview) -> None:
        first, count = offset // GRAIN, -(-len(data) // GRAIN)
        with self._lock:
            place = self._next
            self._next += count * _GRAIN_SECTORS
            grow(self.file, self._next)
            self._enter(first, count, place)
        self.file.write(place * SECTOR, data)

    def _enter(self, first: int, count: int, place: int) -> None:
        """Have the tables say that grains from ``first`` on stand at sector ``place``."""
        sectors = place + np.arange(count, dtype=np.int64) * _GRAIN_SECTORS
        at = 0
        while at < count:
            number, inside = divmod(first + at, PER_TABLE)
            table = self._tables.get(number)
            if table is None:
                table = self._tables[number] = np.zeros(PER_TABLE, "<u4")
            end = min(at + PER_TABLE - inside, count)
            table[inside : inside + end - at] = sectors[at:end]
            at = end

    def finish(self) -> None:
        self.file.resize(self._next * SECTOR)
        for start in (self._redundant, self._directory):
            first = start + -(-self._count * 4 // SECTOR)
            directory = (first + np.arange(self._count, dtype=np.int64) * _TABLE_SECTORS).astype("<u4")
            self.file.write(start * SECTOR, memoryview(directory.tobytes()))
            for low, tables in self._rows():
                self.file.write((first + low * _TABLE_SECTORS) * SECTOR, memoryview(tables))
        header = SparseExtentHeader(
            MAGIC,
            1,
            NEWLINE_TEST | REDUNDANT,
            self._capacity,
            _GRAIN_SECTORS,
            1 if self._descriptor else 0,
            len(self._descriptor) // SECTOR,
            PER_TABLE,
            self._redundant,
            self._directory,
            self._overhead,
            0,
            NEWLINES,
            0,
            bytes(433),
        )
        self.file.write_many(0, [header.pack(), self._descriptor])

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        """Tables that follow each other, as the file has them, and the number of the first; a few MiB at most."""
        numbers = sorted(self._tables)
        start = 0
        for at in range(1, len(numbers) + 1):
            if at == len(numbers) or numbers[at] != numbers[start] + at - start or at - start == _ROW:
                yield numbers[start], b"".join(self._tables[number].tobytes() for number in numbers[start:at])
                start = at


def grow(file: FileSink, sectors: int) -> None:
    """Have a sparse file be at least so long, in big steps.  Raises WriteError beyond what its tables can say."""
    if sectors > _MOST_SECTORS:
        raise WriteError(f"{file.path} would have more than 2 TiB, the most a sparse VMDK can; choose a flat one")
    if sectors * SECTOR > file.size:
        file.resize(-(-sectors * SECTOR // _STEP) * _STEP)
