"""What a FAT volume occupies, found without asking the FAT which clusters are free: folders and their chains.

    root folder ──> folders ──> entries ──> first clusters ──> chains, all of them followed at once at the end

The same FAT says where chains go and what is free, so this finds what contradicts itself in it: a file that begins at
a free cluster, or runs into one, or ends before its content does.  Chains that no folder leads to claim nothing; the
FAT calls their clusters used, and that keeps them.

"Microsoft Extensible Firmware Initiative FAT32 File System Specification", version 1.03, section "FAT Directory
Structure".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import InvalidImage
from ferrotype.extents import Offsets
from ferrotype.filesystems import Claims
from ferrotype.filesystems.fat_files import (
    DELETED,
    DOT,
    ENTRY,
    MOST_FOLDER,
    MOST_FOLDERS,
    MOST_READ,
    Folder,
    Tree,
    heads_of,
    name_of,
)
from ferrotype.filesystems.fat_records import (
    ATTR_DIRECTORY,
    ATTR_LONG_NAME,
    ATTR_VOLUME_ID,
    DIRECTORY_ENTRY,
    Layout,
)
from ferrotype.filesystems.remains import Intact, printable

__all__ = ["claims"]


def claims(remains: Intact, layout: Layout, tables: list[int], root_cluster: int) -> Iterator[Claims]:
    """The answer of ``FileSystem.claims``."""
    return _Walk(remains, layout, tables, root_cluster).claims()


class _Walk:
    """Goes through all folders once.  What is wrong with one chain is told last: another may lead to more."""

    def __init__(self, remains: Intact, layout: Layout, tables: list[int], root_cluster: int) -> None:
        self._layout, self._root = layout, root_cluster
        self._tree = Tree(remains, layout, tables, root_cluster)
        self._chains = self._tree.chains
        if not self._chains.whole:
            raise InvalidImage("the FAT is in more pieces than can be followed")
        self._lengths, self._sound = self._chains.followed()
        self._met = np.zeros(len(self._lengths), bool)  # runs at which a chain begins
        self._wrong: str | None = None

    def claims(self) -> Iterator[Claims]:
        yield Claims(np.zeros(1, np.int64), np.array([self._layout.data_start], np.int64))
        if self._root:
            yield self._take(np.array([self._root], np.int64), np.ones(1, np.int64), lambda _: "the root folder")
        seen, waiting, read = {self._root}, deque([Folder("", self._root)]), 0
        while waiting:
            folder = waiting.popleft()
            data = self._tree.read(folder)
            read += len(data)
            if len(seen) > MOST_FOLDERS or read > MOST_READ:
                raise InvalidImage("the volume has more folders than can be believed")
            for below in (yield from self._search(folder, data)):
                if below.head not in seen:
                    seen.add(below.head)
                    waiting.append(below)
        yield Claims(*self._chains.places(self._chains.through(self._met)))
        if self._wrong is not None:
            raise InvalidImage(self._wrong)

    def _search(self, folder: Folder, data: bytes) -> Generator[Claims, None, list[Folder]]:
        """Take what stands in one folder; the folders in it."""
        if len(data) >= MOST_FOLDER + self._layout.cluster or (folder.path and data[: len(DOT)] != DOT):
            raise InvalidImage(f"the folder {folder.path} is damaged: it does not begin, or end, as folders do")
        entries = np.frombuffer(data, DIRECTORY_ENTRY, len(data) // ENTRY)
        wanted = np.flatnonzero(_in_use(np.frombuffer(data, np.uint8, len(entries) * ENTRY).reshape(-1, ENTRY)))
        entries = entries[wanted]
        heads = heads_of(entries, self._layout.bits)
        folders = entries["DIR_Attr"] & ATTR_DIRECTORY != 0
        sizes = np.where(folders, 1, entries["DIR_FileSize"])
        stored = np.flatnonzero((heads != 0) | (sizes != 0))

        def name(at: int) -> str:
            return folder.path + printable(name_of(data, int(wanted[at])))

        yield self._take(heads[stored], sizes[stored], lambda at: name(int(stored[at])))
        yield Claims(*_NOTHING, len(entries))
        return [Folder(name(at) + "/", int(heads[at])) for at in np.flatnonzero(folders).tolist()]

    def _take(self, heads: Offsets, sizes: Offsets, name: Callable[[int], str]) -> Claims:
        """Remember chains, by their first clusters; claimed is what no chain covers: clusters that the FAT lacks."""
        on_volume = (heads >= 2) & (heads < self._layout.clusters + 2)
        runs = self._chains.find(heads)
        found = np.flatnonzero(on_volume & (runs >= 0))
        self._met[runs[found]] = True
        lengths = np.zeros(len(heads), np.int64)
        run = runs[found]
        lengths[found] = self._lengths[run] - (heads[found] - self._chains.firsts[run])
        sound = np.zeros(len(heads), bool)
        sound[found] = self._sound[run]
        wrong = ~sound | (lengths * self._layout.cluster < sizes)
        if wrong.any() and self._wrong is None:
            at = int(wrong.argmax())
            self._wrong = f"the chain of {name(at)}, from cluster {int(heads[at])} on, is damaged or too short"
        lost = self._chains.at(heads[on_volume & (runs < 0)])
        return Claims(lost, lost + self._layout.cluster)


def _in_use(rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which entries may own clusters: all that are not deleted, parts of long names, labels or dots.

    Entries of impossible names are among them, unlike where names are told.
    """
    kind, name = rows[:, 11], rows[:, :11]
    label = (kind & 0x3F == ATTR_LONG_NAME) | (kind & (ATTR_VOLUME_ID | ATTR_DIRECTORY) == ATTR_VOLUME_ID)
    dots = (name[:, 0] == DOT[0]) & np.isin(name[:, 1], (DOT[0], DOT[1])) & (name[:, 2:] == DOT[2]).all(axis=1)
    used: NDArray[np.bool_] = (name[:, 0] != DELETED) & ~label & ~dots
    return used


_NOTHING: Final = (np.zeros(0, np.int64), np.zeros(0, np.int64))
