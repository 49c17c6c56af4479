"""Which files of an exFAT volume stand in given ranges of it.

    FAT, read once ──> chains ──> which chains the ranges touch
    root folder ──> folders ──> entry sets ──> where the content lies: touched?  then its name is told

    entry set   0x85 file: attributes | 0xC0 stream: NoFatChain, first cluster, length | 0xC1 15 characters | 0xC1 ...
                a type below 0x80 is an entry not in use, 0: none from here on

Content without a chain lies in one piece.  Content counts to its last byte, folders by whole clusters; a file whose
chain runs through a lost part of the FAT is lost behind it, so it counts too.

Time grows with the FAT (about 5 ns a cluster) and with the folders (about 0.2 ms each, and 0.2 us an entry); names
cost 10 us each, and only those of folders and of touched files are put together.  What cannot be read counts as
entries not in use.

Microsoft's "exFAT file system specification", revision 1.00, sections 4.1, 6.3, 7.1, 7.2, 7.4, 7.6 and 7.7.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.extents import Offsets
from ferrotype.filesystems.chains import Chains
from ferrotype.filesystems.remains import NOWHERE, Paths, Ranges, Remains, printable
from ferrotype.units import GiB, KiB, MiB

__all__ = [
    "ALLOCATED",
    "BITMAP",
    "FILE",
    "FOLDER",
    "MOST_FOLDER",
    "MOST_FOLDERS",
    "MOST_READ",
    "NAME",
    "STREAM",
    "UPCASE",
    "Content",
    "Folder",
    "Layout",
    "Tree",
    "entry_sets",
    "name_of",
]

_WINDOW: Final = 4 * MiB  # bytes of the FAT looked at in one go
_FIRST_PIECE: Final = 8 * KiB  # bytes of a folder that are read first: most are not longer, clusters are
_PIECE: Final = 4 * MiB
MOST_FOLDER: Final = 256 * MiB  # section 7: the most a directory may hold
MOST_FOLDERS: Final = 1 << 20
MOST_READ: Final = 4 * GiB  # bytes of all folders together: 40 million files
_MOST_STEPS: Final = 1 << 22  # pieces of chains that are gone through one by one, some seconds

_ENTRY: Final = 32  # bytes
_NOT_IN_USE: Final = 0x01
BITMAP, UPCASE, FILE, STREAM, NAME = 0x81, 0x82, 0x85, 0xC0, 0xC1  # EntryType
FOLDER: Final = 0x10  # FileAttributes
ALLOCATED, NO_FAT_CHAIN = 1, 2  # GeneralSecondaryFlags
_CHARACTERS: Final = 15  # in one name entry
_BAD: Final = 0xFFFFFFF7
_REGION: Final = 12  # sectors

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands, in bytes of the volume."""

    sector: int
    fats: int  # start of the first FAT
    fats_end: int
    fat: int  # the one in use
    heap: int
    cluster: int
    clusters: int
    root: int  # cluster


