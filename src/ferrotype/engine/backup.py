"""Back up: source -> survey -> plan -> workers read, hash and seal -> one thread stores -> the snapshot commits it.

Each cell of the chunk grid is decided once: zero, the same as in the parent, stored already, or new.  Only new ones
are compressed and sealed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np

from ferrotype.block.lenient import Lenient, joined
from ferrotype.engine import unreadable
from ferrotype.engine.batches import BatchSealer, Tally
from ferrotype.engine.prepare import NamedSource, PreparedDisk, described, prepare, warn_of_clock
from ferrotype.engine.space import warn_of_backup
from ferrotype.extents import Offsets, State
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.repository.chunkmap import MapBuilder
from ferrotype.repository.sealing import ZERO_ID, ChunkId
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot, Statistics, next_order
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import Writer, open_writer
from ferrotype.units import format_size
from ferrotype.version import PROGRAM


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How to back up."""

    all_sectors: bool = False
    exclude_swap_files: bool = False
    name: str | None = None
    tags: tuple[str, ...] = ()
    workers: int = 0  # 0: one each processor
    verify_after: bool = False  # read back and prove what was stored before it is committed
    prove_free: bool = False  # prove what is left out before anything is stored
    becomes: Path | None = None  # what a new image is called that has a hidden name so far


def backup(repository: Repository, sources: Sequence[NamedSource], options: BackupOptions, job: Job) -> Snapshot:
    """Back up the sources into one new snapshot, and return it once it is durable.

    Raises Cancelled, DeviceError, WriteError ...; what was stored until then is kept for the next backup to use.
    """
    began = time.monotonic()
    known = repository.snapshots()
    prepared = prepare(
        repository,
        sources,
        job,
        known=known,
        all_sectors=options.all_sectors,
        exclude_swap_files=options.exclude_swap_files,
        prove_free=options.prove_free,
    )
    warn_of_backup(repository, prepared, job, options.becomes)
    with _fresh_index(repository), open_writer(repository, from_medium=options.verify_after) as writer:
        if writer.adopted:
            job.note(f"a backup that was cut is taken up again: {writer.adopted} chunks of it are used")
        total = Tally()
        records, reasons, said = [], dict[str, str](), dict[str, str]()
        for disk in prepared:
            job.begin(f"backing up {disk.named.name}", disk.plan.data_bytes)
            worker = BatchSealer(repository, writer, disk, job)
            record, tally = _backup_disk(worker, writer, disk, options, job)
            data = disk.plan.data
            unreadable.refuse_nothing(
                record.name, _lost(worker.source.found, data), disk.plan.data_bytes, worker.source.reason
            )
            records.append(record)
            reasons[record.name] = worker.source.reason
            said[record.name] = unreadable.EITHER if worker.source.known else unreadable.NOW
            total.add(tally)
        job.begin("reading back and committing" if options.verify_after else "committing")
        free, zero = _left_out(prepared, total)
        statistics = Statistics(
            disk_bytes=sum(disk.survey.size for disk in prepared),
            read_bytes=total.read,
            free_bytes=free,
            zero_bytes=zero,
            deduplicated_bytes=total.deduplicated,
            new_bytes=total.new,
            chunks=total.chunks,
            new_chunks=total.new_chunks,
            seconds=round(time.monotonic() - began, 3),
        )
        parents = [disk.parent[0].id for disk in prepared if disk.parent]
        created = datetime.now(UTC)
        snapshot = writer.commit(
            Snapshot(
                created=created,
                host=socket.gethostname(),
                name=options.name or ", ".join(disk.named.name for disk in prepared),
                disks=tuple(records),
                tags=options.tags,
                parent=parents[0] if parents else None,
                program=PROGRAM,
                statistics=statistics,
                unique=os.urandom(8).hex(),
                order=next_order(known, created),
            ),
            {disk.named.name: disk.parent[1] for disk in prepared if disk.parent},
        )
    warn_of_clock(snapshot, known, prepared, job)
    for record in records:
        unreadable.tell(
            record.name,
            record.unreadable,
            job,
            sector=record.sector_size,
            what=said[record.name],
            reason=reasons.get(record.name, ""),
        )
    return snapshot


