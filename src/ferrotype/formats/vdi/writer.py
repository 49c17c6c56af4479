"""Writing VDI, dynamic and fixed: the header and the block map in the first MiB or so, blocks of 1 MiB behind it."""

from __future__ import annotations

import os
import struct
import uuid
from typing import Annotated, Final

import numpy as np

from ferrotype.block import Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.errors import UsageError
from ferrotype.formats import Option, Options, Spec, one_of
from ferrotype.formats.growing import GrowingBlocks
from ferrotype.records import Record, b16, record, u32, u64
from ferrotype.units import MiB, TiB

__all__ = [
    "DIFFERENCING",
    "DYNAMIC",
    "FIXED",
    "FREE",
    "OPTIONS",
    "SIGNATURE",
    "ZERO",
    "Header",
    "Preheader",
    "VdiSink",
    "create",
]

SIGNATURE: Final = 0xBEDA107F
DYNAMIC, FIXED, DIFFERENCING = 1, 2, 4  # image_type
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE  # entries of the block map; all below are blocks of the file

BLOCK: Final = MiB
MAX_DISK: Final = 512 * TiB  # the block map then has 2 GiB, and offset_data 32 bits
_SECTOR: Final = 512
_MAP: Final = 512  # where the block map begins
_TEXT: Final = b"<<< Oracle VM VirtualBox Disk Image >>>\n"


@record(endian="<", size=72)
class Preheader(Record):
    """VDIPREHEADER."""

    text: Annotated[bytes, "64s"]
    signature: u32
    version: u32  # major in the upper half


@record(endian="<", size=384)
class Header(Record):
    """VDIHEADER1, behind the preheader.  Later ones are longer, by what is not needed to read the disk."""

    header_size: u32
    image_type: u32
    image_flags: u32
    description: Annotated[bytes, "256s"]
    offset_bmap: u32
    offset_data: u32
    cylinders: u32
    heads: u32
    sectors: u32
    sector_size: u32
    unused: u32
    disk_size: u64
    block_size: u32
    block_extra: u32
    blocks_in_image: u32
    blocks_allocated: u32
    uuid_image: b16
    uuid_modify: b16
    uuid_link: b16
    uuid_parent_modify: b16


# What VDIHEADER1PLUS has more, the logical geometry: not known, but VirtualBox wants its sector size right.
_LOGICAL_GEOMETRY: Final = struct.pack("<4I", 0, 0, 0, _SECTOR)


OPTIONS: Final[Options] = {
    "subformat": Option(
        "dynamic: only blocks with data are stored; fixed: all of the disk has its place", one_of("dynamic", "fixed")
    )
}


def create(outputs: Outputs, spec: Spec) -> VdiSink:
    """A dynamic or fixed disk of exactly the size wanted."""
    if spec.compress or spec.backing:
        raise UsageError("VDI disks are not compressed, and differencing ones are not written")
    if spec.size % _SECTOR:
        raise UsageError(f"a VDI has whole sectors of {_SECTOR} bytes; a disk of {spec.size} bytes does not fit")
    if not 0 < spec.size <= MAX_DISK:
        raise UsageError(f"a VDI has 1 sector to {MAX_DISK // TiB} TiB, and the disk {spec.size} bytes")
    return VdiSink(outputs.create(), spec)


class VdiSink:
    """Blocks in the order in which they were first written; of a fixed disk, in that of the disk."""

    def __init__(self, file: FileSink, spec: Spec) -> None:
        self._file, self._size = file, spec.size
        self.traits = Traits(sector_size=spec.sector_size, unit=_SECTOR, blank=True)
        count = -(-spec.size // BLOCK)
        self._data = -(-(_MAP + 4 * count) // MiB) * MiB
        self._fixed = spec.get("subformat", "dynamic") == "fixed"
        self._blocks = GrowingBlocks(file, spec.size, block=BLOCK, start=self._data)
        if self._fixed:
            self._blocks.slots[:] = np.arange(count)
            self._blocks.used = count
            file.resize(self._blocks.end)

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, data: memoryview, /) -> None:
        self._blocks.write(offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing to do: what has no block is zeros, and so is what was not written of one that is there."""
        check_write("VDI", self._size, offset, length)

    def finish(self) -> None:
        self._file.resize(self._blocks.end)
        self._file.write(0, memoryview(self._headers()))
        # the table as it is: what says that a block has no slot is what FREE is as a signed number
        self._file.write(_MAP, self._blocks.slots.data.cast("B"))

    def _headers(self) -> bytes:
        before = Preheader(_TEXT, SIGNATURE, 0x00010001)
        header = Header(
            header_size=Header.SIZE + len(_LOGICAL_GEOMETRY),
            image_type=FIXED if self._fixed else DYNAMIC,
            image_flags=0,
            description=b"",
            offset_bmap=_MAP,
            offset_data=self._data,
            cylinders=0,  # VirtualBox reckons the geometry itself where there is none
            heads=0,
            sectors=0,
            sector_size=_SECTOR,
            unused=0,
            disk_size=self._size,
            block_size=BLOCK,
            block_extra=0,
            blocks_in_image=len(self._blocks.slots),
            blocks_allocated=self._blocks.used,
            uuid_image=_new_uuid(),
            uuid_modify=_new_uuid(),
            uuid_link=bytes(16),
            uuid_parent_modify=bytes(16),
        )
        return before.pack() + header.pack() + _LOGICAL_GEOMETRY

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""


def _new_uuid() -> bytes:
    return uuid.UUID(bytes=os.urandom(16), version=4).bytes_le
