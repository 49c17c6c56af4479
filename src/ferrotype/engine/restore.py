"""Restore: snapshot -> chunks in the order of the disk -> sink; zeros as the target allows.

for each stretch of the disk
    known zeros      left alone on a blank target, else holes, discards or zeroing
    chunks           located many at a time, read from the pack in long runs, proven, written in long runs
    delta            the target is read and hashed first, and only what differs is written

Workers do all but the writing; one thread writes, in the order of the disk, since the kernel lets a single write at a
time into a file.  To sinks that are ``concurrent``, such as devices, the workers write.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Sink, Source
from ferrotype.block.device import aligned_buffer
from ferrotype.block.lenient import clipped
from ferrotype.block.views import Slice
from ferrotype.engine.larger import remove_leftovers, settle_table
from ferrotype.engine.readback import check_content, check_pieces
from ferrotype.engine.starts import tell_of_start
from ferrotype.engine.targets import check_takes
from ferrotype.engine.unreadable import BEFORE, tell
from ferrotype.errors import CorruptChunk, IntegrityError, MissingChunk
from ferrotype.extents import State
from ferrotype.filesystems.signatures import Mark
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region
from ferrotype.repository.source import SnapshotSource, lost_at
from ferrotype.repository.store import Repository
from ferrotype.units import MiB, format_size
from ferrotype.volumes.relocate import moved_backup

T = TypeVar("T")

_BATCH: Final = 2 * MiB  # bytes of the disk a worker restores at a time
_LOOKUP: Final = 1 << 18  # chunks located together: so many touch each page of a large index, which is swept seldom


class ManySink(Protocol):
    """A sink that takes adjacent pieces in one call."""

    def write_many(self, offset: int, parts: list[bytes], /) -> None: ...


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore."""

    no_blank: bool = False  # the target is known to be zero: do not zero it
    delta: bool = False  # read the target first and write what differs
    workers: int = 0
    verify_after: bool = False  # read back from the medium what was written, and compare it with the snapshot
    move_backup_table: bool = True  # put the backup GPT at the end of a larger target


@dataclass(slots=True)
class RestoreResult:
    """What was done, in bytes of the target."""

    disk_bytes: int = 0
    written_bytes: int = 0
    zeroed_bytes: int = 0
    kept_bytes: int = 0  # already right on the target
    table_moved: bool = False
    removed: list[Mark] = field(default_factory=list)  # metadata of former owners, behind what was restored
    seconds: float = 0.0
    verified: bool = False  # it was read back
    unreadable: Sequence[
        tuple[int, int]
    ] = ()  # (start on the target, length) that are zeros for want of what stood there


@dataclass(frozen=True, slots=True)
class Part:
    """What is restored: a stretch of a disk of a snapshot, all of it or one partition."""

    repository: Repository
    disk: DiskRecord
    start: int
    length: int

    @property
    def unreadable(self) -> list[tuple[int, int]]:
        """What of it could not be read when the backup was made: start on the disk, and length."""
        return clipped(self.disk.unreadable, self.start, self.length)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk's place on the target and in the image; ``skip`` bytes of it lie before the part."""

    chunk_id: ChunkId
    target: int
    length: int
    skip: int
    pack: str
    offset: int
    stored: int


def check_target(part: Part, target: Source | Sink) -> None:
    """Raises Refused where the target cannot take the part."""
    check_takes(target, part.length, part.disk.sector_size)


def restore(
    part: Part,
    sink: Sink,
    options: RestoreOptions,
    job: Job,
    *,
    target: Source | None = None,
    reread: Callable[[], Source] | None = None,
    what: Path = Path("the target"),
) -> RestoreResult:
    """Write ``part`` to the start of ``sink`` and flush it.

    ``target`` reads what the sink writes to; ``delta`` needs it.  ``reread`` opens what was written as the medium
    gives it back; ``verify_after`` needs it, and ``what`` the target is called.  Raises Refused before the first
    write where the target does not fit, MissingChunk or CorruptChunk where the image is damaged, and WriteError
    where something does not read back.
    """
    began = time.monotonic()
    check_target(part, sink)
    job.begin("restoring", part.length)
    worker = _Worker(part, sink, options, target if options.delta else None)
    workers = options.workers or len(os.sched_getaffinity(0)) + 1
    result = RestoreResult(disk_bytes=part.length)
    done = 0
    for found in map_ordered(worker, _batches(part), workers=workers):
        worker.write(found)
        result.written_bytes += found.written
        result.kept_bytes += found.kept
        result.zeroed_bytes += found.zeroed
        job.advance(found.end - done)
        done = found.end
    if options.verify_after and reread is not None:  # before the table moves
        with closing(reread()) as back:
            check_content(Slice(SnapshotSource(part.repository, part.disk), part.start, part.length), back, what, job)
        result.verified = True
    if target is not None:  # before the table moves: it may stand where they did
        result.removed = remove_leftovers(part.length, sink, target, job)
    if options.move_backup_table and part.length == part.disk.size and sink.size > part.length:
        whole = SnapshotSource(part.repository, part.disk)
        result.table_moved = settle_table(whole, sink, part.disk.sector_size, job, target=target)
    job.begin("flushing")
    sink.flush()
    if result.verified and result.table_moved and reread is not None:
        with closing(reread()) as back:
            whole = SnapshotSource(part.repository, part.disk)
            check_pieces(moved_backup(whole, sink.size, part.disk.sector_size), back, what)
    if target is not None:
        tell_of_start(target, job)
        if sink.size > part.length:
            rest = format_size(sink.size - part.length)
            job.note(f"the target is larger by {rest}; what it held there stays, but for what could claim the disk")
    result.seconds = time.monotonic() - began
    result.unreadable = [(start - part.start, length) for start, length in part.unreadable]
    say_what_was_lost(part, job)
    return result


