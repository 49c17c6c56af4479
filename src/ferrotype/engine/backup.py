"""Back up: source -> survey -> plan -> workers read, hash and seal -> one thread stores -> the snapshot commits it.

Each cell of the chunk grid is decided once: zero, the same as in the parent, stored already, or new.  Only new ones
are compressed and sealed.  Workers share nothing but the source and the index, which they only ask.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source
from ferrotype.block.device import aligned_buffer
from ferrotype.engine.plan import Batch, CellRun, DiskPlan, blank_gaps, plan
from ferrotype.engine.survey import Survey, survey
from ferrotype.errors import IntegrityError, ReadError, UsageError
from ferrotype.extents import Offsets
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository.chunkmap import ChunkMap, MapBuilder
from ferrotype.repository.sealing import ID_SIZE, ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot, Statistics
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer, open_writer
from ferrotype.units import format_size
from ferrotype.version import PROGRAM

_SAMPLE: Final = 4096 // 8  # one 64-bit word of each 4 KiB is looked at before a whole cell is


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How to back up."""

    all_sectors: bool = False
    exclude_swap_files: bool = False
    name: str | None = None
    tags: tuple[str, ...] = ()
    workers: int = 0  # 0: one each processor
    verify_after: bool = False  # read back and prove what was stored before it is committed


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A disk to back up, and what is known of it besides its bytes."""

    source: Source
    name: str  # how the snapshot will call it
    described: str  # what the user named
    model: str = ""
    serial: str = ""


@dataclass(frozen=True, slots=True)
class PreparedDisk:
    """A disk that was looked at: what will be read, and what the last backup of it knows."""

    named: NamedSource
    survey: Survey
    plan: DiskPlan
    identity: str
    parent: tuple[Snapshot, DiskRecord] | None


@dataclass(slots=True)
class _Tally:
    """Counts that become the snapshot's statistics."""

    read: int = 0
    zero: int = 0
    deduplicated: int = 0
    new: int = 0
    chunks: int = 0
    new_chunks: int = 0
    unreadable: list[tuple[int, int]] = field(default_factory=list)

    def add(self, other: _Tally) -> None:
        self.read += other.read
        self.zero += other.zero
        self.deduplicated += other.deduplicated
        self.new += other.new
        self.chunks += other.chunks
        self.new_chunks += other.new_chunks
        self.unreadable += other.unreadable


@dataclass(slots=True)
class _Sealed:
    """What a worker made of a batch."""

    region: int
    ids: list[tuple[int, bytes]]  # first cell, ids
    new: list[tuple[ChunkId, bytes, int]]  # id, frame, plaintext bytes
    tally: _Tally


def prepare(
    repository: Repository, sources: Sequence[NamedSource], options: BackupOptions, job: Job
) -> list[PreparedDisk]:
    """Look at each source and decide what will be read; tells the user what is kept whole and why."""
    if len({named.name for named in sources}) < len(sources):
        raise UsageError("two sources have the same name; back them up one by one")
    known = repository.snapshots()
    prepared = []
    for named in sources:
        job.begin(f"looking at {named.name}")
        surveyed = survey(named.source, exclude_swap_files=options.exclude_swap_files)
        told = surveyed.told
        for sentence in told.damage if options.all_sectors else [*told.damage, *told.unclean]:
            job.warn(f"{named.name}: {sentence}")
        for sentence in () if options.all_sectors else told.notes:
            job.note(f"{named.name}: {sentence}")
        identity = _identity(named, surveyed)
        parent = find_parent(known, named, identity, surveyed.size)
        chunk_size = parent[1].chunk_size if parent else repository.config.chunk_size
        planned = plan(surveyed, chunk_size, all_sectors=options.all_sectors)
        prepared.append(PreparedDisk(named, surveyed, planned, identity, parent))
    return prepared


def backup(repository: Repository, sources: Sequence[NamedSource], options: BackupOptions, job: Job) -> Snapshot:
    """Back up the sources into one new snapshot, and return it once it is durable.

    Raises Cancelled, DeviceError, WriteError ...; what was stored until then is kept for the next backup to use.
    """
    from ferrotype.engine.space import warn_of_backup  # it knows this module

    began = time.monotonic()
    prepared = prepare(repository, sources, options, job)
    warn_of_backup(repository, prepared, job)
    with _fresh_index(repository), open_writer(repository) as writer:
        if writer.adopted:
            job.note(f"a backup that was cut is taken up again: {writer.adopted} chunks of it are used")
        total = _Tally()
        records = []
        for disk in prepared:
            job.begin(f"backing up {disk.named.name}", disk.plan.data_bytes)
            record, tally = _backup_disk(repository, writer, disk, options, job)
            records.append(record)
            total.add(tally)
        job.begin("reading back and committing" if options.verify_after else "committing")
        statistics = Statistics(
            disk_bytes=sum(disk.survey.size for disk in prepared),
            read_bytes=total.read,
            free_bytes=sum(disk.plan.free_bytes for disk in prepared),
            zero_bytes=sum(disk.plan.zero_bytes for disk in prepared) + total.zero,
            deduplicated_bytes=total.deduplicated,
            new_bytes=total.new,
            chunks=total.chunks,
            new_chunks=total.new_chunks,
            seconds=round(time.monotonic() - began, 3),
        )
        parents = [disk.parent[0].id for disk in prepared if disk.parent]
        snapshot = writer.commit(
            Snapshot(
                created=datetime.now(UTC),
                host=socket.gethostname(),
                name=options.name or ", ".join(disk.named.name for disk in prepared),
                disks=tuple(records),
                tags=options.tags,
                parent=parents[0] if parents else None,
                program=PROGRAM,
                statistics=statistics,
                unique=os.urandom(8).hex(),
            ),
            {disk.named.name: disk.parent[1] for disk in prepared if disk.parent},
            from_medium=options.verify_after,
        )
    for record in records:
        for start, length in record.unreadable:
            job.warn(f"{record.name}: {length} bytes at {start} could not be read and are kept as zeros")
    return snapshot


