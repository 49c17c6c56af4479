"""What a backup will read: the cells of each region's chunk grid that hold data, in batches for the workers.

    region        |-----------------------------------------|      starts at each partition
    cells         | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |.|
    data extents     ====   ==              ==========             neither zero nor free
    cell runs     [0 1 2]                  [6 7 8]                 read; all others are zeros without reading

Planning is vectorised over the extents: its cost follows their number, not the size of the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.engine.survey import Survey
from ferrotype.extents import Offsets, State
from ferrotype.units import MiB

BATCH: Final = 4 * MiB  # bytes a worker takes at a time: what threads can only do in turn is little beside that


@dataclass(frozen=True, slots=True)
class CellRun:
    """Neighbouring cells to read: bytes ``start`` to ``start + length`` of the disk, cells from ``first`` on."""

    first: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one worker handles in one go."""

    region: int
    runs: tuple[CellRun, ...]


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What of a disk is read, and in which cells."""

    size: int
    chunk_size: int
    regions: tuple[tuple[int, int], ...]  # (start, length)
    data: tuple[Offsets, Offsets]  # starts and ends of the extents that hold data
    free_bytes: int  # left out because no file system uses it
    zero_bytes: int  # left out because it is known to be zero

    @property
    def data_bytes(self) -> int:
        return int((self.data[1] - self.data[0]).sum())

    def cells(self, region: int) -> int:
        return -(-self.regions[region][1] // self.chunk_size)

    def cell_runs(self, region: int) -> tuple[Offsets, Offsets]:
        """First and past-the-last cells of the runs of cells that hold data."""
        start, length = self.regions[region]
        starts, ends = self.data
        low = int(np.searchsorted(ends, start, "right"))
        high = int(np.searchsorted(starts, start + length, "left"))
        first = (np.maximum(starts[low:high], start) - start) // self.chunk_size
        last = -(-(np.minimum(ends[low:high], start + length) - start) // self.chunk_size)
        if len(first) == 0:
            return first, last
        fresh = np.append(True, first[1:] > last[:-1])  # the rest touch or share a cell with their neighbour
        return first[fresh], last[np.append(fresh[1:], True)]

    def batches(self) -> Iterator[Batch]:
        """All cells to read, ascending, about ``BATCH`` bytes at a time."""
        room = max(1, BATCH // self.chunk_size)
        for region, (start, length) in enumerate(self.regions):
            runs: list[CellRun] = []
            left = room
            for first, last in zip(*(column.tolist() for column in self.cell_runs(region)), strict=True):
                while first < last:
                    count = min(last - first, left)
                    at = start + first * self.chunk_size
                    runs.append(CellRun(first, at, min(count * self.chunk_size, start + length - at)))
                    first, left = first + count, left - count
                    if left == 0:
                        yield Batch(region, tuple(runs))
                        runs, left = [], room
            if runs:
                yield Batch(region, tuple(runs))


def plan(survey: Survey, chunk_size: int, *, all_sectors: bool) -> DiskPlan:
    """Decide what is read.  With ``all_sectors`` only what the source itself knows to be zero is not."""
    skip = State.ZERO if all_sectors else State.ZERO | State.FREE
    free = 0 if all_sectors else survey.extents.total(State.FREE)
    data = survey.extents.runs(skip, present=False)
    zero = survey.size - free - int((data[1] - data[0]).sum())
    return DiskPlan(survey.size, chunk_size, survey.regions, data, free, zero)


def blank_gaps(view: memoryview, start: int, data: tuple[Offsets, Offsets]) -> None:
    """Zero all bytes of ``view``, which stands at ``start`` of the disk, that lie outside the data extents."""
    end = start + len(view)
    low = int(np.searchsorted(data[1], start, "right"))
    high = int(np.searchsorted(data[0], end, "left"))
    gap_starts = np.concatenate(([start], data[1][low:high])) - start
    gap_ends = np.concatenate((data[0][low:high], [end])) - start
    real = gap_ends > gap_starts
    gap_starts, gap_ends = gap_starts[real], gap_ends[real]
    if len(gap_starts) > 32 and len(view) % 512 == 0 and not ((gap_starts % 512).any() or (gap_ends % 512).any()):
        change = np.zeros(len(view) // 512 + 1, np.int8)  # many small gaps: one masked store instead
        change[gap_starts // 512] += 1
        change[gap_ends // 512] -= 1
        np.frombuffer(view, np.uint8).reshape(-1, 512)[np.cumsum(change[:-1], dtype=np.int8) > 0] = 0
        return
    for gap_start, gap_end in zip(gap_starts.tolist(), gap_ends.tolist(), strict=True):
        view[gap_start:gap_end] = bytes(gap_end - gap_start)
