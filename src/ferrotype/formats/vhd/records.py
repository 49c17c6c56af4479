"""The structures of VHD, and which of its two footers counts."""

from __future__ import annotations

from typing import Annotated, Final, NamedTuple

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.signs import trailer_place
from ferrotype.records import Record, b4, b8, b16, record, u8, u16, u32, u64

__all__ = [
    "DIFFERENCING",
    "DYNAMIC",
    "EPOCH",
    "FIXED",
    "MAX_GEOMETRY",
    "UNUSED",
    "DynamicHeader",
    "Footer",
    "FoundFooter",
    "ParentLocator",
    "checksum",
    "find_footer",
    "has_footer",
]

FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4  # Disk Type
UNUSED: Final = 0xFFFFFFFF  # entry of the BAT
EPOCH: Final = 946_684_800  # 2000-01-01 UTC, from which time stamps count seconds
MAX_GEOMETRY: Final = 65535 * 16 * 255  # sectors; what the geometry says where it cannot say the size

_COOKIE: Final = b"conectix"
_OLD_FOOTER: Final = 511  # bytes; Virtual PC before 2004


@record(endian=">", size=512)
class Footer(Record):
    """Section "Hard Disk Footer Format"."""

    Cookie: b8
    Features: u32
    FileFormatVersion: u32
    DataOffset: u64  # of the dynamic disk header
    TimeStamp: u32
    CreatorApplication: b4
    CreatorVersion: u32
    CreatorHostOS: b4
    OriginalSize: u64
    CurrentSize: u64
    Cylinders: u16
    Heads: u8
    SectorsPerTrack: u8
    DiskType: u32
    Checksum: u32
    UniqueId: b16
    SavedState: u8
    Reserved: Annotated[bytes, "427s"]

    @property
    def geometry(self) -> int:
        """Sectors that the geometry gives."""
        return self.Cylinders * self.Heads * self.SectorsPerTrack


@record(endian=">", size=1024)
class DynamicHeader(Record):
    """Section "Dynamic Disk Header Format"."""

    Cookie: b8
    DataOffset: u64
    TableOffset: u64
    HeaderVersion: u32
    MaxTableEntries: u32
    BlockSize: u32
    Checksum: u32
    ParentUniqueId: b16
    ParentTimeStamp: u32
    Reserved1: u32
    ParentUnicodeName: Annotated[bytes, "512s"]
    ParentLocators: Annotated[bytes, "192s"]
    Reserved2: Annotated[bytes, "256s"]


@record(endian=">", size=24)
class ParentLocator(Record):
    """Section "Dynamic Disk Header Format", Parent Locator Entries."""

    PlatformCode: b4
    PlatformDataSpace: u32
    PlatformDataLength: u32
    Reserved: u32
    PlatformDataOffset: u64


def checksum(structure: bytes, at: int) -> int:
    """The one's complement of the sum of a structure's bytes, without the checksum itself, which stands at ``at``."""
    return ~(sum(structure) - sum(structure[at : at + 4])) & 0xFFFFFFFF


class FoundFooter(NamedTuple):
    """The footer that counts."""

    footer: Footer
    place: int  # where it stands; the end of the file where only the copy at the start is there
    warnings: tuple[str, ...]


def find_footer(file: Source) -> FoundFooter:
    """The footer at the end; where it is damaged, its copy at the start.  Raises InvalidImage where there is none."""
    copy = _candidate(file, 0, Footer.SIZE)
    place, last = _last(file, copy)
    if last is None and copy is None:
        raise InvalidImage("the file has no VHD footer", offset=max(0, file.size - Footer.SIZE))
    if last is not None and _is_sound(last):
        footer = Footer.unpack(last)
        warnings = []
        if footer.DiskType != FIXED and last != copy:
            warnings.append("the copy of the footer at the start of the file is damaged or out of date")
        return _checked(FoundFooter(footer, place, tuple(warnings)))
    if copy is not None and _is_sound(copy) and Footer.unpack(copy).DiskType != FIXED:
        warning = "the footer at the end of the file is damaged or missing, its copy at the start was used"
        return _checked(FoundFooter(Footer.unpack(copy), place, (warning,)))
    if last is not None and last == copy:  # some program changed both, and forgot to sum them up anew
        warning = "the checksum of the footer and that of its copy are wrong, and both say the same"
        return _checked(FoundFooter(Footer.unpack(last), place, (warning,)))
    where = 0 if last is None else place
    raise InvalidImage("the footer has a wrong checksum, and so has its copy, if any", offset=where, field="Checksum")


def has_footer(file: Source) -> bool:
    """Whether something like a footer is there, sound or not."""
    copy = _candidate(file, 0, Footer.SIZE)
    return copy is not None or _last(file, copy)[1] is not None


def _last(file: Source, copy: bytes | None) -> tuple[int, bytes | None]:
    """Where the footer at the end stands, and its bytes; the end of the file where there is none.

    One before padding must prove that it is that of the file, not of a VHD that a raw disk has in its last bytes.
    """
    for length in (Footer.SIZE, _OLD_FOOTER):
        if (data := _candidate(file, file.size - length, length)) is not None:
            return file.size - length, data
    place = trailer_place(file, _COOKIE)
    if place is not None and (data := _candidate(file, place, Footer.SIZE)) is not None and _is_sound(data):
        footer = Footer.unpack(data)
        if footer.CurrentSize == place if footer.DiskType == FIXED else data == copy:
            return place, data
    return file.size, None


def _candidate(file: Source, offset: int, length: int) -> bytes | None:
    if offset < 0 or offset + length > file.size:
        return None
    data = read(file, offset, length)
    return data.ljust(Footer.SIZE, b"\0") if data.startswith(_COOKIE) else None


def _is_sound(data: bytes) -> bool:
    return Footer.unpack(data).Checksum == checksum(data, 64)


def _checked(found: FoundFooter) -> FoundFooter:
    version = found.footer.FileFormatVersion
    if version >> 16 != 1:
        raise UnsupportedError(f"VHD version {version >> 16}.{version & 0xFFFF}", field="FileFormatVersion")
    if found.footer.DiskType not in (FIXED, DYNAMIC, DIFFERENCING):
        raise UnsupportedError(f"VHD disk type {found.footer.DiskType}", field="DiskType")
    return found
