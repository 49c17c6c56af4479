"""Make the GPT of a restored disk right on a larger target.

as restored   | MBR | header | array | partitions ... | array | backup |                          |
as it must be | MBR | header | array | partitions ...            ...            | array | backup |
                (1)   (2)                                (4) zeros                (3)     (3)

1  the protective entry covers the whole disk       UEFI specification 2.10, Table 5.4
2  AlternateLBA, LastUsableLBA, checksum            Table 5.5
3  copies at the end                                section 5.3.1: the backup is in the last LBA of the device
4  the old backup header would be found by tools that look for lost tables
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import UsageError
from ferrotype.volumes import gpt, mbr

__all__ = ["moved_backup"]

_MAX_LBA32: Final = 0xFFFFFFFF
_CHS_UNKNOWN: Final = b"\xff\xff\xff"  # for sectors that cylinder, head and sector cannot name
_ENTRIES_AT: Final = 446


def moved_backup(disk: Source, new_size: int, sector_size: int) -> tuple[tuple[int, bytes], ...]:
    """The writes (offset, bytes), ascending, that move the backup GPT of ``disk`` to the end of ``new_size`` bytes.

    They apply to a target that holds the bytes of ``disk`` from its start; a damaged copy is mended from the other.
    Empty where the disk has no GPT or the size does not change.  Raises UsageError where the target is smaller,
    InvalidImage where the GPT is damaged beyond use.
    """
    if new_size < disk.size:
        raise UsageError(f"a disk of {disk.size} bytes does not fit into {new_size}")
    if new_size // sector_size == disk.size // sector_size:
        return ()
    loaded = gpt.load(disk, sector_size)
    if loaded is None:
        return ()
    last = new_size // sector_size - 1
    plan = _Plan(loaded, sector_size, last)
    writes = [(0, _protective_mbr(read(disk, 0, sector_size), disk.size // sector_size - 1, last))]
    writes.append((sector_size, plan.header(1, last, plan.primary_array)))
    if not loaded.primary.array_good:
        writes.append((plan.primary_array * sector_size, plan.array))
    if loaded.backup.traced and loaded.backup.lba < plan.backup_array:
        writes.append((loaded.backup.lba * sector_size, bytes(sector_size)))
    writes.append((plan.backup_array * sector_size, plan.array))
    writes.append((last * sector_size, plan.header(last, 1, plan.backup_array)))
    return tuple(sorted(writes))


@dataclass(frozen=True, slots=True)
class _Plan:
    loaded: gpt.Loaded
    sector_size: int
    last: int  # LBA of the new backup header

    @property
    def array(self) -> bytes:
        """The entry array, filled up to whole sectors."""
        return self.loaded.array.ljust(self.loaded.header.array_sectors(self.sector_size) * self.sector_size, b"\0")

    @property
    def primary_array(self) -> int:
        header = self.loaded.primary.header
        return header.PartitionEntryLBA if header else 2

    @property
    def backup_array(self) -> int:
        return self.last - self.loaded.header.array_sectors(self.sector_size)

    def header(self, lba: int, alternate: int, array: int) -> bytes:
        """A header sector with the table's own facts, for one place.  Bytes past the known fields stay."""
        old = self.loaded.header
        sector = bytearray(self.loaded.chosen.sector)
        made = gpt.Header(
            Signature=old.Signature,
            Revision=old.Revision,
            HeaderSize=old.HeaderSize,
            HeaderCRC32=0,
            Reserved=old.Reserved,
            MyLBA=lba,
            AlternateLBA=alternate,
            FirstUsableLBA=old.FirstUsableLBA,
            LastUsableLBA=self.backup_array - 1,
            DiskGUID=old.DiskGUID,
            PartitionEntryLBA=array,
            NumberOfPartitionEntries=old.NumberOfPartitionEntries,
            SizeOfPartitionEntry=old.SizeOfPartitionEntry,
            PartitionEntryArrayCRC32=old.PartitionEntryArrayCRC32,
        )
        sector[: gpt.Header.SIZE] = made.pack()
        struct.pack_into("<I", sector, 16, gpt.header_crc(bytes(sector), old.HeaderSize))
        return bytes(sector)


def _protective_mbr(sector: bytes, old_last: int, new_last: int) -> bytes:
    """The MBR with its protective entry stretched, if that entry reached the old end.

    The entry of a hybrid MBR protects only what its other entries leave free, and stays.
    """
    entries = mbr.BootRecord.unpack(sector).entries
    alone = sum(entry.used for entry in entries) == 1
    made = bytearray(sector)
    for at, entry in zip(range(_ENTRIES_AT, 510, mbr.Entry.SIZE), entries, strict=True):
        reaches = entry.StartingLBA + entry.SizeInLBA > min(old_last, _MAX_LBA32)
        if entry.OSType != mbr.PROTECTIVE or entry.StartingLBA > old_last or not (alone or reaches):
            continue
        stretched = mbr.Entry(
            BootIndicator=entry.BootIndicator,
            StartingCHS=entry.StartingCHS,
            OSType=entry.OSType,
            EndingCHS=_CHS_UNKNOWN,
            StartingLBA=entry.StartingLBA,
            SizeInLBA=min(new_last + 1 - entry.StartingLBA, _MAX_LBA32),
        )
        made[at : at + mbr.Entry.SIZE] = stretched.pack()
    return bytes(made)