def say_what_was_lost(part: Part, job: Job) -> None:
    """The zeros that stand for what the backup could not read, or salvage could not save, are no content."""
    tell(part.disk.name, part.unreadable, job, sector=part.disk.sector_size, what=BEFORE)


# ---------------------------------------------------------------------- what goes where


@dataclass(frozen=True, slots=True)
class _Zeros:
    target: int
    length: int


def _batches(part: Part) -> Iterator[list[_Piece] | _Zeros]:
    """All of the part, ascending: runs of chunks of about ``_BATCH`` bytes, and the zeros between."""
    at = part.start
    batch: list[_Piece] = []
    size = 0
    for piece in _pieces(part):
        start = part.start + piece.target
        if batch and (start > at or size >= _BATCH):
            yield batch
            batch, size = [], 0
        if start > at:
            yield _Zeros(at - part.start, start - at)
        batch.append(piece)
        size += piece.length
        at = start + piece.length
    if batch:
        yield batch
    end = part.start + part.length
    if at < end:
        yield _Zeros(at - part.start, end - at)


def _pieces(part: Part) -> Iterator[_Piece]:
    """Every stored chunk of the part, ascending by target."""
    end = part.start + part.length
    for region in part.disk.regions:
        low, high = max(region.start, part.start), min(region.start + region.length, end)
        if low < high:
            yield from _region_pieces(part, region, low, high)


def _region_pieces(part: Part, region: Region, low: int, high: int) -> Iterator[_Piece]:
    size = part.disk.chunk_size
    first, last = (low - region.start) // size, -(-(high - region.start) // size)
    for cells, ids in _telling_where(part, low, high, _gathered(part.repository, part.disk, region, first, last)):
        packs, offsets, lengths, names = part.repository.locate_many(ids)
        columns = (cells.tolist(), packs.tolist(), offsets.tolist(), lengths.tolist())
        for i, (cell, pack, offset, length) in enumerate(zip(*columns, strict=True)):
            chunk_id = ChunkId(ids[i].tobytes())
            start = region.start + cell * size
            from_, to = max(start, low), min(start + size, high)
            if pack < 0:
                missing = part.repository.explained(MissingChunk(chunk_id), part.disk)
                if isinstance(missing, IntegrityError):
                    missing = lost_at(
                        missing, part.repository, part.disk, [(chunk_id, from_, to - from_)], (low, high - low)
                    )
                raise missing
            yield _Piece(chunk_id, from_ - part.start, to - from_, from_ - start, names[pack], offset, length)


def _telling_where(part: Part, low: int, high: int, found: Iterator[T]) -> Iterator[T]:
    """What is found of the maps of [low, high) on the disk; a page that is lost costs a part of that."""
    try:
        yield from found
    except IntegrityError as error:
        raise lost_at(error, part.repository, part.disk, (), (low, high - low)) from None


def _gathered(
    repository: Repository, disk: DiskRecord, region: Region, first: int, last: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.void]]]:
    """Cells that are not zero, and their ids, many pages at a time."""
    cells: list[NDArray[np.int64]] = []
    ids: list[NDArray[np.void]] = []
    count = 0
    for cell, page in repository.map(disk, region).pages(first, last - first):
        used = np.flatnonzero(page != np.void(ZERO_ID))
        cells.append(used + cell)
        ids.append(page[used])
        count += len(used)
        if count >= _LOOKUP:
            yield np.concatenate(cells), np.concatenate(ids)
            cells, ids, count = [], [], 0
    if cells:
        yield np.concatenate(cells), np.concatenate(ids)


