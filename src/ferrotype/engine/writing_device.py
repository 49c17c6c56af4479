"""A disk written over a device: what ``convert`` onto one does.

data           written where it stands on the disk
zeros          known or found, zeroed as the device does it best
behind it      left alone; on a larger device the backup GPT is moved to the end
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ferrotype.block import Sink, Traits
from ferrotype.engine.convert import copy
from ferrotype.engine.larger import remove_leftovers, settle_table
from ferrotype.engine.readback import Digests, check_digests, check_pieces
from ferrotype.engine.references import OpenDisk
from ferrotype.engine.sectors import sector_size_of
from ferrotype.engine.starts import tell_of_start
from ferrotype.engine.targets import check_fits, check_takes, open_target
from ferrotype.errors import UsageError
from ferrotype.job import Job
from ferrotype.units import KiB
from ferrotype.volumes.relocate import moved_backup

if TYPE_CHECKING:
    from ferrotype.engine.writing import NewImage, Written

__all__ = ["check_device", "write_device"]

_UNIT: Final = 128 * KiB  # bytes; shorter stretches of zeros are written: many small requests to zero cost more


def check_device(disk: OpenDisk, wanted: NewImage) -> None:
    """Raise Refused where the device cannot take the disk, UsageError where more than its bytes is asked for."""
    if wanted.format != "raw" or wanted.compress or wanted.options or wanted.backing is not None:
        raise UsageError(f"{wanted.path} is a device, which holds the bytes of a disk and no image of it")
    check_fits(wanted.path, disk.source.size, sector_size_of(disk))


def write_device(disk: OpenDisk, wanted: NewImage, job: Job) -> Written:
    """Make the device hold the disk from its start; all of it is durable then.

    Raises what ``check_device`` does, before the first write.
    """
    from ferrotype.engine.writing import Written

    began = time.monotonic()
    source, sector_size = disk.source, sector_size_of(disk)
    moved = False
    with open_target(wanted.path, source.size, sector_size, in_place=True, patience=wanted.patience) as target:
        check_takes(target.sink, source.size, sector_size)
        digests = Digests() if wanted.verify_after else None
        done = copy(source, _Start(target.sink, source.size), job, digests=digests)
        if digests is not None:  # before the table moves
            with closing(target.reread()) as back:
                check_digests(digests, source, back, wanted.path, job)
        if target.source is not None:
            remove_leftovers(source.size, target.sink, target.source, job)
        if disk.reference.partition is None and target.sink.size > source.size:
            moved = settle_table(source, target.sink, sector_size, job, target=target.source)
        job.begin("flushing")
        target.sink.flush()
        if digests is not None and moved:
            with closing(target.reread()) as back:
                check_pieces(moved_backup(source, target.sink.size, sector_size), back, wanted.path)
        if target.source is not None:
            tell_of_start(target.source, job)
    done.seconds = time.monotonic() - began
    return Written("raw", done, done.disk_bytes, done.disk_bytes - done.written_bytes, moved, wanted.verify_after)


class _Start:
    """The first bytes of a device, as ``copy`` fills them."""

    def __init__(self, sink: Sink, size: int) -> None:
        self._sink, self._size = sink, size

    @property
    def size(self) -> int:
        return self._size

    @property
    def traits(self) -> Traits:
        return replace(self._sink.traits, unit=_UNIT)

    def write(self, offset: int, data: memoryview, /) -> None:
        self._sink.write(offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        self._sink.write_zeros(offset, length)

    def finish(self) -> None:
        """Nothing: there are no tables."""

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        """Nothing: who opened the device closes it."""
