"""Partition tables as Clonezilla saves them: sfdisk's dump, parted's listing, and sectors of the disk.

    sda-pt.sf       /dev/sda1 : start= 2048, size= 204800, type=83, bootable
    sda-pt.parted   Disk /dev/sda: 41943040s
    sda-mbr  sda-hidden-data-after-mbr  sda-gpt-1st  sda-gpt-2nd  sda-gpt.gdisk

Boot records of logical partitions are not saved; they are made again from the dump, as Clonezilla does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from ferrotype.errors import InvalidImage
from ferrotype.formats import MAX_SIZE

__all__ = ["Partition", "Table", "boot_records", "gdisk_sectors", "master_boot_record", "parse_dump", "parted_size"]

MAX_PARTITIONS: Final = 1024
_LINE: Final = re.compile(r"(?:/dev/)?([\w./!-]{1,64})\s*:\s*start=\s*(\d{1,15}),\s*size=\s*(\d{1,15})(.*)")
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_SIGNATURE: Final = b"\x55\xaa"
_CHS: Final = b"\xfe\xff\xff"  # "look at the sector numbers"
_ALIGN: Final = 2048  # sectors before a logical partition, where there is room


@dataclass(frozen=True, slots=True)
class Partition:
    """An entry of the dump; places in sectors."""

    name: str
    start: int
    size: int
    kind: int | None  # of an MBR
    bootable: bool

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def extended(self) -> bool:
        return self.kind in _EXTENDED

    @property
    def number(self) -> int:
        digits = re.search(r"\d{1,6}$", self.name)
        return int(digits[0]) if digits else 0


@dataclass(frozen=True, slots=True)
class Table:
    """sfdisk's dump."""

    label: str  # "dos", "gpt", "" where it does not say
    sector_size: int
    partitions: tuple[Partition, ...]
    disk_id: int


def parse_dump(text: str) -> Table:
    """Raises InvalidImage at partitions that cannot be: too many, none at all in place, or over each other."""
    fields = dict(re.findall(r"^([\w-]{1,32}):[ \t]*(\S{1,64})", text, re.MULTILINE))
    sector_size = {"512": 512, "4096": 4096}.get(fields.get("sector-size", "512"))
    if sector_size is None:
        raise InvalidImage("the dump of a partition table has impossible sectors", field="sector-size")
    partitions = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None or not int(match[3]):
            continue
        kind = re.search(r"(?:type|Id)=\s*([0-9a-fA-F]{1,2})\b(?!-)", match[4])
        name = match[1].rpartition("/")[2]
        partitions.append(
            Partition(name, int(match[2]), int(match[3]), int(kind[1], 16) if kind else None, "bootable" in match[4])
        )
    if len(partitions) > MAX_PARTITIONS or any(one.end * sector_size > MAX_SIZE for one in partitions):
        raise InvalidImage("the dump of a partition table is impossible", field="start")
    placed = sorted((one for one in partitions if not one.extended), key=lambda one: one.start)
    for left, right in pairwise(placed):
        if left.end > right.start:
            raise InvalidImage(f"the partitions {left.name} and {right.name} overlap", field="start")
    disk_id = fields.get("label-id", "0")
    number = int(disk_id, 16) if re.fullmatch(r"0x[0-9a-fA-F]{1,8}", disk_id) else 0
    label = fields.get("label", "dos" if any(one.kind is not None for one in partitions) else "")
    return Table(label, sector_size, tuple(partitions), number)


def parted_size(text: str) -> int | None:
    """Sectors of the disk, as parted's listing says."""
    match = re.search(r"^Disk /\S+:\s*(\d{1,15})s\s*$", text, re.MULTILINE)
    return int(match[1]) if match else None


def _entry(kind: int, start: int, size: int, *, bootable: bool = False) -> bytes:
    if not 0 <= start < 1 << 32 or not 0 <= size < 1 << 32:
        raise InvalidImage("a partition is too far behind for an MBR", field="start")
    head = (b"\x80" if bootable else b"\0") + _CHS + bytes([kind]) + _CHS
    return head + start.to_bytes(4, "little") + size.to_bytes(4, "little")


def master_boot_record(table: Table) -> bytes:
    """An MBR of the primary partitions, without code to boot from."""
    record = bytearray(512)
    record[440:444] = table.disk_id.to_bytes(4, "little")
    for one in table.partitions:
        if 1 <= one.number <= 4:
            at = 446 + 16 * (one.number - 1)
            record[at : at + 16] = _entry(one.kind or 0x83, one.start, one.size, bootable=one.bootable)
    record[510:] = _SIGNATURE
    return bytes(record)


def boot_records(table: Table) -> list[tuple[int, bytes]]:
    """The boot records of the logical partitions, each with the sector it stands in.

    The first stands where the extended partition begins, the others between the partitions.
    """
    extended = next((one for one in table.partitions if one.extended and one.number <= 4), None)
    if table.label != "dos" or extended is None:
        return []
    logical = sorted((one for one in table.partitions if one.number > 4), key=lambda one: one.number)
    places, before = [], extended.start
    for number, one in enumerate(logical):
        places.append(before if number == 0 else max(before, one.start - _ALIGN))
        if not places[-1] < one.start < one.end <= extended.end:
            raise InvalidImage(f"the logical partition {one.name} has no room", field="start")
        before = one.end
    records = []
    for number, (place, one) in enumerate(zip(places, logical, strict=True)):
        entries = _entry(one.kind or 0x83, one.start - place, one.size, bootable=one.bootable)
        if number + 1 < len(logical):
            following = logical[number + 1]
            entries += _entry(0x05, places[number + 1] - extended.start, following.end - places[number + 1])
        records.append((place, bytes(446) + entries.ljust(64, b"\0") + _SIGNATURE))
    return records


def gdisk_sectors(data: bytes, sector_size: int) -> list[tuple[int, bytes]]:
    """The sectors in sgdisk's backup: MBR, both GPT headers and the entries, each with the sector it belongs in."""
    sectors = [data[at : at + sector_size] for at in range(0, 3 * sector_size, sector_size)]
    entries = data[3 * sector_size :]
    if len(data) < 4 * sector_size or any(one[:8] != b"EFI PART" for one in sectors[1:]):
        raise InvalidImage("the saved GPT is none", offset=sector_size)
    placed: list[tuple[int, bytes]] = [(0, sectors[0])]
    for header in sectors[1:]:
        own, table = int.from_bytes(header[24:32], "little"), int.from_bytes(header[72:80], "little")
        placed += [(own, header), (table, entries)]
    return placed


def inside(pieces: Sequence[tuple[int, bytes]], size: int) -> bool:
    """Whether pieces, placed in bytes, lie within the disk."""
    return all(at >= 0 and at + len(data) <= size for at, data in pieces)
