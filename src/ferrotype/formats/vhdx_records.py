"""VHDX: the structures at the head of a file, and what they say once they were checked.

    0       64K        128K       192K             256K             320K    1M
    +-------+----------+----------+----------------+----------------+-------+----------------------------------+
    | file  | header 1 | header 2 | region table 1 | region table 2 |       | log | metadata | BAT | blocks .. |
    | ident.|          |          |                |                |       |     in any order, at whole MiB    |
    +-------+----------+----------+----------------+----------------+-------+----------------------------------+

    metadata region   table (64 KiB): item id, offset, length | items: sizes, disk id, parent locator ...

Of the two headers the one with the higher sequence number is in force; the second region table is a spare.  Written
from [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format"; section numbers are cited where they matter.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Final

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.crc32c import crc32c
from ferrotype.records import Record, b4, b8, b16, record, u16, u32, u64
from ferrotype.units import KiB, MiB, TiB


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def guid_text(guid: bytes) -> str:
    """A GUID as people write it."""
    return str(uuid.UUID(bytes_le=guid))


HEADERS: Final = (64 * KiB, 128 * KiB)  # section 2.2
HEADER_SIZE: Final = 4 * KiB
REGION_TABLES: Final = (192 * KiB, 256 * KiB)
TABLE_SIZE: Final = 64 * KiB  # of a region table and of the metadata table
MAX_ENTRIES: Final = 2047  # in either
MAX_DISK: Final = 64 * TiB

BAT: Final = _guid("2dc27766-f623-4200-9d64-115e9bfd4a08")  # section 2.2.3.2
METADATA: Final = _guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")

FILE_PARAMETERS: Final = _guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")  # section 2.6.2
VIRTUAL_DISK_SIZE: Final = _guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID: Final = _guid("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE: Final = _guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE: Final = _guid("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR: Final = _guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
LOCATOR_TYPE: Final = _guid("b04aefb7-d19e-4a81-b789-25b8e9445913")  # section 2.6.2.6.3


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


@record(endian="<", size=32)
class MetadataTable(Record):
    """Section 2.6.1.1."""

    Signature: b8
    Reserved: u16
    EntryCount: u16
    Reserved2: Annotated[bytes, "20s"]


@record(endian="<", size=32)
class MetadataEntry(Record):
    """Section 2.6.1.2."""

    ItemId: b16
    Offset: u32  # from the start of the region
    Length: u32
    Flags: u32
    Reserved: u32


IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4  # of MetadataEntry.Flags


@record(endian="<", size=8)
class FileParameters(Record):
    """Section 2.6.2.1."""

    BlockSize: u32
    Flags: u32


LEAVE_BLOCK_ALLOCATED, HAS_PARENT = 1, 2  # of FileParameters.Flags


@record(endian="<", size=20)
class Locator(Record):
    """Section 2.6.2.6.1."""

    LocatorType: b16
    Reserved: u16
    KeyValueCount: u16


@record(endian="<", size=12)
class LocatorEntry(Record):
    """Section 2.6.2.6.2; offsets from the start of the locator, UTF-16 without an end mark."""

    KeyOffset: u32
    ValueOffset: u32
    KeyLength: u16
    ValueLength: u16


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
    """The regions ``BAT`` and ``metadata``, the ``log`` and the ``headers``, and what is to be said of them."""
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
        entry = RegionEntry.unpack(table, where)
        name = _REGIONS.get(entry.Guid)
        if name is None:
            if entry.Required & 1:
                raise UnsupportedError(
                    f"the region {guid_text(entry.Guid)} is required and unknown", offset=at + where, field="Guid"
                )
            continue
        if name in found:
            raise InvalidImage(f"the {name} region is listed twice", offset=at + where, field="Guid")
        if entry.FileOffset % MiB or entry.Length % MiB or not entry.Length:
            raise InvalidImage(
                f"the {name} region does not stand at whole MiB", offset=at + where + 16, field="FileOffset"
            )
        if entry.FileOffset + entry.Length > file.size:
            raise InvalidImage(f"the {name} region lies outside the file", offset=at + where + 16, field="FileOffset")
        region = Region(name, entry.FileOffset, entry.Length)
        for other in found.values():
            if region.start < other.end and other.start < region.end:
                raise InvalidImage(
                    f"the {name} region overlaps the {other.name}", offset=at + where + 16, field="FileOffset"
                )
        found[name] = region
    for name in _REGIONS.values():
        if name not in found:
            raise InvalidImage(f"there is no {name} region", offset=at, field="region table")
    return found


# ---------------------------------------------------------------------- metadata


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a file says of its disk; sizes in bytes."""

    size: int
    block_size: int
    fixed: bool  # blocks stay allocated
    logical_sector: int
    physical_sector: int
    disk_id: bytes
    parent: Mapping[str, str] | None  # keys and values of the parent locator; None: there is no parent

    @property
    def blocks(self) -> int:
        """Payload blocks."""
        return -(-self.size // self.block_size)

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks whose sectors one sector bitmap block covers: section 2.5."""
        return (1 << 23) * self.logical_sector // self.block_size

    @property
    def bat_entries(self) -> int:
        """Entries of the BAT, those of sector bitmap blocks between: section 2.5."""
        if not self.blocks:
            return 0
        if self.parent is None:
            return self.blocks + (self.blocks - 1) // self.chunk_ratio
        return -(-self.blocks // self.chunk_ratio) * (self.chunk_ratio + 1)


_ITEMS: Final = {
    FILE_PARAMETERS: ("FileParameters", FileParameters.SIZE),
    VIRTUAL_DISK_SIZE: ("VirtualDiskSize", 8),
    DISK_ID: ("VirtualDiskId", 16),
    LOGICAL_SECTOR_SIZE: ("LogicalSectorSize", 4),
    PHYSICAL_SECTOR_SIZE: ("PhysicalSectorSize", 4),
}


def disk_metadata(file: Source, region: Region) -> Metadata:
    """The metadata items, checked."""
    items = {entry.ItemId: (at, entry) for at, entry in _entries(file, region)}

    def item(guid: bytes) -> tuple[int, bytes]:
        name, size = _ITEMS[guid]
        if guid not in items:
            raise InvalidImage("a metadata item is missing", offset=region.start, field=name)
        at, entry = items[guid]
        if entry.Length != size:
            raise InvalidImage(f"a metadata item has {entry.Length} bytes", offset=at + 20, field=name)
        start = region.start + entry.Offset
        return start, read_exactly(file, start, size, name)

    def number(guid: bytes) -> tuple[int, int]:
        start, octets = item(guid)
        return start, int.from_bytes(octets, "little")

    at, octets = item(FILE_PARAMETERS)
    parameters = FileParameters.unpack(octets)
    block = parameters.BlockSize
    if block & (block - 1) or not MiB <= block <= 256 * MiB:
        raise InvalidImage(f"blocks of {block} bytes", offset=at, field="BlockSize")
    if parameters.Flags & ~(LEAVE_BLOCK_ALLOCATED | HAS_PARENT):
        raise UnsupportedError(f"file parameters {parameters.Flags:#x} are unknown", offset=at + 4, field="Flags")
    sectors = {}
    for guid in (LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE):
        at, sectors[guid] = number(guid)
        if sectors[guid] not in (512, 4096):
            raise InvalidImage(f"sectors of {sectors[guid]} bytes", offset=at, field=_ITEMS[guid][0])
    at, size = number(VIRTUAL_DISK_SIZE)
    if size % sectors[LOGICAL_SECTOR_SIZE] or size > MAX_DISK:
        raise InvalidImage(f"a disk of {size} bytes", offset=at, field="VirtualDiskSize")
    parent = None
    if parameters.Flags & HAS_PARENT:
        if PARENT_LOCATOR not in items:
            raise InvalidImage("there is no parent locator", offset=region.start, field="ParentLocator")
        entry = items[PARENT_LOCATOR][1]
        parent = _locator(file, region.start + entry.Offset, entry.Length)
    return Metadata(
        size=size,
        block_size=block,
        fixed=bool(parameters.Flags & LEAVE_BLOCK_ALLOCATED),
        logical_sector=sectors[LOGICAL_SECTOR_SIZE],
        physical_sector=sectors[PHYSICAL_SECTOR_SIZE],
        disk_id=item(DISK_ID)[1],
        parent=parent,
    )


def _entries(file: Source, region: Region) -> Iterator[tuple[int, MetadataEntry]]:
    """The entries of known items and where they stand in the file."""
    table = read_exactly(file, region.start, TABLE_SIZE, "metadata table")
    head = MetadataTable.unpack(table)
    if head.Signature != b"metadata":
        raise InvalidImage("there is no metadata table", offset=region.start, field="Signature")
    if head.EntryCount > MAX_ENTRIES:
        raise InvalidImage(
            f"the metadata table has {head.EntryCount} entries", offset=region.start + 10, field="EntryCount"
        )
    seen = set()
    for number in range(head.EntryCount):
        where = MetadataTable.SIZE + number * MetadataEntry.SIZE
        at, entry = region.start + where, MetadataEntry.unpack(table, where)
        known = not entry.Flags & IS_USER and (entry.ItemId in _ITEMS or entry.ItemId == PARENT_LOCATOR)
        if not known and entry.Flags & IS_REQUIRED:
            raise UnsupportedError(
                f"the metadata item {guid_text(entry.ItemId)} is required and unknown", offset=at, field="ItemId"
            )
        if not known:
            continue
        if entry.ItemId in seen:
            raise InvalidImage("a metadata item is listed twice", offset=at, field="ItemId")
        if entry.Offset < TABLE_SIZE or entry.Offset + entry.Length > region.length or entry.Length > MiB:
            raise InvalidImage("a metadata item lies outside its region", offset=at + 16, field="Offset")
        seen.add(entry.ItemId)
        yield at, entry


def _locator(file: Source, at: int, length: int) -> dict[str, str]:
    """The parent locator's keys and values."""
    item = read_exactly(file, at, length, "parent locator")
    head = Locator.unpack(item)
    if head.LocatorType != LOCATOR_TYPE:
        raise UnsupportedError(
            f"the parent locator type {guid_text(head.LocatorType)} is unknown", offset=at, field="LocatorType"
        )
    found = {}
    for number in range(head.KeyValueCount):
        where = Locator.SIZE + number * LocatorEntry.SIZE
        entry = LocatorEntry.unpack(item, where)
        key = _text(item, entry.KeyOffset, entry.KeyLength, at)
        if key in found:
            raise InvalidImage(f"the parent locator says {key!r} twice", offset=at + where, field="KeyOffset")
        found[key] = _text(item, entry.ValueOffset, entry.ValueLength, at)
    return found


def _text(item: bytes, start: int, length: int, at: int) -> str:
    if start + length > len(item) or length == 0:
        raise InvalidImage("a text lies outside the parent locator", offset=at + start, field="ParentLocator")
    try:
        return item[start : start + length].decode("utf-16-le")
    except UnicodeDecodeError:
        raise InvalidImage("a text is no UTF-16", offset=at + start, field="ParentLocator") from None
