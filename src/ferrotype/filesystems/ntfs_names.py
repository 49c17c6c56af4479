"""Paths of NTFS files: from the names in a file's record, folder by folder, up to the root.

    record 64: "b.txt" in folder (37, sequence 2) ──> record 37: "a" in folder (5, 5) ──> the root: a/b.txt

A folder's own record may be lost.  Then the index of the folder above still names it; ``lost`` holds what the indexes
say of such records.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ferrotype.errors import InvalidImage
from ferrotype.filesystems.ntfs_mft import MasterFileTable
from ferrotype.filesystems.ntfs_records import (
    ATTRIBUTE_LIST,
    DIRECTORY,
    FILE_NAME,
    SEGMENT,
    FileName,
    FileRecord,
    utf16,
)
from ferrotype.filesystems.ntfs_table import Table
from ferrotype.filesystems.remains import UNREADABLE, printable

__all__ = ["ROOT", "SYSTEM", "Link", "Naming", "nameless"]

ROOT: Final = 5
_EXTEND: Final = 11
SYSTEM: Final = (  # "NTFS Documentation", Files: records 0 to 11
    "<$MFT>",
    "<$MFTMirr>",
    "<$LogFile>",
    "<$Volume>",
    "<$AttrDef>",
    "<root folder>",
    "<$Bitmap>",
    "<$Boot>",
    "<$BadClus>",
    "<$Secure>",
    "<$UpCase>",
    "<$Extend>",
)

_DOS: Final = 2  # namespace of a name that only stands in for a longer one
_MOST_LINKS: Final = 16  # names of one file that are tried
_MOST_DEPTH: Final = 512  # folders in one path
_MOST_KNOWN: Final = 1 << 20  # folders remembered at a time
_MOST_LISTS: Final = 1 << 13  # files whose name is looked for in other records


@dataclass(frozen=True, slots=True)
class Link:
    """One name of a file, and the reference of the folder it is in."""

    parent: int
    dos: bool
    name: str

    @classmethod
    def parse(cls, value: bytes) -> Link | None:
        """A $FILE_NAME's value; None where it holds no name."""
        try:
            head = FileName.unpack(value)
        except InvalidImage:
            return None
        name = utf16(value[FileName.SIZE : FileName.SIZE + 2 * head.file_name_length])
        return cls(head.parent_directory, head.flags == _DOS, printable(name)) if name else None


def nameless(number: int) -> str:
    """What a record without a name stands as."""
    return f"<record {number}>"


class Naming:
    """Finds paths; remembers the folders it came by."""

    def __init__(self, table: Table, mft: MasterFileTable, lost: dict[int, tuple[int, Link]]) -> None:
        self._table, self._mft, self._lost = table, mft, lost
        self._folders: dict[int, tuple[int, Link] | None] = {}  # sequence number, name
        self._lists = _MOST_LISTS

    def path(self, number: int, links: Iterable[Link]) -> str:
        """The path of a record with these names: a whole one if there is one, and not the short DOS name."""
        if number < len(SYSTEM):
            return SYSTEM[number]
        found = None
        for link in sorted(links, key=lambda link: link.dos)[:_MOST_LINKS]:
            path, whole = self._climb(link)
            if whole:
                return path
            found = found or path
        return found or nameless(number)

    def of_record(self, number: int, sequence: int) -> str | None:
        """The path of a base record that is not at hand; None where another file has taken its place."""
        record = self._record(number)
        if record is None:
            sequence_now, link = self._lost.get(number, (0, None))
            links = [link] if link else []
        else:
            sequence_now, links = record.header.sequence_number, self._links(record)
        return self.path(number, links) if sequence in (0, sequence_now) or not sequence_now else None

    def listed(self, number: int) -> list[Link]:
        """The names of a record at hand that holds none itself, only a list of the records that do."""
        record = self._record(number)
        return [] if record is None else self._links(record)

    def _climb(self, link: Link) -> tuple[str, bool]:
        """The path of one name, and whether it goes up to the root."""
        steps = [link.name]
        for _ in range(_MOST_DEPTH):
            number, sequence = link.parent & SEGMENT, link.parent >> 48
            if number in (ROOT, _EXTEND):
                below = "/".join(reversed(steps))
                return (below if number == ROOT else f"<$Extend/{below}>"), True
            above = self._folder(number)
            if above is None or sequence not in (0, above[0]):
                break
            link = above[1]
            steps.append(link.name)
        return f"{nameless(link.parent & SEGMENT)}/{'/'.join(reversed(steps))}", False

    def _folder(self, number: int) -> tuple[int, Link] | None:
        if number not in self._folders:
            if len(self._folders) >= _MOST_KNOWN:
                self._folders.clear()
            self._folders[number] = self._look_up(number)
        return self._folders[number]

    def _look_up(self, number: int) -> tuple[int, Link] | None:
        record = self._record(number)
        if record is None or not record.header.flags & DIRECTORY:
            return self._lost.get(number)
        links = sorted(self._links(record), key=lambda link: link.dos)
        return (record.header.sequence_number, links[0]) if links else None

    def _record(self, number: int) -> FileRecord | None:
        try:
            return FileRecord.parse(self._table.record(number), number)
        except InvalidImage:
            return None

    def _links(self, record: FileRecord) -> list[Link]:
        values = [a.value for a in record.attributes if a.type_code == FILE_NAME and a.value]
        if not values and record.find(ATTRIBUTE_LIST, "") is not None and self._lists:
            self._lists -= 1
            with suppress(*UNREADABLE):  # the names up to what cannot be read
                values.extend(piece.value or b"" for piece in self._mft._pieces(record, FILE_NAME, ""))
        return [link for link in map(Link.parse, values) if link]
