"""Writing VHD, dynamic and fixed.

fixed      | the disk | footer |
dynamic    | footer | header | BAT | ... bitmap | block of 2 MiB | ... bitmap | block | footer |

The data of blocks begins at multiples of 4 KiB, as newer Windows has it, so bitmaps stand at the end of a page.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import replace
from typing import Final

import numpy as np

from ferrotype.block import Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.errors import UsageError
from ferrotype.formats import Option, Options, Spec, WritableSink, one_of
from ferrotype.formats.growing import GrowingBlocks
from ferrotype.formats.vhd.records import DYNAMIC, EPOCH, FIXED, UNUSED, DynamicHeader, Footer, checksum
from ferrotype.units import GiB, KiB, MiB

__all__ = ["MAX_DISK", "OPTIONS", "create", "geometry"]

MAX_DISK: Final = 2040 * GiB  # more is refused by Hyper-V, and sector numbers of blocks would not do
BLOCK: Final = 2 * MiB

_SECTOR: Final = 512
_BITMAP: Final = 512  # bytes; one bit for each sector of a block
_PAGE: Final = 4 * KiB
_TABLE: Final = 1536  # where the BAT begins
_RESERVED_FEATURE: Final = 2  # section "Features": always set


OPTIONS: Final[Options] = {
    "subformat": Option(
        "dynamic: only blocks with data are stored; fixed: all of the disk, as Azure wants",
        one_of("dynamic", "fixed"),
    )
}


def create(outputs: Outputs, spec: Spec) -> WritableSink:
    """A dynamic or fixed disk of exactly the size wanted."""
    if spec.compress or spec.backing:
        raise UsageError("VHD disks are not compressed, and differencing ones are not written")
    if spec.size % _SECTOR:
        raise UsageError(f"a VHD has whole sectors of {_SECTOR} bytes; a disk of {spec.size} bytes does not fit")
    if not 0 < spec.size <= MAX_DISK:
        raise UsageError(f"a VHD has 1 sector to {MAX_DISK // GiB} GiB, and the disk {spec.size} bytes; use vhdx")
    file = outputs.create()
    return FixedSink(file, spec) if spec.get("subformat", "dynamic") == "fixed" else DynamicSink(file, spec)


def geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads, sectors a track: the appendix "CHS Calculation" of the specification."""
    sectors = min(sectors, 65535 * 16 * 255)
    if sectors >= 65535 * 16 * 63:
        track, heads = 255, 16
        return sectors // track // heads, heads, track
    track = 17
    tracks = sectors // track
    heads = max((tracks + 1023) // 1024, 4)
    if tracks >= heads * 1024 or heads > 16:
        track, heads = 31, 16
        tracks = sectors // track
    if tracks >= heads * 1024:
        track, heads = 63, 16
        tracks = sectors // track
    return tracks // heads, heads, track


def _footer(size: int, kind: int) -> bytes:
    cylinders, heads, track = geometry(size // _SECTOR)
    footer = Footer(
        Cookie=b"conectix",
        Features=_RESERVED_FEATURE,
        FileFormatVersion=0x00010000,
        DataOffset=Footer.SIZE if kind == DYNAMIC else 0xFFFFFFFF_FFFFFFFF,
        TimeStamp=max(0, min(int(time.time()) - EPOCH, 0xFFFFFFFF)),
        # Readers go by this when they choose between geometry and Current Size; it stands for the latter everywhere.
        CreatorApplication=b"win ",
        CreatorVersion=0x000A0000,
        CreatorHostOS=b"Wi2k",
        OriginalSize=size,
        CurrentSize=size,
        Cylinders=cylinders,
        Heads=heads,
        SectorsPerTrack=track,
        DiskType=kind,
        Checksum=0,
        UniqueId=uuid.UUID(bytes=os.urandom(16), version=4).bytes,
        SavedState=0,
        Reserved=bytes(427),
    )
    return replace(footer, Checksum=checksum(footer.pack(), 64)).pack()


def _header(entries: int) -> bytes:
    header = DynamicHeader(
        Cookie=b"cxsparse",
        DataOffset=0xFFFFFFFF_FFFFFFFF,  # the specification says 0xFFFFFFFF; Windows wants all bits
        TableOffset=_TABLE,
        HeaderVersion=0x00010000,
        MaxTableEntries=entries,
        BlockSize=BLOCK,
        Checksum=0,
        ParentUniqueId=bytes(16),
        ParentTimeStamp=0,
        Reserved1=0,
        ParentUnicodeName=bytes(512),
        ParentLocators=bytes(192),
        Reserved2=bytes(256),
    )
    return replace(header, Checksum=checksum(header.pack(), 36)).pack()


class FixedSink:
    """The disk as it is, with a footer behind it."""

    def __init__(self, file: FileSink, spec: Spec) -> None:
        self._file, self._size = file, spec.size
        self.traits = Traits(sector_size=spec.sector_size, blank=True)
        file.resize(spec.size + Footer.SIZE)

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("VHD", self._size, offset, len(data))
        self._file.write(offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing to do: the new file is zeros."""
        check_write("VHD", self._size, offset, length)

    def finish(self) -> None:
        self._file.write(self._size, memoryview(_footer(self._size, FIXED)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""


class DynamicSink:
    """Blocks in the order in which they were first written."""

    def __init__(self, file: FileSink, spec: Spec) -> None:
        self._file, self._size = file, spec.size
        self.traits = Traits(sector_size=spec.sector_size, unit=_SECTOR, blank=True)
        entries = -(-spec.size // BLOCK)
        table_end = _TABLE + -(-4 * entries // _SECTOR) * _SECTOR
        self._table_end = table_end
        self._blocks = GrowingBlocks(
            file,
            spec.size,
            block=BLOCK,
            start=-(-(table_end + _BITMAP) // _PAGE) * _PAGE,
            stride=BLOCK + _PAGE,
            fresh=self._write_bitmap,
        )

    @property
    def size(self) -> int:
        return self._size

    def _write_bitmap(self, place: int) -> None:
        """All of a block is there, its holes being zeros: so Virtual PC and others write it too."""
        self._file.write(place - _BITMAP, memoryview(b"\xff" * _BITMAP))

    def write(self, offset: int, data: memoryview, /) -> None:
        self._blocks.write(offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing to do: what has no block is zeros, and so is what was not written of one that is there."""
        check_write("VHD", self._size, offset, length)

    def finish(self) -> None:
        blocks = self._blocks
        end = blocks.end - _PAGE if blocks.used else self._table_end  # behind the data of the last block
        slots = blocks.slots.astype(np.int64)
        sectors = (slots * (BLOCK + _PAGE) + (blocks.start - _BITMAP)) // _SECTOR
        table = np.where(slots < 0, UNUSED, sectors).astype(">u4").tobytes()
        footer = _footer(self._size, DYNAMIC)
        self._file.resize(end + len(footer))
        padding = b"\xff" * (self._table_end - _TABLE - len(table))
        self._file.write_many(0, [footer, _header(len(slots)), table, padding])
        self._file.write(end, memoryview(footer))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""
