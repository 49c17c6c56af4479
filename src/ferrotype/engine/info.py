"""What a disk is, as data: for ``info`` and ``map``."""

from __future__ import annotations

from dataclasses import dataclass

from ferrotype.engine.references import OpenDisk
from ferrotype.engine.survey import Survey, survey
from ferrotype.extents import State
from ferrotype.job import Job


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """A disk and its survey."""

    format: str
    survey: Survey

    def as_json(self) -> dict[str, object]:
        s = self.survey
        return {
            "format": self.format,
            "virtual_size": s.size,
            "sector_size": s.sector_size,
            "table": s.table.kind if s.table else None,
            "disk_id": s.table.disk_id if s.table else None,
            "volumes": [volume.as_json() for volume in s.volumes],
            "free_bytes": s.extents.total(State.FREE),
            "hole_bytes": s.extents.total(State.HOLE),
        }


def disk_info(disk: OpenDisk, job: Job) -> DiskInfo:
    """Survey a disk; damage goes to the job as warnings, the rest as notes."""
    job.begin(f"looking at {disk.reference.text}")
    surveyed = survey(disk.source, sector_size=disk.sector_size)
    for sentence in surveyed.told.damage:
        job.warn(sentence)
    for sentence in [*surveyed.told.unclean, *surveyed.told.notes]:
        job.note(sentence)
    return DiskInfo(disk.format, surveyed)


def extents_json(surveyed: Survey) -> list[dict[str, object]]:
    """The allocation map, ascending and complete.

    ``data``: the source stores bytes here; ``zero``: it is known to read as zeros; ``free``: no file system uses it.
    """
    return [
        {
            "start": extent.start,
            "length": extent.length,
            "data": not extent.state & State.HOLE,
            "zero": bool(extent.state & State.ZERO),
            "free": bool(extent.state & State.FREE),
        }
        for extent in surveyed.extents
    ]
