"""FAT12, FAT16 and FAT32: which clusters are free.

    sector 0              reserved        NumFATs x FATSz                 FAT12/16 only
    +-------------+-------------+-------+-------+-----------------+--------------------------+- - -+
    | boot sector | FSInfo ...  | FAT 0 | FAT 1 | root directory  | cluster 2 | 3 | 4 | ...  | rest|
    +-------------+-------------+-------+-------+-----------------+--------------------------+- - -+
                                                                  data_start            whole clusters only

    FAT      12, 16 or 28 (of 32) bits for each cluster; 0 is free, all else is not (bad clusters included)
             entry 0: the media byte and ones    entry 1: ones, and the volume's dirty and error bits

Written from "Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03; section
"Boot Sector and BPB" for the layout, "FAT Type Determination" and "FAT Data Structure" for the table.  One thing
differs from it on purpose: a boot sector without FATSz16 can only be laid out as FAT32, however few clusters it has
(``mkfs.fat -F 32`` on small volumes), so the number of clusters only decides between FAT12 and FAT16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import DeviceError, FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import BitmapRuns, ExtentMap, Offsets, State
from ferrotype.filesystems import Claims, Facts
from ferrotype.filesystems.copies import require_copy
from ferrotype.filesystems.fat_claims import claims
from ferrotype.filesystems.fat_files import Tree
from ferrotype.filesystems.fat_records import (
    ATTR_DIRECTORY,
    ATTR_LONG_NAME,
    ATTR_VOLUME_ID,
    DIRECTORY_ENTRY,
    BootSector,
    Extended,
    Extended32,
    entries_of,
    layout_of,
    sectors_of,
)
from ferrotype.filesystems.remains import Intact, Ranges, Remains
from ferrotype.units import KiB, MiB

__all__ = ["Fat", "format_serial", "free_runs", "open", "probe"]

# Boot sectors of others that fill in a BPB too.  BitLocker To Go hides behind a complete FAT32 one; the GUID that
# gives it away stands at byte 424 ({4967D63B-2E29-4AD8-8399-F6A339E3D001}).
_FOREIGN_OEM: Final = (b"NTFS    ", b"EXFAT   ", b"-FVE-FS-")
_FOREIGN_TYPE: Final = (b"HPFS    ", b"NTFS    ", b"JFS     ")
_BITLOCKER_TO_GO: Final = bytes.fromhex("3bd66749292ed84a8399f6a339e3d001")

_WINDOW: Final = 768 * KiB  # bytes of a FAT looked at in one go; whole entries of all three widths
_MOST_RUNS: Final = 1 << 21  # free runs: a map of two million takes about 250 MiB to build
_MOST_ROOT: Final = 2 * MiB  # bytes of a root directory searched for the label
_MOST_FATS: Final = 4  # the specification knows 1 and 2, mkfs.fat makes up to 4


def format_serial(serial: int) -> str | None:
    """A volume serial number as blkid prints it, None for 0."""
    return f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if serial else None


def free_runs(windows: Iterable[tuple[NDArray[np.uint8], int]]) -> tuple[Offsets, Offsets]:
    """Starts and ends of the runs of ones in a bitmap that comes in one or more windows of (bytes, number of bits).

    Raises UnsupportedError beyond two million runs, so that memory and time are bounded whatever the disk says.
    """
    starts, ends, base, count = [], [], 0, 0
    for packed, bits in windows:
        runs = BitmapRuns()
        runs.add(packed, bits)
        first, last = runs.finish()
        starts.append(first + base)
        ends.append(last + base)
        base += bits
        count += len(first)
        if count > _MOST_RUNS:
            raise UnsupportedError(f"the free space is in more than {_MOST_RUNS} pieces")
    return np.concatenate(starts), np.concatenate(ends)


def _same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two windows of equal length hold the same bytes."""
    words = len(one) // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )


