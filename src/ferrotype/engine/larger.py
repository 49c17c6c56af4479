"""A target larger than the disk that was written to it: its partition table, and what a former owner left at its end.

The metadata of RAID, ZFS and other containers stands at the end of a disk.  Left there, the next start would assemble
the former array and take the disk that was just restored.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Final

from ferrotype.block import Sink, Source, read
from ferrotype.block.device import open_source
from ferrotype.errors import FormatError
from ferrotype.filesystems.signatures import Mark, Peek, marks
from ferrotype.job import Job
from ferrotype.volumes.relocate import moved_backup

__all__ = ["leftovers", "remove_leftovers", "say_leftovers", "settle_table"]


_MOST: Final = 64  # signatures removed: those that hide behind others, too


def settle_table(disk: Source, sink: Sink, sector_size: int, job: Job, *, target: Source | None = None) -> bool:
    """Put the backup GPT of ``disk``, all of which ``sink`` holds from its start, at the sink's end; whether it was.

    A disk without one leaves none there: what ``target``, which reads the sink, had as the backup of its former
    table is removed.
    """
    try:
        writes = moved_backup(disk, sink.size, sector_size)
    except FormatError as error:
        job.warn(f"the partition table is restored as it was, and not moved to the end of the target: {error}")
        writes = ()
    for offset, data in writes:
        sink.write(offset, memoryview(data))
    if not writes and target is not None:
        _remove_stale_table(disk.size, sink, sector_size, target)
    return bool(writes)


def _remove_stale_table(size: int, sink: Sink, sector_size: int, target: Source) -> None:
    """Zero a backup GPT header that the target's former content left in its last sector.

    It would describe a disk that is gone, and partitioning programs would offer to bring that back.
    """
    last = sink.size // sector_size * sector_size - sector_size
    if last >= size and read(target, last, 8) == b"EFI PART":
        sink.write_zeros(last, sector_size)


def leftovers(target: Source, size: int) -> list[Mark]:
    """What could claim a target for its former owner, once ``size`` bytes of something else stand at its start."""
    return marks(Peek(target), size) if target.size > size else []


def remove_leftovers(size: int, sink: Sink, target: Source, job: Job) -> list[Mark]:
    """Zero what ``leftovers`` finds, until nothing more is found; what was removed.  Tells the user."""
    removed: list[Mark] = []
    while len(removed) < _MOST and (found := leftovers(target, size)):
        for mark in found:
            sink.write_zeros(mark.start, mark.length)
        sink.flush()
        removed += found
    for kind in dict.fromkeys(mark.kind for mark in removed):
        job.note(f"the metadata of a former owner behind what was restored, {kind}, was removed")
    return removed


def say_leftovers(path: Path, size: int, job: Job) -> None:
    """Tell what would be removed from an existing target."""
    with closing(open_source(path)) as target:
        for mark in leftovers(target, size):
            job.note(f"{path} has {mark.kind} of a former owner at byte {mark.start}, which would be removed")
