"""seSparse, the space-efficient sparse extents of ESXi 6.5 and later.

| const header | volatile header | journal | directory | tables ... | free bitmap | backmap | grains ... |

directory entry   0x1 (4 bits) | 0 (28) | number of the table (32)
table entry       type (4 bits) | low bits of the grain's number in the file (12) | its high bits (48)
                  0 nothing (all bits)   1 unmapped, 2 zeroed: both read as zeros   3 stored

All numbers have 64 bits, all offsets and sizes are in sectors.  VMware does not document the format; written from
what open programs that read it agree on, and like them refusing whatever is not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE
from ferrotype.formats.mapped import Kind
from ferrotype.formats.vmdk.descriptor import SECTOR
from ferrotype.formats.vmdk.sparse import Sparse, Stored, check_tables
from ferrotype.formats.vmdk.tables import BAD, Grains, GrainTables, KeptGrains, Shape, read_directory
from ferrotype.records import Record, record, u64

__all__ = ["CONST_MAGIC", "VOLATILE_MAGIC", "open_sesparse"]

CONST_MAGIC: Final = 0xCAFEBABE
VOLATILE_MAGIC: Final = 0xCAFECAFE
VERSION: Final = 0x0000000200000001
GRAIN: Final = 8  # sectors
TABLE: Final = 64  # sectors


@record(endian="<", size=512)
class ConstHeader(Record):
    """Sector 0."""

    magic: u64
    version: u64
    capacity: u64
    grain_size: u64
    grain_table_size: u64
    flags: u64
    reserved: Annotated[bytes, "32s"]
    volatile_header_offset: u64
    volatile_header_size: u64
    journal_header_offset: u64
    journal_header_size: u64
    journal_offset: u64
    journal_size: u64
    grain_dir_offset: u64
    grain_dir_size: u64
    grain_tables_offset: u64
    grain_tables_size: u64
    free_bitmap_offset: u64
    free_bitmap_size: u64
    backmap_offset: u64
    backmap_size: u64
    grains_offset: u64
    grains_size: u64
    pad: Annotated[bytes, "304s"]


@record(endian="<", size=512)
class VolatileHeader(Record):
    """What changes while the disk is written."""

    magic: u64
    free_gt_number: u64
    next_txn_seq_number: u64
    replay_journal: u64
    pad: Annotated[bytes, "480s"]


def open_sesparse(file: Source, kept: KeptGrains | None = None) -> Sparse:
    """The extent in a file that begins with ``CONST_MAGIC``."""
    header = ConstHeader.unpack(read_exactly(file, 0, ConstHeader.SIZE, "the const header"))
    expected = {"version": VERSION, "grain_size": GRAIN, "grain_table_size": TABLE, "flags": 0}
    for field, value in expected.items():
        found = getattr(header, field)
        if found != value:
            raise UnsupportedError(f"seSparse with {field} {found:#x} cannot be read", field=field)
    if any(header.reserved) or any(header.pad):
        raise UnsupportedError("reserved fields of the const header are in use", field="reserved")
    if not 0 < header.capacity <= MAX_SIZE // SECTOR:
        raise InvalidImage(f"a capacity of {header.capacity} sectors is impossible", offset=16, field="capacity")
    for field in ("volatile_header", "grain_dir", "grain_tables", "grains"):
        if not 0 < getattr(header, f"{field}_offset") <= file.size // SECTOR:
            raise InvalidImage(f"the {field} lies outside the file", field=f"{field}_offset")
    _check_volatile(header, file)
    shape = Shape(header.capacity * SECTOR, GRAIN * SECTOR, TABLE * SECTOR // 8, "<u8")
    decode = _SeGrains(header.grains_offset, header.grains_size, file.size)
    tables = GrainTables(file, shape, _directory(header, file, shape), decode, kept=kept)
    return Sparse("seSparse", Stored(tables), shape)


def _check_volatile(header: ConstHeader, file: Source) -> None:
    start = header.volatile_header_offset * SECTOR
    volatile = VolatileHeader.unpack(read_exactly(file, start, VolatileHeader.SIZE, "the volatile header"))
    if volatile.magic != VOLATILE_MAGIC:
        raise InvalidImage("there is no volatile header", offset=start, field="magic")
    if volatile.replay_journal:
        raise UnsupportedError(
            "the disk was not closed properly and its journal is not replayed: let ESXi open it once",
            offset=start,
            field="replay_journal",
        )
    if any(volatile.pad):
        raise UnsupportedError("reserved fields of the volatile header are in use", offset=start, field="pad")


def _directory(header: ConstHeader, file: Source, shape: Shape) -> NDArray[np.int64]:
    """Offsets of the tables in the file."""
    start = header.grain_dir_offset * SECTOR
    if header.grain_dir_size * SECTOR < shape.tables * 8:
        raise InvalidImage(
            f"a grain directory of {header.grain_dir_size} sectors is too small for the disk", field="grain_dir_size"
        )
    entries = read_directory(file, start, shape, "grain directory")
    used = entries != 0
    numbers = (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)
    if ((entries >> np.uint64(32))[used] != 0x10000000).any():
        raise InvalidImage("the grain directory holds an entry of an unknown kind", offset=start)
    if (numbers[used] >= header.grain_tables_size // TABLE).any():
        raise InvalidImage("the grain directory names a grain table that is not there", offset=start)
    offsets = np.where(used, header.grain_tables_offset * SECTOR + numbers * shape.table_bytes, 0)
    check_tables(offsets, shape, file, start, "grain directory")
    return offsets


@dataclass(frozen=True, slots=True)
class _SeGrains:
    """Decodes the entries of grain tables."""

    grains_offset: int  # sectors
    grains_size: int  # sectors
    file_size: int

    def __call__(self, entries: NDArray[np.int64], first: int) -> Grains:  # noqa: ARG002
        types = entries >> 60  # what has the top bit set is negative, and so bad
        numbers = ((entries >> 48) & 0xFFF) | ((entries & 0xFFFFFFFFFFFF) << 12)
        most = min(self.grains_size, self.file_size // SECTOR) // GRAIN
        kinds = np.full(len(entries), BAD, np.uint8)
        kinds[entries == 0] = Kind.HOLE
        kinds[(types == 1) | (types == 2)] = Kind.ZERO
        kinds[(types == 3) & (numbers >= 0) & (numbers < most)] = Kind.STORED
        places = (self.grains_offset + np.clip(numbers, 0, most) * GRAIN) * SECTOR
        return kinds, places
