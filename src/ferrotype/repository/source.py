"""A disk of a snapshot as a Source: every byte of it proven on the way out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

import numpy as np

from ferrotype.block import Traits
from ferrotype.errors import ReadError
from ferrotype.extents import ExtentMap, State
from ferrotype.repository.chunkmap import ChunkMap
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.store import Repository
from ferrotype.units import MiB

_KEPT_BYTES: Final = 32 * MiB  # decoded chunks kept


class SnapshotSource:
    """Random access to one disk of a snapshot; reading 4 KiB decodes one chunk."""

    def __init__(self, repository: Repository, disk: DiskRecord) -> None:
        self.repository = repository
        self.disk = disk
        self.size = disk.size
        self.traits = Traits(sector_size=disk.sector_size, preferred_size=MiB, sector_known=True)
        self._maps = [repository.map(disk, region) for region in disk.regions]
        self._starts = [region.start for region in disk.regions]
        self._kept: OrderedDict[ChunkId, bytes] = OrderedDict()
        self._keep = max(2, _KEPT_BYTES // disk.chunk_size)
        self._lock = threading.Lock()

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 0 or offset + len(buf) > self.size:
            raise ReadError(self.disk.name, offset, len(buf), "outside the disk")
        at, end = offset, offset + len(buf)
        for number in self._touched(offset, len(buf)):
            region, chunk_map = self.disk.regions[number], self._maps[number]
            stop = min(end, region.start + region.length)
            first = (at - region.start) // self.disk.chunk_size
            last = (stop - 1 - region.start) // self.disk.chunk_size
            ids = chunk_map.ids(first, last - first + 1)
            for i, cell in enumerate(range(first, last + 1)):
                start = region.start + cell * self.disk.chunk_size
                low, high = max(at, start), min(stop, start + self.disk.chunk_size)
                self._copy(ChunkId(ids[i].tobytes()), low - start, buf[low - offset : high - offset])
            at = stop

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        """ZERO and HOLE where the snapshot stores nothing."""
        maps = [ExtentMap.uniform(offset, 0)]
        at, end = offset, offset + length
        for number in self._touched(offset, length):
            region = self.disk.regions[number]
            stop = min(end, region.start + region.length)
            maps.append(self._region_extents(region, self._maps[number], at, stop))
            at = stop
        return ExtentMap.concat(maps[1:] or maps)

    def close(self) -> None:
        """The repository belongs to whoever opened it."""

    def _touched(self, offset: int, length: int) -> Iterator[int]:
        if length <= 0:
            return
        number = int(np.searchsorted(self._starts, offset, "right")) - 1
        while number < len(self._starts) and self._starts[number] < offset + length:
            yield number
            number += 1

    def _region_extents(self, region: Region, chunk_map: ChunkMap, start: int, stop: int) -> ExtentMap:
        size = self.disk.chunk_size
        first = (start - region.start) // size
        count = (stop - 1 - region.start) // size - first + 1
        lows, highs = [], []
        for cell, ids in chunk_map.pages(first, count):
            used = np.concatenate(([False], ids != np.void(ZERO_ID), [False])).astype(np.int8)
            edge = np.diff(used)
            lows.append(np.flatnonzero(edge == 1) + cell)
            highs.append(np.flatnonzero(edge == -1) + cell)
        empty = np.zeros(0, np.int64)
        low = np.concatenate([empty, *lows]) * size + region.start
        high = np.concatenate([empty, *highs]) * size + region.start
        return ExtentMap.from_runs(start, stop - start, low, high, State.DATA, State.ZERO | State.HOLE)

    def _copy(self, chunk_id: ChunkId, skip: int, out: memoryview) -> None:
        if chunk_id == ZERO_ID:
            out[:] = bytes(len(out))
            return
        plain = self._chunk(chunk_id)
        if skip + len(out) > len(plain):
            raise ReadError(self.disk.name, skip, len(out), f"chunk {chunk_id.hex()[:16]} is shorter than its place")
        out[:] = memoryview(plain)[skip : skip + len(out)]

    def _chunk(self, chunk_id: ChunkId) -> bytes:
        with self._lock:
            plain = self._kept.get(chunk_id)
            if plain is not None:
                self._kept.move_to_end(chunk_id)
                return plain
        plain = self.repository.chunk(chunk_id)
        with self._lock:
            self._kept[chunk_id] = plain
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return plain
