"""The chunk tables of EWF: where each chunk stands in its segment.

    sectors   [chunk][chunk][chunk] ...
    table     | entries, base | 76 | 1044 | 33815 | ... | Adler-32 |     bit 31: the chunk is a zlib stream
    table2    the same again

An offset counts from the table's base.  EnCase 6.7.1 wrote segments larger than 2 GiB whose offsets use all 32 bits
from where 31 do not suffice, and whose chunks are plain from there on.

Source: "Expert Witness Compression Format specification", Table section and Table2 section.

Memory: one small object for each table section, and 4 bytes for each chunk of the tables used last.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final, NamedTuple
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.formats.ewf.chunks import Form, Place, chunk_bound
from ferrotype.formats.ewf.segments import Segments
from ferrotype.formats.mapped import Kept
from ferrotype.units import MiB

__all__ = ["Table", "Tables"]

_PAGE: Final = 1 << 20  # entries held together
_KEPT: Final = 16 * MiB  # bytes of entries kept
_PROVEN_AT_OPENING: Final = 4 * MiB  # bytes of tables: those of a disk of 32 GiB in chunks of the usual size
_PACKED: Final = 0x8000_0000
_PIECE: Final = 4 * MiB


@dataclass(frozen=True, slots=True)
class Table:
    """A table section, checked to lie within its segment."""

    segment: int
    at: int  # offset of its first entry
    count: int
    base: int
    low: int  # what its chunks stand in: from here
    high: int  # to here
    sealed: bool = True  # entries are followed by their Adler-32
    mirror: int = 0  # offset of the first entry of table2; 0: there is none


class _Page(NamedTuple):
    """Up to ``_PAGE`` entries of a table."""

    first: int  # chunk
    table: Table
    skip: int  # entries of the table before
    chunks: int


class _Entries(NamedTuple):
    """The entries of a page, and the one behind them where there is one."""

    raw: NDArray[np.uint32]
    overflow: int  # index from which offsets have 32 bits


class Tables:
    """All tables of an image, in order."""

    def __init__(self, tables: Sequence[Table], segments: Segments, chunk_size: int) -> None:
        self._segments, self._bound = segments, chunk_bound(chunk_size)
        self._tables = tables
        self._pages: list[_Page] = []
        first = 0
        for table in tables:
            for skip in range(0, table.count, _PAGE):
                count = min(_PAGE, table.count - skip)
                self._pages.append(_Page(first, table, skip, count))
                first += count
        self.count = first
        self._firsts = [page.first for page in self._pages]
        self._kept: Kept[int, _Entries] = Kept(_KEPT, lambda entries: entries.raw.nbytes)
        self._sound: dict[tuple[int, int], bool] = {}
        self._lock = Lock()

    def prove_some(self) -> list[str]:
        """Prove the first tables, which is all of them but on large disks: a sentence for each where table2 is used.

        Raises InvalidImage where neither is whole.
        """
        found, left = [], _PROVEN_AT_OPENING
        for table in self._tables:
            left -= 4 * table.count
            if left < 0:
                break
            if self._whole(table) != table.at:
                found.append(f"{self._where(table, table.at)} is damaged; its mirror, table2, is used instead")
        return found

    def check(self) -> list[str]:
        return [
            f"{self._where(table, at)}, with {table.count} entries, is damaged"
            for table in self._tables
            for at in (table.at, table.mirror)
            if at and not self._is_sound(table, at)
        ]

    def _where(self, table: Table, at: int) -> str:
        return f"the table at byte {at} of {self._segments.names[table.segment]}"

    def _whole(self, table: Table) -> int:
        """Where the entries of a table stand whole."""
        for at in (table.at, table.mirror):
            if at and self._is_sound(table, at):
                return at
        raise InvalidImage(
            f"{self._where(table, table.at)} is damaged, and so is its mirror"
            if table.mirror
            else f"{self._where(table, table.at)} is damaged",
            offset=table.at,
            field="checksum",
        )

    def _is_sound(self, table: Table, at: int) -> bool:
        if not table.sealed:
            return True
        key = (table.segment, at)
        with self._lock:
            known = self._sound.get(key)
        if known is None:
            total, end = 1, at + 4 * table.count
            for start in range(at, end, _PIECE):
                total = adler32(self._segments.read(table.segment, start, min(_PIECE, end - start)), total)
            known = total == int.from_bytes(self._segments.read(table.segment, end, 4), "little")
            with self._lock:
                self._sound[key] = known
        return known

    def _load(self, number: int) -> _Entries:
        page = self._pages[number]
        table = page.table
        more = page.skip + page.chunks < table.count
        at = self._whole(table) + 4 * page.skip
        raw = np.frombuffer(self._segments.read(table.segment, at, 4 * (page.chunks + more)), "<u4")
        short = raw & np.uint32(_PACKED - 1)
        # What falls back with 31 bits, and goes on from its neighbour with 32, has outgrown 31.
        far = raw[1:].astype(np.int64) - short[:-1]
        over = (short[1:] < short[:-1]) & (far > 0) & (far <= self._bound)
        return _Entries(raw, int(np.argmax(over)) + 1 if over.any() else len(raw))

    def find(self, number: int) -> Place:
        which = bisect_right(self._firsts, number) - 1
        page = self._pages[which] if which >= 0 else None
        if page is None or number >= page.first + page.chunks:
            raise InvalidImage(f"no table has chunk {number}")
        table, index = page.table, number - page.first
        raw, overflow = self._kept.of(which, self._load)
        entry = int(raw[index])
        packed = bool(entry & _PACKED) and index < overflow
        offset = table.base + (entry if index >= overflow else entry & (_PACKED - 1))
        end = table.high
        if index + 1 < len(raw):
            following = int(raw[index + 1])
            end = table.base + (following if index + 1 >= overflow else following & (_PACKED - 1))
        if not offset < end:  # the last of its table, or chunks out of order
            end = table.high if table.low <= offset < table.high else self._segments.size(table.segment)
        end = min(end, self._segments.size(table.segment))
        if not 13 <= offset < end:
            raise InvalidImage(
                f"chunk {number} should stand at byte {offset} of {self._segments.names[table.segment]}, outside it",
                offset=offset,
                field="table entry",
            )
        return Place(table.segment, offset, end - offset, Form.ZLIB if packed else Form.PLAIN)

    def zeros(self, first: int, last: int) -> None:
        """Nothing is known of zeros before they are read."""
