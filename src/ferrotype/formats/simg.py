"""Android sparse images (``simg``): what ``fastboot`` flashes and ``img2simg`` makes.

    | file header | chunk header, data | chunk header, data | ...

    RAW          blocks as they are
    FILL         4 bytes, repeated over the blocks
    DONT_CARE    blocks that the image has nothing for: holes here
    CRC32        of everything up to here

All numbers are little-endian.  Written from the description in AOSP, ``libsparse/sparse_format.h``.
"""

from __future__ import annotations

import re
import struct
import zlib
from array import array
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.mapped import Kind, MappedSource, Mapping
from ferrotype.formats.related import Related
from ferrotype.job import Job
from ferrotype.records import Record, record, u16, u32
from ferrotype.units import KiB, MiB

__all__ = ["open", "probe"]

_MAGIC: Final = 0xED26FF3A
_RAW, _FILL, _DONT_CARE, _CRC32 = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4
_MAX_BLOCK: Final = 64 * MiB  # bytes; images have blocks of 4 KiB
_MAX_CHUNKS: Final = 1 << 20
_MAX_SIZE: Final = 1 << 55  # bytes of a disk: so that the rows of a FILL can be numbered
_ROWS: Final = 1 << 40
_WINDOW: Final = 64 * KiB  # bytes read at once while the chunks are gone through
_ROW: Final = 64 * KiB  # bytes of a FILL chunk made at a time
_MOST_RUNS: Final = 1 << 16  # mapped at a time
_PIECE: Final = MiB
_ONE_OF_MANY: Final = re.compile(r"sparse_?chunk[._]?\d+$|[._]sparse\.\d+$", re.IGNORECASE)


@record(endian="<", size=28)
class Header(Record):
    """sparse_header_t."""

    magic: u32
    major_version: u16
    minor_version: u16
    file_hdr_sz: u16
    chunk_hdr_sz: u16
    blk_sz: u32
    total_blks: u32
    total_chunks: u32
    image_checksum: u32  # CRC-32 of the disk with zeros for DONT_CARE; 0: none


# chunk_header_t: chunk_type, reserved1, chunk_sz (blocks of the disk), total_sz (bytes in the file, this header
# included).  There may be many of them: no objects are made.
_CHUNK: Final = struct.Struct("<HHII")


def probe(file: Source) -> bool:
    """Whether the magic is there."""
    return file.size >= Header.SIZE and read(file, 0, 4) == _MAGIC.to_bytes(4, "little")


def open(file: Source, related: Related) -> Image:
    """The disk, of which every chunk's header was looked at."""
    if not probe(file):
        raise InvalidImage("there is no header of an Android sparse image", offset=0, field="magic")
    header = Header.unpack(read(file, 0, Header.SIZE))
    if header.major_version != 1:
        raise UnsupportedError(f"version {header.major_version} of Android sparse images", field="major_version")
    if header.file_hdr_sz < Header.SIZE or header.chunk_hdr_sz < _CHUNK.size:
        raise InvalidImage("headers that are too short", offset=8, field="file_hdr_sz")
    if not 0 < header.blk_sz <= _MAX_BLOCK or header.blk_sz % 4:
        raise InvalidImage(f"a block of {header.blk_sz} bytes", offset=12, field="blk_sz")
    size = header.blk_sz * header.total_blks
    if size > _MAX_SIZE:
        raise InvalidImage(f"a disk of {size} bytes", offset=16, field="total_blks")
    if related.path is not None and _ONE_OF_MANY.search(related.path.name):
        raise UnsupportedError("this is one image of several that make a disk: join them with simg2img FILE... OUT")
    chunks = _Chunks(file, header)
    source = MappedSource(file, chunks, size, name="Android sparse image", row=_ROW)
    checked = bool(chunks.sums) or header.image_checksum != 0
    facts: dict[str, object] = {"unit": header.blk_sz, "chunks": header.total_chunks, "checksums": checked}
    left = file.size - chunks.end
    return Image(
        "simg",
        source,
        facts=facts,
        warnings=(f"{left} bytes behind the last chunk mean nothing, and are left out",) if left else (),
        check=(lambda job: _damages(source, chunks, header.image_checksum, job)) if checked else None,
        close=file.close,
    )


