"""Compare: two disks, as far as they are not known to be zeros -> batches -> workers read and compare.

    both known to be zeros      nothing is read
    one of them                 the other is read, and must be zeros
    neither                     both are read

Cost: a pass over what is not known; memory is a few batches a worker and the ranges listed, whatever the sizes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source
from ferrotype.block.device import aligned_buffer
from ferrotype.block.lenient import Lenient
from ferrotype.engine.live import tell_of_use
from ferrotype.engine.reach import tell_of_reach
from ferrotype.engine.unreadable import tell_of_disk
from ferrotype.extents import ExtentMap, State, merge
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import KiB, MiB, TiB

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk

__all__ = ["MAX_RANGES", "SECTOR", "Comparison", "compare", "compare_disks"]

MAX_RANGES: Final = 10_000  # listed; what has as many is not looked at to its end
SECTOR: Final = 512  # bytes: listed ranges begin and end at multiples of it, or at the end of the longer disk
_BATCH: Final = 2 * MiB  # bytes of each disk that a worker takes at a time
_PIECE: Final = 512 * KiB  # bytes compared at once: two of them stay in a core's cache
_WINDOW: Final = TiB  # bytes of the disks whose extents are asked for at a time

_ONE, _OTHER = State.ZERO, State.HOLE  # in a map of both: which of the two is known to be zeros
_BOTH: Final = _ONE | _OTHER


@dataclass(slots=True)
class Comparison:
    """What was found.  Ranges are (start, length) in bytes, ascending, neighbours joined."""

    sizes: tuple[int, int]
    first_difference: int | None = None  # the byte; None: there is none
    differences: list[tuple[int, int]] = field(default_factory=list)
    allocation: list[tuple[int, int]] = field(default_factory=list)  # strict: one stores what is no data in the other
    truncated: bool = False  # there may be more than what is listed
    strict: bool = False
    found: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]] = (), ()  # of these, not known before
    reasons: tuple[str, str] = "", ""  # why the first of those could not be read
    compared_bytes: int = 0  # that were read, of either
    unreadable: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]] = (), ()  # of each; not compared

    @property
    def identical(self) -> bool:
        """Whether the disks hold the same; what one of them has more is zeros, or, if strict, nothing.

        False, too, where nothing differs and something could not be compared: then nobody knows.
        """
        return self.first_difference is None and not self.unknown

    @property
    def unknown(self) -> bool:
        """Whether something of either disk could not be read, now or when its image was made."""
        return any(self.unreadable)

    def as_json(self) -> dict[str, object]:
        document: dict[str, object] = {
            "identical": self.identical,
            "first_difference": self.first_difference,
            "differences": [{"start": start, "length": length} for start, length in self.differences],
            "truncated": self.truncated,
            "sizes": list(self.sizes),
            "read_bytes": self.compared_bytes,
            "unreadable": [
                {"disk": which, "start": start, "length": length}
                for which, ranges in enumerate(self.unreadable)
                for start, length in ranges
            ],
        }
        if self.strict:
            document["allocation_differences"] = [{"start": s, "length": n} for s, n in self.allocation]
        return document


def compare(
    one: Source, other: Source, job: Job, *, strict: bool = False, workers: int = 0, phase: str = "comparing"
) -> Comparison:
    """Compare two disks.  Behind the end of the shorter one the longer one must be zeros, which the job is told.

    If ``strict``, sizes and what is known to be zeros must be the same, too.
    """
    result = Comparison((one.size, other.size), strict=strict)
    whole = max(result.sizes)
    if one.size != other.size:
        job.note(f"the sizes differ: {one.size} and {other.size} bytes; what one of them has more should be zeros")
    job.begin(phase, whole)
    lenient = Lenient(one, job), Lenient(other, job)
    worker = _Worker(*lenient)
    count = workers or len(os.sched_getaffinity(0))
    at = 0
    for done in map_ordered(worker, _batches(one, other, result), workers=count, depth=3 * count):
        result.compared_bytes += done.read
        _add(result, done)
        job.advance(done.end - at)
        at = done.end
        if result.truncated:
            break
    else:
        job.advance(whole - at)
    if strict:
        _add_strict(result)
    result.unreadable = lenient[0].unreadable, lenient[1].unreadable
    result.found = lenient[0].found, lenient[1].found
    result.reasons = lenient[0].reason, lenient[1].reason
    if result.truncated:
        job.warn(f"more than {MAX_RANGES} ranges differ, and what follows them was not looked at")
    return result


def compare_disks(one: OpenDisk, other: OpenDisk, job: Job, *, strict: bool = False) -> Comparison:
    """``compare``, with the job told what of either could not be read."""
    for disk in (one, other):
        tell_of_use(disk, job)
    result = compare(one.source, other.source, job, strict=strict)
    for disk, found, reason in zip((one, other), result.found, result.reasons, strict=True):
        tell_of_disk(disk, found, job, reason)
        tell_of_reach(disk, job)
    if result.unknown and result.first_difference is None:
        lost = sum(length for ranges in result.unreadable for _, length in ranges)
        job.warn(f"nothing differs in what can be read, but {lost} bytes could not be compared")
    return result


def _add(result: Comparison, done: _Done) -> None:
    if done.first is not None and result.first_difference is None:
        result.first_difference = done.first
    for start, end in done.ranges:
        result.truncated |= not _listed(result.differences, start, end)


def _listed(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    """Add a range behind all others; False where the list is full."""
    if ranges and sum(ranges[-1]) == start:
        start = ranges.pop()[0]
    if len(ranges) >= MAX_RANGES:
        return False
    ranges.append((start, end - start))
    return True


def _add_strict(result: Comparison) -> None:
    """What else makes disks differ: where they store something, and how large they are."""
    found = [] if result.first_difference is None else [result.first_difference]
    found += [start for start, _ in result.allocation[:1]]
    if result.sizes[0] != result.sizes[1]:
        found.append(min(result.sizes))
    result.first_difference = min(found, default=None)


# ---------------------------------------------------------------------- what is to be looked at


@dataclass(frozen=True, slots=True)
class _Batch:
    """A stretch of the disks and, in a map of both, which of them is known to be zeros where."""

    start: int
    end: int
    zeros: ExtentMap


def _batches(one: Source, other: Source, result: Comparison) -> Iterator[_Batch]:
    whole, common = max(result.sizes), min(result.sizes)
    for start in range(0, whole, _WINDOW):
        length = min(_WINDOW, whole - start)
        first = _zeros(one, start, length)
        second = _zeros(other, start, length).translate({State.ZERO: _OTHER})
        zeros = merge(first, second)
        if result.strict and common > start:
            _compare_allocation(zeros.clip(start, min(length, common - start)), result)
        starts, ends = zeros.translate({_ONE: State.DATA, _OTHER: State.DATA}).cut(_BATCH).runs(_BOTH, present=False)
        for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
            for at in range(low, high, _BATCH):
                end = min(at + _BATCH, high)
                yield _Batch(at, end, zeros.clip(at, end - at))


def _zeros(source: Source, start: int, length: int) -> ExtentMap:
    """ZERO where the disk is known to be zeros, and behind its end."""
    inside = min(max(source.size - start, 0), length)
    behind = ExtentMap.uniform(start + inside, length - inside, State.ZERO)
    if not inside:
        return behind
    own = source.extents(start, inside).masked(State.ZERO)
    return ExtentMap.concat([own, behind]) if behind.length else own


def _compare_allocation(zeros: ExtentMap, result: Comparison) -> None:
    starts, ends = zeros.translate({_BOTH: State.DATA}).runs(_BOTH)
    room = MAX_RANGES - len(result.allocation) + 1  # one more is joined to the last
    for start, end in zip(starts[:room].tolist(), ends[:room].tolist(), strict=True):
        result.truncated |= not _listed(result.allocation, start, end)


# ---------------------------------------------------------------------- looking at it


@dataclass(frozen=True, slots=True)
class _Done:
    end: int
    read: int
    first: int | None  # byte that differs
    ranges: list[tuple[int, int]]  # start and end of sectors that differ


class _Worker:
    """Reads batches of two disks and compares them; called from many threads."""

    def __init__(self, one: Lenient, other: Lenient) -> None:
        self._one, self._other = one, other
        self._local = threading.local()

    def __call__(self, batch: _Batch) -> _Done:
        read, first, ranges = 0, None, list[tuple[int, int]]()
        for at in range(batch.start, batch.end, _PIECE):
            zeros = batch.zeros.clip(at, min(_PIECE, batch.end - at))
            count, differs, found = self._piece(zeros)
            read += count
            first = differs if first is None else first
            ranges += found
        return _Done(batch.end, read, first, ranges)

    def _piece(self, zeros: ExtentMap) -> tuple[int, int | None, list[tuple[int, int]]]:
        """Bytes read, the first that differs, and the sectors that do."""
        start, length = zeros.start, zeros.length
        first, second = self._buffers()
        read = _fill(self._one, first, zeros, _ONE) + _fill(self._other, second, zeros, _OTHER)
        for low, count in (*self._one.lost_in(start, length), *self._other.lost_in(start, length)):
            first[low - start : low - start + count] = second[low - start : low - start + count] = bytes(count)
        mine, theirs = np.frombuffer(first[:length], np.uint8), np.frombuffer(second[:length], np.uint8)
        if _same(mine, theirs):
            return read, None, []
        differ = mine != theirs
        sectors = np.logical_or.reduceat(differ, np.arange(0, length, SECTOR))
        edges = np.flatnonzero(np.diff(np.concatenate(([False], sectors, [False])).astype(np.int8)))
        bounds = np.minimum(edges * SECTOR, length) + start
        pairs = zip(bounds[0::2].tolist(), bounds[1::2].tolist(), strict=True)
        return read, start + int(np.argmax(differ)), list(pairs)

    def _buffers(self) -> tuple[memoryview, memoryview]:
        buffers: tuple[memoryview, memoryview] | None = getattr(self._local, "buffers", None)
        if buffers is None:
            buffers = self._local.buffers = aligned_buffer(_PIECE), aligned_buffer(_PIECE)
        return buffers


def _fill(source: Source, view: memoryview, zeros: ExtentMap, zero: State) -> int:
    """Read what is not known to be zeros; the bytes read."""
    read = 0
    for extent in zeros.masked(zero):
        piece = view[extent.start - zeros.start : extent.end - zeros.start]
        if extent.state & zero:
            piece[:] = bytes(extent.length)
        else:
            source.read_into(extent.start, piece)
            read += extent.length
    return read


def _same(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two ranges of one length hold the same: by words as far as they go."""
    words = len(one) // 8 * 8
    return np.array_equal(one[:words].view(np.uint64), other[:words].view(np.uint64)) and np.array_equal(
        one[words:], other[words:]
    )
