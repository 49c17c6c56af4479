"""What was written is read again from its medium and held against what it should be: ``--verify-after``.

    restore    the snapshot is read once more, every chunk proven, and compared with the target
    convert    each batch was digested as it was read; what the new image gives back must have the same digests, and
               be zeros where there was none.  The source is not asked again: it may fail, or be in use
    tables     what was moved on a larger target is compared where it went

All of it is durable before, and the page cache is told to forget it: what is read comes from where it was stored.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np
from blake3 import blake3

from ferrotype.block import Source, read
from ferrotype.block.device import aligned_buffer
from ferrotype.block.file import FileSource
from ferrotype.block.views import Slice, Through
from ferrotype.engine.compare import SECTOR, compare
from ferrotype.errors import DeviceError, FormatError, ReadError, WriteError
from ferrotype.extents import State
from ferrotype.formats.registry import open_file
from ferrotype.formats.related import Related
from ferrotype.formats.split import joined
from ferrotype.job import Job
from ferrotype.linux import drop_cache
from ferrotype.pipeline import map_ordered
from ferrotype.units import MiB, TiB

if TYPE_CHECKING:
    from ferrotype.engine.writing import NewImage

__all__ = ["Digests", "check_content", "check_digests", "check_pieces", "reopened"]

_PIECE: Final = MiB  # bytes read at a time
_TOGETHER: Final = 4 * MiB  # bytes of what should be zeros that a worker takes at a time
_WINDOW: Final = TiB  # bytes whose extents are asked for at a time
_LENGTH: Final = 16  # bytes of a digest: nobody chooses what a medium gives back instead


# ---------------------------------------------------------------------- a restored disk


def check_content(expected: Source, back: Source, what: Path, job: Job) -> None:
    """Compare a disk with the start of what was written.  Raises WriteError naming the first range that differs.

    Zeros for want of what could not be read when it was backed up are to be there, too: ``expected`` does not say so.
    """
    found = compare(Through(expected), Slice(back, 0, expected.size), job, phase="reading back")
    if found.differences:
        _fail(what, *found.differences[0])
    for (start, length), why in (
        (ranges[0], why) for ranges, why in zip(found.found, found.reasons, strict=True) if ranges
    ):
        _fail(what, start, length, why)


def check_pieces(pieces: Sequence[tuple[int, bytes]], back: Source, what: Path) -> None:
    """Compare single pieces (offset, bytes).  Raises WriteError."""
    for offset, data in pieces:
        try:
            same = read(back, offset, len(data)) == data
        except ReadError as error:
            _fail(what, offset, len(data), str(error))
        if not same:
            _fail(what, offset, len(data))


# ---------------------------------------------------------------------- a converted disk


@dataclass(frozen=True, slots=True)
class _Stretch:
    start: int
    end: int
    digest: bytes | None  # None: zeros


class Digests:
    """Digests of the batches of a disk, ascending, as they were read; between them it is zeros.

    Memory: 32 bytes for each batch, which is 8 MiB for a TiB of data.
    """

    def __init__(self) -> None:
        self._starts, self._ends, self._digests = array("q"), array("q"), bytearray()

    @staticmethod
    def of(view: memoryview) -> bytes:
        """The digest of a batch.  From any thread."""
        return blake3(view).digest(_LENGTH)

    def add(self, start: int, end: int, digest: bytes) -> None:
        self._starts.append(start)
        self._ends.append(end)
        self._digests += digest

    def stretches(self, back: Source, size: int) -> Iterator[_Stretch]:
        """All of the disk, but for zeros that ``back`` knows to be zeros."""
        at = 0
        for number, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            yield from _zeros(back, at, start)
            yield _Stretch(start, end, bytes(self._digests[number * _LENGTH : (number + 1) * _LENGTH]))
            at = end
        yield from _zeros(back, at, size)


def _zeros(back: Source, start: int, end: int) -> Iterator[_Stretch]:
    for window in range(start, end, _WINDOW):
        lows, highs = back.extents(window, min(_WINDOW, end - window)).runs(State.ZERO, present=False)
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            for at in range(low, high, _TOGETHER):
                yield _Stretch(at, min(at + _TOGETHER, high), None)


def check_digests(digests: Digests, source: Source, back: Source, what: Path, job: Job) -> None:
    """Read a new disk back.  Raises WriteError naming the first range that is wrong.

    ``source`` is what it was made of, which is asked again only for what is wrong, to name the very sectors.
    """
    size = source.size
    if back.size < size:
        raise WriteError(f"{what} reads back as a disk of {back.size} bytes, and {size} were written; {_NEXT}")
    job.begin("reading back", size)
    checker = _Checker(source, back, what)
    at = 0
    for stretch in map_ordered(checker, digests.stretches(back, size), workers=len(os.sched_getaffinity(0))):
        job.advance(stretch.end - at)
        at = stretch.end
    job.advance(size - at)


class _Checker:
    """Reads stretches back; called from many threads."""

    def __init__(self, source: Source, back: Source, what: Path) -> None:
        self._source, self._back, self._what = source, back, what

    def __call__(self, stretch: _Stretch) -> _Stretch:
        hasher = blake3()
        for at, view in self._pieces(stretch):
            if stretch.digest is not None:
                hasher.update(view)
            elif wrong := _differing(view, bytes(len(view))):
                _fail(self._what, at + wrong[0], wrong[1])
        if stretch.digest is not None and hasher.digest(_LENGTH) != stretch.digest:
            _fail(self._what, *self._narrowed(stretch))
        return stretch

    def _narrowed(self, stretch: _Stretch) -> tuple[int, int]:
        """Start and length of the first wrong sectors, where the source gives the same as before; else of all."""
        whole = stretch.start, stretch.end - stretch.start
        try:
            wanted = read(self._source, *whole)
        except DeviceError:
            return whole
        if Digests.of(memoryview(wanted)) == stretch.digest:
            for at, view in self._pieces(stretch):
                first = at - stretch.start
                if wrong := _differing(view, wanted[first : first + len(view)]):
                    return at + wrong[0], wrong[1]
        return whole

    def _pieces(self, stretch: _Stretch) -> Iterator[tuple[int, memoryview]]:
        buffer = aligned_buffer(min(_PIECE, stretch.end - stretch.start))
        for at in range(stretch.start, stretch.end, _PIECE):
            view = buffer[: min(_PIECE, stretch.end - at)]
            try:
                self._back.read_into(at, view)
            except (ReadError, FormatError) as error:
                _fail(self._what, at, len(view), str(error))
            yield at, view


def _differing(view: memoryview, wanted: bytes) -> tuple[int, int] | None:
    """Start and length of the first sectors in a row that differ."""
    differ = np.frombuffer(view, np.uint8) != np.frombuffer(wanted, np.uint8)
    if not differ.any():
        return None
    sectors = np.logical_or.reduceat(differ, np.arange(0, len(view), SECTOR))
    first = int(np.argmax(sectors))
    same = np.flatnonzero(~sectors[first:])
    last = first + int(same[0]) if len(same) else len(sectors)
    return first * SECTOR, min(last * SECTOR, len(view)) - first * SECTOR


# ---------------------------------------------------------------------- a new image


@contextmanager
def reopened(files: Sequence[Path], wanted: NewImage) -> Iterator[Source]:
    """The disk in a new image, as the reader of its format gives it back from the medium.

    ``files``: all of the image, durable, where they stand now, the main one first.  Raises WriteError where it does
    not open.
    """
    for path in files:
        _forget(path)
    first = files[0]
    related = Related(first, _allowed(wanted), patience=wanted.patience)
    file: Source = FileSource(first, patience=wanted.patience)
    try:
        file = joined(file, related)
        image = open_file(file, related, wanted.format)
    except (FormatError, DeviceError) as error:
        file.close()
        raise WriteError(f"{wanted.path} cannot be opened again as it was written: {error}; {_NEXT}") from error
    except BaseException:
        file.close()
        raise
    try:
        yield image.source
    except FormatError as error:
        raise WriteError(f"{wanted.path} does not read back as it was written: {error}; {_NEXT}") from error
    finally:
        image.close()


def _allowed(wanted: NewImage) -> list[Path]:
    """The user named the backing file, wherever it lies, and what lies beside that."""
    return [] if wanted.backing is None else [(wanted.path.parent / wanted.backing).parent]


def _forget(path: Path) -> None:
    """Have the page cache forget a file, all of which is durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        drop_cache(fd, 0, 0)
    finally:
        os.close(fd)


_NEXT: Final = "do not rely on it, and look after the device that it is on"


def _fail(what: Path, start: int, length: int, why: str = "other bytes stand there") -> NoReturn:
    raise WriteError(f"{what}: {length} bytes at {start} do not read back as they were written ({why}); {_NEXT}")
