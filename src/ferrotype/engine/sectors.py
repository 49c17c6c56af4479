"""The size of a disk's sectors, and whether a new image of it can say it.

A partition table counts in sectors.  Whoever shows the disk to a machine with others shows it without partitions.
"""

from __future__ import annotations

from typing import Final

from ferrotype.engine.references import OpenDisk
from ferrotype.errors import FormatError, ReadError
from ferrotype.formats.registry import FORMATS
from ferrotype.job import Job
from ferrotype.volumes.scan import scan

__all__ = ["sector_size_of", "sectors_in"]

_COUNTING: Final = ("gpt", "mbr")  # tables that count in the disk's sectors; that of Apple names its own unit


def sector_size_of(disk: OpenDisk) -> int:
    """Of the disk, in bytes: as it was said, as the source knows it, or as its partition table has it."""
    return _size_and_table(disk)[0]


def _size_and_table(disk: OpenDisk) -> tuple[int, str | None]:
    """The size, and the kind of the table that counts in it."""
    try:
        table = scan(disk.source, sector_size=disk.sector_size)
    except (FormatError, ReadError):  # what cannot be believed counts in nothing
        table = None
    kind, traits = (table.kind if table is not None else None), disk.source.traits
    if disk.sector_size is not None:
        return disk.sector_size, kind
    return (traits.sector_size if traits.sector_known or table is None else table.sector_size), kind


def sectors_in(format: str, disk: OpenDisk, job: Job) -> int:
    """The size of the sectors that a new image of the disk is told; warns where a machine will see another one."""
    size, kind = _size_and_table(disk)
    told = FORMATS[format].sectors if format in FORMATS else None
    if told is None or (size in told and disk.source.size % size == 0):
        return size
    if kind in _COUNTING and size != 512:
        why = f"{format} images say 512" if size not in told else "the disk ends within one"
        job.warn(
            f"{disk.reference.text}: its partition table counts in sectors of {size} bytes, and a machine will see "
            f"sectors of 512 in the new image, and no partitions: {why}; "
            + ("vhdx and E01 keep the size" if size == 4096 else "only a raw disk can be shown with others")
        )
    return 512
