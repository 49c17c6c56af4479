"""Which files of a FAT12, FAT16 or FAT32 volume stand in given ranges of it.

    FAT, read once ──> chains ──> which chains the ranges touch
    root folder ──> folders ──> entries ──> first cluster ──> is its chain touched?  then its name is told

    folder     32 bytes an entry   long name, last part | ... | long name, part 1 | short name, first cluster, size
               first byte 0xE5: deleted      0: none from here on      attributes 0x0F: part of a long name

Time grows with the FAT (about 5 ns a cluster) and with the folders (about 0.2 ms each, and 50 ns an entry); names
cost 10 us each, and only those of folders and of touched files are put together.  What cannot be read counts as
deleted entries and as ends of chains.

"Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03, sections "FAT Directory
Structure" and "Long Directory Entries".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.filesystems.chains import Chains
from ferrotype.filesystems.fat_records import (
    ATTR_DIRECTORY,
    ATTR_LONG_NAME,
    ATTR_VOLUME_ID,
    DIRECTORY_ENTRY,
    Layout,
    entries_of,
)
from ferrotype.filesystems.remains import NOWHERE, Paths, Ranges, Remains, printable
from ferrotype.units import GiB, MiB

__all__ = [
    "DELETED",
    "DOT",
    "ENTRY",
    "MOST_FOLDER",
    "MOST_FOLDERS",
    "MOST_READ",
    "Folder",
    "Tree",
    "heads_of",
    "name_of",
]

_WINDOW: Final = 3 * MiB  # bytes of a FAT looked at in one go; whole entries of all three widths
MOST_FOLDER: Final = 2 * MiB  # bytes; a folder holds at most 65536 entries
MOST_FOLDERS: Final = 1 << 20
MOST_READ: Final = GiB  # bytes of all folders together: 32 million entries

ENTRY: Final = 32  # bytes
DELETED: Final = 0xE5
DOT: Final = b".          "
_LAST_PART: Final = 0x40  # in the order of a long name's part
_MOST_PARTS: Final = 20  # of 13 characters: 255 and the end
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10  # DIR_NTRes: Windows stores the case of a short name there

_LEGAL: Final = np.ones(256, bool)  # what a short name may consist of; lower case is met
_LEGAL[:0x20] = False
_LEGAL[list(b'"*+,./:;<=>?[\\]|\x7f')] = False


@dataclass(frozen=True, slots=True)
class Folder:
    path: str  # with a slash at its end; empty for the root
    head: int  # first cluster; 0: the root of FAT12 and FAT16


class Tree:
    """The folders of a volume, searched once for what the ranges touch."""

    def __init__(
        self, remains: Remains, layout: Layout, tables: list[int], root_cluster: int, ranges: Ranges = NOWHERE
    ) -> None:
        """``tables`` are the offsets of the FATs in use; what one of them cannot tell is asked of the next."""
        self._layout, self._ranges, self._root_cluster = layout, ranges, root_cluster
        self._remains = remains
        self._chains = Chains.of(
            self._windows(tables),
            layout.data_start,
            layout.cluster,
            layout.clusters,
            bad={12: 0xFF7, 16: 0xFFF7, 32: 0x0FFFFFF7}[layout.bits],
        )
        self._touched = self._chains.touched(ranges)
        self._owned = np.zeros(len(self._touched), bool)  # runs that a folder leads to
        self._left = MOST_READ
        self._paths = Paths()

    @property
    def chains(self) -> Chains:
        return self._chains

    def files(self) -> tuple[str, ...]:
        """The answer of ``FileSystem.files_at``."""
        self._structures()
        seen, waiting = {self._root_cluster}, deque([Folder("", self._root_cluster)])
        while waiting and not self._paths.full:
            folder = waiting.popleft()
            for path, head in self._search(folder):
                if head not in seen:
                    seen.add(head)
                    waiting.append(Folder(path + "/", head))
            if self._left < 0 or len(seen) > MOST_FOLDERS:
                self._paths.stop()
        if not self._paths.full:
            self._ownerless()
        return self._paths.sorted()

    def _windows(self, tables: list[int]) -> Iterator[NDArray[np.uint32]]:
        """The entries of the FAT from cluster 2 on."""
        layout, skip, left = self._layout, 2, self._layout.clusters
        for at in range(0, layout.table_size, _WINDOW):
            size = min(_WINDOW, layout.table_size - at)
            window = entries_of(self._window([table + at for table in tables], size), layout.bits)[skip:][:left]
            yield window
            skip, left = 0, left - len(window)

    def _window(self, copies: list[int], size: int) -> bytes:
        """A piece of the FAT, from the first copy that can be read; what no copy has counts as free."""
        found = self._remains.read(copies[0], size)
        gaps = [(start - copies[0], end - copies[0]) for start, end in self._remains.gaps]
        for copy in copies[1:]:
            left = list[tuple[int, int]]()
            for start, end in gaps:
                found[start:end] = self._remains.read(copy + start, end - start)
                left += [(low - copy, high - copy) for low, high in self._remains.gaps]
            gaps = left
        return bytes(found)

    def _structures(self) -> None:
        layout, touches = self._layout, self._ranges.touches
        fat_end = layout.fat_start + layout.fats * layout.fat_size
        if touches(0, layout.fat_start):
            self._paths.add("<boot sector>")
        if touches(layout.fat_start, fat_end):
            self._paths.add("<fat>")
        root = np.array([self._root_cluster], np.int64)
        if self._root_cluster:
            hit = bool(self._chains.touched_from(root, self._touched, self._ranges)[0])
            self._own(root)
        else:
            hit = touches(layout.root_start, layout.root_start + layout.root_size)
        if hit:
            self._paths.add("<root folder>")

    # ------------------------------------------------------------------ folders

    def _search(self, folder: Folder) -> Iterator[tuple[str, int]]:
        """Take the names of what is touched in one folder; paths and first clusters of the folders in it."""
        data = self.read(folder)
        rows = np.frombuffer(data, np.uint8, len(data) // ENTRY * ENTRY).reshape(-1, ENTRY)
        if folder.path and len(rows) and rows[0, 0] != DELETED and data[: len(DOT)] != DOT:
            return  # a folder begins with an entry of itself: this cluster holds something else
        entries = np.frombuffer(data, DIRECTORY_ENTRY, len(rows))
        wanted = np.flatnonzero(_named(rows))
        heads = heads_of(entries[wanted], self._layout.bits)
        folders = entries["DIR_Attr"][wanted] & ATTR_DIRECTORY != 0
        hit = self._chains.touched_from(heads, self._touched, self._ranges)
        self._own(heads)
        for at in np.flatnonzero(hit | folders).tolist():
            path = folder.path + printable(name_of(data, int(wanted[at])))
            if hit[at]:
                self._paths.add(path)
            if folders[at] and heads[at] >= 2:
                yield path, int(heads[at])

    def read(self, folder: Folder) -> bytes:
        """The entries of a folder, up to the one that says that none follow."""
        if folder.head == 0:
            pieces = iter([(self._layout.root_start, self._layout.root_start + self._layout.root_size)])
        else:
            pieces = self._chains.pieces(folder.head, max(MOST_FOLDER // self._layout.cluster, 1))
        found = bytearray()
        for start, end in pieces:
            piece = self._remains.read(start, end - start, fill=DELETED)
            self._left -= len(piece)
            ends = np.flatnonzero(np.frombuffer(piece, np.uint8)[::ENTRY] == 0)
            if len(ends):
                found += piece[: int(ends[0]) * ENTRY]
                break
            found += piece
        return bytes(found)

    # ------------------------------------------------------------------ chains without a name

    def _own(self, heads: NDArray[np.int64]) -> None:
        runs = self._chains.find(heads)
        self._owned[runs[runs >= 0]] = True

    def _ownerless(self) -> None:
        """Chains that no folder leads to: the folder that did is lost."""
        beginnings = self._chains.beginnings() & self._touched & ~self._owned
        for cluster in self._chains.firsts[beginnings].tolist():
            self._paths.add(f"<cluster {cluster}>")


def heads_of(entries: NDArray[Any], bits: int) -> NDArray[np.int64]:
    """The first clusters of entries."""
    heads: NDArray[np.int64] = entries["DIR_FstClusLO"].astype(np.int64)
    return heads | (entries["DIR_FstClusHI"].astype(np.int64) & 0x0FFF) << 16 if bits == 32 else heads


def _named(rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which entries stand for files and folders: not deleted, no part of a long name, no label, no dot entries."""
    first, attributes = rows[:, 0], rows[:, 11]
    legal: NDArray[np.bool_] = _LEGAL[rows[:, 1:11]].all(axis=1) & (_LEGAL[first] | (first == 5))
    kind = attributes & (ATTR_VOLUME_ID | 0xC0) == 0  # labels and parts of long names have the first bit
    named: NDArray[np.bool_] = legal & kind & (first != DELETED) & (first != 0x20)
    return named


def name_of(data: bytes, at: int) -> str:
    """The name of entry ``at``: the long one in front of it if that is whole and its own, else the short one."""
    short = data[at * ENTRY : at * ENTRY + 11]
    checksum = 0
    for octet in short:
        checksum = ((checksum & 1) << 7 | checksum >> 1) + octet & 0xFF
    found = bytearray()
    for order in range(1, min(_MOST_PARTS, at) + 1):
        part = data[(at - order) * ENTRY : (at - order + 1) * ENTRY]
        if part[11] & 0x3F != ATTR_LONG_NAME or part[13] != checksum or part[0] & ~_LAST_PART != order:
            break
        found += part[1:11] + part[14:26] + part[28:32]
        if part[0] & _LAST_PART:
            name = found.decode("utf-16-le", "surrogatepass").split("\0")[0]
            return name or _short(short, data[at * ENTRY + 12])
    return _short(short, data[at * ENTRY + 12])


def _short(name: bytes, case: int) -> str:
    first = b"\xe5" if name[0] == 5 else name[:1]
    base, extension = (part.decode("cp850").rstrip(" ") for part in (first + name[1:8], name[8:]))
    base = base.lower() if case & _LOWER_BASE else base
    extension = extension.lower() if case & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base
