"""The index: chunk id -> where its frame stands.

On disk it is a set of immutable, sorted segments, one object each.  One that is damaged is replaced in memory by the
tables of the packs it listed.  Memory: directories, and the pages that were used last, up to a bound.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptObject
from ferrotype.objects import ObjectStore
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository.merging import build_segment
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.packs import read_table
from ferrotype.repository.sealing import Sealer
from ferrotype.repository.segments import ENTRY, PREFIX, Entries, Location, PageCache, Segment


class _DamagedSegment(Exception):
    """A segment has to be replaced before the question can be answered."""

    def __init__(self, segment: Segment, error: CorruptObject) -> None:
        super().__init__(str(error))
        self.segment = segment
        self.error = error


class Index:
    """All segments of a repository, and what a writer has added since."""

    def __init__(
        self,
        store: ObjectStore,
        sealer: Sealer,
        warn: Callable[[str], None],
        is_outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        """``is_outdated`` says of a damaged segment whether it only belongs to an older state of the store.

        Then CorruptObject is raised instead of going on without the segment, and the index is to be opened anew.
        """
        self._store = store
        self._sealer = sealer
        self._warn = warn
        self._is_outdated = is_outdated
        self._mending = threading.Lock()
        self._cache = PageCache()
        self.segments: list[Segment] = []
        self.damaged: list[str] = []
        self.rebuilt: Segment | None = None
        self._unlisted: Segment | None = None
        self._tables: dict[str, Entries | None] = {}  # of packs read so far: segments may turn out damaged one by one
        stored = {info.name for info in store.list(PACKS)}
        readable = []
        for info in store.list(PREFIX):
            try:
                segment = Segment(store, info.name, sealer, self._cache)
                if not stored.issuperset(segment.packs):
                    raise CorruptObject(info.name, "it lists packs that are not stored")
                readable.append(segment)
            except CorruptObject as error:
                self._say_damaged(error)
        self._settle(readable)

    def readable(self, segment: Segment) -> bool:
        """Whether all pages of a segment can be read; one of which they cannot is replaced."""
        try:
            for _ in segment.sweep():
                pass
        except CorruptObject as error:
            self._replace(segment, error)
            return False
        return True

    def renew(self, name: str, absorbed: list[Segment]) -> list[str]:
        """A segment was put that holds what ``absorbed`` did; the names of the objects that it makes obsolete."""
        with self._mending:
            fresh = Segment(self._store, name, self._sealer, self._cache)
            obsolete = [segment.name for segment in absorbed if segment is not self.rebuilt] + self.damaged
            left = [segment for segment in self.segments if segment not in absorbed]
            if self.rebuilt in absorbed:
                self.rebuilt = None
                self.damaged = []
            self.segments = sorted([*left, fresh], key=lambda s: s.count, reverse=True)
        return obsolete

    def _replace(self, segment: Segment, error: CorruptObject) -> None:
        """Go on without a segment that turned out to be damaged."""
        with self._mending:
            if segment not in self.segments:
                return  # another thread was quicker
            if segment is self.rebuilt:
                raise error
            self._say_damaged(error)
            self._settle([s for s in self.segments if s is not segment and s is not self.rebuilt])

    def _say_damaged(self, error: CorruptObject) -> None:
        if self._is_outdated():
            raise error
        self._warn(f"{error}; the tables of the packs it lists are read instead")
        self.damaged.append(error.name)

    def _settle(self, segments: list[Segment]) -> None:
        """Use these segments, and the tables of the packs that none of them lists where one is damaged."""
        self._unlisted = None
        self.rebuilt = self._rebuild(segments) if self.damaged else None
        if self.rebuilt is not None:
            segments = [*segments, self.rebuilt]
        self.segments = sorted(segments, key=lambda s: s.count, reverse=True)

    def _rebuild(self, readable: list[Segment]) -> Segment:
        """A segment in memory for the packs that no readable segment lists."""
        listed = {pack for segment in readable for pack in segment.packs}
        packs: list[str] = []
        parts = [np.zeros(0, ENTRY)]
        for name in [info.name for info in self._store.list(PACKS) if info.name not in listed]:
            if name not in self._tables:
                self._tables[name] = self._table(name)
            if (entries := self._tables[name]) is not None:
                entries["pack"] = len(packs)
                packs.append(name)
                parts.append(entries)
        memory = MemoryStore()
        name, segment = build_segment(np.concatenate(parts), packs, self._sealer, bytes(16))
        memory.put(name, segment)
        return Segment(memory, name, self._sealer, self._cache)

    def unlisted(self) -> Segment:
        """What stands in packs that no segment lists, by their own tables.

        It is no part of the index, and none that a writer may build upon: it is for chunks that a snapshot needs and
        no segment has, since a segment can be lost without a trace where the catalog that named it is lost too.
        """
        with self._mending:
            if self._unlisted is None:
                self._unlisted = self._rebuild(self.segments)
            return self._unlisted

    def _table(self, pack: str) -> Entries | None:
        """Entries of all frames of a pack, from its own table; None where that is damaged."""
        try:
            table = read_table(self._store, pack, self._sealer)
        except CorruptObject as error:
            self._warn(str(error))
            return None
        entries = np.zeros(len(table), ENTRY)
        entries["id"], entries["offset"], entries["length"] = table.ids, table.offsets, table.lengths
        return entries

    @property
    def count(self) -> int:
        return sum(segment.count for segment in self.segments)

    def packs(self) -> set[str]:
        """Names of all packs that a segment lists."""
        return {pack for segment in self.segments for pack in segment.packs}

    def find(self, chunk_id: bytes) -> Location | None:
        while True:
            for segment in self.segments:
                try:
                    if (location := segment.find(chunk_id)) is not None:
                        return location
                except CorruptObject as error:
                    self._replace(segment, error)
                    break  # ask those that are left
            else:
                return None

    def find_many(
        self, ids: NDArray[np.void]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        """For each id: pack number (-1 where it is missing), offset and length; and the packs the numbers mean."""
        while True:
            try:
                return self._find_many(ids)
            except _DamagedSegment as damage:
                self._replace(damage.segment, damage.error)

    def _find_many(
        self, ids: NDArray[np.void]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        packs: list[str] = []
        number = np.full(len(ids), -1, np.int64)
        offset = np.zeros(len(ids), np.int64)
        length = np.zeros(len(ids), np.int64)
        for segment in self.segments:
            missing = np.flatnonzero(number < 0)
            if len(missing) == 0:
                break
            try:
                found, entries = segment.find_many(ids[missing])
            except CorruptObject as error:
                raise _DamagedSegment(segment, error) from error
            where = missing[found]
            number[where] = entries["pack"].astype(np.int64) + len(packs)
            offset[where] = entries["offset"]
            length[where] = entries["length"]
            packs += segment.packs
        return number, offset, length, packs