# ---------------------------------------------------------------------- doing it


@dataclass(slots=True)
class _Found:
    """What a batch comes to, and what is still to be written of it; bytes and offsets of the target."""

    end: int
    kept: int = 0
    written: int = 0
    zeroed: int = 0
    runs: list[tuple[int, list[bytes]]] = field(default_factory=list)  # offset, and parts that follow each other
    zeros: list[tuple[int, int]] = field(default_factory=list)  # offset, length


class _Worker:
    """Finds what batches are to hold; called from many threads."""

    def __init__(self, part: Part, sink: Sink, options: RestoreOptions, target: Source | None) -> None:
        self._part = part
        self._sealer = part.repository.sealer
        self._sink = sink
        self._many = cast("ManySink | None", sink if hasattr(sink, "write_many") else None)
        self._leave_zeros = options.no_blank or sink.traits.blank
        self._target = target
        self._local = threading.local()

    def __call__(self, batch: list[_Piece] | _Zeros) -> _Found:
        found = self._zeros(batch) if isinstance(batch, _Zeros) else self._chunks(batch)
        if self._sink.traits.concurrent:
            self.write(found)
        return found

    def write(self, found: _Found) -> None:
        """Write what is still to be written."""
        for offset, parts in found.runs:
            self._write(offset, parts)
        for offset, length in found.zeros:
            self._sink.write_zeros(offset, length)
        found.runs, found.zeros = [], []

    def _chunks(self, batch: list[_Piece]) -> _Found:
        wanted, kept = (batch, 0) if self._target is None else self._differing(self._target, batch)
        found = _Found(batch[-1].target + batch[-1].length, kept)
        for run in _adjacent(wanted):
            found.runs.append((run[0].target, list(self._plain(run))))
            found.written += sum(piece.length for piece in run)
        return found

    def _zeros(self, zeros: _Zeros) -> _Found:
        end = zeros.target + zeros.length
        if self._leave_zeros:
            return _Found(end)
        if self._target is None:
            return _Found(end, zeroed=zeros.length, zeros=[(zeros.target, zeros.length)])
        found = _Found(end)
        starts, ends = self._target.extents(zeros.target, zeros.length).runs(State.ZERO, present=False)
        for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
            for at in range(start, stop, _BATCH):
                length = min(_BATCH, stop - at)
                if not self._is_zero(self._target, at, length):
                    found.zeros.append((at, length))
                    found.zeroed += length
        found.kept = zeros.length - found.zeroed
        return found

    def _is_zero(self, target: Source, at: int, length: int) -> bool:
        view = self._buffer(length)
        target.read_into(at, view)
        return not np.frombuffer(view, np.uint8).any()

    def _differing(self, target: Source, batch: list[_Piece]) -> tuple[list[_Piece], int]:
        """The pieces the target does not hold yet, and the bytes of the others."""
        start, end = batch[0].target, batch[-1].target + batch[-1].length
        view = self._buffer(end - start)
        target.read_into(start, view)
        wanted = []
        for piece in batch:
            content = view[piece.target - start : piece.target - start + piece.length]
            if piece.skip or self._sealer.id_of(content) != piece.chunk_id:
                wanted.append(piece)
        return wanted, (end - start) - sum(piece.length for piece in wanted)

    def _plain(self, run: list[_Piece]) -> Iterator[bytes]:
        """What the pieces of a run hold on the disk."""
        part = self._part
        try:
            for piece, plain in zip(run, part.repository.chunks(run, part.disk), strict=True):
                if len(plain) < piece.skip + piece.length:
                    raise CorruptChunk(piece.chunk_id, "it is shorter than its place on the disk")
                exact = piece.skip == 0 and len(plain) == piece.length
                yield plain if exact else plain[piece.skip : piece.skip + piece.length]
        except IntegrityError as error:
            places = ((piece.chunk_id, part.start + piece.target, piece.length) for piece in run)
            whole = part.start + run[0].target, sum(piece.length for piece in run)
            raise lost_at(error, part.repository, part.disk, places, whole) from None

    def _write(self, offset: int, parts: list[bytes]) -> None:
        if self._many is not None:
            self._many.write_many(offset, parts)
            return
        for part in parts:
            self._sink.write(offset, memoryview(part))
            offset += len(part)

    def _buffer(self, length: int) -> memoryview:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._local.buffer = aligned_buffer(length)
        return buffer[:length]


def _adjacent(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Runs of pieces that follow each other on the target."""
    run: list[_Piece] = []
    for piece in pieces:
        if run and run[-1].target + run[-1].length != piece.target:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run
