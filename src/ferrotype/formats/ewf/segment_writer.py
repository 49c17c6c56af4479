"""One new segment of an E01 image: sections one behind the other, the chunk tables among them.

    | file header | section | ... | sectors: chunk chunk ... | table | table2 | sectors ... | next or done |

A ``sectors`` section is written first and its descriptor when its end is known.  What is still to come at the end of
a segment, tables and closing sections, is counted as used from the start, so that no segment outgrows its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from ferrotype.block.file import FileSink
from ferrotype.formats.ewf.records import SIGNATURE, Descriptor, SegmentHeader, TableHeader, with_checksum
from ferrotype.units import MiB

__all__ = ["CLOSING", "SegmentWriter"]

_ENTRIES: Final = 16_375  # of a table: what every program since the first one reads
_REACH: Final = 1 << 31  # bytes that an offset of 31 bits reaches
_GROWTH: Final = 64 * MiB  # bytes a file grows by
_PACKED: Final = 0x8000_0000

CLOSING: Final = 8 * Descriptor.SIZE + 2 * (TableHeader.SIZE + 4) + 1052 + 80 + 36  # bytes of all that ends a segment


def _descriptor(kind: str, following: int, size: int) -> bytes:
    return with_checksum(Descriptor(kind.encode().ljust(16, b"\0"), following, size, bytes(40), 0))


class SegmentWriter:
    """Writes one segment, from front to back."""

    def __init__(self, file: FileSink, number: int, limit: int) -> None:
        """``limit``: bytes the file may have in the end."""
        self._file, self._limit = file, limit
        self._at = 0
        self._sectors = 0  # offset of the sectors section that is being filled; 0: none
        self._count = 0  # chunks in it
        self._entries = np.zeros(_ENTRIES, np.uint32)
        self._write(SegmentHeader(SIGNATURE, 1, number, 0).pack())

    def _write(self, data: bytes) -> None:
        end = self._at + len(data)
        if end > self._file.size:
            self._file.resize(max(end, min(end + _GROWTH, self._limit)))
        self._file.write(self._at, memoryview(data))
        self._at = end

    def section(self, kind: str, content: bytes) -> None:
        """Append a section."""
        size = Descriptor.SIZE + len(content)
        self._write(_descriptor(kind, self._at + size, size) + content)

    def has_room(self, size: int) -> bool:
        """Whether a section of so many bytes fits beside all that ends a segment."""
        return self._at + Descriptor.SIZE + size + CLOSING <= self._limit

    def fit(self, sizes: NDArray[np.int64]) -> int:
        """How many of the next chunks, of these sizes, go into the present sectors section."""
        room = self._limit - self._at - CLOSING - 8 * self._count
        within = int(np.searchsorted(np.cumsum(sizes + 8), room, "right"))
        begun = self._at - self._sectors if self._sectors else Descriptor.SIZE
        reached = int(np.searchsorted(begun + np.cumsum(sizes), _REACH, "left"))
        return min(within, reached, _ENTRIES - self._count)

    def add(self, parts: Sequence[bytes], sizes: NDArray[np.int64], packed: NDArray[np.bool_]) -> None:
        """Append chunks, as many as ``fit`` allowed."""
        if not self._sectors:
            self._sectors = self._at
            self._write(bytes(Descriptor.SIZE))
        offsets = self._at - self._base + np.cumsum(sizes) - sizes
        entries = offsets.astype(np.uint32) | np.where(packed, np.uint32(_PACKED), np.uint32(0))
        self._entries[self._count : self._count + len(parts)] = entries
        self._count += len(parts)
        self._write(b"".join(parts))

    @property
    def _base(self) -> int:
        """What offsets count from: the file's start, as every program expects, where 31 bits reach all of it."""
        return 0 if self._limit < _REACH else self._sectors

    @property
    def filling(self) -> bool:
        """Whether a sectors section was begun."""
        return bool(self._sectors)

    def end_sectors(self) -> None:
        """Close the sectors section, where one was begun, and append its tables."""
        if not self._sectors:
            return
        size = self._at - self._sectors
        self._file.write(self._sectors, memoryview(_descriptor("sectors", self._at, size)))
        entries = self._entries[: self._count].astype("<u4").tobytes()
        content = with_checksum(TableHeader(self._count, 0, self._base, 0, 0)) + entries
        content += adler32(entries).to_bytes(4, "little")
        self.section("table", content)
        self.section("table2", content)
        self._sectors = self._count = 0

    def end(self, kind: str) -> None:
        """Append the last section, ``next`` or ``done``, and give the file its size."""
        self._write(_descriptor(kind, self._at, 0))  # EnCase gives it no size
        self._file.resize(self._at)
