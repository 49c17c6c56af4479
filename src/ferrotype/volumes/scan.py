"""Find the partition table of a disk, whichever kind it is, and the sector size it counts in.

    GPT      "EFI PART" one sector behind the start, or in the last sector
    MBR      55 AA at byte 510
    APM      "ER" at byte 0, "PM" one block behind it

A GPT comes first: its protective MBR is a valid MBR table as well.  An MBR with partitions comes before an Apple
map: optical media carry both, and the other systems read the MBR.
"""

from __future__ import annotations

from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, ReadError, UsageError
from ferrotype.volumes import Table, apm, gpt, mbr

__all__ = ["is_signed", "scan"]

_SIZES: Final = (512, 4096, 2048, 1024)  # bytes; the likely ones first
_SIGNS: Final = (  # (offset, bytes) by which the start of a volume, or of a chain of logical partitions, is known
    (510, b"\x55\xaa"),  # FAT, NTFS, exFAT, extended boot record
    (1080, b"\x53\xef"),  # ext2, ext3, ext4
    (0, b"XFSB"),
    (0, b"LUKS\xba\xbe"),
    (4086, b"SWAPSPACE2"),
    (1024, b"H+"),  # HFS+
    (536, b"LVM2 001"),
)


def scan(source: Source, *, sector_size: int | None = None) -> Table | None:
    """The partition table of a disk, or None where it has none.

    The sector size is the given one, else the device's own.  Where neither is known (a plain file), a GPT tells its
    own, and an MBR counts in 512 bytes, except where only 4096 make sense: all entries fit on the disk, a known
    volume starts at one of them, and none starts where 512 would put it.

    Raises InvalidImage where there is a table that cannot be believed, UsageError for an impossible sector size.
    """
    if sector_size is not None and sector_size not in _SIZES:
        raise UsageError(f"{sector_size} is not a sector size; use 512, 1024, 2048 or 4096")
    if sector_size is None and source.traits.sector_known:
        sector_size = source.traits.sector_size
    table = _gpt(source, _SIZES if sector_size is None else (sector_size,))
    if table is not None:
        return table
    table = _mbr(source) if sector_size is None else mbr.read(source, sector_size)
    if table is not None and table.partitions:
        return table
    return apm.read(source, sector_size or 512) or table


def _gpt(source: Source, sizes: tuple[int, ...]) -> Table | None:
    damage: InvalidImage | None = None
    for size in sizes:
        try:
            table = gpt.read(source, size)
        except InvalidImage as error:
            damage = damage or error  # another size may still find a whole one
        else:
            if table is not None:
                return table
    if damage is not None:
        raise damage
    return None


def _mbr(source: Source) -> Table | None:
    usual = mbr.read(source, 512)
    if usual is None or _witnesses(source, usual):
        return usual
    large = mbr.read(source, 4096)
    if large is not None and not large.warnings and _witnesses(source, large):
        return large
    return usual


def _witnesses(source: Source, table: Table) -> bool:
    """Whether a known volume starts at any partition."""
    return any(_sign(source, partition.start) for partition in table.partitions)


def _sign(source: Source, start: int) -> bool:
    try:
        head = read(source, start, min(4096, source.size - start))
    except ReadError:
        return False
    return is_signed(head)


def is_signed(head: bytes) -> bool:
    """Whether the first bytes, 4096 or fewer, are like those of a volume, or of a chain of logical partitions."""
    return any(head.startswith(sign, offset) for offset, sign in _SIGNS)
