"""One snapshot after the other into another image: its frames, its maps, its record.

    as it is    frames, maps and record byte for byte, where both images have the same keys
    anew        chunks and maps under the target's keys; of what is damaged, what is left

Cells whose chunks the target has of an earlier snapshot are known without reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.damage import joined
from ferrotype.engine.frames import BATCH, LOST, Run, frames_of, readable, runs_of, tried_twice
from ferrotype.errors import IntegrityError, MissingChunk
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository import snapshots as records
from ferrotype.repository.chunkmap import ChunkMap, MapBuilder
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer

SALVAGED: Final = "salvaged"  # tag of a snapshot of which something is lost

Ids = NDArray[np.void]


def needed(source: Repository, snapshot: Snapshot, seen: set[bytes]) -> Iterator[Ids]:
    """The ids of all map pages and chunks of a snapshot, page by page, without pages that were seen before.

    Raises IntegrityError where a page cannot be read.
    """
    for disk in snapshot.disks:
        for region in disk.regions:
            for page in source.map(disk, region).walk(lambda page_id: page_id in seen):
                if page.ids is None:
                    raise page.error or MissingChunk(page.page_id)
                seen.add(page.page_id)
                own = np.frombuffer(page.page_id, page.ids.dtype)
                below = page.ids[page.ids != np.void(ZERO_ID)] if page.level == 0 else own[:0]
                yield np.concatenate([own, below])


@contextmanager
def telling(snapshot: Snapshot) -> Iterator[None]:
    """Damage met in the block is told with the snapshot it hits."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(
            f"snapshot {snapshot.id[:8]} ({snapshot.name}) cannot be copied whole: {error}; "
            "`ferrotype verify` says what is hit, `ferrotype salvage` copies what is left"
        ) from error


# ---------------------------------------------------------------------- the work