@contextmanager
def _fresh_index(repository: Repository) -> Iterator[None]:
    """However the block ends, what it stored is found afterwards."""
    try:
        yield
    finally:
        repository.forget_index()


# ---------------------------------------------------------------------- one disk


def _backup_disk(
    worker: BatchSealer, writer: Writer, disk: PreparedDisk, options: BackupOptions, job: Job
) -> tuple[DiskRecord, Tally]:
    workers = options.workers or len(os.sched_getaffinity(0))
    tally = Tally()
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
    record = msgspec.structs.replace(
        described(disk.named, disk.identity, disk.survey),
        chunk_size=disk.plan.chunk_size,
        regions=regions,
        all_sectors=options.all_sectors,
        volumes=tuple(_recorded(disk)),
        unreadable=tuple(
            joined([*_lost(worker.source.found, disk.plan.data), *_known(worker.source, disk, options)])
        ),
    )
    return record, tally


def _left_out(prepared: Sequence[PreparedDisk], total: Tally) -> tuple[int, int]:
    """Bytes of free space, and zeros, that were not stored: with those that were, they are all of the disks.

    What lies beside data in its cell was read and stored with it.
    """
    beside = total.read - sum(disk.plan.data_bytes for disk in prepared)
    zero = sum(disk.plan.zero_bytes for disk in prepared) + total.zero - beside
    free = sum(disk.plan.free_bytes for disk in prepared)
    return max(free + min(zero, 0), 0), max(zero, 0)


def _recorded(disk: PreparedDisk) -> Iterator[dict[str, object]]:
    """The volumes as the snapshot keeps them, with what was proven of each."""
    proofs = {id(proof.volume): proof for proof in disk.proofs if proof.proven}
    for volume in disk.survey.volumes:
        proof = proofs.get(id(volume))
        said = {} if proof is None else {"proven": {"files": proof.files, "free_bytes": proof.free_bytes}}
        yield volume.as_json() | said


def _known(source: Lenient, disk: PreparedDisk, options: BackupOptions) -> list[tuple[int, int]]:
    """What the source itself knows to be missing, as far as it is kept: zeros that are known, too."""
    if not source.known:
        return []
    free = State.DATA if options.all_sectors else State.FREE
    kept = disk.survey.extents.runs(free, present=False) if free else (np.zeros(1, np.int64), np.array([source.size]))
    return _lost(source.known, kept)


def _lost(ranges: list[tuple[int, int]], data: tuple[Offsets, Offsets]) -> list[tuple[int, int]]:
    """The (start, length) that could not be read and hold data, neighbours joined; nobody misses free space."""
    lost: list[tuple[int, int]] = []
    for start, length in sorted(ranges):
        end = start + length
        low = int(np.searchsorted(data[1], start, "right"))
        high = int(np.searchsorted(data[0], end, "left"))
        for data_start, data_end in zip(data[0][low:high].tolist(), data[1][low:high].tolist(), strict=True):
            first, last = max(start, data_start), min(end, data_end)
            if lost and sum(lost[-1]) == first:
                first = lost.pop()[0]
            lost.append((first, last - first))
    return lost


def summary(snapshot: Snapshot) -> str:
    """One line a person understands."""
    s = snapshot.statistics
    parts = [f"read {format_size(s.read_bytes)} of {format_size(s.disk_bytes)} in {s.seconds:.1f} s"]
    parts.append(f"stored {format_size(s.stored_bytes)}")
    saved = [(s.free_bytes, "free space"), (s.zero_bytes, "zeros"), (s.deduplicated_bytes, "known data")]
    saved.append((s.new_bytes - s.stored_bytes, "compression"))
    told = [f"{format_size(size)} {what}" for size, what in saved if size > 0]
    return "; ".join(parts) + (f"; saved by {', '.join(told)}" if told else "")
