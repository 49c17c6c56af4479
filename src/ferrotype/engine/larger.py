"""A target larger than the disk that was written to it: its partition table."""

from __future__ import annotations

from ferrotype.block import Sink, Source, read
from ferrotype.errors import FormatError
from ferrotype.job import Job
from ferrotype.volumes.relocate import moved_backup

__all__ = ["settle_table"]


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