@dataclass(frozen=True, slots=True)
class Folder:
    path: str  # with a slash at its end; empty for the root
    head: int  # first cluster
    length: int  # bytes
    chained: bool


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Where the content of files lies: first cluster, bytes, whether the FAT has to be followed."""

    heads: Offsets
    lengths: Offsets
    chained: NDArray[np.bool_]


class Tree:
    """The folders of a volume, searched once for what the ranges touch."""

    def __init__(self, remains: Remains, layout: Layout, ranges: Ranges = NOWHERE) -> None:
        self._layout, self._ranges = layout, ranges
        self._remains = remains
        self._chains = Chains.of(self._windows(), layout.heap, layout.cluster, layout.clusters, bad=_BAD)
        self._cut = _with_lost_entries(layout, ranges)
        self._touched = self._chains.touched(self._cut)
        self._left, self._steps = MOST_READ, _MOST_STEPS
        self._paths = Paths()

    @property
    def chains(self) -> Chains:
        return self._chains

    def files(self) -> tuple[str, ...]:
        """The answer of ``FileSystem.files_at``."""
        root = Folder("", self._layout.root, MOST_FOLDER, chained=True)
        self._structures()
        seen, waiting = {root.head}, deque([root])
        while waiting and not self._paths.full:
            for folder in self._search(waiting.popleft()):
                if folder.head not in seen:
                    seen.add(folder.head)
                    waiting.append(folder)
            if self._left < 0 or len(seen) > MOST_FOLDERS:
                self._paths.stop()
        return self._paths.sorted()

    def _windows(self) -> Iterator[NDArray[np.uint32]]:
        """The entries of the FAT from cluster 2 on; what cannot be read is free."""
        end = self._layout.clusters * 4
        for at in range(0, end, _WINDOW):
            data = self._remains.read(self._layout.fat + 8 + at, min(_WINDOW, end - at))
            yield np.frombuffer(data, "<u4").astype(np.uint32)

    def _structures(self) -> None:
        region = _REGION * self._layout.sector
        for name, start, end in (
            ("<boot region>", 0, region),
            ("<copy of the boot region>", region, 2 * region),
            ("<fat>", self._layout.fats, self._layout.fats_end),
        ):
            if self._ranges.touches(start, end):
                self._paths.add(name)
        for start, end in self._chains.pieces(self._layout.root, max(MOST_FOLDER // self._layout.cluster, 1)):
            if self._ranges.touches(start, end):
                self._paths.add("<root folder>")

    # ------------------------------------------------------------------ folders

    def _search(self, folder: Folder) -> list[Folder]:
        """Take the names of what is touched in one folder; the folders in it."""
        rows = self.read(folder)
        if not folder.path:
            self._take_tables(rows)
        sets = entry_sets(rows)
        content = self.content(rows[sets + 1])
        folders = rows[sets, 4] & FOLDER != 0
        if folders.any():  # of a folder every cluster counts, up to its last byte anyway
            whole = -(-content.lengths // self._layout.cluster) * self._layout.cluster
            content = Content(content.heads, np.where(folders, whole, content.lengths), content.chained)
        hit = self._hit(content)
        found = []
        for at in np.flatnonzero(hit | folders).tolist():
            path = folder.path + printable(name_of(rows, int(sets[at])))
            if hit[at]:
                self._paths.add(path)
            if folders[at] and content.heads[at] >= 2:
                length = min(int(content.lengths[at]), MOST_FOLDER)
                found.append(Folder(path + "/", int(content.heads[at]), length, bool(content.chained[at])))
        return found

    def _take_tables(self, rows: Bytes) -> None:
        """The allocation bitmaps and the up-case table, which the root folder names (sections 7.1 and 7.2)."""
        for kind, name in ((BITMAP, "<allocation bitmap>"), (UPCASE, "<up-case table>")):
            tables = rows[np.flatnonzero(rows[:, 0] == kind)[:4]].copy()
            tables[:, 1] = ALLOCATED
            if self._hit(self.content(tables)).any():
                self._paths.add(name)

    def read(self, folder: Folder) -> Bytes:
        """The entries of a folder, up to the one that says that none follow; one that is lost cannot say so."""
        layout, left = self._layout, folder.length
        pieces: Iterator[tuple[int, int]] = iter([self._piece(folder.head, folder.length)])
        if folder.chained:
            pieces = self._chains.pieces(folder.head, -(-folder.length // layout.cluster))
        found: list[Bytes] = []
        step = _FIRST_PIECE
        for start, end in pieces:
            at, end = start, min(end, start + left)
            while at < end:
                size = min(step, end - at)
                rows = np.frombuffer(self._remains.read(at, size, fill=_NOT_IN_USE), np.uint8)
                rows = rows[: size // _ENTRY * _ENTRY].reshape(-1, _ENTRY)
                for low, high in self._remains.gaps:
                    rows[(low - at) // _ENTRY : -((at - high) // _ENTRY), 0] = _NOT_IN_USE
                self._left -= size
                ends = np.flatnonzero(rows[:, 0] == 0)
                places = at + ends * _ENTRY
                ends = ends[~self._ranges.touch(places, places + _ENTRY)]
                found.append(rows[: ends[0]] if len(ends) else rows)
                if len(ends) or self._left < 0:
                    return np.concatenate(found)
                at, left, step = at + size, left - size, _PIECE
        return np.concatenate([np.zeros((0, _ENTRY), np.uint8), *found])

    # ------------------------------------------------------------------ content

    def content(self, streams: Bytes) -> Content:
        """Of stream extension entries; the entries of the tables have the same fields there (section 6.3)."""
        heads = np.ascontiguousarray(streams[:, 20:24]).view("<u4")[:, 0].astype(np.int64)
        stated = np.ascontiguousarray(streams[:, 24:32]).view("<u8")[:, 0]
        layout = self._layout
        most = layout.clusters * layout.cluster
        lengths = np.minimum(stated, np.uint64(most)).astype(np.int64)
        somewhere = (streams[:, 1] & ALLOCATED != 0) & (heads >= 2) & (heads < layout.clusters + 2)
        heads, lengths = np.where(somewhere, heads, 0), np.where(somewhere, lengths, 0)
        return Content(heads, lengths, (streams[:, 1] & NO_FAT_CHAIN == 0) & (lengths > layout.cluster))

    def _hit(self, content: Content) -> NDArray[np.bool_]:
        starts = self._layout.heap + (content.heads - 2) * self._layout.cluster
        hit = self._ranges.touch(starts, starts + content.lengths) & ~content.chained
        chained = np.flatnonzero(content.chained)
        near = self._chains.touched_from(content.heads[chained], self._touched, self._cut)
        for at in chained[near].tolist():
            hit[at] = self._chain_hit(int(content.heads[at]), int(content.lengths[at]))
        return hit

    def _chain_hit(self, head: int, length: int) -> bool:
        """Whether content is touched, or its chain ends early: it is one that runs through something lost."""
        for start, end in self._chains.pieces(head, -(-length // self._layout.cluster)):
            self._steps -= 1
            if self._steps < 0 or self._ranges.touches(start, min(end, start + length)):
                return True
            length -= end - start
        return length > 0

    def _piece(self, head: int, length: int) -> tuple[int, int]:
        start = self._layout.heap + (head - 2) * self._layout.cluster
        return start, min(start + length, self._layout.heap + self._layout.clusters * self._layout.cluster)


def _with_lost_entries(layout: Layout, ranges: Ranges) -> Ranges:
    """The ranges, and the clusters whose entry in the FAT lies in one."""
    low = np.clip((ranges.starts - layout.fat) // 4, 2, layout.clusters + 2)
    high = np.clip(-((layout.fat - ranges.ends) // 4), 2, layout.clusters + 2)
    some = low < high
    starts = np.concatenate([ranges.starts, layout.heap + (low[some] - 2) * layout.cluster])
    ends = np.concatenate([ranges.ends, layout.heap + (high[some] - 2) * layout.cluster])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    if not len(starts):
        return ranges
    apart = starts[1:] > ends[:-1]
    return Ranges(starts[np.append(True, apart)], ends[np.append(apart, True)])


def entry_sets(rows: Bytes) -> NDArray[np.intp]:
    """The file entries that are followed by a stream extension and as many names as that needs (section 7.4)."""
    sets = np.flatnonzero(rows[:-2, 0] == FILE) if len(rows) > 2 else np.zeros(0, np.intp)
    names = -(-rows[sets + 1, 3].astype(np.int64) // _CHARACTERS)
    sound = (rows[sets + 1, 0] == STREAM) & np.isin(rows[sets + 2, 0], (NAME, _NOT_IN_USE))
    sound &= (names > 0) & (names < rows[sets, 1]) & (sets + 1 + names < len(rows))
    found: NDArray[np.intp] = sets[sound]
    return found


def name_of(rows: Bytes, at: int) -> str:
    """The name of an entry set; where an entry of it is lost, question marks for its characters."""
    length = int(rows[at + 1, 3])
    found = bytearray()
    for entry in rows[at + 2 : at + 2 - (-length // _CHARACTERS)]:
        found += entry[2:].tobytes() if entry[0] == NAME else "?".encode("utf-16-le") * _CHARACTERS
    return found[: 2 * length].decode("utf-16-le", "surrogatepass").replace("\0", "\\x00").replace("/", "\\x2f")
