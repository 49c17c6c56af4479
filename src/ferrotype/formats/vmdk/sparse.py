"""Sparse extents of VMDK as hosted products make them, and compressed streams.

hosted    | header | descriptor | redundant directory | its tables | directory | tables | grain | grain | ...
stream    | header | descriptor | grain, grain ... table | grain ... table | directory | footer | end of stream |

In a stream everything behind the descriptor is led by a marker; a grain's is its first sector on the disk and its
length when compressed, and the rest of it follows at once:

    | LBA (8) | size (4) | deflated data ... up to a sector |
    | sectors (8) | 0 (4) | type (4) | up to a sector |      type 0 end of stream, 1 table, 2 directory, 3 footer

A stream's header may not know where the directory will be (GD_AT_END); its footer, a copy of the header, does.
Written from VMware's "Virtual Disk Format 5.0", sections "Hosted Sparse Extents" and "Stream-Optimized Compressed".
"""

# ruff: noqa: N815  the fields are called as the specification calls them

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE
from ferrotype.formats.codecs import inflate
from ferrotype.formats.mapped import Kind, Layout
from ferrotype.formats.vmdk.descriptor import MAX_DESCRIPTOR, SECTOR
from ferrotype.formats.vmdk.tables import BAD, Grains, GrainTables, KeptGrains, Shape, read_directory
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.records import Record, b4, record, u8, u16, u32, u64

__all__ = [
    "GD_AT_END",
    "MAGIC",
    "UNCLEAN",
    "Marker",
    "SectorGrains",
    "Sparse",
    "SparseExtentHeader",
    "Stored",
    "carried_descriptor",
    "check_tables",
    "checked_shape",
    "directory_of",
    "embedded_descriptor",
    "open_hosted",
]

MAGIC: Final = b"KDMV"
NEWLINES: Final = b"\n \r\n"
GD_AT_END: Final = (1 << 64) - 1
PER_TABLE: Final = 512
NEWLINE_TEST, REDUNDANT, ZEROED_GRAINS, COMPRESSED, MARKERS = 1, 2, 4, 1 << 16, 1 << 17
DEFLATE: Final = 1
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)

_ALL_FLAGS: Final = NEWLINE_TEST | REDUNDANT | ZEROED_GRAINS | COMPRESSED | MARKERS
_MOST_GRAIN: Final = 1 << 16  # sectors: 32 MiB
_MOST_PACKED: Final = 1 << 12  # sectors of a grain that is compressed: 2 MiB, and each thread may hold some
UNCLEAN: Final = "the disk was not closed properly by its last writer: what was written last may be missing"
_MOST_NUMBER: Final = 1 << 31  # grains of a compressed extent: their numbers share a place with a sector


@record(endian="<", size=512)
class SparseExtentHeader(Record):
    """Hosted Sparse Extents, "The Sparse Extent Header"; the footer of a stream is one too."""

    magicNumber: b4
    version: u32
    flags: u32
    capacity: u64  # sectors
    grainSize: u64  # sectors
    descriptorOffset: u64  # sectors
    descriptorSize: u64  # sectors
    numGTEsPerGT: u32
    rgdOffset: u64  # sectors
    gdOffset: u64  # sectors
    overHead: u64  # sectors of metadata before the first grain
    uncleanShutdown: u8
    newlines: b4  # singleEndLineChar, nonEndLineChar, doubleEndLineChar1, doubleEndLineChar2
    compressAlgorithm: u16
    pad: Annotated[bytes, "433s"]


@record(endian="<", size=16)
class Marker(Record):
    """Stream-Optimized Compressed, "Markers"; where size is not 0 the data begin in the place of type."""

    val: u64  # sectors that follow, or the first sector of a grain
    size: u32
    type: u32


