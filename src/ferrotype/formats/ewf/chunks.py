"""The disk of an EWF image as a layout: chunks of one size, each found by its number and proven by its Adler-32.

disk     | chunk 0 | chunk 1 | chunk 2 | ... | last, shorter |
             |          |
segment  ..[zlib stream][plain bytes, Adler-32]..

tables say where    Chunks.find(number) -> Place        versions 1 and 2 differ in nothing else
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol
from zlib import adler32

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.formats.codecs import inflate_sealed
from ferrotype.formats.ewf.bzip2 import bunzip2_sealed
from ferrotype.formats.ewf.segments import Segments
from ferrotype.formats.mapped import Kind, Mapping

__all__ = ["ChunkLayout", "Chunks", "Form", "Place", "chunk_bound"]


class Form(IntEnum):
    """How a chunk is kept."""

    ZLIB = 0  # a zlib stream
    PLAIN = 1  # as it is, with its Adler-32 behind it
    BARE = 2  # as it is, without
    PATTERN = 3  # eight bytes over and over; the place's offset is those bytes
    BZIP2 = 4  # a bzip2 stream, or its one block alone


class Place(NamedTuple):
    """Where a chunk stands; ``room`` is the bytes up to where the next thing begins, which may be too many."""

    segment: int
    offset: int
    room: int
    form: Form


class Chunks(Protocol):
    """The tables of an image.  Called from many threads."""

    def find(self, number: int, /) -> Place:
        """Raises InvalidImage where the tables have no such chunk, or what they say of it cannot be."""

    def zeros(self, first: int, last: int, /) -> NDArray[np.bool_] | None:
        """Which chunks from ``first`` on are known to be zeros: at least one, fewer than asked for where it suits.

        None where the tables never know that.
        """

    def check(self) -> list[str]:
        """Prove every table: a sentence for each that is damaged."""


def chunk_bound(chunk_size: int) -> int:
    """Bytes that no packed chunk exceeds, however badly it was packed: deflate's stored blocks and then some."""
    return chunk_size + chunk_size // 8 + 1024


class ChunkLayout:
    """Where the disk's bytes stand: rows of packed chunks, each placed by its number, and known zeros."""

    def __init__(self, size: int, chunk_size: int, segments: Segments, chunks: Chunks) -> None:
        self.size, self.chunk_size = size, chunk_size
        self._segments, self._chunks = segments, chunks
        self._most = chunk_bound(chunk_size)
        self._open: dict[Form, Callable[[int, Place], bytes]] = {
            Form.ZLIB: self._zlib,
            Form.PLAIN: self._plain,
            Form.BARE: self._bare,
            Form.PATTERN: self._pattern,
            Form.BZIP2: self._bzip2,
        }

    def mapping(self, offset: int, length: int, /) -> Mapping:
        first = offset // self.chunk_size
        zeros = self._chunks.zeros(first, -(-(offset + length) // self.chunk_size))
        if zeros is None:
            return Mapping.uniform(offset, length, Kind.PACKED, first, offset - first * self.chunk_size)
        heads = np.flatnonzero(np.diff(zeros, prepend=~zeros[:1]))
        bounds = (first + np.append(heads, len(zeros)).astype(np.int64)) * self.chunk_size
        kinds = np.where(zeros[heads], np.uint8(Kind.ZERO), np.uint8(Kind.PACKED))
        whole = Mapping(bounds, kinds, first + heads.astype(np.int64), np.zeros(len(heads), np.int64))
        return whole.clip(offset, min(length, whole.end - offset))

    def unpack(self, place: int, /) -> bytes:
        where = self._chunks.find(place)
        try:
            return self._open[where.form](place, where)
        except InvalidImage as error:
            name = self._segments.names[where.segment]
            raise InvalidImage(
                f"chunk {place} (byte {place * self.chunk_size} of the disk) in {name} is damaged: {error}",
                offset=where.offset if where.form != Form.PATTERN else None,
            ) from None

    def length(self, number: int) -> int:
        """Bytes of the disk in a chunk."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def _read(self, where: Place, length: int) -> bytes:
        return self._segments.read(where.segment, where.offset, length)

    def _zlib(self, number: int, where: Place) -> bytes:
        return self._enough(number, inflate_sealed(self._read(where, min(where.room, self._most)), self.chunk_size))

    def _plain(self, number: int, where: Place) -> bytes:
        needed = self.length(number)
        lengths = [needed]
        if needed < self.chunk_size and where.room >= self.chunk_size + 4:
            lengths.append(self.chunk_size)  # some programs fill the last chunk up
        if needed < where.room - 4 < self.chunk_size:
            lengths.append(where.room - 4)  # libewf keeps the bytes behind the last whole sector of a file
        for length in lengths:
            data = self._read(where, length + 4)
            plain = data[:-4]
            if adler32(plain) == int.from_bytes(data[-4:], "little"):
                return plain
        raise InvalidImage("its Adler-32 is another")

    def _bzip2(self, number: int, where: Place) -> bytes:
        return self._enough(number, bunzip2_sealed(self._read(where, min(where.room, self._most)), self.chunk_size))

    def _bare(self, number: int, where: Place) -> bytes:
        return self._enough(number, self._read(where, min(where.room, self.length(number))))

    def _pattern(self, number: int, where: Place) -> bytes:  # noqa: ARG002  one of several of a kind
        return where.offset.to_bytes(8, "little") * (self.chunk_size // 8)

    def _enough(self, number: int, plain: bytes) -> bytes:
        if len(plain) < self.length(number):
            raise InvalidImage(f"it holds {len(plain)} bytes where {self.length(number)} are needed")
        return plain
