"""VHDX: what a file says of its disk, in the items of its metadata region.

    0       32                     64K
    +-------+-------+-------+-----+--------+--------+--------+-----
    | table | entry | entry | ... | item   | item   | item   | ...     entry: item id, offset, length, flags
    +-------+-------+-------+-----+--------+--------+--------+-----

    parent locator   head | key offset, value offset, lengths | ... | texts in UTF-16

Written from [MS-VHDX], section 2.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from ferrotype.block import Source, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.vhdx.records import MAX_ENTRIES, TABLE_SIZE, Region, guid, guid_text
from ferrotype.records import Record, b8, b16, record, u16, u32
from ferrotype.units import MiB, TiB

MAX_DISK: Final = 64 * TiB
MAX_USER_ENTRIES: Final = 1024

FILE_PARAMETERS: Final = guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")  # section 2.6.2
VIRTUAL_DISK_SIZE: Final = guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID: Final = guid("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE: Final = guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE: Final = guid("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR: Final = guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
LOCATOR_TYPE: Final = guid("b04aefb7-d19e-4a81-b789-25b8e9445913")  # section 2.6.2.6.3


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

    def item(known: bytes) -> tuple[int, bytes]:
        name, size = _ITEMS[known]
        if known not in items:
            raise InvalidImage("a metadata item is missing", offset=region.start, field=name)
        at, entry = items[known]
        if entry.Length != size:
            raise InvalidImage(f"a metadata item has {entry.Length} bytes", offset=at + 20, field=name)
        start = region.start + entry.Offset
        return start, read_exactly(file, start, size, name)

    def number(known: bytes) -> tuple[int, int]:
        start, octets = item(known)
        return start, int.from_bytes(octets, "little")

    at, octets = item(FILE_PARAMETERS)
    parameters = FileParameters.unpack(octets)
    block = parameters.BlockSize
    if block & (block - 1) or not MiB <= block <= 256 * MiB:
        raise InvalidImage(f"blocks of {block} bytes", offset=at, field="BlockSize")
    if parameters.Flags & ~(LEAVE_BLOCK_ALLOCATED | HAS_PARENT):
        raise UnsupportedError(f"file parameters {parameters.Flags:#x} are unknown", offset=at + 4, field="Flags")
    sectors = {}
    for known in (LOGICAL_SECTOR_SIZE, PHYSICAL_SECTOR_SIZE):
        at, sectors[known] = number(known)
        if sectors[known] not in (512, 4096):
            raise InvalidImage(f"sectors of {sectors[known]} bytes", offset=at, field=_ITEMS[known][0])
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
    """The entries of known items and where they stand in the file.  All of the table is checked: section 2.6.1.2."""
    table = read_exactly(file, region.start, TABLE_SIZE, "metadata table")
    head = MetadataTable.unpack(table)
    if head.Signature != b"metadata":
        raise InvalidImage("there is no metadata table", offset=region.start, field="Signature")
    if head.EntryCount > MAX_ENTRIES:
        raise InvalidImage(
            f"the metadata table has {head.EntryCount} entries", offset=region.start + 10, field="EntryCount"
        )
    seen, spans = set(), []
    for number in range(head.EntryCount):
        where = MetadataTable.SIZE + number * MetadataEntry.SIZE
        at, entry = region.start + where, MetadataEntry.unpack(table, where)
        user = bool(entry.Flags & IS_USER)
        known = not user and (entry.ItemId in _ITEMS or entry.ItemId == PARENT_LOCATOR)
        if not known and entry.Flags & IS_REQUIRED:
            raise UnsupportedError(
                f"the metadata item {guid_text(entry.ItemId)} is required and unknown", offset=at, field="ItemId"
            )
        if (entry.ItemId, user) in seen:
            raise InvalidImage("a metadata item is listed twice", offset=at, field="ItemId")
        seen.add((entry.ItemId, user))
        if entry.Length or entry.Offset:  # else it is there and empty
            end = entry.Offset + entry.Length
            if not TABLE_SIZE <= entry.Offset < end <= region.length or entry.Length > MiB:
                raise InvalidImage("a metadata item lies outside its region", offset=at + 16, field="Offset")
            spans.append((entry.Offset, end, at))
        if known:
            yield at, entry
    if sum(user for _, user in seen) > MAX_USER_ENTRIES:
        raise InvalidImage("the metadata table has too many user items", offset=region.start + 10, field="EntryCount")
    for (_, end, _), (start, _, at) in pairwise(sorted(spans)):
        if start < end:
            raise InvalidImage("a metadata item overlaps another one", offset=at + 16, field="Offset")


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
    if start + length > len(item) or length == 0 or start == 0:
        raise InvalidImage("a text lies outside the parent locator", offset=at + start, field="ParentLocator")
    try:
        text = item[start : start + length].decode("utf-16-le")
    except UnicodeDecodeError:
        raise InvalidImage("a text is no UTF-16", offset=at + start, field="ParentLocator") from None
    if "\0" in text:
        raise InvalidImage(f"a text holds a NUL: {text[:80]!r}", offset=at + start, field="ParentLocator")
    return text
