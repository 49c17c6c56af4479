"""The structures FAT is made of: boot sector, where everything stands, entries of the table and of directories.

    FAT12    aa bA BB    two entries: Aaa, BBb        FAT16    2 bytes        FAT32    28 bits of 4 bytes

"Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03, whose field names are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.records import Record, b8, record, u8, u16, u32


@record(endian="<", size=36)
class BootSector(Record):
    """Boot sector and BPB, the part all three types share."""

    BS_jmpBoot: Annotated[bytes, "3s"]
    BS_OEMName: b8
    BPB_BytsPerSec: u16
    BPB_SecPerClus: u8
    BPB_RsvdSecCnt: u16
    BPB_NumFATs: u8
    BPB_RootEntCnt: u16
    BPB_TotSec16: u16
    BPB_Media: u8
    BPB_FATSz16: u16
    BPB_SecPerTrk: u16
    BPB_NumHeads: u16
    BPB_HiddSec: u32
    BPB_TotSec32: u32


@record(endian="<", size=26)
class Extended(Record):
    """Byte 36 on of FAT12 and FAT16, and byte 64 on of FAT32."""

    BS_DrvNum: u8
    BS_Reserved1: u8  # bit 0: not cleanly unmounted, bit 1: hard errors seen
    BS_BootSig: u8
    BS_VolID: u32
    BS_VolLab: Annotated[bytes, "11s"]
    BS_FilSysType: b8


@record(endian="<", size=28)
class Extended32(Record):
    """Byte 36 to 63 of FAT32."""

    BPB_FATSz32: u32
    BPB_ExtFlags: u16
    BPB_FSVer: u16
    BPB_RootClus: u32
    BPB_FSInfo: u16
    BPB_BkBootSec: u16
    BPB_Reserved: Annotated[bytes, "12s"]


DIRECTORY_ENTRY: Final = np.dtype(  # "FAT Directory Structure"
    {
        "names": ["DIR_Name", "DIR_Attr", "DIR_FstClusHI", "DIR_FstClusLO", "DIR_FileSize"],
        "formats": ["V11", "u1", "<u2", "<u2", "<u4"],
        "offsets": [0, 11, 20, 26, 28],
        "itemsize": 32,
    }
)
ATTR_VOLUME_ID: Final = 0x08
ATTR_DIRECTORY: Final = 0x10
ATTR_LONG_NAME: Final = 0x0F


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands; counts in sectors or clusters, offsets in bytes."""

    bits: int  # 12, 16 or 32
    sector: int
    cluster: int
    fat_start: int
    fat_size: int
    fats: int
    root_start: int  # FAT12/16
    root_size: int
    data_start: int
    clusters: int
    size: int

    @property
    def table_size(self) -> int:
        """Bytes of a FAT that hold entries of clusters."""
        return ((self.clusters + 2) * self.bits + 7) // 8


def sectors_of(boot: BootSector) -> int:
    """Sectors of the volume, from whichever of the two fields holds them."""
    return boot.BPB_TotSec16 or boot.BPB_TotSec32


def layout_of(boot: BootSector, fat_size: int) -> Layout:
    """Section "FAT Type Determination".  Raises InvalidImage where the parts do not fit each other."""
    sector = boot.BPB_BytsPerSec
    root_start = boot.BPB_RsvdSecCnt + boot.BPB_NumFATs * fat_size
    data_start = root_start + -(-boot.BPB_RootEntCnt * 32 // sector)
    clusters = max(sectors_of(boot) - data_start, 0) // boot.BPB_SecPerClus
    if clusters == 0:
        raise InvalidImage("FAT without a single cluster", field="BPB_TotSec32")
    layout = Layout(
        bits=32 if boot.BPB_FATSz16 == 0 else 12 if clusters < 4085 else 16,
        sector=sector,
        cluster=sector * boot.BPB_SecPerClus,
        fat_start=boot.BPB_RsvdSecCnt * sector,
        fat_size=fat_size * sector,
        fats=boot.BPB_NumFATs,
        root_start=root_start * sector,
        root_size=boot.BPB_RootEntCnt * 32,
        data_start=data_start * sector,
        clusters=clusters,
        size=sectors_of(boot) * sector,
    )
    if clusters >= {12: 4085, 16: 65525, 32: 0x0FFFFFF5}[layout.bits]:
        raise InvalidImage(f"{clusters} clusters are too many for FAT{layout.bits}", field="BPB_TotSec32")
    if layout.table_size > layout.fat_size:
        raise InvalidImage(f"the FAT is too short for {clusters} clusters", field="BPB_FATSz")
    return layout


def entries_of(table: bytes | NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """The whole entries in ``table``; of 32 bits the upper four are reserved and cleared."""
    octets = np.frombuffer(table, np.uint8)
    if bits != 12:
        whole = octets[: len(octets) // (bits // 8) * (bits // 8)].view(f"<u{bits // 8}")
        return whole.astype(np.uint32) if bits == 16 else whole & np.uint32(0x0FFFFFFF)
    triples = np.append(octets, np.zeros(-len(octets) % 3, np.uint8)).reshape(-1, 3).astype(np.uint32)
    pairs = np.empty((len(triples), 2), np.uint32)  # aa bA BB is the pair Aaa BBb
    pairs[:, 0] = triples[:, 0] | (triples[:, 1] & 0x0F) << 8
    pairs[:, 1] = triples[:, 1] >> 4 | triples[:, 2] << 4
    return pairs.reshape(-1)
