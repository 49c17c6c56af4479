"""The runs of a UDIF image: where every byte of the disk stands, and how what is packed is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.codecs import bunzip2, inflate, unxz
from ferrotype.formats.dmg.adc import unadc
from ferrotype.formats.dmg.blocks import SECTOR, Table
from ferrotype.formats.dmg.lzfse import unlzfse
from ferrotype.formats.mapped import Kind, Mapping
from ferrotype.units import MiB

__all__ = ["CODECS", "DmgLayout"]

MOST_UNIT: Final = 64 * MiB  # bytes of a packed run, packed and not
MOST_SLOW: Final = 4 * MiB  # the same where Python opens it

_ZERO, _RAW, _IGNORE = 0, 1, 2
_ADC, _ZLIB, _BZIP2, _LZFSE, _XZ = range(0x80000004, 0x80000009)
_COMMENT, _END = 0x7FFFFFFE, 0xFFFFFFFF

Unpack = Callable[[bytes, int], bytes]
CODECS: Final[dict[int, tuple[str, str, int, Unpack]]] = {
    _ADC: ("UDCO", "adc", MOST_SLOW, unadc),
    _ZLIB: ("UDZO", "zlib", MOST_UNIT, inflate),
    _BZIP2: ("UDBZ", "bzip2", MOST_UNIT, bunzip2),
    _LZFSE: ("ULFO", "lzfse", MOST_UNIT, unlzfse),
    _XZ: ("ULMO", "xz", MOST_UNIT, unxz),
}


class DmgLayout:
    """Where every byte of the disk is: one mapping of all of it, and the runs by number for what is packed."""

    def __init__(self, tables: list[Table], data: Source, size: int) -> None:
        """Raises InvalidImage where runs overlap, or lie outside their table, the disk or the data fork."""
        self._data = data
        columns = [_rows(table, data.size) for table in tables]
        kinds, starts, ends, offsets, lengths = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.argsort(starts, kind="stable")
        self.kinds: NDArray[np.uint32] = kinds[order]
        self.starts: NDArray[np.int64] = starts[order]
        self.ends: NDArray[np.int64] = ends[order]
        self.offsets: NDArray[np.int64] = offsets[order]  # in the data fork
        self._lengths: NDArray[np.int64] = lengths[order]
        self.packed: NDArray[np.bool_] = self.kinds >= _ADC
        self.stored: NDArray[np.bool_] = self.kinds == _RAW
        self.counted: NDArray[np.bool_] = self.kinds != _IGNORE  # in the checksum of their table
        over = np.flatnonzero(self.starts[1:] < self.ends[:-1])
        if len(over):
            raise InvalidImage(f"two runs hold sector {int(self.starts[over[0] + 1]) // SECTOR} of the disk")
        self._mapping = self._whole(size)

    def _whole(self, size: int) -> Mapping:
        """The runs with what no run holds between them, which reads as zeros."""
        count = len(self.starts)
        bounds = np.empty(2 * count + 2, np.int64)
        bounds[0], bounds[-1] = 0, size
        bounds[1:-1:2], bounds[2:-1:2] = self.starts, self.ends
        kinds = np.full(2 * count + 1, Kind.ZERO, np.uint8)
        kinds[1::2] = np.where(self.stored, Kind.STORED, np.where(self.packed, Kind.PACKED, Kind.ZERO))
        places = np.zeros(2 * count + 1, np.int64)
        places[1::2] = np.where(self.stored, self.offsets, np.arange(count))
        wanted = np.flatnonzero(bounds[1:] > bounds[:-1])
        return Mapping(
            np.append(bounds[wanted], size), kinds[wanted], places[wanted], np.zeros(len(wanted), np.int64)
        )

    def mapping(self, offset: int, length: int, /) -> Mapping:
        return self._mapping.clip(offset, length)

    def unpack(self, place: int, /) -> bytes:
        size = int(self.ends[place] - self.starts[place])
        at, length = int(self.offsets[place]), int(self._lengths[place])
        return CODECS[int(self.kinds[place])][3](read(self._data, at, length), size)


def _rows(table: Table, room: int) -> tuple[NDArray[np.generic], ...]:
    """(kind, start, end on the disk, offset, length in the data fork) of a table's runs, all of them checked."""
    runs = table.runs[(table.runs["kind"] != _COMMENT) & (table.runs["kind"] != _END)]
    runs = runs[runs["count"] > 0]
    kinds = runs["kind"].astype(np.uint32)
    sectors, counts = runs["sector"].astype(np.uint64), runs["count"].astype(np.uint64)
    offsets, lengths = runs["offset"].astype(np.uint64), runs["length"].astype(np.uint64)

    def refuse(wrong: NDArray[np.bool_], what: str, field: str) -> None:
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise InvalidImage(f"run {number} of the block table {table.name!r} {what}", field=field)

    unknown = ~np.isin(kinds, np.array([_ZERO, _RAW, _IGNORE, *CODECS], np.uint32))
    if unknown.any():
        kind = int(kinds[np.flatnonzero(unknown)[0]])
        raise UnsupportedError(f"the block table {table.name!r} has runs of the unknown kind {kind:#x}", field="kind")
    held = np.uint64(table.count)
    refuse((sectors > held) | (counts > held) | (sectors + counts > held), "lies outside its table", "sector")
    stored = (kinds != _ZERO) & (kinds != _IGNORE)
    limit = np.uint64(max(room - table.data_offset, 0))
    beyond = (offsets > limit) | (lengths > limit) | (offsets + lengths > limit)
    refuse(stored & beyond, "lies outside the data fork", "offset")
    for kind, (_, name, most, _) in CODECS.items():
        large = (counts > most // SECTOR) | (lengths > MOST_UNIT)
        refuse((kinds == kind) & large, f"is too large for {name}: at most {most} bytes are opened at once", "count")
    refuse((kinds == _RAW) & (lengths != counts * np.uint64(SECTOR)), "has another length than its sectors", "length")
    starts = (sectors.astype(np.int64) + table.first) * SECTOR
    ends = starts + counts.astype(np.int64) * SECTOR
    places = np.where(stored, offsets, np.uint64(0)).astype(np.int64) + table.data_offset
    return kinds, starts, ends, places, np.where(stored, lengths, np.uint64(0)).astype(np.int64)
