"""A disk of a snapshot as a Source: every byte of it proven on the way out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.block import Traits
from ferrotype.errors import IntegrityError, MissingChunk, ReadError
from ferrotype.extents import ExtentMap, State
from ferrotype.repository.chunkmap import ChunkMap
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.store import Repository
from ferrotype.units import MiB

# Who made an image may have one page stand in its maps a million million times, so the work of one answer is bounded.
_MOST_WORK: Final = 1 << 18  # map pages looked at for one map of extents: 32 TiB of data in chunks of 128 KiB
_RUNS: Final = 16  # runs of data on a page that count as much as the page, since each takes 16 bytes
_KEPT_MAPS: Final = 16  # each keeps up to 2 MiB of pages
_KEPT_BYTES: Final = 32 * MiB  # decoded chunks kept


class SnapshotSource:
    """Random access to one disk of a snapshot; reading 4 KiB decodes one chunk."""

    def __init__(self, repository: Repository, disk: DiskRecord) -> None:
        self.repository = repository
        self.disk = disk
        self.size = disk.size
        self.unreadable = disk.unreadable
        self.traits = Traits(sector_size=disk.sector_size, preferred_size=MiB, sector_known=True)
        self._maps: OrderedDict[int, ChunkMap] = OrderedDict()  # of the regions used last
        self._starts = np.array([region.start for region in disk.regions], np.int64)
        self._kept: OrderedDict[ChunkId, bytes] = OrderedDict()
        self._keep = max(2, _KEPT_BYTES // disk.chunk_size)
        self._lock = threading.Lock()

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 0 or offset + len(buf) > self.size:
            raise ReadError(self.disk.name, offset, len(buf), "outside the disk")
        at, end = offset, offset + len(buf)
        for number in self._touched(offset, len(buf)):
            region, chunk_map = self.disk.regions[number], self._map(number)
            stop = min(end, region.start + region.length)
            first = (at - region.start) // self.disk.chunk_size
            last = (stop - 1 - region.start) // self.disk.chunk_size
            places: list[tuple[ChunkId, int, int]] = []
            try:
                ids = chunk_map.ids(first, last - first + 1)
                wanted = []
                for i, cell in enumerate(range(first, last + 1)):
                    start = region.start + cell * self.disk.chunk_size
                    low, high = max(at, start), min(stop, start + self.disk.chunk_size)
                    chunk_id = ChunkId(ids[i].tobytes())
                    places.append((chunk_id, low, high - low))
                    wanted.append((chunk_id, low - start, buf[low - offset : high - offset]))
                self._fill(wanted)
            except IntegrityError as error:
                raise lost_at(error, self.repository, self.disk, places, (at, stop - at)) from None
            at = stop

    def _fill(self, wanted: list[tuple[ChunkId, int, memoryview]]) -> None:
        """Fill each piece with what its chunk holds from some byte on; neighbours in a pack are read at once."""
        missing = []
        for chunk_id, skip, out in wanted:
            if chunk_id == ZERO_ID:
                out[:] = bytes(len(out))
            elif (plain := self._known(chunk_id)) is not None:
                self._copy(chunk_id, plain, skip, out)
            else:
                missing.append((chunk_id, skip, out))
        if not missing:
            return
        places = self._located([chunk_id for chunk_id, _, _ in missing])
        for (chunk_id, skip, out), plain in zip(missing, self.repository.chunks(places, self.disk), strict=True):
            kept = plain[: self.disk.chunk_size]  # no more is kept than a cell takes
            self._copy(chunk_id, kept, skip, out)
            if len(out) < len(kept):  # its rest may be asked for next
                self._keep_chunk(chunk_id, kept)

    def _located(self, ids: list[ChunkId]) -> list[_Place]:
        packs, offsets, lengths, names = self.repository.locate_many(np.array(ids, np.void(ids[0]).dtype))
        places = []
        columns = (ids, packs.tolist(), offsets.tolist(), lengths.tolist())
        for chunk_id, pack, offset, stored in zip(*columns, strict=True):
            if pack < 0:
                raise self.repository.explained(MissingChunk(chunk_id), self.disk)
            places.append(_Place(chunk_id, names[pack], offset, stored))
        return places

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        """ZERO and HOLE where the snapshot stores nothing.  What a very large map says last is left out: DATA."""
        maps = [ExtentMap.uniform(offset, 0)]
        at, end, left = offset, offset + length, _MOST_WORK
        for number in self._touched(offset, length):
            region = self.disk.regions[number]
            stop = min(end, region.start + region.length)
            if left <= 0:
                stop = end
                maps.append(ExtentMap.uniform(at, stop - at))
                break
            found, work = self._region_extents(region, self._map(number), at, stop, left)
            maps.append(found)
            at, left = stop, left - work
        return ExtentMap.concat(maps[1:] or maps)

    def close(self) -> None:
        """The repository belongs to whoever opened it."""

    def _map(self, number: int) -> ChunkMap:
        with self._lock:
            found = self._maps.get(number)
            if found is None:
                found = self._maps[number] = self.repository.map(self.disk, self.disk.regions[number])
                while len(self._maps) > _KEPT_MAPS:
                    self._maps.popitem(last=False)
            else:
                self._maps.move_to_end(number)
            return found

    def _touched(self, offset: int, length: int) -> Iterator[int]:
        if length <= 0:
            return
        number = int(np.searchsorted(self._starts, offset, "right")) - 1
        while number < len(self._starts) and self._starts[number] < offset + length:
            yield number
            number += 1

    def _region_extents(
        self, region: Region, chunk_map: ChunkMap, start: int, stop: int, most: int
    ) -> tuple[ExtentMap, int]:
        """What is stored of a region, and the work that took, which is about ``most`` at most."""
        size = self.disk.chunk_size
        first = (start - region.start) // size
        end = (stop - 1 - region.start) // size + 1
        lows, highs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        work = 0
        for cell, ids in chunk_map.pages(first, end - first):
            if work >= most:
                lows.append(np.array([cell], np.int64))
                highs.append(np.array([end], np.int64))
                break
            used = np.concatenate(([False], ids != np.void(ZERO_ID), [False])).astype(np.int8)
            edge = np.diff(used)
            low, high = np.flatnonzero(edge == 1) + cell, np.flatnonzero(edge == -1) + cell
            if len(low) and len(highs[-1]) and highs[-1][-1] == low[0]:  # goes on from the page before
                highs[-1], low = highs[-1][:-1], low[1:]
            lows.append(low)
            highs.append(high)
            work += 1 + len(low) // _RUNS
        low, high = np.concatenate(lows) * size + region.start, np.concatenate(highs) * size + region.start
        return ExtentMap.from_runs(start, stop - start, low, high, State.DATA, State.ZERO | State.HOLE), work

    def _copy(self, chunk_id: ChunkId, plain: bytes, skip: int, out: memoryview) -> None:
        if skip + len(out) > len(plain):
            raise ReadError(self.disk.name, skip, len(out), f"chunk {chunk_id.hex()[:16]} is shorter than its place")
        out[:] = memoryview(plain)[skip : skip + len(out)]

    def _known(self, chunk_id: ChunkId) -> bytes | None:
        with self._lock:
            plain = self._kept.get(chunk_id)
            if plain is not None:
                self._kept.move_to_end(chunk_id)
            return plain

    def _keep_chunk(self, chunk_id: ChunkId, plain: bytes) -> None:
        with self._lock:
            self._kept[chunk_id] = plain
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)


def lost_at(
    error: IntegrityError,
    repository: Repository,
    disk: DiskRecord,
    places: Iterable[tuple[ChunkId, int, int]],
    otherwise: tuple[int, int],
) -> IntegrityError:
    """The error, with the bytes of the disk that it costs, of the chunks that were wanted at ``places``.

    Those are (id, start, length) on the disk.  A page of a map is none of them, and costs a part of ``otherwise``.
    """
    lost = getattr(error, "chunk_id", None)
    exact = next(((start, length) for chunk_id, start, length in places if chunk_id == lost), None)
    image = str(getattr(repository.store, "path", "IMAGE"))  # a store in memory has none
    return error.at(disk.name, *(exact or otherwise), image, exact=exact is not None)


@dataclass(frozen=True, slots=True)
class _Place:
    """A chunk, and where its frame stands."""

    chunk_id: ChunkId
    pack: str
    offset: int
    stored: int
