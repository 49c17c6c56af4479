"""What an exFAT volume occupies, found without its allocation bitmap: the content that every folder's entries name.

    root folder ──> bitmaps, up-case table
                └─> entry sets ──> content in one piece, or a chain ──> the FAT, followed at once at the end

The FAT says nothing of free space here.  Each entry set has to be whole, content has to lie on the volume, and a
chain has to have as many clusters as its content needs.

Microsoft's "exFAT file system specification", revision 1.00, sections 4.1, 6, 7.1, 7.2 and 7.4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.filesystems import Claims
from ferrotype.filesystems.exfat_files import (
    ALLOCATED,
    BITMAP,
    FILE,
    FOLDER,
    MOST_FOLDER,
    MOST_FOLDERS,
    MOST_READ,
    NAME,
    STREAM,
    UPCASE,
    Bytes,
    Folder,
    Layout,
    Tree,
    entry_sets,
    name_of,
)
from ferrotype.filesystems.remains import Intact, printable

__all__ = ["claims"]

_SECONDARY: Final = 0xC0  # EntryType, from here on


def claims(remains: Intact, layout: Layout) -> Iterator[Claims]:
    """The answer of ``FileSystem.claims``."""
    return _Walk(remains, layout).claims()


class _Walk:
    """Goes through all folders once.  What is wrong with one chain is told last: another may lead to more."""

    def __init__(self, remains: Intact, layout: Layout) -> None:
        self._layout, self._tree = layout, Tree(remains, layout)
        self._chains = self._tree.chains
        if not self._chains.whole:
            raise InvalidImage("the FAT is in more pieces than can be followed")
        self._lengths, self._sound = self._chains.followed()
        self._met = np.zeros(len(self._lengths), bool)  # runs at which a chain begins
        self._wrong: str | None = None

    def claims(self) -> Iterator[Claims]:
        yield Claims(np.zeros(1, np.int64), np.array([self._layout.heap], np.int64))
        root = Folder("", self._layout.root, MOST_FOLDER, chained=True)
        self._follow(np.array([root.head], np.int64), np.ones(1, np.int64), lambda _: "the root folder")
        seen, waiting, read = {root.head}, deque([root]), 0
        while waiting:
            folder = waiting.popleft()
            rows = self._tree.read(folder)
            read += rows.size
            if len(seen) > MOST_FOLDERS or read > MOST_READ:
                raise InvalidImage("the volume has more folders than can be believed")
            sets = _sets(rows, folder)
            if not folder.path:
                yield self._take(_tables(rows), lambda _: "the allocation bitmap or the up-case table", 0)
            yield self._take(_further(rows), lambda _: "an entry of an unknown kind", 0)
            yield self._take(rows[sets + 1], _Names(folder, rows, sets).name, len(sets))
            for below in self._below(folder, rows, sets):
                if below.head not in seen:
                    seen.add(below.head)
                    waiting.append(below)
        yield Claims(*self._chains.places(self._chains.through(self._met)))
        if self._wrong is not None:
            raise InvalidImage(self._wrong)

    def _below(self, folder: Folder, rows: Bytes, sets: NDArray[np.intp]) -> Iterator[Folder]:
        content = self._tree.content(rows[sets + 1])
        named = _Names(folder, rows, sets)
        for at in np.flatnonzero((rows[sets, 4] & FOLDER != 0) & (content.lengths > 0)).tolist():
            length = int(content.lengths[at])
            if length > MOST_FOLDER:
                raise InvalidImage(f"the folder {named.name(at)} is longer than folders can be")
            yield Folder(named.name(at) + "/", int(content.heads[at]), length, bool(content.chained[at]))

    def _take(self, streams: Bytes, name: Callable[[int], str], files: int) -> Claims:
        """The content that stream extensions, or entries of their form, tell of; that in chains is remembered."""
        layout = self._layout
        stated = np.ascontiguousarray(streams[:, 24:32]).view("<u8")[:, 0]
        content = self._tree.content(streams)
        clusters = -(-content.lengths // layout.cluster)
        outside = (stated != content.lengths) | (content.heads + clusters > layout.clusters + 2)
        if outside.any():
            raise InvalidImage(f"the content of {name(int(outside.argmax()))} does not lie on the volume")
        chained = np.flatnonzero(content.chained)
        self._follow(content.heads[chained], clusters[chained], lambda at: name(int(chained[at])))
        starts = self._chains.at(content.heads)
        ends = starts + np.where(content.chained, np.minimum(clusters, 1), clusters) * layout.cluster
        return Claims(starts, ends, files)

    def _follow(self, heads: NDArray[np.int64], clusters: NDArray[np.int64], name: Callable[[int], str]) -> None:
        runs = self._chains.find(heads)
        found = np.flatnonzero(runs >= 0)
        run = runs[found]
        self._met[run] = True
        long = np.zeros(len(heads), bool)
        lengths = self._lengths[run] - (heads[found] - self._chains.firsts[run])
        long[found] = (lengths >= clusters[found]) & self._sound[run]
        if not long.all() and self._wrong is None:
            at = int((~long).argmax())
            self._wrong = f"the chain of {name(at)}, from cluster {int(heads[at])} on, is damaged or too short"


class _Names:
    """The names of a folder's entry sets, for when they are needed."""

    def __init__(self, folder: Folder, rows: Bytes, sets: NDArray[np.intp]) -> None:
        self._folder, self._rows, self._sets = folder, rows, sets

    def name(self, at: int) -> str:
        return self._folder.path + printable(name_of(self._rows, int(self._sets[at])))


def _sets(rows: Bytes, folder: Folder) -> NDArray[np.intp]:
    sets = entry_sets(rows)
    if len(sets) != int((rows[:, 0] == FILE).sum()):
        raise InvalidImage(f"the folder {folder.path or 'at the root'} has files whose entries are damaged")
    return sets


def _tables(rows: Bytes) -> Bytes:
    """The entries of the bitmaps and of the up-case table, with the flags of content that is somewhere."""
    tables = rows[np.isin(rows[:, 0], (BITMAP, UPCASE))].copy()
    tables[:, 1] = ALLOCATED
    return tables


def _further(rows: Bytes) -> Bytes:
    """Secondary entries of unknown kinds that have content of their own (section 6.3)."""
    kind = rows[:, 0]
    found: Bytes = rows[(kind >= _SECONDARY) & ~np.isin(kind, (STREAM, NAME)) & (rows[:, 1] & ALLOCATED != 0)]
    return found
