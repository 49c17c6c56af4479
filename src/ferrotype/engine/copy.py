"""Copy snapshots from one image to another.

    same keys     frames move as they are, each proven on the way; ids stay, so snapshots stay what they are
    other keys    frames are opened, proven, and sealed anew; maps and snapshots are made again

What is there already is not copied again, and a copy that was cut is taken up like a backup.  A damaged chunk is an
error that names it: damage is never handed on.  ``salvage`` copies what is left of damaged snapshots with ``keep``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.references import parse
from ferrotype.errors import DeviceError, IntegrityError, MissingChunk, ObjectMissing, StoreError, UsageError
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository import snapshots as records
from ferrotype.repository.chunkmap import PAGE_SIZE, ChunkMap, MapBuilder
from ferrotype.repository.index import keys_of
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer, open_writer
from ferrotype.units import KiB, MiB

SALVAGED: Final = "salvaged"  # tag of a snapshot of which something is lost
_BATCH: Final = MiB  # bytes of frames a worker reads and proves at a time
_GAP: Final = 64 * KiB  # bytes read for nothing rather than reading twice
_FOLD: Final = 1 << 20  # chunks gathered before what stands twice is left out

Ids = NDArray[np.void]
T = TypeVar("T")
_LOST: Final = (IntegrityError, StoreError, DeviceError)


@dataclass(slots=True)
class CopyResult:
    """What was, or would be, done."""

    copied: list[Snapshot] = field(default_factory=list)  # as the target has them now
    originals: list[str] = field(default_factory=list)  # their ids in the source
    skipped: list[Snapshot] = field(default_factory=list)  # the target had them
    chunks: int = 0  # put into the target, or to be put: then an upper bound where they are sealed anew
    stored_bytes: int = 0
    sealed_anew: bool = False  # the target has other keys


def chosen(text: str, more: Sequence[str] = ()) -> tuple[Path, list[str]]:
    """The image that ``IMAGE`` or ``IMAGE::SNAPSHOT`` names, and the snapshots; none are named where all are meant.

    Raises UsageError for a reference to less than a snapshot.
    """
    reference = parse(text)
    if reference.disk or reference.partition:
        raise UsageError(f"{text}: whole snapshots are copied; name no disk and no partition")
    return reference.path, list(dict.fromkeys([*([reference.snapshot] if reference.snapshot else ()), *more]))


def copy(
    source: Repository,
    snapshots: Sequence[Snapshot],
    target: Repository,
    job: Job,
    *,
    dry_run: bool = False,
    workers: int = 0,
) -> CopyResult:
    """Copy snapshots of ``source`` into ``target``, which is open for writing, oldest first.

    Each is committed on its own.  Raises IntegrityError naming what is damaged; what was committed until then stays.
    """
    result = CopyResult(sealed_anew=not source.sealer.has_keys_of(target.sealer))
    there = {_identity(snapshot): snapshot for snapshot in target.snapshots()}
    wanted: list[Snapshot] = []
    pairs = []
    if result.sealed_anew:  # what the target has of other snapshots need not be opened again
        pairs = [(old, there[_identity(old)]) for old in source.snapshots() if _identity(old) in there]
    for snapshot in sorted({s.id: s for s in snapshots}.values(), key=lambda s: (s.created, s.id)):
        (result.skipped if _identity(snapshot) in there else wanted).append(snapshot)
    job.begin("finding what is to be copied")
    chunks, total = _weigh(source, wanted, target, job, anew=result.sealed_anew)
    if dry_run:
        result.copied, result.originals = wanted, [snapshot.id for snapshot in wanted]
        result.chunks, result.stored_bytes = chunks, total
        return result
    if not wanted:
        return result
    try:
        with open_writer(target) as writer:
            copier = _Copier(source, target, writer, job, workers or len(os.sched_getaffinity(0)), pairs)
            job.begin("copying", total)
            for snapshot in wanted:
                if result.sealed_anew:
                    result.copied.append(copier.anew(snapshot))
                else:
                    result.copied.append(copier.as_it_is(snapshot))
                result.originals.append(snapshot.id)
            result.chunks, result.stored_bytes = copier.chunks, writer.stored
    finally:
        target.forget_index()
    return result


def keep(source: Repository, snapshot: Snapshot, target: Repository, job: Job, *, workers: int = 0) -> Snapshot:
    """Copy what can be read of a damaged snapshot; what cannot is zeros, and recorded as unreadable.

    The new snapshot is tagged ``salvaged`` and names the old one as its parent.
    """
    try:
        with open_writer(target) as writer:
            copier = _Copier(source, target, writer, job, workers or len(os.sched_getaffinity(0)), [])
            return copier.anew(snapshot, damaged=True)
    finally:
        target.forget_index()


def _identity(snapshot: Snapshot) -> tuple[object, ...]:
    """What stays the same when a snapshot is sealed under other keys."""
    disks = tuple((disk.name, disk.size) for disk in snapshot.disks)
    return snapshot.unique, snapshot.created, snapshot.host, snapshot.name, disks, SALVAGED in snapshot.tags


# ---------------------------------------------------------------------- how much


def _weigh(
    source: Repository, snapshots: Sequence[Snapshot], target: Repository, job: Job, *, anew: bool
) -> tuple[int, int]:
    """Number and stored bytes of the chunks that the target lacks; eight bytes of memory for each."""
    if anew:
        sizes = [_size(source, disk, job) for snapshot in snapshots for disk in snapshot.disks]
        return sum(chunks for chunks, _ in sizes), sum(size for _, size in sizes)
    seen: set[bytes] = set()
    keys = np.zeros(0, np.uint64)
    lengths = np.zeros(0, np.int64)
    fresh: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []

    def fold() -> None:
        nonlocal keys, lengths, fresh
        keys, first = np.unique(np.concatenate([keys, *(k for k, _ in fresh)]), return_index=True)
        lengths = np.concatenate([lengths, *(n for _, n in fresh)])[first]
        fresh = []

    for snapshot in snapshots:
        with _telling(snapshot):
            for ids in _needed(source, snapshot, seen):
                missing = ids[target.locate_many(ids)[0] < 0]
                fresh.append((keys_of(missing), source.locate_many(missing)[2]))
                if sum(len(k) for k, _ in fresh) > _FOLD:
                    fold()
                job.advance(0)
    fold()
    return len(keys), int(lengths.sum())


def _size(source: Repository, disk: DiskRecord, job: Job) -> tuple[int, int]:
    """Chunks and map pages of a disk, and the bytes of both before compression."""
    chunks = pages = 0
    for region in disk.regions:
        for page in source.map(disk, region).walk(lambda _: False):
            pages += 1
            if page.ids is not None and page.level == 0:
                chunks += int((page.ids != np.void(ZERO_ID)).sum())
            job.advance(0)
    return chunks + pages, chunks * disk.chunk_size + pages * PAGE_SIZE


def _needed(source: Repository, snapshot: Snapshot, seen: set[bytes]) -> Iterator[Ids]:
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
def _telling(snapshot: Snapshot) -> Iterator[None]:
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
class _Run:
    """Frames of one pack that are read together, ascending."""

    pack: str
    frames: tuple[tuple[ChunkId, int, int], ...]  # id, offset, length


@dataclass(frozen=True, slots=True)
class _Cells:
    """Neighbouring cells of a map; ``known`` are those whose new id is known already, elsewhere the zero id."""

    first: int
    ids: tuple[bytes, ...]
    known: tuple[bytes, ...]
    runs: tuple[_Run, ...]


@dataclass(frozen=True, slots=True)
class _Sealed:
    """New ids of cells, and the frames of those that are new."""

    first: int
    ids: bytes
    new: tuple[tuple[ChunkId, bytes], ...]
    lost: tuple[int, ...]  # cells
    cells: int  # that are not zeros


class _Copier:
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
        with _telling(snapshot):
            for frames in map_ordered(self._proven, self._missing(snapshot), workers=self._workers):
                for chunk_id, frame in frames:
                    self.chunks += self._writer.add(chunk_id, frame)
                self._job.advance(sum(len(frame) for _, frame in frames))
            name = records.PREFIX + snapshot.id
            frame = self._source.store.get(name)
            self._source.sealer.unseal_object(name, frame)
        return self._writer.commit_copy(snapshot, frame)

    def _missing(self, snapshot: Snapshot) -> Iterator[_Run]:
        for ids in _needed(self._source, snapshot, self._seen):
            missing = ids[self._target.locate_many(ids)[0] < 0]
            self._job.advance(0)
            yield from _runs(self._source, [i.tobytes() for i in missing if i.tobytes() not in self._writer])

    def _proven(self, run: _Run) -> list[tuple[ChunkId, bytes]]:
        """An encrypted frame is proven by its tag; a plain one has to be decoded for that."""
        sealer = self._source.sealer
        prove = sealer.authenticate if sealer.encrypted else sealer.unseal

        def proven(chunk_id: ChunkId, frame: memoryview) -> tuple[ChunkId, bytes]:
            prove(chunk_id, frame)
            return chunk_id, bytes(frame)

        return [_twice(self._source, chunk_id, frame, proven) for chunk_id, frame in _frames(self._source, run)]

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
            with _telling(snapshot):
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
        step = max(1, _BATCH // disk.chunk_size)
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
                runs = tuple(_runs(self._source, todo, lenient=damaged))
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
                for chunk_id, frame in (_left if damaged else _frames)(self._source, run):
                    try:
                        fresh[chunk_id], sealed = _twice(self._source, chunk_id, frame, self._sealed_anew)
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
        except _LOST:
            pass
    return out


def _runs(source: Repository, wanted: Sequence[bytes], *, lenient: bool = False) -> Iterator[_Run]:
    """Where the chunks stand, in the order of packs.  Raises MissingChunk, unless ``lenient``."""
    if not wanted:
        return
    ids = np.frombuffer(b"".join(dict.fromkeys(wanted)), f"V{ID_SIZE}")
    number, offset, length, packs = source.locate_many(ids)
    if not lenient and (number < 0).any():
        raise MissingChunk(ids[int(np.argmin(number))].tobytes())
    order = np.lexsort((offset, number))
    frames: list[tuple[ChunkId, int, int]] = []
    current, begin, end = -1, 0, 0
    for at in order[number[order] >= 0].tolist():
        pack, start, size = int(number[at]), int(offset[at]), int(length[at])
        if frames and (pack != current or start - end > _GAP or start + size - begin > _BATCH):
            yield _Run(packs[current], tuple(frames))
            frames = []
        if not frames:
            current, begin = pack, start
        frames.append((ChunkId(ids[at].tobytes()), start, size))
        end = start + size
    if frames:
        yield _Run(packs[current], tuple(frames))


def _frames(source: Repository, run: _Run) -> Iterator[tuple[ChunkId, memoryview]]:
    """The frames of a run, read in one call."""
    base = run.frames[0][1]
    end = max(offset + length for _, offset, length in run.frames)
    try:
        data = memoryview(source.store.get(run.pack, base, end - base))
    except ObjectMissing:  # a writer has pruned it meanwhile: what is needed stands elsewhere
        source.refresh()
        for chunk_id, _, _ in run.frames:
            at = source.locate(chunk_id)
            yield chunk_id, memoryview(source.store.get(at.pack, at.offset, at.length))
        return
    for chunk_id, offset, length in run.frames:
        yield chunk_id, data[offset - base : offset - base + length]


def _twice(source: Repository, chunk_id: ChunkId, frame: memoryview, work: Callable[[ChunkId, memoryview], T]) -> T:
    """What ``work`` makes of a frame; of one that a writer has moved meanwhile, from where it stands now."""
    try:
        return work(chunk_id, frame)
    except IntegrityError:
        source.refresh()
        at = source.locate(chunk_id)
        return work(chunk_id, memoryview(source.store.get(at.pack, at.offset, at.length)))


def _left(source: Repository, run: _Run) -> Iterator[tuple[ChunkId, memoryview]]:
    """The frames of a run that can be read, each on its own where they cannot together."""
    try:
        yield from list(_frames(source, run))
    except _LOST:
        for chunk_id, offset, length in run.frames:
            try:
                yield chunk_id, memoryview(source.store.get(run.pack, offset, length))
            except _LOST:
                continue


def joined(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length), ascending, neighbours as one."""
    out: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        if out and start <= sum(out[-1]):
            first, so_far = out.pop()
            out.append((first, max(so_far, start + length - first)))
        else:
            out.append((start, length))
    return out
