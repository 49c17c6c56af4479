"""Making streamOptimized VMDK disks, the kind that OVA archives carry.

| header | descriptor | up to 64 KiB | grains | table | grains | table | ... | directory | footer | end of stream |

Grains are deflated on all cores and stand in the order of the disk; grains of zeros are left out, and tables of only
such as well.  Each table follows the last of its grains.  The header says GD_AT_END, the footer where the directory
is.  Written from VMware's "Virtual Disk Format 5.0", section "Stream-Optimized Compressed".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, cast

import numpy as np

from ferrotype.block import Traits
from ferrotype.block.file import check_write
from ferrotype.block.outputs import Outputs
from ferrotype.block.zeros import zero_cells
from ferrotype.formats import Spec
from ferrotype.formats.codecs import FASTEST, deflate
from ferrotype.formats.vmdk.descriptor import SECTOR, Extent, render
from ferrotype.formats.vmdk.grains import GRAIN, embedded, grow
from ferrotype.formats.vmdk.sparse import (
    COMPRESSED,
    DEFLATE,
    FOOTER,
    GD_AT_END,
    GRAIN_DIRECTORY,
    GRAIN_TABLE,
    MAGIC,
    MARKERS,
    NEWLINE_TEST,
    NEWLINES,
    PER_TABLE,
    Marker,
    SparseExtentHeader,
)

__all__ = ["StreamSink"]

_GRAIN_SECTORS: Final = GRAIN // SECTOR
_OVERHEAD: Final = 128  # sectors before the first grain
_LEAD: Final = struct.Struct("<QI")  # of a grain: its sector on the disk, its bytes


@dataclass(slots=True)
class _Grains:
    """Packed grains of one table, which follow each other."""

    table: int
    numbers: list[int] = field(default_factory=list)  # in the table
    starts: list[int] = field(default_factory=list)  # sectors from the first one
    parts: list[bytes] = field(default_factory=list)
    sectors: int = 0

    def add(self, number: int, data: bytes) -> None:
        length = -(-(_LEAD.size + len(data)) // SECTOR)
        lead = _LEAD.pack((self.table * PER_TABLE + number) * _GRAIN_SECTORS, len(data))
        self.numbers.append(number)
        self.starts.append(self.sectors)
        self.parts += [lead, data, bytes(length * SECTOR - _LEAD.size - len(data))]
        self.sectors += length


class StreamSink:
    """A new stream, a ``Packer``."""

    def __init__(self, outputs: Outputs, spec: Spec) -> None:
        self._size, self._level = spec.size, spec.get("level", FASTEST)
        capacity = -(-spec.size // SECTOR)
        extent = Extent("RDONLY", capacity, "SPARSE", outputs.path.name, None)
        descriptor = embedded(render("streamOptimized", [extent], spec))
        self._header = SparseExtentHeader(
            MAGIC,
            3,
            NEWLINE_TEST | COMPRESSED | MARKERS,
            capacity,
            _GRAIN_SECTORS,
            1,
            len(descriptor) // SECTOR,
            PER_TABLE,
            0,
            GD_AT_END,
            _OVERHEAD,
            0,
            NEWLINES,
            DEFLATE,
            bytes(433),
        )
        self._file = outputs.create()
        self._directory = np.zeros(-(-spec.size // (GRAIN * PER_TABLE)), "<u4")
        self._entries = np.zeros(PER_TABLE, "<u4")
        self._table = 0  # whose entries these are
        self._next = _OVERHEAD  # sector
        self.traits = Traits(unit=GRAIN, blank=True, ordered=True)
        grow(self._file, self._next)
        self._file.write_many(0, [self._header.pack(), descriptor])

    @property
    def size(self) -> int:
        return self._size

    # ------------------------------------------------------------------ writing

    def pack(self, offset: int, data: memoryview, /) -> list[_Grains]:
        packed: list[_Grains] = []
        for at, zero in enumerate(zero_cells(data, GRAIN)):
            if zero:
                continue
            grain: memoryview | bytes = data[at * GRAIN : (at + 1) * GRAIN]
            if len(grain) < GRAIN:  # the disk ends inside it, and readers want a whole one
                grain = bytes(grain).ljust(GRAIN, b"\0")
            table, number = divmod(offset // GRAIN + at, PER_TABLE)
            if not packed or packed[-1].table != table:
                packed.append(_Grains(table))
            packed[-1].add(number, deflate(grain, level=self._level))
        return packed

    def put(self, offset: int, packed: object, /) -> None:  # noqa: ARG002
        for grains in cast("list[_Grains]", packed):
            if grains.table != self._table:
                self._end_table()
                self._table = grains.table
            self._entries[grains.numbers] = np.array(grains.starts, np.int64) + self._next
            self._append(grains.parts, grains.sectors)

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("VMDK stream", self._size, offset, len(data))
        self.put(offset, self.pack(offset, data))

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing is stored: what is not written is zeros."""
        check_write("VMDK stream", self._size, offset, length)

    def _append(self, parts: Sequence[bytes], sectors: int) -> int:
        """Write whole sectors at the end of the stream; returns the first one."""
        start = self._next
        grow(self._file, start + sectors)
        self._file.write_many(start * SECTOR, parts)
        self._next += sectors
        return start

    def _marked(self, kind: int, data: bytes) -> int:
        """Append metadata behind a marker; returns the first sector of the data."""
        sectors = -(-len(data) // SECTOR)
        marker = Marker(sectors, 0, kind).pack().ljust(SECTOR, b"\0")
        return self._append([marker, data.ljust(sectors * SECTOR, b"\0")], 1 + sectors) + 1

    def _end_table(self) -> None:
        if self._entries.any():
            self._directory[self._table] = self._marked(GRAIN_TABLE, self._entries.tobytes())
            self._entries[:] = 0

    def finish(self) -> None:
        self._end_table()
        directory = self._marked(GRAIN_DIRECTORY, self._directory.tobytes())
        self._marked(FOOTER, replace(self._header, gdOffset=directory).pack())
        self._append([bytes(SECTOR)], 1)  # the marker of the end of the stream
        self._file.resize(self._next * SECTOR)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""