@dataclass(frozen=True, slots=True)
class Sparse:
    """A sparse extent, opened."""

    subformat: str  # what it is called where no descriptor says it
    layout: Layout
    shape: Shape
    descriptor: bytes | None = None
    compressed: bool = False
    dirty: bool = False
    delta: bool = False  # its holes are those of a parent
    warnings: tuple[str, ...] = ()
    check: Callable[[Job], list[str]] | None = None  # proves the checksums of compressed grains

    @property
    def size(self) -> int:
        """Bytes of the disk in it."""
        return self.shape.size

    @property
    def grain(self) -> int:
        """Bytes."""
        return self.shape.grain


# ---------------------------------------------------------------------- hosted


def open_hosted(file: Source, kept: KeptGrains | None = None) -> Sparse:
    """The extent in a file that begins with ``MAGIC``."""
    header = SparseExtentHeader.unpack(read_exactly(file, 0, SparseExtentHeader.SIZE, "the header"))
    _check_header(header, file)
    descriptor = _embedded(header, file)
    at_end = header.gdOffset == GD_AT_END
    if at_end:
        header = _footer(header, file)
    compressed = header.compressAlgorithm == DEFLATE
    shape = checked_shape(header.capacity, header.grainSize, PER_TABLE, "<u4", compressed=compressed)
    metadata = max(SECTOR, (header.descriptorOffset + header.descriptorSize) * SECTOR if descriptor else 0)
    decode = SectorGrains(file.size, metadata, header.flags, compressed=compressed)
    directory, copy, warnings = _directories(header, file, shape)
    tables = GrainTables(file, shape, directory, decode, copy=copy, kept=kept)
    dirty = bool(header.uncleanShutdown) and not compressed
    if dirty:
        warnings.append(UNCLEAN)
    packed = _Packed(tables, file, markers=bool(header.flags & MARKERS)) if compressed else None
    return Sparse(
        "streamOptimized" if compressed else "monolithicSparse",
        packed or Stored(tables),
        shape,
        descriptor,
        compressed=compressed,
        dirty=dirty,
        warnings=tuple(warnings),
        check=packed.check if packed else None,
    )


def carried_descriptor(file: Source) -> bytes | None:
    """The descriptor of a file that begins with ``MAGIC`` and holds nothing else; None where it is an extent."""
    header = SparseExtentHeader.unpack(read_exactly(file, 0, SparseExtentHeader.SIZE, "the header"))
    return _embedded(header, file) if header.capacity == 0 else None


def embedded_descriptor(file: Source) -> bytes | None:
    """The descriptor in a file that begins with ``MAGIC``, where it has one."""
    return _embedded(SparseExtentHeader.unpack(read_exactly(file, 0, SparseExtentHeader.SIZE, "the header")), file)


def _check_header(header: SparseExtentHeader, file: Source) -> None:
    if header.version not in (1, 2, 3):
        raise UnsupportedError(
            f"sparse extents of version {header.version} cannot be read", offset=4, field="version"
        )
    if header.flags & NEWLINE_TEST and header.newlines != NEWLINES:
        raise InvalidImage(
            "the ends of lines were translated, as by ftp in text mode: the file is damaged throughout",
            offset=73,
            field="singleEndLineChar",
        )
    if header.flags & ~_ALL_FLAGS:
        raise UnsupportedError(f"the flags {header.flags:#x} mean something unknown", offset=8, field="flags")
    if header.compressAlgorithm > DEFLATE:
        raise UnsupportedError(
            f"compression {header.compressAlgorithm} cannot be read", offset=77, field="compressAlgorithm"
        )
    if bool(header.flags & COMPRESSED) != (header.compressAlgorithm == DEFLATE):
        raise InvalidImage("the header contradicts itself on whether grains are compressed", offset=8, field="flags")
    if header.gdOffset != GD_AT_END and header.overHead * SECTOR > file.size:
        raise InvalidImage(
            f"the file has {file.size} bytes, and its metadata alone {header.overHead} sectors",
            offset=64,
            field="overHead",
        )


