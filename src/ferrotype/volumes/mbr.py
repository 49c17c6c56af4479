"""The classic partition table of PCs: four entries in sector 0, logical partitions in a chain of further sectors.

    byte 0            440        446                              510
         | boot code   | id  | 0 | entry 1 | entry 2 | 3 | 4       | 55 AA |      master boot record (MBR)

    MBR ─ extended entry ──> EBR ─ link ──> EBR ─ link ──> EBR                   each one laid out like the MBR
                              └ logical 5    └ logical 6    └ logical 7

A logical partition starts relative to its own EBR (extended boot record), a link relative to the extended partition.

Source: UEFI specification 2.10, section 5.2 (Tables 5.1 and 5.2).  It leaves extended partitions out; those follow
Microsoft's "Disk Concepts and Troubleshooting" (Windows 2000 Server Operations Guide, chapter 1).

The last bytes 55 AA also end the boot sector of FAT, NTFS and exFAT volumes that span a whole disk, so a table is
believed only where all four boot indicators are 00 or 80 and, next to a boot sector, its entries fit the disk too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Final

from ferrotype.block import Source
from ferrotype.block import read as read_bytes
from ferrotype.errors import ReadError
from ferrotype.records import Record, record, u8, u16, u32
from ferrotype.volumes import Partition, Table

SIGNATURE: Final = 0xAA55
PROTECTIVE: Final = 0xEE  # OSType of the entry that keeps software that knows no GPT away (UEFI 5.2.3)

_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
# DR-DOS's password-protected extended partitions.  Other software sees an ordinary partition here, so these count as
# extended only where an EBR is really found.
_SECURED_EXTENDED: Final = frozenset({0xC5, 0xCF, 0xD5})
_MAX_LINKS: Final = 1024  # EBRs followed on one disk; Linux stops at 256 partitions
_MAX_NAMED: Final = 8  # partitions named in one warning


@record(endian="<", size=16)
class Entry(Record):
    """MBR partition record, UEFI 2.10 Table 5.2."""

    BootIndicator: u8
    StartingCHS: Annotated[bytes, "3s"]
    OSType: u8
    EndingCHS: Annotated[bytes, "3s"]
    StartingLBA: u32
    SizeInLBA: u32

    @property
    def used(self) -> bool:
        return self.OSType != 0 and self.SizeInLBA != 0


@record(endian="<", size=512)
class BootRecord(Record):
    """Master or extended boot record, UEFI 2.10 Table 5.1."""

    BootCode: Annotated[bytes, "440s"]
    UniqueMBRDiskSignature: u32
    Unknown: u16
    PartitionRecord: Annotated[bytes, "64s"]
    Signature: u16

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(Entry.unpack(self.PartitionRecord, at) for at in range(0, 64, Entry.SIZE))

    @property
    def believable(self) -> bool:
        """The signature stands and every boot indicator is 00 or 80."""
        return self.Signature == SIGNATURE and all(entry.BootIndicator in (0x00, 0x80) for entry in self.entries)


def read(source: Source, sector_size: int) -> Table | None:
    """The MBR table of a disk whose sectors have ``sector_size`` bytes; None where sector 0 holds none.

    Extended partitions are containers, not partitions: they are followed and not listed.  Entries that reach outside
    the disk or overlap each other are left out with a warning.  Raises ReadError where sector 0 cannot be read.
    """
    if source.size < sector_size:
        return None
    sector = read_bytes(source, 0, sector_size)
    boot = BootRecord.unpack(sector)
    if not boot.believable:
        return None
    used = [entry for entry in boot.entries if entry.used]
    if is_boot_sector(sector) and not (used and _fits(used, source.size // sector_size)):
        return None
    if not used and boot.UniqueMBRDiskSignature == 0:
        return None  # any boot sector ends in 55 AA: with neither an entry nor an id nothing says "table"
    found = _Reading(source, sector_size, f"{boot.UniqueMBRDiskSignature:08x}", [(0, sector_size)])
    found.primary(boot.entries)
    return found.table()


def is_boot_sector(sector: bytes) -> bool:
    """Whether these 512 or more bytes begin like a FAT, NTFS or exFAT volume (jump, then a sane parameter block)."""
    if not (sector[0] == 0xE9 or (sector[0] == 0xEB and sector[2] == 0x90)):
        return False
    if sector[3:11] in (b"NTFS    ", b"EXFAT   "):
        return True
    # FAT: Microsoft "FAT32 File System Specification" 1.03, BPB_BytsPerSec, SecPerClus, RsvdSecCnt, NumFATs, Media
    bytes_per_sector = int.from_bytes(sector[11:13], "little")
    per_cluster, reserved, fats, media = sector[13], int.from_bytes(sector[14:16], "little"), sector[16], sector[21]
    return (
        bytes_per_sector in (512, 1024, 2048, 4096)
        and per_cluster.bit_count() == 1
        and reserved > 0
        and fats in (1, 2)
        and (media == 0xF0 or media >= 0xF8)
    )


def disjoint(candidates: Iterable[Partition], warnings: list[str]) -> tuple[Partition, ...]:
    """The candidates that overlap no other, ascending by start; a warning names the rest.

    Of two partitions that overlap neither is kept: the free space of one may be the data of the other.
    """
    ascending = sorted(candidates, key=lambda p: (p.start, p.end))
    bad: set[int] = set()
    furthest = 0  # position of the partition that reaches furthest so far
    for i in range(1, len(ascending)):
        if ascending[i].start < ascending[furthest].end:
            bad |= {i, furthest}
        if ascending[i].end > ascending[furthest].end:
            furthest = i
    warn_of(sorted(ascending[i].index for i in bad), "overlap each other and are not used", warnings)
    return tuple(p for i, p in enumerate(ascending) if i not in bad)


def warn_of(indices: Sequence[int], what: str, warnings: list[str]) -> None:
    """One warning about partitions, however many there are."""
    if indices:
        more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
        warnings.append(f"partitions {', '.join(map(str, indices[:_MAX_NAMED]))}{more} {what}")


def _fits(used: Sequence[Entry], sectors: int) -> bool:
    spans = sorted((entry.StartingLBA, entry.StartingLBA + entry.SizeInLBA) for entry in used)
    apart = all(left[1] <= right[0] for left, right in pairwise(spans))
    return apart and spans[-1][1] <= sectors


@dataclass(slots=True)
class _Reading:
    """A table while it is being read."""

    source: Source
    sector_size: int
    disk_id: str
    metadata: list[tuple[int, int]]
    partitions: list[Partition] = field(default_factory=list)
    outside: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # sectors of the EBRs read, over all chains
    next_logical: int = 5

    @property
    def sectors(self) -> int:
        return self.source.size // self.sector_size

    def primary(self, entries: Sequence[Entry]) -> None:
        for number, entry in enumerate(entries, 1):
            if not entry.used:
                continue
            if entry.OSType == PROTECTIVE:
                self.warnings.append("the MBR announces a GPT, but there is none")
            elif entry.OSType in _EXTENDED or (
                entry.OSType in _SECURED_EXTENDED and self._ebr(entry.StartingLBA) is not None
            ):
                self.chain(number, entry)
            else:
                self.add(number, entry, 0)

    def chain(self, number: int, container: Entry) -> None:
        """Follow the EBRs of an extended partition.  What breaks the chain ends it; what was read stays."""
        base = container.StartingLBA
        end = min(base + container.SizeInLBA, self.sectors)
        here = base
        while True:
            trouble = self._obstacle(here, base, end)
            ebr = None if trouble else self._ebr(here)
            if ebr is None:
                trouble = trouble or "no extended boot record there"
                self.warnings.append(
                    f"the chain of logical partitions in partition {number} breaks at sector {here}: {trouble}"
                )
                return
            self.seen.add(here)
            self.metadata.append((here * self.sector_size, self.sector_size))
            self._logical(ebr, here, end)
            link = next((entry for entry in ebr.entries if entry.used and entry.OSType in _links()), None)
            if link is None:
                return
            here = base + link.StartingLBA

    def _logical(self, ebr: BootRecord, here: int, end: int) -> None:
        for position, entry in enumerate(ebr.entries):
            if not entry.used or entry.OSType in _links():
                continue
            # Only the first two entries have a meaning; some software leaves garbage in the others.
            if position >= 2 and here + entry.StartingLBA + entry.SizeInLBA > end:
                continue
            self.add(self.next_logical, entry, here)
            self.next_logical += 1

    def _obstacle(self, here: int, base: int, end: int) -> str | None:
        if here in self.seen:
            return "the links run in a circle"
        if not base <= here < end:
            return "it lies outside the extended partition"
        return f"more than {_MAX_LINKS} links" if len(self.seen) >= _MAX_LINKS else None

    def _ebr(self, lba: int) -> BootRecord | None:
        if lba == 0 or lba >= self.sectors:
            return None
        try:
            ebr = BootRecord.unpack(read_bytes(self.source, lba * self.sector_size, self.sector_size))
        except ReadError:
            return None
        return ebr if ebr.believable else None

    def add(self, index: int, entry: Entry, base: int) -> None:
        start, size = base + entry.StartingLBA, entry.SizeInLBA
        if start + size > self.sectors:
            self.outside.append(index)
            return
        self.partitions.append(
            Partition(
                index=index,
                start=start * self.sector_size,
                size=size * self.sector_size,
                type=f"{entry.OSType:02x}",
                uuid=f"{self.disk_id}-{index:02x}",
            )
        )

    def table(self) -> Table:
        warn_of(self.outside, "reach beyond the end of the disk and are not used", self.warnings)
        return Table(
            kind="mbr",
            sector_size=self.sector_size,
            disk_id=self.disk_id,
            partitions=disjoint(self.partitions, self.warnings),
            metadata=tuple(sorted(self.metadata)),
            warnings=tuple(self.warnings),
        )


def _links() -> frozenset[int]:
    return _EXTENDED | _SECURED_EXTENDED