@contextmanager
def _fresh_index(repository: Repository) -> Iterator[None]:
    """However the block ends, what it stored is found afterwards."""
    try:
        yield
    finally:
        repository.forget_index()


# ---------------------------------------------------------------------- which disk it is


def _identity(named: NamedSource, surveyed: Survey) -> str:
    """What stays the same when the disk is seen again under another name."""
    if surveyed.table is not None and surveyed.table.disk_id.strip("0-"):
        return f"{surveyed.table.kind}:{surveyed.table.disk_id}"
    if named.serial:
        return f"serial:{named.serial}"
    uuids = [volume.uuid for volume in surveyed.volumes if volume.uuid]
    return f"volume:{uuids[0]}" if uuids else ""


def find_parent(
    known: Sequence[Snapshot], named: NamedSource, identity: str, size: int
) -> tuple[Snapshot, DiskRecord] | None:
    """The newest snapshot of the same disk: by its identity, else by name and size.

    A wrong guess costs time and nothing else: ids are compared, not trusted.
    """
    for snapshot in reversed(known):
        for disk in snapshot.disks:
            if identity and disk.identity == identity:
                return snapshot, disk
    for snapshot in reversed(known):
        for disk in snapshot.disks:
            if disk.size == size and disk.name == named.name:
                return snapshot, disk
    return None


# ---------------------------------------------------------------------- one disk


def _backup_disk(
    repository: Repository, writer: Writer, disk: PreparedDisk, options: BackupOptions, job: Job
) -> tuple[DiskRecord, _Tally]:
    worker = _Worker(repository, writer, disk)
    workers = options.workers or len(os.sched_getaffinity(0))
    tally = _Tally()
    roots: list[ChunkId] = [ZERO_ID] * len(disk.plan.regions)
    builder: MapBuilder | None = None
    current = -1
    for sealed in map_ordered(worker, worker.jobs(), workers=workers, depth=workers * 3):
        if sealed.region != current:
            if builder is not None:
                roots[current] = builder.finish()
            current = sealed.region
            builder = MapBuilder(disk.plan.cells(current), writer.add_plain)
        for chunk_id, frame, length in sealed.new:
            if writer.add(chunk_id, frame):
                tally.new += length
                tally.new_chunks += 1
            else:
                tally.deduplicated += length
        if builder is not None:
            for first, ids in sealed.ids:
                builder.put(first, ids)
        tally.add(sealed.tally)
        job.advance(sealed.tally.read)
    if builder is not None:
        roots[current] = builder.finish()
    regions = tuple(
        Region(start, length, root.hex()) for (start, length), root in zip(disk.plan.regions, roots, strict=True)
    )
    record = DiskRecord(
        name=disk.named.name,
        size=disk.survey.size,
        sector_size=disk.survey.sector_size,
        chunk_size=disk.plan.chunk_size,
        regions=regions,
        identity=disk.identity,
        source=disk.named.described,
        table=disk.survey.table.kind if disk.survey.table else None,
        all_sectors=options.all_sectors,
        volumes=tuple(volume.as_json() for volume in disk.survey.volumes),
        unreadable=_lost(tally.unreadable, disk.plan.data),
        model=disk.named.model,
    )
    return record, tally


def _lost(unreadable: list[tuple[int, int]], data: tuple[Offsets, Offsets]) -> tuple[tuple[int, int], ...]:
    """The (start, length) that could not be read and hold data, neighbours joined; nobody misses free space."""
    lost: list[tuple[int, int]] = []
    for start, length in sorted(unreadable):
        end = start + length
        low = int(np.searchsorted(data[1], start, "right"))
        high = int(np.searchsorted(data[0], end, "left"))
        for data_start, data_end in zip(data[0][low:high].tolist(), data[1][low:high].tolist(), strict=True):
            first, last = max(start, data_start), min(end, data_end)
            if lost and sum(lost[-1]) == first:
                first = lost.pop()[0]
            lost.append((first, last - first))
    return tuple(lost)