def checked_shape(capacity: int, grain: int, per_table: int, dtype: str, *, compressed: bool = False) -> Shape:
    """The sizes of an extent, checked; ``capacity`` and ``grain`` in sectors."""
    most = _MOST_PACKED if compressed else _MOST_GRAIN
    if not 0 < grain <= most or grain & (grain - 1):
        raise InvalidImage(f"grains of {grain} sectors are impossible", field="grainSize")
    if not 0 < capacity <= MAX_SIZE // SECTOR:
        raise InvalidImage(f"a capacity of {capacity} sectors is impossible", field="capacity")
    if compressed and capacity // grain >= _MOST_NUMBER:
        raise UnsupportedError(f"a compressed extent of {capacity // grain} grains cannot be read", field="capacity")
    return Shape(capacity * SECTOR, grain * SECTOR, per_table, dtype)


def _embedded(header: SparseExtentHeader, file: Source) -> bytes | None:
    if header.descriptorOffset == 0:
        return None
    size = header.descriptorSize * SECTOR
    if not 0 < size <= MAX_DESCRIPTOR:
        raise InvalidImage(f"the descriptor has {size} bytes", offset=36, field="descriptorSize")
    return read_exactly(file, header.descriptorOffset * SECTOR, size, "the descriptor")


def _footer(header: SparseExtentHeader, file: Source) -> SparseExtentHeader:
    """The footer of a stream whose header says that there is one."""
    start = file.size - 3 * SECTOR
    tail = read(file, start, 3 * SECTOR) if start >= SECTOR and file.size % SECTOR == 0 else b""
    if not tail or Marker.unpack(tail) != Marker(1, 0, FOOTER) or any(tail[2 * SECTOR : 2 * SECTOR + Marker.SIZE]):
        raise InvalidImage(
            "the stream does not end with a footer, so it was cut short: nothing says where its grains are",
            offset=max(start, 0),
            field="footer",
        )
    footer = SparseExtentHeader.unpack(tail, SECTOR)
    for field in ("magicNumber", "version", "flags", "capacity", "grainSize", "numGTEsPerGT", "compressAlgorithm"):
        if getattr(footer, field) != getattr(header, field):
            raise InvalidImage("the footer of the stream contradicts its header", offset=start + SECTOR, field=field)
    if footer.gdOffset == GD_AT_END:
        raise InvalidImage(
            "the footer does not say where the grain directory is", offset=start + SECTOR, field="gdOffset"
        )
    return footer


def _directories(
    header: SparseExtentHeader, file: Source, shape: Shape
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None, list[str]]:
    """The directory to use, its redundant copy where there is a sound one, and what is to be said of them."""
    if header.numGTEsPerGT != PER_TABLE:
        raise UnsupportedError(f"grain tables of {header.numGTEsPerGT} entries", offset=44, field="numGTEsPerGT")
    copy = None
    if header.flags & REDUNDANT and header.rgdOffset:
        try:
            copy = directory_of(file, header.rgdOffset, shape, "redundant grain directory", "rgdOffset")
        except InvalidImage as error:
            damage = str(error)
    try:
        directory = directory_of(file, header.gdOffset, shape, "grain directory", "gdOffset")
    except InvalidImage as error:
        if copy is None:
            raise
        return copy, None, [f"{error}; its redundant copy is used"]
    if header.flags & REDUNDANT and header.rgdOffset and copy is None:
        return directory, None, [f"{damage}; the first one is sound"]
    return directory, copy, []


def directory_of(file: Source, sector: int, shape: Shape, what: str, field: str) -> NDArray[np.int64]:
    """A grain directory as offsets in the file, all tables inside it and none over another."""
    if not 0 < sector <= file.size // SECTOR:
        raise InvalidImage(f"the {what} lies at sector {sector}, outside the file", field=field)
    entries = read_directory(file, sector * SECTOR, shape, what).astype(np.int64)
    entries *= SECTOR
    check_tables(entries, shape, file, sector * SECTOR, what)
    return entries