def _is_power(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _plausible(boot: BootSector, sector: bytes) -> bool:
    """Whether a first sector can be nothing but FAT's."""
    sectors, fat_size = sectors_of(boot), boot.BPB_FATSz16 or int.from_bytes(sector[36:40], "little")
    return (
        boot.BS_OEMName not in _FOREIGN_OEM
        and sector[54:62] not in _FOREIGN_TYPE
        and sector[424:440] != _BITLOCKER_TO_GO
        and (sector[510:512] == b"\x55\xaa" or sector[0] in (0xEB, 0xE9, 0x60))  # 0x60: a 68000 branch, Atari
        and boot.BPB_BytsPerSec in (512, 1024, 2048, 4096)
        and _is_power(boot.BPB_SecPerClus)
        and boot.BPB_RsvdSecCnt > 0
        and 1 <= boot.BPB_NumFATs <= _MOST_FATS
        and (boot.BPB_Media == 0xF0 or boot.BPB_Media >= 0xF8)
        and (boot.BPB_RootEntCnt > 0) == (boot.BPB_FATSz16 > 0)
        and fat_size > 0
        and sectors > boot.BPB_RsvdSecCnt + boot.BPB_NumFATs * fat_size
    )


class Fat:
    """An opened FAT file system."""

    def __init__(self, source: Source) -> None:
        self._source = source
        sector = read_exactly(source, 0, 512, "the boot sector")
        boot = BootSector.unpack(sector)
        if not _plausible(boot, sector):
            raise InvalidImage("not a FAT boot sector", offset=0)
        self._root_cluster = 0
        self._backup = 0  # byte of the backup boot sector; 0: there is none
        self._tables = list(range(boot.BPB_NumFATs))
        if boot.BPB_FATSz16:
            extended = Extended.unpack(sector, 36)
            self._layout = layout_of(boot, boot.BPB_FATSz16)
            self._refuse_atari(marked=sector[510:512] == b"\x55\xaa")
            self._refuse_in_doubt(sector[54:62])
        else:
            extended = Extended.unpack(sector, 64)
            self._open32(boot, Extended32.unpack(sector, 36))
        self._check_tables()
        trusted = extended.BS_BootSig in (0x28, 0x29)
        self.facts = Facts(
            kind="vfat",
            label=self._label(),
            uuid=format_serial(extended.BS_VolID) if trusted or self._layout.bits == 32 else None,
            block_size=self._layout.cluster,
            size=self._layout.size,
            unclean=self._unclean(extended.BS_Reserved1 if trusted else 0),
        )

    def _open32(self, boot: BootSector, extended: Extended32) -> None:
        self._layout = layout_of(boot, extended.BPB_FATSz32)
        if extended.BPB_FSVer != 0:
            raise UnsupportedError(f"FAT32 of version {extended.BPB_FSVer:#06x}", field="BPB_FSVer")
        if not 2 <= extended.BPB_RootClus < self._layout.clusters + 2:
            raise InvalidImage(f"there is no cluster {extended.BPB_RootClus}", field="BPB_RootClus")
        self._root_cluster = extended.BPB_RootClus
        if extended.BPB_BkBootSec < boot.BPB_RsvdSecCnt:  # 0 and 0xFFFF: none is kept
            self._backup = extended.BPB_BkBootSec * boot.BPB_BytsPerSec
        if extended.BPB_ExtFlags & 0x80:  # mirroring is off: only one of the FATs is kept up to date
            active = extended.BPB_ExtFlags & 0x0F
            if active >= boot.BPB_NumFATs:
                raise InvalidImage(f"there is no FAT {active}", field="BPB_ExtFlags")
            self._tables = [active]

    def _refuse_in_doubt(self, told: bytes) -> None:
        """Few clusters mean 12 bits, and some programs wrote 16 all the same and said so in BS_FilSysType."""
        layout = self._layout
        if layout.bits == 12 and told.startswith(b"FAT16") and (layout.clusters + 2) * 2 <= layout.fat_size:
            raise UnsupportedError(
                "its boot sector says FAT16 and its number of clusters FAT12", field="BS_FilSysType"
            )

    def _refuse_atari(self, *, marked: bool) -> None:
        """An Atari's hard disks hold 16-bit entries however few the clusters, and lack the 0x55AA mark."""
        layout = self._layout
        roomy = (layout.clusters + 2) * 2 <= layout.fat_size
        if layout.bits != 12 or marked or not roomy:
            return
        if read_exactly(self._source, layout.fat_start, 4, "the FAT")[3] == 0xFF:
            raise UnsupportedError("the FAT could hold entries of 12 bits, or of 16 as on an Atari", offset=510)

    def _check_tables(self) -> None:
        """All that is not clusters lies on the volume, and the FAT starts like one: a blank FAT would free it all."""
        if self._layout.data_start > self._source.size:
            raise InvalidImage("the volume ends inside the file system's tables", offset=self._source.size)
        self._tables = self._readable_first()
        first = read(self._source, self._table_at(self._tables[0]), 1)[0]
        if first != 0xF0 and first < 0xF8:
            raise InvalidImage(f"the FAT starts with {first:#04x}, which is no media byte")
        if self._root_cluster and self._next(self._root_cluster) == 0:
            raise InvalidImage("the root directory's cluster is free in the FAT", field="BPB_RootClus")

    def _readable_first(self) -> list[int]:
        """The FATs in use, one in front whose beginning can be read if there is one."""
        for at, table in enumerate(self._tables):
            try:
                read(self._source, self._table_at(table), 8)
            except DeviceError:
                continue
            return self._tables[at:] + self._tables[:at]
        return self._tables

    def _table_at(self, table: int) -> int:
        return self._layout.fat_start + table * self._layout.fat_size

    def _next(self, cluster: int) -> int:
        """A FAT32 entry."""
        return int(entries_of(read(self._source, self._table_at(self._tables[0]) + cluster * 4, 4), 32)[0])

    # ------------------------------------------------------------------ facts

    def _unclean(self, state: int) -> str | None:
        """Section "FAT Data Structure", entry 1; and the same bits in the boot sector, where Linux puts them."""
        bits = self._layout.bits
        entry = int(entries_of(read(self._source, self._table_at(self._tables[0]), 8), bits)[1])
        clean, good = {12: (0, 0), 16: (1 << 15, 1 << 14), 32: (1 << 27, 1 << 26)}[bits]
        if state & 1 or entry & clean != clean:
            return "the volume was not cleanly unmounted"
        if state & 2 or entry & good != good:
            return "the volume has seen read or write errors"
        if self._layout.size > self._source.size:
            return f"the file system is {self._layout.size - self._source.size} bytes longer than its volume"
        return None

    def _label(self) -> str | None:
        """The volume label's entry of the root directory; the boot sector's copy is out of date too often."""
        try:
            for piece in self._root_pieces():
                entries = np.frombuffer(piece, DIRECTORY_ENTRY, len(piece) // 32)
                head = np.frombuffer(piece, np.uint8)[: len(entries) * 32 : 32]
                ends = np.flatnonzero(head == 0)
                if len(ends):
                    entries, head = entries[: ends[0]], head[: ends[0]]
                attributes = entries["DIR_Attr"]
                hits = np.flatnonzero(
                    (head != 0xE5)
                    & ((attributes & 0x3F) != ATTR_LONG_NAME)
                    & ((attributes & (ATTR_VOLUME_ID | ATTR_DIRECTORY)) == ATTR_VOLUME_ID)
                    & (entries["DIR_FstClusHI"] == 0)
                    & (entries["DIR_FstClusLO"] == 0)
                )
                if len(hits):
                    name = entries["DIR_Name"][hits[0]].tobytes()
                    return (b"\xe5" + name[1:] if name[0] == 5 else name).decode("cp850").rstrip(" \0") or None
                if len(ends):
                    return None
        except (FormatError, DeviceError):  # a label is not worth losing the map for
            return None
        return None

    def _root_pieces(self) -> Iterator[bytes]:
        if not self._root_cluster:
            yield read_exactly(self._source, self._layout.root_start, self._layout.root_size, "the root directory")
            return
        cluster, size = self._root_cluster, self._layout.cluster
        for _ in range(max(_MOST_ROOT // max(size, 4 * KiB), 1)):  # bounded, so a cycle does no harm
            if not 2 <= cluster < self._layout.clusters + 2:
                return
            yield read_exactly(
                self._source, self._layout.data_start + (cluster - 2) * size, size, "the root directory"
            )
            cluster = self._next(cluster)

    # ------------------------------------------------------------------ maps

    def allocation(self) -> ExtentMap:
        """FREE where the FAT says 0.  Raises InvalidImage where the copies of the FAT or of the layout differ."""
        require_copy(self._source, self._backup, self._is_alike)
        runs = free_runs(self._free_windows())
        starts, ends = (self._layout.data_start + edge * self._layout.cluster for edge in runs)
        return ExtentMap.from_runs(0, self._source.size, starts, ends, State.FREE)

    def _is_alike(self, sector: bytes) -> bool:
        """Whether a boot sector lays a volume out as this one."""
        boot, extended = BootSector.unpack(sector), Extended32.unpack(sector, 36)
        return (
            _plausible(boot, sector)
            and layout_of(boot, extended.BPB_FATSz32) == self._layout
            and extended.BPB_RootClus == self._root_cluster
        )

    def _free_windows(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """Bitmaps of the free clusters, cluster 2 first."""
        layout, skip, left = self._layout, 2, self._layout.clusters
        buffers = np.empty((2, min(_WINDOW, layout.table_size)), np.uint8)
        for at in range(0, layout.table_size, _WINDOW):
            entries = self._agreed(at, buffers[:, : layout.table_size - at], skip)[:left]
            yield np.packbits(entries == 0, bitorder="little"), len(entries)
            skip, left = 0, left - len(entries)

    def _agreed(self, at: int, buffers: NDArray[np.uint8], skip: int) -> NDArray[np.uint32]:
        """Entries from a window of the FAT, without the first ``skip``, which all copies in use must have alike.

        The first two entries may differ: they are no clusters, and the dirty bits are kept in the first FAT only.
        The window is as long as the two buffers, which hold it for as long as the entries are used.
        """
        bits, clusters = self._layout.bits, self._layout.clusters
        first, *others = self._tables
        raw, copy = buffers
        self._source.read_into(self._table_at(first) + at, memoryview(raw))
        entries = entries_of(raw, bits)[skip:][:clusters]  # a FAT12 may end in half an entry of no cluster
        for table in others:
            self._source.read_into(self._table_at(table) + at, memoryview(copy))
            if not _same(copy, raw) and not np.array_equal(entries_of(copy, bits)[skip:][:clusters], entries):
                raise InvalidImage(f"FAT {table} differs from FAT {first}", offset=self._table_at(table) + at)
        return entries

    def swap_files(self) -> ExtentMap:
        """All DATA: no paging file is looked for on FAT."""
        return ExtentMap.uniform(0, self._source.size)

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        """See FileSystem.  A cluster belongs to its file as a whole, what lies behind the file's end included.

        A chain that no folder leads to stands as ``<cluster 12>``, by its first cluster.
        """
        ranges, tables = Ranges(starts, ends), [self._table_at(table) for table in self._tables]
        return Tree(Remains(self._source, ranges), self._layout, tables, self._root_cluster, ranges).files()

    def claims(self) -> Iterator[Claims]:
        """See FileSystem, and ``fat_claims``."""
        tables = [self._table_at(table) for table in self._tables]
        return claims(Intact(self._source), self._layout, tables, self._root_cluster)


def probe(source: Source, /) -> bool:
    """Whether the boot sector is FAT's; one without the 0x55AA mark must be confirmed by the FAT's first byte."""
    try:
        if source.size < 512:
            return False
        sector = read(source, 0, 512)
        boot = BootSector.unpack(sector)
        if not _plausible(boot, sector):
            return False
        fat_start = boot.BPB_RsvdSecCnt * boot.BPB_BytsPerSec
        if sector[510:512] == b"\x55\xaa":
            return True
        return fat_start < source.size and read(source, fat_start, 1)[0] == boot.BPB_Media
    except (FormatError, DeviceError):
        return False


def open(source: Source, /) -> Fat:
    """Open the FAT file system on ``source``.  Raises InvalidImage or UnsupportedError."""
    return Fat(source)