class _Chunks:
    """The layout: where runs end on the disk, what they are, and where.

    The place of a FILL is the number of its value times ``_ROWS``, and then that of the row in it.
    """

    def __init__(self, file: Source, header: Header) -> None:
        """Go through all chunks.  Raises InvalidImage where they are not in the file, or do not make up the disk."""
        self.sums: list[tuple[int, int, int]] = []  # up to which byte of the disk, CRC-32, where in the file
        self._values: list[bytes] = []
        self._header = header
        if header.total_chunks > _MAX_CHUNKS:
            raise UnsupportedError(
                f"{header.total_chunks} chunks; at most {_MAX_CHUNKS} are read", field="total_chunks"
            )
        if header.total_chunks * _CHUNK.size > file.size:
            raise InvalidImage(f"{header.total_chunks} chunks in {file.size} bytes", offset=20, field="total_chunks")
        bounds, kinds, places = array("q", [0]), array("B"), array("q")
        window, at = _Window(file), header.file_hdr_sz
        for _ in range(header.total_chunks):
            kind, _, blocks, total = _CHUNK.unpack(window.read(at, _CHUNK.size))
            data = at + header.chunk_hdr_sz
            length = blocks * header.blk_sz
            wanted = {_RAW: length, _FILL: 4, _DONT_CARE: 0, _CRC32: 4}.get(kind)
            if wanted is None:
                raise InvalidImage(f"a chunk of type {kind:#x}", offset=at, field="chunk_type")
            if total != header.chunk_hdr_sz + wanted or (kind == _CRC32 and blocks):
                raise InvalidImage(f"a chunk of {total} bytes for {blocks} blocks", offset=at, field="total_sz")
            if data + wanted > file.size:
                raise InvalidImage("the file ends within a chunk: it is cut short", offset=at)
            end = bounds[-1] + length
            if end > header.blk_sz * header.total_blks:
                raise InvalidImage("the chunks hold more than the disk", offset=at, field="chunk_sz")
            if kind == _CRC32:
                self.sums.append((end, int.from_bytes(window.read(data, 4), "little"), at))
            elif length:
                run, place = self._run(kind, data, window)
                bounds.append(end)
                kinds.append(run)
                places.append(place)
            at = data + wanted
        if bounds[-1] != header.blk_sz * header.total_blks:
            raise InvalidImage(
                f"the chunks hold {bounds[-1] // header.blk_sz} of {header.total_blks} blocks", field="total_blks"
            )
        self.end = at
        self._bounds, self._kinds, self._places = np.array(bounds), np.array(kinds), np.array(places)

    def _run(self, kind: int, data: int, window: _Window) -> tuple[Kind, int]:
        if kind == _RAW:
            return Kind.STORED, data
        if kind == _DONT_CARE:
            return Kind.HOLE, 0
        value = window.read(data, 4)
        if value == bytes(4):
            return Kind.ZERO, 0
        self._values.append(value)
        return Kind.PACKED, (len(self._values) - 1) * _ROWS

    def mapping(self, offset: int, length: int) -> Mapping:
        first = int(np.searchsorted(self._bounds, offset, "right")) - 1
        last = int(np.searchsorted(self._bounds, offset + length, "left"))
        last = min(last, first + _MOST_RUNS)
        runs = slice(first, last)
        skips = np.zeros(last - first, np.int64)
        mapping = Mapping(self._bounds[first : last + 1], self._kinds[runs], self._places[runs], skips)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def unpack(self, place: int) -> bytes:
        return self._values[place // _ROWS] * (_ROW // 4)


class _Window:
    """Small reads of a file that go forward: chunks without data stand side by side."""

    def __init__(self, file: Source) -> None:
        self._file, self._at, self._data = file, 0, b""

    def read(self, offset: int, length: int) -> bytes:
        inside = offset - self._at
        if not 0 <= inside <= len(self._data) - length:
            if offset + length > self._file.size:
                raise InvalidImage("the file ends before its last chunk: it is cut short", offset=offset)
            self._at, inside = offset, 0
            self._data = read(self._file, offset, min(_WINDOW, self._file.size - offset))
        return self._data[inside : inside + length]


def _damages(disk: Source, chunks: _Chunks, whole: int, job: Job) -> list[str]:
    """A sentence for each checksum that is not that of the disk before it."""
    found, crc, at = [], 0, 0
    last = [(disk.size, whole, 24)] if whole else []
    for end, stated, place in [*chunks.sums, *last]:
        while at < end:
            piece = read(disk, at, min(_PIECE, end - at))
            crc, at = zlib.crc32(piece, crc), at + len(piece)
            job.advance(len(piece))
        if crc != stated:
            found.append(f"bytes 0 to {end} of the disk have another CRC-32 than byte {place} of the file says")
    return found
