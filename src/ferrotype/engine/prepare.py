"""Before a backup: which disk it is, what will be read of it, and what the last backup of it knows."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from ferrotype.block import Source
from ferrotype.engine.plan import DiskPlan, plan
from ferrotype.engine.prove import Proof, believe, prove, require
from ferrotype.engine.same_disks import Disks, Looks
from ferrotype.engine.survey import Survey, survey
from ferrotype.errors import UsageError
from ferrotype.job import Job
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.repository.store import Repository


@dataclass(frozen=True, slots=True)
class NamedSource:
    """A disk to back up, and what is known of it besides its bytes."""

    source: Source
    name: str  # how the snapshot will call it
    described: str  # what the user named
    model: str = ""
    serial: str = ""
    whole: bool = True  # a whole disk; the serial number of a part is that of the disk, with #NUMBER behind it
    machine: str = ""
    path: str = ""
    file: str = ""
    sector_size: int | None = None  # what the user said, if anything


@dataclass(frozen=True, slots=True)
class PreparedDisk:
    """A disk that was looked at: what will be read, and what the last backup of it knows."""

    named: NamedSource
    survey: Survey
    plan: DiskPlan
    identity: str
    parent: tuple[Snapshot, DiskRecord] | None
    proofs: tuple[Proof, ...] = ()  # of what is left out, where they were asked for


def prepare(
    repository: Repository,
    sources: Sequence[NamedSource],
    job: Job,
    *,
    all_sectors: bool = False,
    exclude_swap_files: bool = False,
    known: Sequence[Snapshot] | None = None,
    prove_free: bool = False,
) -> list[PreparedDisk]:
    """Look at each source and decide what will be read; tells the user what is kept whole and why.

    ``known`` are the snapshots of the repository, where they were read already.
    What is left out is proven by a second way (``prove``).  A volume where that fails is kept whole, and told; with
    ``prove_free`` it raises InvalidImage.
    """
    if len({named.name for named in sources}) < len(sources):
        raise UsageError("two sources have the same name; back them up one by one")
    known = repository.snapshots() if known is None else known
    told_apart = Disks(known)
    prepared = []
    for named in sources:
        job.begin(f"looking at {named.name}")
        surveyed = survey(named.source, sector_size=named.sector_size, exclude_swap_files=exclude_swap_files)
        told = surveyed.told
        for sentence in told.damage if all_sectors else [*told.damage, *told.unclean]:
            job.warn(f"{named.name}: {sentence}")
        for sentence in () if all_sectors else told.notes:
            job.note(f"{named.name}: {sentence}")
        proofs: tuple[Proof, ...] = ()
        if not all_sectors:
            job.begin(f"proving what is left out of {named.name}")
            proofs = prove(named.source, surveyed, job, exclude_swap_files=exclude_swap_files)
            if prove_free:
                require(proofs, named.name, job)
            surveyed = believe(surveyed, proofs, named.name, job)
        identity = _identity(named, surveyed)
        parent = find_parent(known, told_apart, named, identity, surveyed)
        chunk_size = parent[1].chunk_size if parent else repository.config.chunk_size
        planned = plan(surveyed, chunk_size, all_sectors=all_sectors)
        prepared.append(PreparedDisk(named, surveyed, planned, identity, parent, proofs))
    return prepared


def warn_of_clock(snapshot: Snapshot, known: Sequence[Snapshot], prepared: Sequence[PreparedDisk], job: Job) -> None:
    """Say where a new snapshot has an earlier time than those it follows: some clock is wrong."""
    before = [disk.parent[0] for disk in prepared if disk.parent] or list(known[-1:])
    newest = max(before, key=lambda s: s.created, default=snapshot)
    if snapshot.created < newest.created:
        job.warn(
            f"the clock says {snapshot.local_time:%Y-%m-%d %H:%M:%S}, which is before the snapshot that this "
            f"one follows ({newest.id[:8]}, {newest.local_time:%Y-%m-%d %H:%M:%S}): it counts as the newer "
            "one all the same; set the clock, since the rules of forget take hours and days from it"
        )


# ---------------------------------------------------------------------- which disk it is


def _identity(named: NamedSource, surveyed: Survey) -> str:
    """What stays the same when the disk is seen again under another name."""
    if surveyed.table is not None and surveyed.table.disk_id.strip("0-"):
        return f"{surveyed.table.kind}:{surveyed.table.disk_id}"
    if named.serial and named.whole:
        return f"serial:{named.serial}"
    uuids = [volume.uuid for volume in surveyed.volumes if volume.uuid]
    return f"volume:{uuids[0]}" if uuids else ""


def find_parent(
    known: Sequence[Snapshot], told_apart: Disks, named: NamedSource, identity: str, surveyed: Survey
) -> tuple[Snapshot, DiskRecord] | None:
    """The newest snapshot of the same disk; else of one with its identity, such as a clone; else by name and size.

    A wrong guess costs time and nothing else: ids are compared, not trusted.
    """
    host = socket.gethostname()
    record = described(named, identity, surveyed)
    if (same := told_apart.find(Looks.of(host, record))) is not None:
        return same.members[-1]
    for snapshot in reversed(known):
        for disk in snapshot.disks:
            if identity and disk.identity == identity:
                return snapshot, disk
    for snapshot in reversed(known):
        for disk in snapshot.disks:
            if disk.size == surveyed.size and disk.name == named.name:
                return snapshot, disk
    return None


def described(named: NamedSource, identity: str, surveyed: Survey) -> DiskRecord:
    """What a snapshot records of a disk, but for its content."""
    return DiskRecord(
        name=named.name,
        size=surveyed.size,
        sector_size=surveyed.sector_size,
        chunk_size=0,
        regions=(),
        identity=identity,
        source=named.described,
        table=surveyed.table.kind if surveyed.table else None,
        volumes=tuple(volume.as_json() for volume in surveyed.volumes),
        model=named.model,
        serial=named.serial,
        machine=named.machine,
        path=named.path,
        file=named.file,
    )