class _Worker:
    """Reads batches and turns them into ids and frames; called from many threads."""

    def __init__(self, repository: Repository, writer: Writer, disk: PreparedDisk) -> None:
        self._sealer = repository.sealer
        self._writer = writer
        self._source = disk.named.source
        self._plan = disk.plan
        self._local = threading.local()
        self._parents = _parent_maps(repository, disk)

    def jobs(self) -> Iterator[tuple[Batch, list[NDArray[np.void] | None]]]:
        """Batches, each with the ids its cells had in the parent."""
        for batch in self._plan.batches():
            yield batch, [self._parent_ids(batch.region, run) for run in batch.runs]

    def __call__(self, job: tuple[Batch, list[NDArray[np.void] | None]]) -> _Sealed:
        batch, parent_ids = job
        out = _Sealed(batch.region, [], [], _Tally())
        for run, known in zip(batch.runs, parent_ids, strict=True):
            view = self._buffer(run.length)
            self._read(run, view, out.tally)
            blank_gaps(view, run.start, self._plan.data)
            out.ids.append((run.first, self._seal_cells(view, known, out)))
        return out

    def _parent_ids(self, region: int, run: CellRun) -> NDArray[np.void] | None:
        parent = self._parents[region]
        if parent is None:
            return None
        count = -(-run.length // self._plan.chunk_size)
        try:
            return parent.ids(run.first, max(0, min(count, parent.cells - run.first)))
        except IntegrityError:  # damage to an old snapshot must not keep a new one from being made
            self._parents[region] = None
            return None

    def _buffer(self, length: int) -> memoryview:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = aligned_buffer(max(length, self._plan.chunk_size))
        return buffer[:length]

    def _read(self, run: CellRun, view: memoryview, tally: _Tally) -> None:
        """Fill ``view``; what the device cannot read becomes zeros and is noted."""
        pending = [(0, run.length)]
        while pending:
            low, high = pending.pop()
            try:
                self._source.read_into(run.start + low, view[low:high])
            except ReadError as error:
                bad = min(max(error.start - run.start, low), high - 1)
                end = min(max(error.start + error.length - run.start, bad + 1), high)
                view[bad:end] = bytes(end - bad)
                tally.unreadable.append((run.start + bad, end - bad))
                pending += [part for part in ((end, high), (low, bad)) if part[0] < part[1]]
        tally.read += run.length

    def _seal_cells(self, view: memoryview, known: NDArray[np.void] | None, out: _Sealed) -> bytes:
        size, sealer, writer, tally = self._plan.chunk_size, self._sealer, self._writer, out.tally
        ids: list[bytes] = []
        zero = _zero_cells(view, size)
        parent = known.tobytes() if known is not None else b""
        for number, at in enumerate(range(0, len(view), size)):
            cell = view[at : at + size]
            if zero[number]:
                ids.append(ZERO_ID)
                tally.zero += len(cell)
                continue
            chunk_id = sealer.id_of(cell)
            ids.append(chunk_id)
            tally.chunks += 1
            if chunk_id == parent[number * ID_SIZE : (number + 1) * ID_SIZE] or chunk_id in writer:
                tally.deduplicated += len(cell)
            else:
                out.new.append((chunk_id, sealer.seal(chunk_id, cell), len(cell)))
        return b"".join(ids)


def _parent_maps(repository: Repository, disk: PreparedDisk) -> list[ChunkMap | None]:
    """For each region of the plan, the parent's map of the region that starts at the same place."""
    if disk.parent is None or disk.parent[1].chunk_size != disk.plan.chunk_size:
        return [None] * len(disk.plan.regions)
    record = disk.parent[1]
    by_start = {region.start: repository.map(record, region) for region in record.regions}
    return [by_start.get(start) for start, _ in disk.plan.regions]


def _zero_cells(view: memoryview, size: int) -> list[bool]:
    """Which cells of ``size`` bytes are all zeros; the last one may be shorter."""
    whole = len(view) // size
    words = np.frombuffer(view[: whole * size], np.uint64).reshape(whole, size // 8)
    likely = np.logical_not(words[:, ::_SAMPLE].any(axis=1))
    zero: list[bool] = likely.tolist()
    for number in np.flatnonzero(likely).tolist():
        zero[number] = not bool(words[number].any())
    if len(view) % size:
        zero.append(bytes(view[whole * size :]).count(0) == len(view) % size)
    return zero


def summary(snapshot: Snapshot) -> str:
    """One line a person understands."""
    s = snapshot.statistics
    parts = [f"read {format_size(s.read_bytes)} of {format_size(s.disk_bytes)} in {s.seconds:.1f} s"]
    parts.append(f"stored {format_size(s.stored_bytes)}")
    saved = [(s.free_bytes, "free space"), (s.zero_bytes, "zeros"), (s.deduplicated_bytes, "known data")]
    saved.append((s.new_bytes - s.stored_bytes, "compression"))
    told = [f"{format_size(size)} {what}" for size, what in saved if size > 0]
    return "; ".join(parts) + (f"; saved by {', '.join(told)}" if told else "")
