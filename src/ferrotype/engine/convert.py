"""Convert: source -> batches of whole units -> workers read and drop zeros, pack where it takes work -> image.

    extents       known zeros are never read
    batches       4 MiB, cut at multiples of the sink's unit
    workers       read, and look for zeros; a ``Packer`` is given whole batches to pack instead
    in order      one thread writes, or puts what was packed

One thread, since the kernel lets a single write at a time into a file: a second writer would spin until the first is
done, on a core that can read ahead meanwhile.  Only to sinks that say they are ``concurrent`` do the workers write.

Cost: a pass over what is not known to be zero; memory is a few batches a worker, whatever the size of the disk.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

import numpy as np

from ferrotype.block import Source
from ferrotype.block.device import aligned_buffer
from ferrotype.block.lenient import Lenient
from ferrotype.block.views import padded_extents, read_padded
from ferrotype.block.zeros import zero_cells
from ferrotype.engine.readback import Digests
from ferrotype.engine.unreadable import refuse_nothing
from ferrotype.extents import ExtentMap, State, merge
from ferrotype.formats import Marking, Packer, WritableSink
from ferrotype.job import Job
from ferrotype.pipeline import map_ordered
from ferrotype.units import KiB, MiB

__all__ = ["Converted", "copy"]

_BATCH: Final = 4 * MiB  # bytes of the disk a worker takes at a time, or one unit where that is larger
_GRAIN: Final = 16 * KiB  # zeros are looked for in pieces of it where the sink's unit says nothing
_GAP: Final = 32  # batches of known zeros that an ordered sink is told of at a time
_ZEROED: Final = 256 * MiB  # bytes of a device that are zeroed at a time
_FLYING: Final = 128 * MiB  # bytes of batches that are read and not yet written, or two batches
_WINDOW: Final = 1 << 40  # bytes of the disk whose extents are asked for at a time


@dataclass(slots=True)
class Converted:
    """What was done, in bytes of the disk."""

    disk_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    unreadable: Sequence[tuple[int, int]] = ()  # (start, length) that are zeros for want of what stands there
    found: Sequence[tuple[int, int]] = ()  # those of them that were not known before
    reason: str = ""  # why the first of these could not be read


def copy(
    source: Source,
    sink: WritableSink,
    job: Job,
    *,
    backing: Source | None = None,
    workers: int = 0,
    digests: Digests | None = None,
) -> Converted:
    """Write the whole source to a sink of the same size, and finish it.  Nothing is flushed or committed.

    With ``backing`` the sink shows that where nothing is written, and only what differs from it is.  On a sink that
    is not blank, known zeros are written as zeros.  What cannot be read is zeros in the sink, which is told of it
    where it has a place for that.  With ``digests`` what was read is remembered there, for reading it back.
    """
    began = time.monotonic()
    source = Lenient(source, job)
    if source.size != sink.size:
        raise ValueError(f"the source has {source.size} bytes and the sink {sink.size}")
    result = Converted(disk_bytes=source.size)
    job.begin("converting", source.size)
    worker = _Worker(source, sink, backing, digested=digests is not None)
    depth, count = _shape(sink, workers or len(os.sched_getaffinity(0)))
    held = backing is None and not sink.traits.blank
    at = 0
    for done in map_ordered(worker, _batches(source, backing, _grid(sink)), workers=count, depth=depth):
        _pass_over(sink, at, done.start, job, held=held)
        worker.write(done)
        if digests is not None:
            digests.add(done.start, done.end, done.digest)
        result.read_bytes += done.read
        result.written_bytes += done.written
        job.advance(done.end - done.start)
        at = done.end
    _pass_over(sink, at, source.size, job, held=held)
    result.unreadable, result.found = source.unreadable, source.found
    result.reason = source.reason
    refuse_nothing("the disk", source.found, result.read_bytes, source.reason)
    if isinstance(sink, Marking):
        sink.mark_unreadable(result.unreadable)
    sink.finish()
    result.seconds = time.monotonic() - began
    return result


def _shape(sink: WritableSink, cores: int) -> tuple[int, int]:
    """Batches in flight, and workers."""
    depth = max(2, min(3 * cores, _FLYING // _grid(sink)))
    return depth, min(cores, depth)


def _pass_over(sink: WritableSink, start: int, end: int, job: Job, *, held: bool) -> None:
    """What is known to be zeros is done.  A sink that takes all in order may have work with it, such as hashing.

    ``held``: the sink may hold something there, which is zeroed.
    """
    told = sink.traits.ordered and sink.traits.blank
    step = _grid(sink) * _GAP if told else _ZEROED if held else max(end - start, 1)
    for at in range(start, end, step):
        count = min(step, end - at)
        if told or held:
            sink.write_zeros(at, count)
        job.advance(count)


# ---------------------------------------------------------------------- what is to be looked at


@dataclass(frozen=True, slots=True)
class _Batch:
    """A stretch of the disk that starts and ends on the grid, and the extents of the source in it."""

    start: int
    end: int
    extents: ExtentMap


def _grid(sink: WritableSink) -> int:
    unit = sink.traits.unit
    return max(unit, _BATCH // unit * unit)


def _batches(source: Source, backing: Source | None, grid: int) -> Iterator[_Batch]:
    """Ascending stretches that are not known to be zeros, in the source and behind it."""
    size = source.size
    window = _WINDOW // grid * grid or grid
    for start in range(0, size, window):
        extents = source.extents(start, min(window, size - start))
        starts, ends = _interesting(extents, backing).cut(grid).runs(State.ZERO, present=False)
        for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
            for at in range(low, high, grid):
                end = min(at + grid, high)
                yield _Batch(at, end, extents.clip(at, end - at))


def _interesting(extents: ExtentMap, backing: Source | None) -> ExtentMap:
    """ZERO where the range is known to be zeros and needs no writing."""
    zeros = extents.masked(State.ZERO)
    if backing is None:
        return zeros
    lower = padded_extents(backing, extents.start, extents.length).masked(State.ZERO)
    flipped = {State.ZERO: State.DATA, State.DATA: State.CLEAN}  # OR of what is no zero, for lack of an AND
    return merge(zeros.translate(flipped), lower.translate(flipped)).translate(
        {State.DATA: State.ZERO, State.CLEAN: State.DATA}
    )


# ---------------------------------------------------------------------- doing it


class _Piece(NamedTuple):
    """What is to be written of a batch: bytes of it, zeros or as they are, or in the form a ``Packer`` made."""

    start: int
    end: int
    zero: bool
    packed: object = None


@dataclass(slots=True)
class _Done:
    """A batch that was read, and what is still to be written of it."""

    start: int
    end: int
    read: int
    written: int
    pieces: Sequence[_Piece]
    buffer: memoryview | None  # that the pieces lie in, where they do
    digest: bytes = b""  # of the batch, where it is wanted


class _Worker:
    """Reads batches and packs or writes them; called from many threads."""

    def __init__(self, source: Source, sink: WritableSink, backing: Source | None, *, digested: bool = False) -> None:
        self._source, self._sink, self._backing, self._digested = source, sink, backing, digested
        self._packer = sink if isinstance(sink, Packer) else None
        unit = sink.traits.unit
        self._grain = unit if unit >= 4 * KiB else _GRAIN
        self._free: list[memoryview] = []  # buffers of batches that are done
        self._held: list[memoryview] = []  # of the batch written last: the sink may be storing it still

    def __call__(self, batch: _Batch) -> _Done:
        length = batch.end - batch.start
        buffer = self._buffer()
        view = buffer[:length]
        read = self._fill(batch, view)
        if self._packer is not None and self._backing is None:
            pieces, written = [_Piece(0, length, zero=False)], read  # it looks for zeros itself
        else:
            pieces = self._pieces(batch.start, view)
            written = sum(piece.end - piece.start for piece in pieces if not piece.zero)
        digest = Digests.of(view) if self._digested else b""
        done = _Done(batch.start, batch.end, read, written, pieces, buffer, digest)
        if self._packer is not None:
            pack, at = self._packer.pack, batch.start
            done.pieces = [
                piece if piece.zero else piece._replace(packed=pack(at + piece.start, view[piece.start : piece.end]))
                for piece in pieces
            ]
            self._give_back(done)
        elif self._sink.traits.concurrent:
            self._write(done)
            self._give_back(done)
        return done

    def write(self, done: _Done) -> None:
        """Write what is still to be written of a batch."""
        if any(not piece.zero for piece in done.pieces):
            self._write(done)
            if done.buffer is not None:
                self._free += self._held
                self._held = [done.buffer]
        else:
            self._write(done)
            self._give_back(done)

    def _write(self, done: _Done) -> None:
        for piece in done.pieces:
            at = done.start + piece.start
            if piece.zero:
                self._sink.write_zeros(at, piece.end - piece.start)
            elif self._packer is not None:
                self._packer.put(at, piece.packed)
            elif done.buffer is not None:
                self._sink.write(at, done.buffer[piece.start : piece.end])
        done.pieces = ()

    def _fill(self, batch: _Batch, view: memoryview) -> int:
        """Read what is not known to be zero; the bytes read."""
        read = 0
        for extent in batch.extents:
            piece = view[extent.start - batch.start : extent.end - batch.start]
            if extent.state & State.ZERO:
                piece[:] = bytes(extent.length)
            else:
                self._source.read_into(extent.start, piece)
                read += extent.length
        return read

    def _pieces(self, start: int, view: memoryview) -> list[_Piece]:
        """What has to be written of a batch, and neither is there already nor stands behind the sink."""
        kinds = [_ZERO if flag else _DATA for flag in zero_cells(view, self._grain)]
        if self._backing is not None:
            kinds = self._against(self._backing, start, view, kinds)
        elif self._sink.traits.blank:
            kinds = [_SKIP if kind == _ZERO else kind for kind in kinds]
        pieces = []
        at = 0
        for kind, group in groupby(kinds):
            end = at + len(list(group))
            if kind != _SKIP:
                pieces.append(_Piece(at * self._grain, min(end * self._grain, len(view)), kind == _ZERO))
            at = end
        return pieces

    def _against(self, backing: Source, start: int, view: memoryview, kinds: list[int]) -> list[int]:
        """What is the same behind the sink already needs no writing."""
        buffer = self._buffer()
        lower = buffer[: len(view)]
        read_padded(backing, start, lower)
        differ = np.frombuffer(view, np.uint8) != np.frombuffer(lower, np.uint8)
        changed = np.logical_or.reduceat(differ, np.arange(0, len(view), self._grain)).tolist()
        self._free.append(buffer)
        return [kind if changed[i] else _SKIP for i, kind in enumerate(kinds)]

    def _buffer(self) -> memoryview:
        """Room for a batch."""
        try:
            return self._free.pop()
        except IndexError:
            return aligned_buffer(min(_grid(self._sink), self._sink.size))

    def _give_back(self, done: _Done) -> None:
        buffer, done.buffer = done.buffer, None
        if buffer is not None:
            self._free.append(buffer)


_SKIP, _ZERO, _DATA = range(3)
