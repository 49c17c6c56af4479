"""Where lost chunks hurt: the ranges of the snapshots' disks that cannot be given back, and the files in them.

    lost chunks  ->  the maps of each snapshot, shared pages once  ->  ranges of its disks  ->  files

A chunk that one pack has lost and another still holds is not lost: what can be read decides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.files import Lossy, Range, Stretch, bounded, files_in, named, recorded_layout, within
from ferrotype.errors import DeviceError, IntegrityError, StoreError
from ferrotype.job import Job
from ferrotype.repository.chunkmap import MapPage
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.segments import keys_of
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository

_UNREADABLE: Final = (IntegrityError, DeviceError, StoreError)
_GROUPS: Final = 16  # walks over the files of one volume: each may read all of the file system's own structures
_RANGES: Final = 1 << 20  # lost cells of one region that are told apart; all behind them counts as lost
_LOOKUP: Final = 1 << 20  # chunks looked up in one sweep: ids are strewn, so each may read all of a large index
_STEP: Final = 1 << 16  # chunks of a sweep that are located at a time
_WALKS: Final = 256  # the same for all volumes of all snapshots; what is beyond has its ranges told, and ``...``


@dataclass(frozen=True, slots=True)
class Damage:
    """A range of a disk whose bytes cannot be given back, and the files that stand in it."""

    snapshot: str
    disk: str
    start: int
    length: int
    files: tuple[str, ...] = ()


def lost_chunks(repository: Repository, suspected: Iterable[bytes]) -> set[bytes]:
    """Those chunks that cannot be given back, from whichever pack."""
    return {chunk_id for chunk_id in suspected if not _readable(repository, ChunkId(chunk_id))}


def _readable(repository: Repository, chunk_id: ChunkId) -> bool:
    try:
        repository.chunk(chunk_id)
    except _UNREADABLE:
        return False
    return True


def find_damage(repository: Repository, lost: set[bytes], known: Sequence[Snapshot], job: Job) -> list[Damage]:
    """What of the snapshots cannot be given back, in their order; ``lost`` are the chunks known to be unreadable.

    Chunks and map pages that are missing altogether are found on the way.
    """
    references = _References(repository, lost)
    hit: list[tuple[Snapshot, DiskRecord, list[Range]]] = []
    for snapshot in known:
        for disk in snapshot.disks:
            ranges = joined([r for region in disk.regions for r in references.lost_ranges(disk, region, job)])
            if ranges:
                hit.append((snapshot, disk, ranges))
        job.advance(0)
    tracer = _Tracer(repository)
    traced = [tracer.traced(snapshot, disk, ranges, job) for snapshot, disk, ranges in reversed(hit)]  # newest first
    return [damage for found in reversed(traced) for damage in found]


# ---------------------------------------------------------------------- ranges


class _References:
    """Finds what of the snapshots' disks is lost, walking shared pages once."""

    def __init__(self, repository: Repository, lost: set[bytes]) -> None:
        self._repository = repository
        self._lost = np.sort(keys_of(np.frombuffer(b"".join(lost), f"V{ID_SIZE}"))) if lost else None
        self._clean: set[bytes] = set()  # pages below which nothing is lost
        self._whole: set[bytes] = set()  # of other ones, bottom pages whose chunks are all there

    def lost_ranges(self, disk: DiskRecord, region: Region, job: Job) -> list[Range]:
        """The (start, length) of a region that cannot be given back, in bytes of the disk."""
        if self._is_clean(disk, region, job):
            return []
        cells: list[tuple[int, int]] = []
        opened: list[tuple[int, bytes, int]] = []  # pages being walked, root first: level, id, what was lost before
        for page in self._repository.map(disk, region).walk(lambda page_id: page_id in self._clean):
            self._close(opened, page.level, len(cells))
            opened.append((page.level, page.page_id, len(cells)))
            cells += self._lost_cells(page)
            job.advance(0)
            if len(cells) > _RANGES:  # a made-up map can lose more cells than there is memory to name them
                cells.append((page.first, disk.cells(region)))
                break
        else:
            self._close(opened, opened[0][0] if opened else 0, len(cells))
        ends = [(first * disk.chunk_size, min(last * disk.chunk_size, region.length)) for first, last in cells]
        return [(region.start + low, high - low) for low, high in ends]

    def _is_clean(self, disk: DiskRecord, region: Region, job: Job) -> bool:
        """Whether nothing of a region is lost, asking for many pages at a time; else the whole ones are known."""
        seen: set[bytes] = set()
        pending: list[tuple[bytes, NDArray[np.void]]] = []
        count = 0
        damaged = False
        for page in self._repository.map(disk, region).walk(
            lambda page_id: page_id in self._clean or page_id in seen
        ):
            seen.add(page.page_id)
            job.advance(0)
            if page.ids is None:
                damaged = True
            elif page.level == 0 and page.page_id not in self._whole:
                ids = page.ids[page.ids != np.void(ZERO_ID)]
                pending.append((page.page_id, ids))
                count += len(ids)
                if count >= _LOOKUP:
                    damaged |= self._settle(pending)
                    pending, count = [], 0
        damaged |= self._settle(pending)
        if not damaged:
            self._clean |= seen
            self._whole -= seen
        return not damaged

    def _settle(self, pending: list[tuple[bytes, NDArray[np.void]]]) -> bool:
        """Note the pages whose chunks are all there; whether there are others."""
        if not pending:
            return False
        lost = self._gone(np.concatenate([ids for _, ids in pending]))
        at, damaged = 0, False
        for page_id, ids in pending:
            if lost[at : at + len(ids)].any():
                damaged = True
            else:
                self._whole.add(page_id)
            at += len(ids)
        return damaged

    def _close(self, opened: list[tuple[int, bytes, int]], level: int, lost: int) -> None:
        """Settle the pages up to ``level`` that the walk has left: a page may stand in a map a million times."""
        while opened and opened[-1][0] <= level:
            _, page_id, before = opened.pop()
            if before == lost:
                self._clean.add(page_id)

    def _lost_cells(self, page: MapPage) -> list[tuple[int, int]]:
        if page.ids is None:
            return [(page.first, page.first + page.count)]
        if page.level or page.page_id in self._whole:
            return []  # a page that is missing below shows itself when the walk comes to it
        used = np.flatnonzero(page.ids[: page.count] != np.void(ZERO_ID))
        lost = self._gone(page.ids[used])
        return [(page.first + cell, page.first + cell + 1) for cell in used[lost].tolist()]

    def _gone(self, ids: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which of the chunks are missing, or known to be unreadable."""
        lost = np.zeros(len(ids), bool)
        keys = keys_of(ids)
        order = np.argsort(keys, kind="stable")
        for first in range(0, len(ids), _STEP):  # one sweep over the index, with little of it in memory
            part = order[first : first + _STEP]
            lost[part] = self._missing(ids[part])
        if self._lost is not None and len(ids):
            at = np.minimum(np.searchsorted(self._lost, keys), len(self._lost) - 1)
            lost |= self._lost[at] == keys
        return lost

    def _missing(self, ids: NDArray[np.void]) -> NDArray[np.bool_]:
        try:
            return self._repository.locate_many(ids)[0] < 0
        except _UNREADABLE:  # a page of the index is damaged: it is said elsewhere; ask one by one
            return np.array([not self._present(ChunkId(i.tobytes())) for i in ids], bool)

    def _present(self, chunk_id: ChunkId) -> bool:
        try:
            return self._repository.index.find(chunk_id) is not None
        except _UNREADABLE:
            return False


def joined(ranges: Sequence[Range]) -> list[Range]:
    """(start, length), ascending, neighbours as one."""
    out: list[Range] = []
    for start, length in sorted(ranges):
        if out and start <= sum(out[-1]):
            first, so_far = out.pop()
            out.append((first, max(so_far, start + length - first)))
        else:
            out.append((start, length))
    return out


# ---------------------------------------------------------------------- files


class _Tracer:
    """Names the files in lost ranges, once for each state of a volume that snapshots share."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._known: dict[object, tuple[str, ...]] = {}
        self._walks = 0

    def traced(self, snapshot: Snapshot, disk: DiskRecord, ranges: Sequence[Range], job: Job) -> list[Damage]:
        """The ranges with the files in each.

        Where many ranges lie in one volume, neighbours are asked about together and each has the files of all.
        """
        files: dict[Range, tuple[str, ...]] = dict.fromkeys(ranges, ())  # ranges share what is the same
        source = Lossy(SnapshotSource(self._repository, disk))
        starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
        borders = [region.start for region in disk.regions]
        for volume in recorded_layout(disk):
            first, behind = bisect_right(ends, volume.start), bisect_left(starts, volume.start + volume.size)
            for group in _groups(ranges[first:behind]):
                names = tuple(named(volume, self._files(source, disk, borders, volume, within(group, volume))))
                for one in group:
                    files[one] = files[one] + names if files[one] else names
                job.advance(0)
        plain = Damage(snapshot.id, disk.name, 0, 0)
        return [replace(plain, start=start, length=n, files=bounded(files[start, n])) for start, n in ranges]

    def _files(
        self, source: Lossy, disk: DiskRecord, borders: Sequence[int], volume: Stretch, ranges: Sequence[Range]
    ) -> tuple[str, ...]:
        first = max(bisect_right(borders, volume.start) - 1, 0)
        behind = bisect_left(borders, volume.start + volume.size)
        state = tuple((r.start - volume.start, r.length, r.map) for r in disk.regions[first:behind])
        key = (disk.chunk_size, volume.size, state, tuple(ranges))
        found = self._known.get(key)
        if found is None:
            if self._walks >= _WALKS:
                return ("...",)
            self._walks += 1
            found = self._known[key] = bounded(files_in(source, volume, ranges))
        return found


def _groups(ranges: Sequence[Range]) -> list[Sequence[Range]]:
    """Neighbours together, in no more than ``_GROUPS`` groups."""
    size = -(-len(ranges) // _GROUPS) or 1
    return [ranges[at : at + size] for at in range(0, len(ranges), size)]
