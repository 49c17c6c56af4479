"""What a disk is, as data: for ``info`` and ``map``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from ferrotype.block.lenient import known_unreadable
from ferrotype.engine.beside import tell_of_beside
from ferrotype.engine.references import OpenDisk
from ferrotype.engine.survey import Survey, survey
from ferrotype.engine.unreadable import as_json, tell_of_disk
from ferrotype.extents import Extent, State
from ferrotype.formats.mapped import Kind, Run, runs_of
from ferrotype.job import Job


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a disk stands in."""

    path: str
    size: int  # bytes
    stored_size: int  # bytes that it takes up on its medium


@dataclass(frozen=True, slots=True)
class Headers:
    """What is known of a disk without reading it."""

    format: str
    size: int  # of the disk, bytes
    files: tuple[StoredFile, ...] = ()  # the one that was named, then parents, extents, segments ...
    container: Mapping[str, object] = field(default_factory=dict)  # ``Image.facts``
    hashes: Mapping[str, str] = field(default_factory=dict)  # of the whole disk, as the container states them
    disks: tuple[str, ...] = ()  # further disks in the container

    @property
    def stored_size(self) -> int | None:
        """Bytes that all its files take up; None: it stands in none."""
        return sum(file.stored_size for file in self.files) if self.files else None

    def as_json(self) -> dict[str, object]:
        """With all the keys of ``DiskInfo``; what would take reading the disk is null, or empty."""
        return {
            "format": self.format,
            "virtual_size": self.size,
            "stored_size": self.stored_size,
            "files": [asdict(file) for file in self.files],
            "readable": False,
            "container": dict(self.container),
            "hashes": dict(self.hashes),
            "disks": list(self.disks),
            "sector_size": None,
            "table": None,
            "disk_id": None,
            "volumes": [],
            "free_bytes": None,
            "hole_bytes": None,
            "unreadable": [],
        }


@dataclass(frozen=True, slots=True)
class DiskInfo(Headers):
    """A disk and its survey, and of a disk image what its container says."""

    survey: Survey = field(kw_only=True)
    unreadable: Sequence[tuple[int, int]] = ()  # (start, length) known to be zeros for want of what stands there

    def as_json(self) -> dict[str, object]:
        s = self.survey
        return {
            **Headers.as_json(self),
            "readable": True,
            "sector_size": s.sector_size,
            "table": s.table.kind if s.table else None,
            "disk_id": s.table.disk_id if s.table else None,
            "volumes": [volume.as_json() for volume in s.volumes],
            "free_bytes": s.extents.total(State.FREE),
            "hole_bytes": s.extents.total(State.HOLE),
            "unreadable": as_json(self.unreadable),
        }


def disk_info(disk: OpenDisk, job: Job) -> DiskInfo:
    """Survey a disk; damage goes to the job as warnings, the rest as notes."""
    job.begin(f"looking at {disk.reference.text}")
    surveyed = survey(disk.source, sector_size=disk.sector_size)
    for sentence in surveyed.told.damage:
        job.warn(sentence)
    tell_of_disk(disk, (), job)
    tell_of_beside(disk, job, taken=False)
    for sentence in [*surveyed.told.unclean, *surveyed.told.notes]:
        job.note(sentence)
    known = disk_headers(disk)
    return DiskInfo(
        known.format,
        known.size,
        known.files,
        known.container,
        known.hashes,
        known.disks,
        survey=surveyed,
        unreadable=known_unreadable(disk.source),
    )


def disk_headers(disk: OpenDisk) -> Headers:
    """What is known of a disk without reading it, as of an image that is ``missing`` something."""
    image, size, files = disk.image, disk.source.size, tuple(_files(disk))
    if image is None:
        return Headers(disk.format, size, files)
    return Headers(disk.format, size, files, image.facts, image.hashes, tuple(image.disks))


def _files(disk: OpenDisk) -> Iterator[StoredFile]:
    """The regular files of a disk, each once."""
    seen = set()
    for path in disk.files:
        try:
            status = os.stat(path)
        except OSError:  # removed meanwhile
            continue
        identity = status.st_dev, status.st_ino
        if stat.S_ISREG(status.st_mode) and identity not in seen:
            seen.add(identity)
            yield StoredFile(str(path), status.st_size, status.st_blocks * 512)


# ---------------------------------------------------------------------- the allocation map


def disk_map(disk: OpenDisk, job: Job) -> list[dict[str, object]]:
    """The allocation map of a disk, as ``extents_json`` says it; of a disk image with where each extent stands."""
    surveyed = disk_info(disk, job).survey
    if disk.image is None:
        return extents_json(surveyed)
    runs = runs_of(disk.source, 0, surveyed.size)
    if "wrapped" in disk.image.facts:  # places are in what was unpacked, and in no file that people have
        runs = (run._replace(place=None) for run in runs)
    return extents_json(surveyed, runs)


def extents_json(surveyed: Survey, runs: Iterable[Run] = ()) -> list[dict[str, object]]:
    """The allocation map, ascending and complete.

    ``data``: the source stores bytes here; ``zero``: it is known to read as zeros; ``free``: no file system uses it.
    Given the runs of the whole disk, also ``depth``: 0 where the image itself says what is here, 1 where its parent
    does ...; ``present``: the one that says so has an entry for it; ``compressed``; and ``offset`` in its file, where
    bytes stand there as they are.
    """
    rows: list[dict[str, object]] = []
    for start, end, state, run in _pieces(surveyed.extents, iter(runs)):
        row: dict[str, object] = {
            "start": start,
            "length": end - start,
            "data": not state & (State.HOLE | State.ZERO),
            "zero": bool(state & State.ZERO),
            "free": bool(state & State.FREE),
        }
        if run is not None:
            row["depth"] = run.depth
            row["present"] = run.kind != Kind.HOLE
            row["compressed"] = run.kind == Kind.PACKED
            if run.place is not None:
                row["offset"] = run.place + start - run.start
        if rows and _goes_on(rows[-1], row):
            rows[-1]["length"] = end - int(str(rows[-1]["start"]))
        else:
            rows.append(row)
    return rows


def _pieces(extents: Iterable[Extent], runs: Iterator[Run]) -> Iterator[tuple[int, int, State, Run | None]]:
    """Start, end, state and run of all pieces in which neither changes."""
    run = next(runs, None)
    for extent in extents:
        at = extent.start
        while at < extent.end:
            while run is not None and run.start + run.length <= at:
                run = next(runs, None)
            end = extent.end if run is None else min(extent.end, run.start + run.length)
            yield at, end, extent.state, run
            at = end


_SAME: Final = ("data", "zero", "free", "depth", "present", "compressed")


def _goes_on(last: dict[str, object], row: dict[str, object]) -> bool:
    """Whether a row says of the next bytes what the last one says."""
    if any(last.get(key) != row.get(key) for key in _SAME):
        return False
    before, here = last.get("offset"), row.get("offset")
    if isinstance(before, int) and isinstance(here, int) and isinstance(last["length"], int):
        return before + last["length"] == here
    return before is None and here is None
