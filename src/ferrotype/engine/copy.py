"""Copy snapshots from one image to another.

    same keys     frames move as they are, each proven on the way; ids stay, so snapshots stay what they are
    other keys    frames are opened, proven, and sealed anew; maps and snapshots are made again

What is there already is not copied again, and a copy that was cut is taken up like a backup.  A damaged chunk is an
error that names it: damage is never handed on.  ``salvage`` copies what is left of damaged snapshots with ``keep``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.engine.copier import SALVAGED, Copier, needed, telling
from ferrotype.engine.references import parse
from ferrotype.errors import UsageError
from ferrotype.job import Job
from ferrotype.repository.chunkmap import PAGE_SIZE
from ferrotype.repository.sealing import ZERO_ID
from ferrotype.repository.segments import keys_of
from ferrotype.repository.snapshots import DiskRecord, Snapshot, ordered
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer

_FOLD: Final = 1 << 20  # chunks gathered before what stands twice is left out


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
    for snapshot in ordered(snapshots):
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
            copier = Copier(source, target, writer, job, workers or len(os.sched_getaffinity(0)), pairs)
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
            copier = Copier(source, target, writer, job, workers or len(os.sched_getaffinity(0)), [])
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
        with telling(snapshot):
            for ids in needed(source, snapshot, seen):
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
