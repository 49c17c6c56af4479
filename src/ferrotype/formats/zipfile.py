"""The zip file that an AFF4 volume is: where its members stand.

    | local header, name | member | local header, name | member | ... | directory | end records | comment |

Members that hold the disk are stored, never deflated, so that they can be read anywhere; small ones may be deflated.
Written from PKWARE's "APPNOTE.TXT", version 6.3.3, sections 4.3 and 4.5.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.codecs import inflate
from ferrotype.records import Record, b4, record, u16, u32, u64
from ferrotype.units import MiB

__all__ = ["Member", "ZipFile", "has_member"]

MOST_DIRECTORY: Final = 64 * MiB
MOST_MEMBERS: Final = 500_000
_MOST_COMMENT: Final = 65_535
_STORED, _DEFLATED = 0, 8
_ENCRYPTED: Final = 1 | 1 << 6 | 1 << 13
_WIDE: Final = 0xFFFFFFFF


@record(endian="<", size=22)
class _End(Record):
    """Section 4.3.16."""

    signature: b4
    disk: u16
    directory_disk: u16
    entries_here: u16
    entries: u16
    directory_size: u32
    directory_offset: u32
    comment_length: u16


@record(endian="<", size=20)
class _Locator(Record):
    """Section 4.3.15."""

    signature: b4
    disk: u32
    offset: u64
    disks: u32


@record(endian="<", size=56)
class _WideEnd(Record):
    """Section 4.3.14."""

    signature: b4
    size: u64
    made_by: u16
    needed: u16
    disk: u32
    directory_disk: u32
    entries_here: u64
    entries: u64
    directory_size: u64
    directory_offset: u64


# Section 4.3.12, and of it what is looked at: signature, flags, method, CRC-32, packed size, size, the lengths of
# name, extra field and comment, offset of the local header.  There may be many of them: no objects are made.
_ENTRY: Final = struct.Struct("<4s4xHH4xIIIHHH8xI")


@record(endian="<", size=30)
class _Local(Record):
    """Section 4.3.7."""

    signature: b4
    needed: u16
    flags: u16
    method: u16
    time: u16
    date: u16
    crc: u32
    packed_size: u32
    size: u32
    name_length: u16
    extra_length: u16


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member's bytes stand."""

    offset: int  # in the file
    size: int
    packed_size: int
    method: int
    crc: int


class ZipFile:
    """The members of a zip file by their names, which are kept as they are written."""

    def __init__(self, file: Source) -> None:
        """Raises InvalidImage where it is none."""
        self.file = file
        directory, before, self.comment = _directory(file)
        self._numbers: dict[bytes, int] = {}
        self._columns = [array("Q"), array("Q"), array("Q"), array("B"), array("I")]  # and CRC
        self._read(directory, before)

    def _read(self, directory: bytes, before: int) -> None:
        at = 0
        while at < len(directory):
            if len(directory) - at < _ENTRY.size:
                raise InvalidImage("the zip directory is cut short", offset=at)
            signature, flags, method, crc, packed, size, name, extra, comment, offset = _ENTRY.unpack_from(
                directory, at
            )
            behind = at + _ENTRY.size + name
            if signature != b"PK\1\2" or behind + extra > len(directory):
                raise InvalidImage("the zip directory is damaged", offset=at)
            if len(self._numbers) >= MOST_MEMBERS:
                raise InvalidImage(f"the zip file has more than {MOST_MEMBERS} members")
            if flags & _ENCRYPTED:
                raise UnsupportedError("the zip file has encrypted members")
            if _WIDE in (size, packed, offset):
                size, packed, offset = _wide([size, packed, offset], directory[behind : behind + extra])
            if before + offset + packed > self.file.size:
                raise InvalidImage("a member lies outside the zip file", offset=at, field="offset")
            self._numbers[directory[at + _ENTRY.size : behind]] = len(self._columns[0])
            for column, value in zip(
                self._columns, (before + offset, size, packed, min(method, 255), crc), strict=True
            ):
                column.append(value)
            at = behind + extra + comment

    def names(self) -> Iterable[bytes]:
        """Of all members."""
        return self._numbers.keys()

    def find(self, name: bytes) -> Member | None:
        """The member of a name.  Raises InvalidImage where its header is not where the directory says."""
        number = self._numbers.get(name)
        if number is None:
            return None
        header, size, packed, method, crc = (int(column[number]) for column in self._columns)
        local = _Local.unpack(read_exactly(self.file, header, _Local.SIZE, "a member's header"))
        offset = header + _Local.SIZE + local.name_length + local.extra_length
        if local.signature != b"PK\3\4" or offset + packed > self.file.size:
            raise InvalidImage("a member is not where the zip directory says", offset=header)
        if method == _STORED and size != packed:
            raise InvalidImage("a stored member has two sizes", offset=header, field="size")
        return Member(offset, size, packed, method, crc)

    def content(self, member: Member, most: int) -> bytes:
        """All of a member that has at most ``most`` bytes."""
        if member.size > most:
            raise InvalidImage(f"a member of {member.size} bytes is too long: at most {most}", offset=member.offset)
        if member.method == _STORED:
            return read(self.file, member.offset, member.size)
        if member.method != _DEFLATED or member.packed_size > most:
            raise UnsupportedError(f"zip method {member.method} is not read", offset=member.offset)
        return inflate(read(self.file, member.offset, member.packed_size), member.size, wbits=-15)


def _directory(file: Source) -> tuple[bytes, int, bytes]:
    """The directory, how many bytes stand before the zip file in the file, and the comment."""
    tail_at = max(0, file.size - _End.SIZE - _MOST_COMMENT)
    tail = read(file, tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise InvalidImage("the zip file has no end record")
    end = _End.unpack(tail, at)
    place = tail_at + at
    size, offset = end.directory_size, end.directory_offset
    if place >= _Locator.SIZE:
        locator = _Locator.unpack(read(file, place - _Locator.SIZE, _Locator.SIZE))
        if locator.signature == b"PK\6\7":
            wide = _WideEnd.unpack(read_exactly(file, locator.offset, _WideEnd.SIZE, "the zip64 end record"))
            if wide.signature != b"PK\6\6":
                raise InvalidImage("the zip64 end record is none", offset=locator.offset)
            place, size, offset = locator.offset, wide.directory_size, wide.directory_offset
    before = place - size - offset
    if size > MOST_DIRECTORY or before < 0:
        raise InvalidImage(f"a zip directory of {size} bytes at {offset} cannot be", offset=place)
    directory = read_exactly(file, before + offset, size, "the zip directory")
    return directory, before, tail[at + _End.SIZE :][: end.comment_length]


def has_member(file: Source, name: bytes) -> bool:
    """Whether a zip file has a member of that name.  Raises InvalidImage where it is no zip file."""
    directory, _, _ = _directory(file)
    at = directory.find(name)
    while at >= 0:
        start = at - _ENTRY.size
        if start >= 0:
            signature, *_, length, _, _, _ = _ENTRY.unpack_from(directory, start)
            if signature == b"PK\1\2" and length == len(name):
                return True
        at = directory.find(name, at + 1)
    return False


def _wide(values: list[int], extra: bytes) -> list[int]:
    """Size, packed size and offset, of which those that are wide stand in the extra field (section 4.5.3)."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
            for place, value in enumerate(values):
                if value == _WIDE and len(wide) >= 8:
                    values[place], wide = int.from_bytes(wide[:8], "little"), wide[8:]
            break
        at += 4 + length
    return values
