"""VHDX: the structures at the head of a file, and what they say once they were checked.

    0       64K        128K       192K             256K             320K    1M
    +-------+----------+----------+----------------+----------------+-------+----------------------------------+
    | file  | header 1 | header 2 | region table 1 | region table 2 |       | log | metadata | BAT | blocks .. |
    | ident.|          |          |                |                |       |     in any order, at whole MiB    |
    +-------+----------+----------+----------------+----------------+-------+----------------------------------+

Of the two headers the one with the higher sequence number is in force; the second region table is a spare.  Written
from [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format"; section numbers are cited where they matter.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE
from ferrotype.formats.crc32c import crc32c
from ferrotype.records import Record, b4, b8, b16, record, u16, u32, u64
from ferrotype.units import KiB, MiB


def guid(text: str) -> bytes:
    """A GUID as it stands in a file."""
    return uuid.UUID(text).bytes_le


def guid_text(stored: bytes) -> str:
    """The same as people write it."""
    return str(uuid.UUID(bytes_le=stored))


HEADERS: Final = (64 * KiB, 128 * KiB)  # section 2.2
HEADER_SIZE: Final = 4 * KiB
REGION_TABLES: Final = (192 * KiB, 256 * KiB)
TABLE_SIZE: Final = 64 * KiB  # of a region table and of the metadata table
MAX_ENTRIES: Final = 2047  # in either

BAT: Final = guid("2dc27766-f623-4200-9d64-115e9bfd4a08")  # section 2.2.3.2
METADATA: Final = guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")


@record(endian="<", size=520)
class FileIdentifier(Record):
    """Section 2.2.1."""

    Signature: b8
    Creator: Annotated[bytes, "512s"]  # UTF-16, for diagnosis


@record(endian="<", size=80)
class Header(Record):
    """Section 2.2.2, up to what is reserved; the checksum is that of 4 KiB."""

    Signature: b4
    Checksum: u32
    SequenceNumber: u64
    FileWriteGuid: b16
    DataWriteGuid: b16
    LogGuid: b16
    LogVersion: u16
    Version: u16
    LogLength: u32
    LogOffset: u64


@record(endian="<", size=16)
class RegionTable(Record):
    """Section 2.2.3.1; the checksum is that of 64 KiB."""

    Signature: b4
    Checksum: u32
    EntryCount: u32
    Reserved: u32


@record(endian="<", size=32)
class RegionEntry(Record):
    """Section 2.2.3.2."""

    Guid: b16
    FileOffset: u64
    Length: u32
    Required: u32  # bit 0


def sealed(structure: bytes) -> bytes:
    """A structure with its CRC-32C in bytes 4 to 8, which is taken over zeros there."""
    blank = structure[:4] + bytes(4) + structure[8:]
    return blank[:4] + crc32c(blank).to_bytes(4, "little") + blank[8:]


def is_sound(structure: bytes) -> bool:
    """Whether the CRC-32C in bytes 4 to 8 is right."""
    return sealed(structure) == structure


# ---------------------------------------------------------------------- headers and regions


def current_header(file: Source) -> tuple[Header, list[str]]:
    """The header in force, and what is to be said of the other one."""
    found = [_header(file, at) for at in HEADERS]
    sound = [one for one in found if one is not None]
    if not sound:
        raise InvalidImage("neither header has a right checksum", offset=HEADERS[0], field="Checksum")
    if len(sound) == 2 and sound[0].SequenceNumber == sound[1].SequenceNumber and sound[0] != sound[1]:
        raise InvalidImage("the two headers contradict each other", offset=HEADERS[1] + 8, field="SequenceNumber")
    header = max(sound, key=lambda one: one.SequenceNumber)
    at = HEADERS[found.index(header)]
    if header.Version != 1:
        raise UnsupportedError(f"VHDX version {header.Version} is unknown", offset=at + 66, field="Version")
    if header.LogOffset % MiB or header.LogLength % MiB or (header.LogLength and header.LogOffset < MiB):
        raise InvalidImage("the log does not stand at whole MiB", offset=at + 72, field="LogOffset")
    if header.LogOffset + header.LogLength > file.size:
        raise InvalidImage("the log lies outside the file", offset=at + 72, field="LogOffset")
    damaged = [
        f"header {number} is damaged, the other one was used" for number, one in enumerate(found, 1) if not one
    ]
    return header, damaged


def _header(file: Source, at: int) -> Header | None:
    if at + HEADER_SIZE > file.size:
        return None
    page = read(file, at, HEADER_SIZE)
    return Header.unpack(page) if page.startswith(b"head") and is_sound(page) else None


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of the file that is in use: bytes."""

    name: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


def regions(file: Source, header: Header) -> tuple[dict[str, Region], list[str]]:
    """The regions ``BAT`` and ``metadata``, the ``log``, the ``headers``, those that need not be known, and remarks.

    None of them overlap.
    """
    for number, at in enumerate(REGION_TABLES):
        table = read_exactly(file, at, TABLE_SIZE, "region table")
        if table.startswith(b"regi") and is_sound(table):
            spoilt = ["the first region table is damaged, the second one was used"] if number else []
            return _checked_regions(file, table, at, header), spoilt
    raise InvalidImage("neither region table has a right checksum", offset=REGION_TABLES[0], field="Checksum")


_REGIONS: Final = {BAT: "BAT", METADATA: "metadata"}


def _checked_regions(file: Source, table: bytes, at: int, header: Header) -> dict[str, Region]:
    count = RegionTable.unpack(table).EntryCount
    if count > MAX_ENTRIES:
        raise InvalidImage(f"the region table has {count} entries", offset=at + 8, field="EntryCount")
    found = {"headers": Region("headers", 0, MiB), "log": Region("log", header.LogOffset, header.LogLength)}
    for number in range(count):
        where = RegionTable.SIZE + number * RegionEntry.SIZE
        region = _region(file, RegionEntry.unpack(table, where), at + where)
        if region.name in found:
            raise InvalidImage(f"the {region.name} is listed twice", offset=at + where, field="Guid")
        found[region.name] = region
    for name in _REGIONS.values():
        if name not in found:
            raise InvalidImage(f"there is no {name} region", offset=at, field="region table")
    for one, other in pairwise(sorted((one for one in found.values() if one.length), key=lambda one: one.start)):
        if other.start < one.end:
            raise InvalidImage(f"the {one.name} overlaps the {other.name}", offset=at, field="FileOffset")
    return found


def _region(file: Source, entry: RegionEntry, at: int) -> Region:
    """The region of the entry at ``at``.  Where it need not be known, it may lie outside the file."""
    known = _REGIONS.get(entry.Guid)
    name = known or f"region {guid_text(entry.Guid)}"
    if known is None and entry.Required & 1:
        raise UnsupportedError(f"the {name} is required and unknown", offset=at, field="Guid")
    if entry.FileOffset % MiB or entry.FileOffset < MiB or entry.Length % MiB or (known and not entry.Length):
        raise InvalidImage(f"the {name} does not stand at whole MiB", offset=at + 16, field="FileOffset")
    if entry.FileOffset + entry.Length > (file.size if known else MAX_SIZE):
        raise InvalidImage(f"the {name} lies outside the file", offset=at + 16, field="FileOffset")
    return Region(name, entry.FileOffset, entry.Length)
