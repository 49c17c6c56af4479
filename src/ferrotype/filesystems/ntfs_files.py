"""Which files of an NTFS volume stand in given ranges of it.

    $MFT, 4 MiB at a time ──> records in use ──> attributes ──> runs that a range touches ──> names, up to the root
    records of $MFT that a range touches ─┬──> those that can be read: their files
                                          └──> the others: what the folders' indexes, and the lists of attributes in
                                               records that are left, say of them

Time grows with $MFT, about 2 us a record, and with the names told, about 20 us each; memory with the names.  Where
records cannot be read, $MFT is gone over once more, and the folders' indexes are read, about 1 us an entry.

R. Russon, Y. Fledel, "NTFS Documentation" (Linux-NTFS project: Concepts, file record, index record; Attributes).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from ferrotype.block import Source
from ferrotype.filesystems.ntfs_batches import Attributes, Bytes, Flags, attributes, fix_up, number_at, runs
from ferrotype.filesystems.ntfs_indexes import lost_names
from ferrotype.filesystems.ntfs_mft import Geometry, MasterFileTable
from ferrotype.filesystems.ntfs_names import SYSTEM, Link, Naming, nameless
from ferrotype.filesystems.ntfs_records import (
    ATTRIBUTE_LIST,
    BITMAP,
    DATA,
    FILE_NAME,
    IN_USE,
    SEGMENT,
    AttributeListEntry,
    utf16,
)
from ferrotype.filesystems.ntfs_table import Table
from ferrotype.filesystems.remains import UNREADABLE, Paths, Ranges, Remains, printable
from ferrotype.units import KiB

__all__ = ["files_at"]

_BOOT: Final = 7
_FIRST_USER: Final = 24  # records 12 to 23 are reserved, in use and without a name
_MAX_LIST: Final = 256 * KiB  # bytes of an attribute list, as Windows limits it
_MOST_ENTRIES: Final = 1 << 21  # of attribute lists looked at, about 2 s


def files_at(source: Source, geometry: Geometry, mft: MasterFileTable, ranges: Ranges) -> tuple[str, ...]:
    """The answer of ``FileSystem.files_at``."""
    mft.renew()
    remains, paths = Remains(source, ranges), Paths()
    table = Table(remains, geometry, mft.data)
    touched = table.touched(ranges)
    if ranges.touches(geometry.clusters * geometry.cluster_size, geometry.size):
        paths.add(SYSTEM[_BOOT])  # the backup boot sector is in no cluster
    lost, names = None, dict[int, tuple[int, Link]]()
    if touched is not None:
        paths.add(SYSTEM[0])
        lost = _lost(table, touched)
        names = {} if lost is None else lost_names(table, geometry, remains, lost)
    naming = Naming(table, mft, names)
    search = _Search(geometry, remains, ranges, naming, paths)
    for first, batch in table.batches():
        here = slice(first, first + len(batch))
        search.batch(first, batch, None if touched is None else touched[here], lost)
        if paths.full:
            break
    if search.nameless:
        wanted = np.zeros(table.count, bool)
        wanted[[number for number in search.nameless if number < table.count]] = True
        found = lost_names(table, geometry, remains, wanted)
        for number, streams in search.nameless.items():
            search.add(number, naming.path(number, [found[number][1]] if number in found else []), streams)
    if lost is not None:
        known = _in_use(mft, lost)
        lost = lost if known is None else lost & known
        for number in np.flatnonzero(lost).tolist():
            if number in names or number < len(SYSTEM):
                paths.add(naming.path(number, [names[number][1]] if number in names else []))
            elif known is not None and number >= _FIRST_USER and number not in search.extensions:
                paths.add(nameless(number))
    return paths.sorted()


def _lost(table: Table, touched: Flags) -> Flags | None:
    """Which of the records that a range touches cannot be read."""
    lost = touched.copy()
    for first, batch in table.batches(touched):
        lost[first : first + len(batch)] &= ~fix_up(batch, b"FILE")
    return lost if lost.any() else None


def _in_use(mft: MasterFileTable, records: Flags) -> Flags | None:
    """Which records $MFT's bitmap calls used; None where it cannot be read: deleted files may be named then."""
    try:
        bitmap = mft.content(mft.record(0), BITMAP)
        packed = b"" if bitmap is None else bitmap.read(0, (len(records) + 7) // 8)
    except UNREADABLE:
        return None
    used = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")[: len(records)].astype(bool)
    return used if len(used) == len(records) else None


class _Search:
    """Takes the names of what is touched, batch by batch of $MFT."""

    def __init__(self, geometry: Geometry, remains: Remains, ranges: Ranges, naming: Naming, paths: Paths) -> None:
        self._geometry, self._remains, self._ranges = geometry, remains, ranges
        self._naming, self._paths = naming, paths
        self._entries = _MOST_ENTRIES
        self.nameless: dict[int, set[str]] = {}  # records whose names stood in lost ones, and the streams to tell
        self.extensions = set[int]()  # lost records that hold parts of files which were told

    def batch(self, first: int, batch: Bytes, touched: Flags | None, lost: Flags | None) -> None:
        """One batch, whose first record has the number ``first``; ``touched`` is of its rows, ``lost`` of all."""
        used = fix_up(batch, b"FILE") & (batch.view("<u2")[:, 11] & IN_USE != 0)
        all_of = attributes(batch, np.flatnonzero(used))
        flat = batch.reshape(-1)
        hits = self._hits(flat, all_of)
        if touched is not None:
            for row in np.flatnonzero(used & touched).tolist():
                hits.setdefault(row, set()).add("")
        if lost is not None:
            for row in self._cut_short(flat, all_of, lost):
                hits.setdefault(row, set()).add("")
        if hits:
            self._tell(first, batch, all_of.take(all_of.type_code == FILE_NAME), hits)

    def _hits(self, flat: Bytes, all_of: Attributes) -> dict[int, set[str]]:
        """Rows whose content a range touches, and the streams it is in."""
        there = all_of.take(all_of.nonresident)
        found = runs(flat, there, self._geometry.clusters)
        unit = self._geometry.cluster_size
        hit = self._ranges.touch(found.lcn * unit, (found.lcn + found.length) * unit)
        streams: dict[int, set[str]] = {}
        for at in np.unique(found.owner[hit]).tolist():
            named = there.type_code[at] == DATA and flat[there.at[at] + 9]
            stream = _stream(flat, int(there.at[at])) if named else ""
            streams.setdefault(int(there.row[at]), set()).add(stream)
        return streams

    def _tell(self, first: int, batch: Bytes, named: Attributes, hits: dict[int, set[str]]) -> None:
        rows = np.array(sorted(hits), np.int64)
        flat, size = batch.reshape(-1), batch.shape[1]
        bases = number_at(flat, rows * size + 32, 8).tolist()  # base_file_record_segment
        low, high = (np.searchsorted(named.row, rows, side).tolist() for side in ("left", "right"))
        for i, row in enumerate(rows.tolist()):
            number, streams = first + row, hits[row]
            if bases[i]:
                number = bases[i] & SEGMENT
                path = self._naming.of_record(number, bases[i] >> 48 & 0xFFFF)
            else:
                links = [link for at in range(low[i], high[i]) if (link := _link(flat, named, at))]
                if not links and len(SYSTEM) <= number < _FIRST_USER:
                    continue
                path = self._naming.path(number, links or self._naming.listed(number))
            if path == nameless(number):
                self.nameless[number] = streams | self.nameless.get(number, set())
            elif path is not None:
                self.add(number, path, streams)

    def add(self, number: int, path: str, streams: set[str]) -> None:
        """Take the name of a record and of streams of it; those of NTFS's own files are told as one."""
        for stream in streams:
            self._paths.add(f"{path}:{stream}" if stream and number >= len(SYSTEM) else path)

    def _cut_short(self, flat: Bytes, all_of: Attributes, lost: Flags) -> list[int]:
        """Rows of files a part of whose description stood in a lost record, as their attribute lists say."""
        lists = all_of.take(all_of.type_code == ATTRIBUTE_LIST)
        found = runs(flat, lists.take(lists.nonresident), self._geometry.clusters)
        outside = np.flatnonzero(lists.nonresident)
        rows = []
        for i in range(len(lists.row)):
            at, end = int(lists.at[i]), int(lists.end[i])
            if lists.nonresident[i]:
                which = np.flatnonzero(outside[found.owner] == i).tolist()
                data = self._clusters([(int(found.lcn[run]), int(found.length[run])) for run in which])
            else:
                data = flat[at + int(number_at(flat, lists.at[i : i + 1] + 20, 2)[0]) : end].tobytes()
            gone = {number for number in self._listed(data) if number < len(lost) and lost[number]}
            if gone:
                self.extensions |= gone
                rows.append(int(lists.row[i]))
        return rows

    def _clusters(self, pieces: list[tuple[int, int]]) -> bytes:
        out, unit = b"", self._geometry.cluster_size
        for lcn, length in pieces:
            out += self._remains.read(lcn * unit, min(length * unit, _MAX_LIST - len(out)))
        return out

    def _listed(self, data: bytes) -> set[int]:
        """The numbers of the records that an attribute list names."""
        at, numbers = 0, set[int]()
        while at + AttributeListEntry.SIZE <= len(data) and self._entries:
            entry = AttributeListEntry.unpack(data, at)
            if not entry.type_code or entry.record_length < AttributeListEntry.SIZE:
                break
            numbers.add(entry.segment_reference & SEGMENT)
            at += entry.record_length
            self._entries -= 1
        return numbers


def _stream(flat: Bytes, at: int) -> str:
    """The name of an attribute."""
    offset = int(flat[at + 10]) | int(flat[at + 11]) << 8
    return printable(utf16(flat[at + offset : at + offset + 2 * int(flat[at + 9])].tobytes()))


def _link(flat: Bytes, named: Attributes, index: int) -> Link | None:
    """The name in a resident $FILE_NAME."""
    at, end = int(named.at[index]), int(named.end[index])
    offset = int(flat[at + 20]) | int(flat[at + 21]) << 8
    return Link.parse(flat[at + offset : end].tobytes())
