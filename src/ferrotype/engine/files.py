"""Which files stand in given ranges of a disk: what a loss means to people.

    ranges of the disk  ->  the volumes they touch  ->  each one's file system, opened over what can still be read

Written for disks that are damaged: what cannot be read or understood names no file, and nothing is raised for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ferrotype.block import Source
from ferrotype.block.views import Slice, Through
from ferrotype.errors import DeviceError, FormatError, IntegrityError, ReadError, StoreError
from ferrotype.extents import ExtentMap
from ferrotype.filesystems.registry import identify
from ferrotype.repository.snapshots import DiskRecord
from ferrotype.volumes.scan import scan

__all__ = ["MAX_FILES", "Lossy", "Stretch", "bounded", "files_hit", "files_in", "named", "recorded_layout", "within"]

MAX_FILES: Final = 1000  # names given for one loss; more would be read by nobody

_LOST: Final = (FormatError, IntegrityError, StoreError, DeviceError)

Range = tuple[int, int]  # start, length; bytes


@dataclass(frozen=True, slots=True)
class Stretch:
    """A volume's place on its disk, in bytes; ``index`` is its partition's number, 0 where there is no table."""

    index: int
    start: int
    size: int


class Lossy(Through):
    """A source whose lost parts are ReadErrors, like the bad sectors of a device, whatever else it raises there."""

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        try:
            self._source.read_into(offset, buf)
        except ReadError:
            raise
        except _LOST as error:
            raise ReadError("the disk", offset, len(buf), str(error)) from error

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        """What the source knows; nothing where it cannot say."""
        try:
            return self._source.extents(offset, length)
        except _LOST:
            return ExtentMap.uniform(offset, length)


def files_hit(source: Source, ranges: Sequence[Range], layout: Sequence[Stretch] | None = None) -> tuple[str, ...]:
    """The files that stand in any of the (start, length) of a disk, at most ``MAX_FILES`` of them and then ``...``.

    A path begins with its partition, ``#2/home/x.txt``; on a disk without a partition table with the slash.
    ``layout`` says where the volumes are, for a disk whose partition table may be lost; None: its table does.
    """
    lossy = Lossy(source)
    found: set[str] = set()
    for volume in _layout(lossy) if layout is None else layout:
        inside = within(ranges, volume)
        if inside:
            found.update(named(volume, files_in(lossy, volume, inside)))
    return bounded(sorted(found))


def within(ranges: Sequence[Range], volume: Stretch) -> list[Range]:
    """The parts of the ranges that lie in a volume, in its own offsets, ascending and apart."""
    out: list[Range] = []
    for start, length in sorted(ranges):
        low = max(start, volume.start) - volume.start
        high = min(start + length, volume.start + volume.size) - volume.start
        if out and low <= sum(out[-1]):
            low, high = out[-1][0], max(high, sum(out.pop()))
        if low < high:
            out.append((low, high - low))
    return out


def files_in(source: Source, volume: Stretch, ranges: Sequence[Range]) -> tuple[str, ...]:
    """What the volume's file system has in ranges of it; nothing where no file system is known there."""
    columns = np.array(ranges, np.int64).reshape(-1, 2)
    try:
        found = identify(Slice(source, volume.start, volume.size))
        if found is None or found.filesystem is None:
            return ()
        return found.filesystem.files_at(columns[:, 0].copy(), columns.sum(axis=1))
    except _LOST:
        return ()


def named(volume: Stretch, paths: Sequence[str]) -> list[str]:
    """Paths of a volume as paths of its disk."""
    prefix = f"#{volume.index}/" if volume.index else "/"
    return [path if path == "..." else prefix + path.lstrip("/") for path in paths]


def bounded(paths: Sequence[str]) -> tuple[str, ...]:
    """No more than anybody reads."""
    return tuple(paths) if len(paths) <= MAX_FILES else (*paths[:MAX_FILES], "...")


def recorded_layout(disk: DiskRecord) -> tuple[Stretch, ...]:
    """The volumes a snapshot's disk had when it was backed up, ascending, as far as its record makes sense."""
    kept: list[Stretch] = []
    at = 0
    for v in sorted((v for v in map(_recorded, disk.volumes) if v), key=lambda v: v.start):
        if v.start >= at and v.size > 0 and v.start + v.size <= disk.size and v.index >= 0:
            kept.append(v)
            at = v.start + v.size
    return tuple(kept)


def _recorded(volume: dict[str, Any]) -> Stretch | None:
    values = [volume.get(key) for key in ("index", "start", "size")]
    index, start, size = values
    return Stretch(index, start, size) if all(type(value) is int for value in values) else None  # type: ignore[arg-type]


def _layout(source: Source) -> list[Stretch]:
    try:
        table = scan(source)
    except _LOST:
        return []
    if table is None:
        return [Stretch(0, 0, source.size)] if source.size else []
    return [Stretch(partition.index, partition.start, partition.size) for partition in table.partitions]
