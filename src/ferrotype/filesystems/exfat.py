"""exFAT: which clusters are free, from its allocation bitmap.

    sector 0           12            24       FatOffset       ClusterHeapOffset              VolumeLength
    +------------------+-------------+--------+-------+-------+-----------------------------+--------+
    | main boot region | backup boot | unused | FAT 0 | FAT 1 | cluster 2 | 3 | 4 | 5 | ... | excess |
    +------------------+-------------+--------+-------+-------+-----------------------------+--------+
    boot region: boot sector, 8 extended boot sectors, OEM parameters, reserved, boot checksum

    root directory (a chain of clusters):  0x83 label | 0x81 allocation bitmap | 0x82 up-case table | files ...
    allocation bitmap (a chain of clusters, in pieces perhaps): bit 0 is cluster 2, a set bit is in use

A volume with two FATs (TexFAT) has two bitmaps as well; VolumeFlags names the pair in use.  Written from Microsoft's
"exFAT file system specification", revision 1.00; section numbers are cited where they matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import DeviceError, FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap, Offsets, State
from ferrotype.filesystems import Claims, Facts
from ferrotype.filesystems.copies import require_copy
from ferrotype.filesystems.exfat_claims import claims
from ferrotype.filesystems.exfat_files import Layout, Tree
from ferrotype.filesystems.fat import format_serial, free_runs
from ferrotype.filesystems.remains import Intact, Ranges, Remains
from ferrotype.records import Record, b8, record, u8, u16, u32, u64
from ferrotype.units import KiB

__all__ = ["ExFat", "open", "probe"]


@record(endian="<", size=120)
class BootSector(Record):
    """Section 3.1, up to the boot code."""

    JumpBoot: Annotated[bytes, "3s"]
    FileSystemName: b8
    MustBeZero: Annotated[bytes, "53s"]
    PartitionOffset: u64
    VolumeLength: u64  # sectors
    FatOffset: u32  # sectors
    FatLength: u32  # sectors
    ClusterHeapOffset: u32  # sectors
    ClusterCount: u32
    FirstClusterOfRootDirectory: u32
    VolumeSerialNumber: u32
    FileSystemRevision: u16
    VolumeFlags: u16
    BytesPerSectorShift: u8
    SectorsPerClusterShift: u8
    NumberOfFats: u8
    DriveSelect: u8
    PercentInUse: u8
    Reserved: Annotated[bytes, "7s"]


@record(endian="<", size=32)
class BitmapEntry(Record):
    """Section 7.1."""

    EntryType: u8
    BitmapFlags: u8  # bit 0: the bitmap of the second FAT
    Reserved: Annotated[bytes, "18s"]
    FirstCluster: u32
    DataLength: u64


_NAME: Final = b"EXFAT   "
_ACTIVE_FAT, _VOLUME_DIRTY, _MEDIA_FAILURE = 1, 2, 4  # section 3.1.13
_ENTRY_BITMAP, _ENTRY_LABEL = 0x81, 0x83
_MOST_CLUSTERS: Final = 0xFFFFFFF5
_END_OF_CHAIN: Final = 0xFFFFFFFF
_REGION: Final = 12  # sectors of a boot region
_MOST_ROOT: Final = 256 << 20  # bytes; section 7: the most a directory may hold
_MOST_PIECES: Final = 4096  # runs of clusters that one chain may consist of before we give up on it
_FAT_WINDOW: Final = 16 * KiB  # entries of the FAT looked at in one go
_DIRECTORY_WINDOW: Final = 256 * KiB
_BITMAP_WINDOW: Final = 128 * KiB


def _checksum(region: bytes) -> int:
    """Section 3.4: over the first eleven sectors, without VolumeFlags and PercentInUse."""
    total = 0
    for at, octet in enumerate(region):
        if at not in (106, 107, 112):
            total = ((total << 31 | total >> 1) + octet) & 0xFFFFFFFF
    return total


def _sound_region(source: Source, start: int, sector: int) -> bytes | None:
    """The boot region at ``start``, or None where it is not one with a right checksum."""
    size = _REGION * sector
    if start + size > source.size:
        return None
    region = read(source, start, size)
    if region[3:11] != _NAME or region[510:512] != b"\x55\xaa" or region[108] != sector.bit_length() - 1:
        return None
    stated = _checksum(region[: 11 * sector]).to_bytes(4, "little")
    return region if region[11 * sector :] == stated * (sector // 4) else None


def _boot_sector(source: Source) -> tuple[BootSector, str | None]:
    """The boot sector, of the backup region where the main one is damaged, and what is then to be said of it."""
    sectors = [512, 1024, 2048, 4096]
    for sector in sectors:
        if region := _sound_region(source, 0, sector):
            return BootSector.unpack(region), None
    for sector in sectors:  # the main one cannot be trusted for its sector size either
        if region := _sound_region(source, _REGION * sector, sector):
            return BootSector.unpack(region), "the main boot region is damaged, its backup was used"
    raise InvalidImage("neither the main nor the backup boot region has a right checksum", offset=0)


class ExFat:
    """An opened exFAT file system."""

    def __init__(self, source: Source) -> None:
        self._source = source
        boot, damage = _boot_sector(source)
        _check(boot)
        self._boot = boot
        self._sector = 1 << boot.BytesPerSectorShift
        self._cluster = self._sector << boot.SectorsPerClusterShift
        self._clusters = boot.ClusterCount
        self._heap = boot.ClusterHeapOffset * self._sector
        active = boot.VolumeFlags & _ACTIVE_FAT if boot.NumberOfFats == 2 else 0
        self._fat = (boot.FatOffset + active * boot.FatLength) * self._sector
        if self._fat + (self._clusters + 2) * 4 > source.size:
            raise InvalidImage("the volume ends inside the FAT", offset=source.size)
        self._layout = Layout(
            sector=self._sector,
            fats=boot.FatOffset * self._sector,
            fats_end=(boot.FatOffset + boot.FatLength * boot.NumberOfFats) * self._sector,
            fat=self._fat,
            heap=self._heap,
            cluster=self._cluster,
            clusters=self._clusters,
            root=boot.FirstClusterOfRootDirectory,
        )
        bitmap, label = self._root(boot.FirstClusterOfRootDirectory, active)
        self._bitmap = self._bitmap_pieces(bitmap, boot.FirstClusterOfRootDirectory)
        size = boot.VolumeLength * self._sector
        self.facts = Facts(
            kind="exfat",
            label=label,
            uuid=format_serial(boot.VolumeSerialNumber),
            block_size=self._cluster,
            size=size,
            unclean=damage or _unclean(boot) or (None if size <= source.size else "it is longer than its volume"),
        )

    # ------------------------------------------------------------------ chains

    def _chain(self, first: int, most: int) -> Iterator[tuple[int, int]]:
        """(first cluster, count) of the pieces of a chain, up to ``most`` clusters.

        A cycle runs into ``most`` as well, or into the limit on pieces.
        """
        cluster, left = first, most
        for _ in range(_MOST_PIECES):
            if not 2 <= cluster < self._clusters + 2:
                raise InvalidImage(f"a chain leads to cluster {cluster}, the volume has {self._clusters}")
            count, following = self._contiguous(cluster, left)
            yield cluster, count
            left -= count
            if following == _END_OF_CHAIN or left == 0:
                return
            cluster = following
        raise UnsupportedError(f"a chain of clusters is in more than {_MOST_PIECES} pieces")

    def _contiguous(self, cluster: int, most: int) -> tuple[int, int]:
        """How many clusters from ``cluster`` follow each other in the chain, and what the last one points to."""
        count = 0
        while True:
            at, size = cluster + count, min(_FAT_WINDOW, self._clusters + 2 - cluster - count, most - count)
            entries = np.frombuffer(read(self._source, self._fat + at * 4, size * 4), "<u4")
            breaks = np.flatnonzero(entries != np.arange(at + 1, at + 1 + size))
            if len(breaks):
                return count + int(breaks[0]) + 1, int(entries[breaks[0]])
            count += size
            # The last cluster of the heap cannot be followed by the next one; _chain refuses what we return then.
            if count == most or cluster + count == self._clusters + 2:
                return count, int(entries[-1])

    def _at(self, cluster: int) -> int:
        return self._heap + (cluster - 2) * self._cluster

    # ------------------------------------------------------------------ root directory

    def _root(self, first: int, active: int) -> tuple[BitmapEntry, str | None]:
        """The entry of the bitmap in use, and the label."""
        bitmap: BitmapEntry | None = None
        label: str | None = None
        for piece in self._directory(first):
            entries = np.frombuffer(piece, np.uint8, len(piece) // 32 * 32).reshape(-1, 32)
            types = entries[:, 0]
            ends = np.flatnonzero(types == 0)
            types = types[: ends[0]] if len(ends) else types
            for row in np.flatnonzero(types == _ENTRY_BITMAP)[:4].tolist():
                entry = BitmapEntry.unpack(piece, row * 32)
                if entry.BitmapFlags & 1 == active and bitmap is None:
                    bitmap = entry
            for row in np.flatnonzero(types == _ENTRY_LABEL)[:1].tolist():
                length = min(piece[row * 32 + 1], 11)
                text = piece[row * 32 + 2 : row * 32 + 2 + 2 * length].decode("utf-16-le", "replace")
                label = label or text or None
            if len(ends) or (bitmap is not None and label is not None):
                break
        if bitmap is None:
            raise InvalidImage("the root directory names no allocation bitmap")
        return bitmap, label

    def _directory(self, first: int) -> Iterator[bytes]:
        for cluster, count in self._chain(first, max(_MOST_ROOT // self._cluster, 1)):
            start, size = self._at(cluster), count * self._cluster
            for at in range(0, size, _DIRECTORY_WINDOW):
                yield read_exactly(self._source, start + at, min(_DIRECTORY_WINDOW, size - at), "the root directory")

    # ------------------------------------------------------------------ allocation bitmap

    def _bitmap_pieces(self, entry: BitmapEntry, root: int) -> list[tuple[int, int]]:
        """(start, length) in bytes of the bitmap, all of them on the volume."""
        size = (self._clusters + 7) // 8
        if not size <= entry.DataLength <= self._clusters * self._cluster:  # section 7.1.5: at least
            raise InvalidImage(
                f"the allocation bitmap has {entry.DataLength} bytes where {size} are needed", field="DataLength"
            )
        pieces: list[tuple[int, int]] = []
        left = size
        for cluster, count in self._chain(entry.FirstCluster, -(-size // self._cluster)):
            length = min(count * self._cluster, left)
            pieces.append((self._at(cluster), length))
            left -= length
        if left:
            raise InvalidImage(f"the chain of the allocation bitmap is {left} bytes too short", field="FirstCluster")
        for start, length in pieces:
            if start + length > self._source.size:
                raise InvalidImage("the volume ends inside the allocation bitmap", offset=start)
        for cluster in (root, entry.FirstCluster):
            if not self._used(pieces, cluster):
                raise InvalidImage(f"cluster {cluster} holds the root directory or the bitmap and is marked free")
        return pieces

    def _used(self, pieces: list[tuple[int, int]], cluster: int) -> bool:
        octet, bit = divmod(cluster - 2, 8)
        for start, length in pieces:
            if octet < length:
                return bool(read(self._source, start + octet, 1)[0] >> bit & 1)
            octet -= length
        return False

    def _free_windows(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        left = self._clusters
        for start, length in self._bitmap:
            for at in range(0, length, _BITMAP_WINDOW):
                packed = np.frombuffer(read(self._source, start + at, min(_BITMAP_WINDOW, length - at)), np.uint8)
                yield ~packed, min(left, len(packed) * 8)
                left -= min(left, len(packed) * 8)

    def allocation(self) -> ExtentMap:
        """FREE where the bitmap's bit is clear; what lies before and behind the cluster heap is DATA.

        Raises InvalidImage where the backup boot region tells of another layout.
        """
        require_copy(self._source, _REGION * self._sector, self._is_alike)
        starts, ends = free_runs(self._free_windows())
        starts, ends = (self._heap + edge * self._cluster for edge in (starts, ends))
        return ExtentMap.from_runs(0, self._source.size, starts, ends, State.FREE)

    def _is_alike(self, sector: bytes) -> bool:
        """Whether a boot sector lays a volume out as this one."""
        return _layout_of(BootSector.unpack(sector)) == _layout_of(self._boot)

    def swap_files(self) -> ExtentMap:
        """All DATA: Windows keeps no paging file on exFAT."""
        return ExtentMap.uniform(0, self._source.size)

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        """See ``FileSystem``, and ``exfat_files`` for what counts."""
        ranges = Ranges(starts, ends)
        return Tree(Remains(self._source, ranges), self._layout, ranges).files() if len(starts) else ()

    def claims(self) -> Iterator[Claims]:
        """See FileSystem, and ``exfat_claims``."""
        return claims(Intact(self._source), self._layout)


def _layout_of(boot: BootSector) -> tuple[object, ...]:
    """All that where clusters lie depends on."""
    return (
        boot.FileSystemName,
        boot.VolumeLength,
        boot.FatOffset,
        boot.FatLength,
        boot.ClusterHeapOffset,
        boot.ClusterCount,
        boot.FirstClusterOfRootDirectory,
        boot.BytesPerSectorShift,
        boot.SectorsPerClusterShift,
        boot.NumberOfFats,
    )


def _check(boot: BootSector) -> None:
    """The bounds that section 3.1 gives for each field, as far as the map depends on them."""
    sector_shift, cluster_shift = boot.BytesPerSectorShift, boot.SectorsPerClusterShift
    if not 9 <= sector_shift <= 12 or cluster_shift > 25 - sector_shift:
        raise InvalidImage(
            f"sectors of 2^{sector_shift} bytes in clusters of 2^{cluster_shift}", field="ClusterShift"
        )
    if boot.FileSystemRevision >> 8 != 1:
        raise UnsupportedError(f"exFAT revision {boot.FileSystemRevision:#06x}", field="FileSystemRevision")
    if boot.NumberOfFats not in (1, 2):
        raise InvalidImage(f"{boot.NumberOfFats} FATs", field="NumberOfFats")
    if not 1 <= boot.ClusterCount <= _MOST_CLUSTERS:
        raise InvalidImage(f"{boot.ClusterCount} clusters", field="ClusterCount")
    if boot.FatLength << sector_shift < (boot.ClusterCount + 2) * 4:
        raise InvalidImage("the FAT is too short for the clusters", field="FatLength")
    if boot.FatOffset < 2 * _REGION or boot.FatOffset + boot.FatLength * boot.NumberOfFats > boot.ClusterHeapOffset:
        raise InvalidImage("the FAT overlaps the boot regions or the clusters", field="FatOffset")
    if boot.ClusterHeapOffset + (boot.ClusterCount << cluster_shift) > boot.VolumeLength:
        raise InvalidImage("the clusters reach beyond the volume", field="ClusterCount")
    if boot.VolumeLength << sector_shift >= 1 << 63:
        raise InvalidImage(f"{boot.VolumeLength} sectors", field="VolumeLength")


def _unclean(boot: BootSector) -> str | None:
    if boot.VolumeFlags & _VOLUME_DIRTY:
        return "the volume was not cleanly unmounted"
    if boot.VolumeFlags & _MEDIA_FAILURE:
        return "the volume has seen media failures"
    return None


def probe(source: Source, /) -> bool:
    """Whether the first sector says exFAT; its checksum is a matter for ``open``."""
    try:
        return source.size >= 512 and read(source, 3, 8) == _NAME
    except (FormatError, DeviceError):
        return False


def open(source: Source, /) -> ExFat:
    """Open the exFAT file system on ``source``.  Raises InvalidImage or UnsupportedError."""
    return ExFat(source)