def check_tables(offsets: NDArray[np.int64], shape: Shape, file: Source, start: int, what: str) -> None:
    """Raise InvalidImage where a table is outside the file, over another one or over the directory at ``start``."""
    used = offsets[offsets != 0]
    if not len(used):
        return
    if (used[1:] < used[:-1]).any():
        used.sort()
    end = start + len(offsets) * np.dtype(shape.dtype).itemsize
    if used[0] < SECTOR or used[-1] + shape.table_bytes > file.size:
        raise InvalidImage(f"the {what} names a grain table outside the file", offset=start)
    if (np.diff(used) < shape.table_bytes).any() or ((used < end) & (used + shape.table_bytes > start)).any():
        raise InvalidImage(f"grain tables of the {what} overlap", offset=start)


@dataclass(frozen=True, slots=True)
class SectorGrains:
    """Decodes the entries of hosted and COWD tables: sectors in the file, 0 for a hole."""

    file_size: int
    metadata: int  # bytes at the start of the file that are no grains
    flags: int
    compressed: bool = False

    def __call__(self, entries: NDArray[np.int64], first: int) -> Grains:
        places = entries * SECTOR
        kinds = np.full(len(entries), Kind.PACKED if self.compressed else Kind.STORED, np.uint8)
        kinds[(places < self.metadata) | (places >= self.file_size)] = BAD
        kinds[entries == 0] = Kind.HOLE
        if self.flags & ZEROED_GRAINS:
            kinds[entries == 1] = Kind.ZERO
        if self.compressed:
            places = entries | (np.arange(first, first + len(entries), dtype=np.int64) << 32)
        return kinds, places


class Stored:
    """The layout of an extent whose grains stand in the file as they are."""

    def __init__(self, tables: GrainTables) -> None:
        self.mapping = tables.mapping

    def unpack(self, place: int, /) -> bytes:
        raise InvalidImage("grains of this extent are not compressed", offset=place)


class _Packed:
    """The layout of an extent whose grains are compressed; a place is the sector, and above it the grain's number."""

    def __init__(self, tables: GrainTables, file: Source, *, markers: bool) -> None:
        self.mapping = tables.mapping
        self._tables, self._file, self._shape, self._markers = tables, file, tables.shape, markers

    def unpack(self, place: int, /) -> bytes:
        number, offset = place >> 32, (place & 0xFFFFFFFF) * SECTOR
        start = number * self._shape.grain
        size = min(2 * self._shape.grain, self._file.size - offset)
        if self._markers:
            marker = Marker.unpack(read_exactly(self._file, offset, Marker.SIZE, "the marker of a grain"))
            if marker.val * SECTOR != start or not 0 < marker.size <= 2 * self._shape.grain:
                raise InvalidImage(
                    f"the marker of the grain at byte {start} of the disk says it is {marker.size} bytes of sector "
                    f"{marker.val}",
                    offset=offset,
                )
            offset, size = offset + 12, marker.size
        data = read_exactly(self._file, offset, size, "a compressed grain")
        try:
            if start + self._shape.grain <= self._shape.size:
                return inflate(data, self._shape.grain)
            return _inflate_last(data, self._shape.size - start, self._shape.grain)
        except InvalidImage as error:
            raise InvalidImage(f"the grain of byte {start} of the disk: {error}", offset=offset) from None

    def check(self, job: Job) -> list[str]:
        """Open every grain, on all cores; a sentence for each that cannot be."""
        found: list[str] = []
        for kinds, places in self._tables.groups():
            found += [f"grain table entry {place} cannot be right" for place in places[kinds == BAD].tolist()]
            packed = places[kinds == Kind.PACKED].tolist()
            for damage in map_ordered(self._damage, packed, workers=len(os.sched_getaffinity(0)), depth=16):
                found += damage
                job.advance(self._tables.shape.grain)
        return found

    def _damage(self, place: int) -> list[str]:
        try:
            self.unpack(place)
        except InvalidImage as error:
            return [str(error)]
        return []


def _inflate_last(data: bytes, least: int, most: int) -> bytes:
    """The last grain, which some writers fill up to its size and others end where the disk does."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise InvalidImage(f"compressed data cannot be opened: {error}") from None
    if not stream.eof or not least <= len(plain) <= most:
        raise InvalidImage(f"compressed data holds {len(plain)} bytes where {least} are needed")
    return plain