@dataclass(frozen=True, slots=True)
class _Cells:
    """Neighbouring cells of a map; ``known`` are those whose new id is known already, elsewhere the zero id."""

    first: int
    ids: tuple[bytes, ...]
    known: tuple[bytes, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class _Sealed:
    """New ids of cells, and the frames of those that are new."""

    first: int
    ids: bytes
    new: tuple[tuple[ChunkId, bytes], ...]
    lost: tuple[int, ...]  # cells
    cells: int  # that are not zeros


class Copier:
    """Copies one snapshot after the other; the caller's thread owns it, its workers share only what is read."""

    def __init__(
        self,
        source: Repository,
        target: Repository,
        writer: Writer,
        job: Job,
        workers: int,
        pairs: list[tuple[Snapshot, Snapshot]],
    ) -> None:
        self._source = source
        self._target = target
        self._writer = writer
        self._job = job
        self._workers = workers
        self._pairs = pairs  # snapshots of the source that the target has, and how it has them
        self._seen: set[bytes] = set()
        self._same = source.sealer.has_keys_of(target.sealer)
        self.chunks = 0

    # ------------------------------------------------------------------ same keys

    def as_it_is(self, snapshot: Snapshot) -> Snapshot:
        """Frames, maps and the snapshot's record byte for byte."""
        with telling(snapshot):
            for frames in map_ordered(self._proven, self._missing(snapshot), workers=self._workers):
                for chunk_id, frame in frames:
                    self.chunks += self._writer.add(chunk_id, frame)
                self._job.advance(sum(len(frame) for _, frame in frames))
            name = records.PREFIX + snapshot.id
            frame = self._source.store.get(name)
            self._source.sealer.unseal_object(name, frame)
        return self._writer.commit_copy(snapshot, frame)

    def _missing(self, snapshot: Snapshot) -> Iterator[Run]:
        for ids in needed(self._source, snapshot, self._seen):
            missing = ids[self._target.locate_many(ids)[0] < 0]
            self._job.advance(0)
            yield from runs_of(self._source, [i.tobytes() for i in missing if i.tobytes() not in self._writer])

    def _proven(self, run: Run) -> list[tuple[ChunkId, bytes]]:
        """An encrypted frame is proven by its tag; a plain one has to be decoded for that."""
        sealer = self._source.sealer
        prove = sealer.authenticate if sealer.encrypted else sealer.unseal

        def proven(chunk_id: ChunkId, frame: memoryview) -> tuple[ChunkId, bytes]:
            prove(chunk_id, frame)
            return chunk_id, bytes(frame)

        return [
            tried_twice(self._source, chunk_id, frame, proven) for chunk_id, frame in frames_of(self._source, run)
        ]

    # ------------------------------------------------------------------ maps made again

    def anew(self, snapshot: Snapshot, *, damaged: bool = False) -> Snapshot:
        """The snapshot under the target's keys; with ``damaged``, zeros where something is lost."""
        disks = tuple(self._disk(disk, snapshot, damaged=damaged) for disk in snapshot.disks)
        ids = {old.id: new.id for old, new in self._pairs}
        parent = ids.get(snapshot.parent or "", snapshot.parent)
        fresh = msgspec.structs.replace(snapshot, disks=disks, parent=parent, id="")
        if damaged:
            tags = (*(tag for tag in snapshot.tags if tag != SALVAGED), SALVAGED)
            fresh = msgspec.structs.replace(fresh, tags=tags, parent=snapshot.id)
        name, frame = self._target.sealer.seal_object(records.KIND, records.encode(fresh))
        fresh = self._writer.commit_copy(msgspec.structs.replace(fresh, id=name.removeprefix(records.PREFIX)), frame)
        self._pairs.append((snapshot, fresh))
        return fresh

    def _disk(self, disk: DiskRecord, snapshot: Snapshot, *, damaged: bool) -> DiskRecord:
        regions = []
        lost: list[tuple[int, int]] = list(disk.unreadable)
        for region in disk.regions:
            builder = MapBuilder(disk.cells(region), self._page)
            gone: list[tuple[int, int]] = []  # cells: first, count
            with telling(snapshot):
                items = self._batches(disk, region, gone, damaged=damaged)
                for sealed in map_ordered(self._again(damaged=damaged), items, workers=self._workers):
                    for chunk_id, frame in sealed.new:
                        self.chunks += self._writer.add(chunk_id, frame)
                    builder.put(sealed.first, sealed.ids)
                    gone += [(cell, 1) for cell in sealed.lost]
                    self._job.advance(sealed.cells * disk.chunk_size)
            regions.append(Region(region.start, region.length, builder.finish().hex()))
            for first, count in gone:
                start = first * disk.chunk_size
                lost.append((region.start + start, min(count * disk.chunk_size, region.length - start)))
        return msgspec.structs.replace(disk, regions=tuple(regions), unreadable=tuple(joined(lost)))

    def _page(self, plain: bytes) -> ChunkId:
        sealer = self._target.sealer
        chunk_id = sealer.id_of(plain)
        if chunk_id not in self._writer:
            self.chunks += self._writer.add(chunk_id, sealer.seal(chunk_id, plain))
        return chunk_id

    def _batches(
        self, disk: DiskRecord, region: Region, gone: list[tuple[int, int]], *, damaged: bool
    ) -> Iterator[_Cells]:
        before = self._before(disk, region)
        step = max(1, BATCH // disk.chunk_size)
        for page in self._source.map(disk, region).walk(lambda _: False):
            if page.ids is None:
                if not damaged:
                    raise page.error or MissingChunk(page.page_id)
                gone.append((page.first, page.count))
                continue
            if page.level:
                continue
            for at in range(0, page.count, step):
                ids = page.ids[at : min(at + step, page.count)]
                if not (ids != np.void(ZERO_ID)).any():
                    continue
                known = _known(before, page.first + at, ids)
                todo = [i.tobytes() for i in ids[(known == np.void(ZERO_ID)) & (ids != np.void(ZERO_ID))]]
                if self._same:
                    todo = [i for i in todo if i not in self._writer]
                runs = tuple(runs_of(self._source, todo, lenient=damaged))
                yield _Cells(
                    page.first + at, tuple(i.tobytes() for i in ids), tuple(i.tobytes() for i in known), runs
                )

    def _before(self, disk: DiskRecord, region: Region) -> tuple[ChunkMap, ChunkMap] | None:
        """The maps, here and there, of the same region in the newest snapshot that the target has of the disk."""
        for old, new in reversed(self._pairs):
            for was, is_now in zip(old.disks, new.disks, strict=True):
                if (was.name, was.chunk_size) != (disk.name, disk.chunk_size):
                    continue
                for old_region, new_region in zip(was.regions, is_now.regions, strict=False):
                    if (old_region.start, old_region.length) == (region.start, region.length):
                        return self._source.map(was, old_region), self._target.map(is_now, new_region)
        return None

    def _again(self, *, damaged: bool) -> Callable[[_Cells], _Sealed]:
        def work(cells: _Cells) -> _Sealed:
            fresh: dict[bytes, bytes] = {}  # old id -> new id
            new: list[tuple[ChunkId, bytes]] = []
            for run in cells.runs:
                for chunk_id, frame in (readable if damaged else frames_of)(self._source, run):
                    try:
                        fresh[chunk_id], sealed = tried_twice(self._source, chunk_id, frame, self._sealed_anew)
                        new += sealed
                    except IntegrityError:
                        if not damaged:
                            raise
            ids: list[bytes] = []
            lost: list[int] = []
            for number, (old, known) in enumerate(zip(cells.ids, cells.known, strict=True)):
                if old == ZERO_ID:
                    ids.append(ZERO_ID)
                elif known != ZERO_ID:
                    ids.append(known)
                elif old in fresh:
                    ids.append(fresh[old])
                elif self._same and old in self._writer:
                    ids.append(old)
                else:
                    ids.append(ZERO_ID)
                    lost.append(cells.first + number)
            used = sum(old != ZERO_ID for old in cells.ids)
            return _Sealed(cells.first, b"".join(ids), tuple(new), tuple(lost), used)

        return work

    def _sealed_anew(self, chunk_id: ChunkId, frame: memoryview) -> tuple[ChunkId, list[tuple[ChunkId, bytes]]]:
        """The id in the target, and the frame where it does not have that."""
        plain = self._source.sealer.unseal(chunk_id, frame)
        if self._same:
            return chunk_id, [(chunk_id, bytes(frame))]
        sealer = self._target.sealer
        fresh = sealer.id_of(plain)
        return fresh, [] if fresh in self._writer else [(fresh, sealer.seal(fresh, plain))]


def _known(before: tuple[ChunkMap, ChunkMap] | None, first: int, ids: Ids) -> Ids:
    """New ids of the cells whose old ids are those of the snapshot before; elsewhere the zero id."""
    out = np.zeros(len(ids), ids.dtype)
    if before is not None:
        try:
            same = before[0].ids(first, len(ids)) == ids
            out[same] = before[1].ids(first, len(ids))[same]
        except LOST:
            pass
    return out
