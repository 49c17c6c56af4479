"""cloop, the compressed loop images of Knoppix, in version 2.

    0                    128          132          136
    +--------------------+------------+------------+---------------------+---------+---------+ ...
    | a shell script     | block_size | num_blocks | offsets, one more   | block 0 | block 1 |
    |                    |            |            | than blocks         | (zlib)  | (zlib)  |
    +--------------------+------------+------------+---------------------+---------+---------+ ...

All numbers are big-endian; the disk has whole blocks.  Written from the description of the format in cloop's own
README and header (compressed_loop.h).
"""

from __future__ import annotations

from typing import Annotated, Final

import numpy as np

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.codecs import inflate
from ferrotype.formats.mapped import Kind, MappedSource, Mapping, cells
from ferrotype.formats.related import Related
from ferrotype.formats.tables import SECTOR, Table
from ferrotype.records import Record, record, u32
from ferrotype.units import MiB

__all__ = ["open", "probe"]

_PREAMBLE: Final = b"#!/bin/sh\n#V2.0 Format\n"
_MAX_BLOCK: Final = 64 * MiB  # bytes; blocks have 64 to 256 KiB
_MAX_BLOCKS: Final = 1 << 26
_WINDOW: Final = 1 << 16  # blocks mapped at a time


@record(endian=">", size=136)
class Header(Record):
    """struct cloop_head."""

    preamble: Annotated[bytes, "128s"]
    block_size: u32
    num_blocks: u32


def probe(file: Source) -> bool:
    """Whether the file begins as the script of version 2 does."""
    return read(file, 0, min(file.size, len(_PREAMBLE))) == _PREAMBLE


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """The disk, unpacked block by block as it is read."""
    if not probe(file):
        raise InvalidImage("this is no cloop image of version 2", offset=0, field="preamble")
    header = Header.unpack(read(file, 0, min(file.size, Header.SIZE)))
    block = header.block_size
    if block == 0 or block % SECTOR:
        raise InvalidImage(f"a block of {block} bytes", offset=128, field="block_size")
    if block > _MAX_BLOCK:
        raise UnsupportedError(f"blocks of {block} bytes; at most {_MAX_BLOCK} are read", field="block_size")
    size = block * header.num_blocks
    if size > MAX_SIZE:
        raise InvalidImage(f"a disk of {size} bytes", offset=132, field="num_blocks")
    if header.num_blocks > _MAX_BLOCKS:
        raise UnsupportedError(f"{header.num_blocks} blocks; at most {_MAX_BLOCKS} are read", field="num_blocks")
    source = MappedSource(file, _Blocks(file, header), size, name="cloop")
    return Image("cloop", source, facts={"unit": block, "compression": "zlib"}, close=file.close)


class _Blocks:
    """The layout: every block is packed, and its number is its place."""

    def __init__(self, file: Source, header: Header) -> None:
        self._file, self._block = file, header.block_size
        self._table = Table(file, Header.SIZE, header.num_blocks + 1, ">u8", "table of offsets")

    def mapping(self, offset: int, length: int) -> Mapping:
        first = offset // self._block
        count = min(-(-(offset + length) // self._block) - first, _WINDOW)
        numbers = np.arange(first, first + count, dtype=np.int64)
        mapping = cells(first * self._block, self._block, np.full(count, Kind.PACKED, np.uint8), numbers)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def unpack(self, place: int) -> bytes:
        start, end = self._table.slice(place, 2).tolist()
        # what does not get smaller grows by a few bytes in each 16 KiB
        if not self._table.end <= start < end <= self._file.size or end - start > self._block * 9 // 8 + 1024:
            raise InvalidImage(
                f"block {place} cannot stand from {start} to {end}", offset=Header.SIZE + 8 * place, field="offsets"
            )
        return inflate(read_exactly(self._file, start, end - start, f"block {place}"), self._block)
