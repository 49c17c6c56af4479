"""The GUID partition table: a header and an array of entries at the start of the disk, copies of both at its end.

    LBA  0             1         2 .. 33          34                    n-34      n-33 .. n-2      n-1
         | protective | primary | entry array    | usable sectors ...        |   | entry array    | backup |
         | MBR        | header  | of the primary | partitions                |   | of the backup  | header |

    header   0        8         12          16        20        24     32            40             48
             | EFI PART | Revision | HeaderSize | HeaderCRC | 0 ... | MyLBA | AlternateLBA | FirstUsable | LastUsable
             56         72             80         84        88
             | DiskGUID | EntryLBA      | number   | size    | CRC of the entry array |

Source: UEFI specification 2.10, section 5.3 (Tables 5.5 and 5.6), protective MBR section 5.2.3 (Table 5.4).

Either copy is enough: a header counts where its checksum, its own address and its bounds are right, an entry array
where the checksum in a good header is right, and each may come from the other half of the disk than its fellow.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import numpy as np

from ferrotype.block import Source
from ferrotype.block import read as read_bytes
from ferrotype.errors import InvalidImage, ReadError
from ferrotype.records import Record, b8, b16, record, u32, u64
from ferrotype.units import MiB
from ferrotype.volumes import Partition, Table, mbr

SIGNATURE: Final = b"EFI PART"
_MAX_ENTRIES: Final = 16384  # 128 times the usual number
_MAX_ARRAY: Final = 4 * MiB  # bytes; the usual array has 16 KiB
_SHARED: Final = (  # header fields in which the two copies agree
    "FirstUsableLBA",
    "LastUsableLBA",
    "DiskGUID",
    "NumberOfPartitionEntries",
    "SizeOfPartitionEntry",
    "PartitionEntryArrayCRC32",
)


@record(endian="<", size=92)
class Header(Record):
    """GPT header, UEFI 2.10 Table 5.5."""

    Signature: b8
    Revision: u32
    HeaderSize: u32
    HeaderCRC32: u32
    Reserved: u32
    MyLBA: u64
    AlternateLBA: u64
    FirstUsableLBA: u64
    LastUsableLBA: u64
    DiskGUID: b16
    PartitionEntryLBA: u64
    NumberOfPartitionEntries: u32
    SizeOfPartitionEntry: u32
    PartitionEntryArrayCRC32: u32

    @property
    def array_size(self) -> int:
        """Bytes of the entry array."""
        return self.NumberOfPartitionEntries * self.SizeOfPartitionEntry

    def array_sectors(self, sector_size: int) -> int:
        return -(-self.array_size // sector_size)


def entry_dtype(size: int) -> np.dtype[np.void]:
    """GPT partition entry of ``size`` bytes, UEFI 2.10 Table 5.6.  GUIDs and names stay raw: numpy strips NULs."""
    fields = {
        "PartitionTypeGUID": ("V16", 0),
        "UniquePartitionGUID": ("V16", 16),
        "StartingLBA": ("<u8", 32),
        "EndingLBA": ("<u8", 40),
        "Attributes": ("<u8", 48),
        "PartitionName": ("V72", 56),
    }
    return np.dtype(
        {
            "names": list(fields),
            "formats": [code for code, _ in fields.values()],
            "offsets": [offset for _, offset in fields.values()],
            "itemsize": size,
        }
    )


@dataclass(frozen=True, slots=True)
class Copy:
    """One of the two headers as found: ``fault`` says why it is not to be believed."""

    name: str  # "primary" or "backup"
    lba: int
    sector: bytes  # the whole sector, empty where it could not be read
    header: Header | None
    fault: str | None
    array_good: bool = False  # the array this header points to has the checksum it states

    @property
    def traced(self) -> bool:
        return self.sector[:8] == SIGNATURE


@dataclass(frozen=True, slots=True)
class Loaded:
    """A GPT that can be believed: ``header`` from one of the copies, and an array of entries that matches it."""

    sector_size: int
    sectors: int  # on the whole disk
    primary: Copy
    backup: Copy
    chosen: Copy
    header: Header
    array: bytes
    warnings: tuple[str, ...]

    @property
    def metadata(self) -> tuple[tuple[int, int], ...]:
        """(start, length) in bytes of what the table occupies, ascending and apart; a damaged copy counts too."""
        array = self.header.array_sectors(self.sector_size)
        spans = [(0, 2), (self.backup.lba, self.backup.lba + 1)]  # first sector, sector behind
        for copy, usual in ((self.primary, 2), (self.backup, max(2, self.backup.lba - array))):
            lba = copy.header.PartitionEntryLBA if copy.header else usual
            spans.append((lba, lba + array))  # empty where the table has room for no entry
        joined: list[tuple[int, int]] = []
        for first, behind in sorted(spans):
            if joined and first <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(behind, joined[-1][1]))
            else:
                joined.append((first, behind))
        return tuple(
            (first * self.sector_size, (min(behind, self.sectors) - first) * self.sector_size)
            for first, behind in joined
            if first < min(behind, self.sectors)
        )


def read(source: Source, sector_size: int) -> Table | None:
    """The GPT of a disk whose sectors have ``sector_size`` bytes; None where there is none.

    Every repair, and every entry that is left out, has a warning.  Raises InvalidImage where the disk says it has a
    GPT and neither copy can be believed.
    """
    loaded = load(source, sector_size)
    if loaded is None:
        return None
    warnings = list(loaded.warnings)
    partitions = _partitions(loaded, warnings)
    return Table(
        kind="gpt",
        sector_size=sector_size,
        disk_id=_guid(loaded.header.DiskGUID),
        partitions=mbr.disjoint(partitions, warnings),
        metadata=loaded.metadata,
        warnings=tuple(warnings),
        rivals=_rivals(source, partitions, sector_size),
    )


def _rivals(source: Source, partitions: list[Partition], sector_size: int) -> tuple[tuple[int, int], ...]:
    """What the entries of a hybrid MBR name that is not, to the sector, a partition of the GPT: (start, length)."""
    try:
        boot = mbr.BootRecord.unpack(read_bytes(source, 0, sector_size))
    except ReadError:
        return ()
    if boot.Signature != mbr.SIGNATURE:
        return ()
    named = [
        (entry.StartingLBA * sector_size, entry.SizeInLBA * sector_size)
        for entry in boot.entries
        if entry.used and entry.OSType != mbr.PROTECTIVE
    ]
    known = {(partition.start, partition.size) for partition in partitions}
    return tuple(span for span in named if span not in known)


def load(source: Source, sector_size: int) -> Loaded | None:
    """Both copies of the table, checked, and the one to use.  Errors as for ``read``."""
    last = source.size // sector_size - 1
    if last < 2:
        return None
    protective = _protective(source, sector_size)
    if protective.other:
        return None  # UEFI 5.2: without a protective entry, what the MBR says is right, and any GPT is a leftover
    primary = _copy(source, "primary", 1, sector_size)
    backup = _backup(source, primary, last, sector_size)
    chosen = _choose(source, primary, backup, sector_size)
    if not protective.present and (chosen is None or chosen[0] is not primary or not primary.array_good):
        return None  # backups of former tables are left behind often; alone, they prove nothing
    if chosen is None:
        if primary.traced or backup.traced:
            raise InvalidImage(
                f"both copies of the GPT are damaged: primary {primary.fault or 'entry array checksum is wrong'}, "
                f"backup {backup.fault or 'entry array checksum is wrong'}"
            )
        return None
    copy, header, array = chosen
    warnings = protective.warnings + _complaints(primary, backup, last)
    return Loaded(sector_size, last + 1, primary, backup, copy, header, array, tuple(warnings))


# ---------------------------------------------------------------------- the two copies


def _copy(source: Source, name: str, lba: int, sector_size: int) -> Copy:
    """The header at ``lba``, checked (UEFI 5.3.2: signature, checksum, MyLBA, then the array's checksum)."""
    try:
        sector = read_bytes(source, lba * sector_size, sector_size)
    except ReadError:
        return Copy(name, lba, b"", None, "header cannot be read")
    header = Header.unpack(sector)
    fault = _fault(header, sector, lba, source.size // sector_size)
    if fault:
        return Copy(name, lba, sector, None, fault)
    good = _array(source, header, header.PartitionEntryLBA, sector_size) is not None
    return Copy(name, lba, sector, header, None, good)


def _fault(header: Header, sector: bytes, lba: int, sectors: int) -> str | None:
    if header.Signature != SIGNATURE:
        return "header is missing"
    if not Header.SIZE <= header.HeaderSize <= len(sector):
        return "header size is wrong"
    if header_crc(sector, header.HeaderSize) != header.HeaderCRC32:
        return "header checksum is wrong"
    if header.MyLBA != lba:
        return "header belongs to another sector"
    entry_size = header.SizeOfPartitionEntry
    if entry_size < 128 or entry_size.bit_count() != 1:  # Table 5.5: 128 * 2^n
        return "entry size is wrong"
    if header.NumberOfPartitionEntries > _MAX_ENTRIES or header.array_size > _MAX_ARRAY:
        return "entry array is too large"
    if header.PartitionEntryLBA < 2 or header.PartitionEntryLBA + header.array_sectors(len(sector)) > sectors:
        return "entry array lies outside the disk"
    if header.FirstUsableLBA > header.LastUsableLBA + 1:
        return "usable range is wrong"
    return None


def header_crc(sector: bytes, header_size: int) -> int:
    """CRC32 over ``header_size`` bytes with the field HeaderCRC32 (bytes 16 to 19) taken as zero."""
    return zlib.crc32(sector[20:header_size], zlib.crc32(bytes(4), zlib.crc32(sector[:16])))


def _backup(source: Source, primary: Copy, last: int, sector_size: int) -> Copy:
    """The backup header: where a good primary says it is; else at the end, else where a damaged primary says."""
    if primary.header is not None:
        lba = primary.header.AlternateLBA
        if not 1 < lba <= last:
            return Copy("backup", lba, b"", None, "header lies beyond the end of the disk")
        return _copy(source, "backup", lba, sector_size)
    at_end = _copy(source, "backup", last, sector_size)
    if at_end.header is None and primary.traced:
        lba = Header.unpack(primary.sector).AlternateLBA
        if 1 < lba < last and (elsewhere := _copy(source, "backup", lba, sector_size)).header is not None:
            return elsewhere
    return at_end


def _array(source: Source, header: Header, lba: int, sector_size: int) -> bytes | None:
    """The entry array at ``lba``, or None where it has not the checksum that ``header`` states."""
    sectors = header.array_sectors(sector_size)
    if lba < 2 or lba + sectors > source.size // sector_size:
        return None
    try:
        array = read_bytes(source, lba * sector_size, sectors * sector_size)[: header.array_size]
    except ReadError:
        return None
    return array if zlib.crc32(array) == header.PartitionEntryArrayCRC32 else None


def _choose(source: Source, primary: Copy, backup: Copy, sector_size: int) -> tuple[Copy, Header, bytes] | None:
    """A good header and an array that matches it: both from one copy if possible, primary first, else mixed."""
    good = [(copy, copy.header) for copy in (primary, backup) if copy.header is not None]
    for copy, header in good:
        if copy.array_good and (array := _array(source, header, header.PartitionEntryLBA, sector_size)) is not None:
            return copy, header, array
    for copy, header in good:
        # Both arrays are equal, so a good header vouches for the other copy's array too, at its usual place.
        elsewhere = backup.lba - header.array_sectors(sector_size) if copy is primary else 2
        if (array := _array(source, header, elsewhere, sector_size)) is not None:
            return copy, header, array
    return None


def _complaints(primary: Copy, backup: Copy, last: int) -> list[str]:
    found = []
    for copy in (primary, backup):
        fault = copy.fault or (None if copy.array_good else "entry array checksum is wrong")
        if fault:
            found.append(f"the {copy.name} GPT is damaged ({fault}); the other copy is used")
    head, tail = primary.header, backup.header
    if head and tail and any(getattr(head, name) != getattr(tail, name) for name in _SHARED):
        found.append("the two copies of the GPT differ; the primary one is used where it is whole")
    if backup.lba != last:
        found.append(
            f"the disk is {'larger' if backup.lba < last else 'smaller'} than its GPT says: "
            f"the backup belongs at sector {backup.lba}, the last sector is {last}"
        )
    return found


# ---------------------------------------------------------------------- the protective MBR


@dataclass(frozen=True, slots=True)
class _Protective:
    present: bool
    other: bool  # an MBR table or a file system stands in sector 0 instead
    warnings: list[str]


def _protective(source: Source, sector_size: int) -> _Protective:
    try:
        sector = read_bytes(source, 0, sector_size)
    except ReadError:
        return _Protective(present=False, other=False, warnings=["the protective MBR cannot be read"])
    boot = mbr.BootRecord.unpack(sector)
    used = [entry for entry in boot.entries if entry.used] if boot.Signature == mbr.SIGNATURE else []
    present = any(entry.OSType == mbr.PROTECTIVE for entry in used)
    if not present:
        other = mbr.is_boot_sector(sector) or (boot.believable and bool(used))
        return _Protective(present=False, other=other, warnings=["the protective MBR is missing"])
    types = ", ".join(f"{entry.OSType:02x}" for entry in used if entry.OSType != mbr.PROTECTIVE)
    warnings = [f"hybrid MBR: it also has entries of type {types}; the GPT is used"] if types else []
    return _Protective(present=True, other=False, warnings=warnings)


# ---------------------------------------------------------------------- entries


def _partitions(loaded: Loaded, warnings: list[str]) -> list[Partition]:
    """The entries in use that lie on the disk and clear of the table; a warning names the others."""
    header, size, metadata = loaded.header, loaded.sector_size, loaded.metadata
    entries = np.frombuffer(loaded.array, entry_dtype(header.SizeOfPartitionEntry))
    used = np.flatnonzero(
        np.frombuffer(entries["PartitionTypeGUID"].tobytes(), np.uint8).reshape(-1, 16).any(axis=1)  # 0: unused
    )
    found: list[Partition] = []
    outside: list[int] = []
    on_table: list[int] = []
    unusual: list[int] = []
    for i in used.tolist():
        entry = entries[i]
        first, last = int(entry["StartingLBA"]), int(entry["EndingLBA"])
        if not first <= last < loaded.sectors:
            outside.append(i + 1)
            continue
        start, end = first * size, (last + 1) * size
        if any(start < at + length and at < end for at, length in metadata):
            on_table.append(i + 1)
            continue
        if first < header.FirstUsableLBA or last > header.LastUsableLBA:
            unusual.append(i + 1)
        found.append(
            Partition(
                index=i + 1,
                start=start,
                size=end - start,
                type=_guid(entry["PartitionTypeGUID"].tobytes()),
                label=_name(entry["PartitionName"].tobytes()),
                uuid=_guid(entry["UniquePartitionGUID"].tobytes()),
            )
        )
    mbr.warn_of(outside, "lie outside the disk and are not used", warnings)
    mbr.warn_of(on_table, "lie on the partition table itself and are not used", warnings)
    mbr.warn_of(unusual, "lie outside the range the GPT calls usable", warnings)
    return found


def _guid(raw: bytes) -> str:
    """UEFI appendix A: the first three fields are little-endian."""
    return str(UUID(bytes_le=raw)).upper()


def _name(raw: bytes) -> str | None:
    """UTF-16LE up to the first NUL; unpaired surrogates become U+FFFD.  None where it is empty."""
    units = np.frombuffer(raw, "<u2")
    ends = np.flatnonzero(units == 0)
    length = int(ends[0]) if len(ends) else len(units)
    return raw[: 2 * length].decode("utf-16-le", "replace") or None
