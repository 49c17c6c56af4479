"""Bochs growing disks, versions 1 and 2.

    0        header size        + 4 * catalog
    +--------+------------------+----------------------+----------------------+ ...
    | header | catalog          | bitmap | extent      | bitmap | extent      |
    +--------+------------------+----------------------+----------------------+ ...

    catalog: which extent of the file holds each extent of the disk, 0xFFFFFFFF none; a set bit, the lowest first,
    says that the file has the sector

All numbers are little-endian.  Written from the Bochs developers' description of the redolog header (Bochs
documentation, "harddisk redologs").
"""

from __future__ import annotations

from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.mapped import Kept, Kind, MappedSource, Mapping
from ferrotype.formats.related import Related
from ferrotype.formats.tables import SECTOR, Table, sector_cells
from ferrotype.records import Record, b16, record, u32, u64
from ferrotype.units import MiB

__all__ = ["open", "probe"]

_MAGIC: Final = b"Bochs Virtual HD Image"
_V1, _V2 = 0x00010000, 0x00020000
_NONE: Final = 0xFFFFFFFF
_MAX_EXTENT: Final = 8 * MiB  # bytes; Bochs itself goes no further
_CELLS: Final = 1 << 18  # sectors looked at one by one at a time
_MAX_CATALOG: Final = 1 << 20  # entries
_BITMAPS_KEPT: Final = 4 * MiB


@record(endian="<", size=96)
class Header(Record):
    """redolog_header_t, up to what is used; version 1 has its disk size where the later ones have a time stamp."""

    magic: Annotated[bytes, "32s"]
    type: b16
    subtype: b16
    version: u32
    header: u32
    catalog: u32  # entries
    bitmap: u32  # bytes
    extent: u32  # bytes
    timestamp: u32
    disk: u64


def probe(file: Source) -> bool:
    """Whether the magic is there."""
    return read(file, 0, min(file.size, len(_MAGIC))) == _MAGIC


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """A growing disk; redologs that stand over another disk are refused."""
    data = read(file, 0, min(file.size, Header.SIZE))
    header = Header.unpack(data)
    if _text(header.magic) != _MAGIC:
        raise InvalidImage("there is no Bochs header", offset=0, field="magic")
    if _text(header.type) != b"Redolog" or _text(header.subtype) != b"Growing":
        kind = b" ".join((_text(header.type), _text(header.subtype))).decode("latin-1")
        raise UnsupportedError(f"a Bochs image of the kind {kind!r}; only growing disks are read", field="subtype")
    if header.version not in (_V1, _V2):
        raise UnsupportedError(f"Bochs image version {header.version:#x}", offset=64, field="version")
    # version 1 packs its 64-bit size right behind the extent size
    size = header.disk if header.version == _V2 else int.from_bytes(data[84:92], "little")
    size = size // SECTOR * SECTOR
    _check(header, size)
    source = MappedSource(file, _Extents(file, header), size, name="Bochs")
    facts = {"subformat": "growing", "unit": header.extent, "version": header.version >> 16}
    return Image("bochs", source, facts=facts, close=file.close)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _check(header: Header, size: int) -> None:
    extent = header.extent
    if header.header < Header.SIZE:
        raise InvalidImage(f"a header of {header.header} bytes", offset=68, field="header")
    if extent < SECTOR or extent & (extent - 1) or extent > _MAX_EXTENT:
        raise InvalidImage(f"an extent of {extent} bytes", offset=80, field="extent")
    if header.bitmap * 8 * SECTOR < extent or header.bitmap > _MAX_EXTENT:
        raise InvalidImage(f"a bitmap of {header.bitmap} bytes for an extent of {extent}", offset=76, field="bitmap")
    if size > MAX_SIZE or header.catalog * extent < size:
        raise InvalidImage(f"a catalog of {header.catalog} entries for a disk of {size} bytes", field="catalog")


class _Extents:
    """The layout."""

    def __init__(self, file: Source, header: Header) -> None:
        self._file = file
        self._extent = header.extent
        self._sectors = header.extent // SECTOR
        self._bitmap = -(-header.bitmap // SECTOR) * SECTOR  # bytes it takes up
        self._table = Table(file, header.header, header.catalog, "<u4", "catalog")
        self._table.check_distinct(_NONE, _MAX_CATALOG)
        self._bitmaps: Kept[int, bytes] = Kept(_BITMAPS_KEPT, len)

    def mapping(self, offset: int, length: int) -> Mapping:
        first = offset // self._extent
        count = -(-(offset + length) // self._extent) - first
        if gap := self._table.lead(first, count, _NONE):
            return Mapping.uniform(offset, min(length, (first + gap) * self._extent - offset), Kind.HOLE)
        entries = self._table.slice(first, min(count, max(_CELLS // self._sectors, 1)))
        starts = self._table.end + entries * (self._bitmap + self._extent)
        bits = self._bits(starts, entries != _NONE)
        mapping = sector_cells(first * self._extent, bits, starts + self._bitmap)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def _bits(self, starts: NDArray[np.int64], stored: NDArray[np.bool_]) -> NDArray[np.bool_]:
        bits = np.zeros((len(starts), self._sectors), bool)
        for number in np.flatnonzero(stored).tolist():
            bitmap = np.frombuffer(self._bitmaps.of(int(starts[number]), self._read_bitmap), np.uint8)
            bits[number] = np.unpackbits(bitmap, count=self._sectors, bitorder="little")
        return bits

    def _read_bitmap(self, start: int) -> bytes:
        return read_exactly(self._file, start, -(-self._sectors // 8), "the bitmap of an extent")

    def unpack(self, place: int) -> bytes:
        raise InvalidImage("Bochs disks have no compressed extents", offset=place)
