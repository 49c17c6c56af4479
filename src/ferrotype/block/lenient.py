"""A source read as far as it can be: what cannot be reads as zeros, and where that is can be asked.

    one read     [==============================================]   nearly always all that there is
    in pieces    [=======][==x==][xxxxxxx][xxxxxxxxxx...][======]   good parts first; steps grow where nothing reads
    narrowed               ==x=   =xxxxxxxxxxxxxxxxxxxx=            then what failed, down to the sector

The one place where a failed read is tried again, whatever it went through: a device, a file, a disk image's format,
a server.  A failing disk must not be worn out by that: tries and time for a stretch are bounded, and time for all.
Within a run of bad sectors the steps grow; its two edges are exact.

Some sources know what could not be read when they were made (``Marked``): that counts, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Final, Protocol, runtime_checkable

from ferrotype.block import Source, Traits
from ferrotype.block.file import check_read
from ferrotype.block.views import Concat, Slice, Through
from ferrotype.errors import DamagedRange, ReadError
from ferrotype.extents import ExtentMap
from ferrotype.job import Job
from ferrotype.units import KiB, MiB

__all__ = ["Lenient", "Limits", "Marked", "MarkedSource", "clipped", "joined", "known_unreadable"]

Range = tuple[int, int]  # start and length in bytes

_PIECE: Final = 64 * KiB  # bytes; what shares a piece with a bad sector is read a second time
_LONGEST: Final = MiB  # bytes of the longest step
_ONE_BY_ONE: Final = 4  # bad sectors, one behind the other, after which steps grow


@dataclass(frozen=True, slots=True)
class Limits:
    """What a failing source is asked for at most, beside reading all of it once."""

    tries: int = 256  # reads of one stretch that fail
    seconds: float = 60.0  # that these take: some drives try for minutes before they say that a sector is bad
    total: float = 1800.0  # seconds that all of them take; what fails after that is left as large as it is


@runtime_checkable
class Marked(Protocol):
    """A source that knows where it holds zeros for want of what was to be read when it was made."""

    @property
    def unreadable(self) -> Sequence[Range]: ...


class MarkedSource(Through):
    """A source of which somebody knows where its bytes stand for what could not be read.  It owns the source."""

    def __init__(self, source: Source, unreadable: Sequence[Range]) -> None:
        super().__init__(source)
        self.unreadable = unreadable

    def close(self) -> None:
        self._source.close()


def known_unreadable(source: Source, offset: int = 0, length: int | None = None) -> list[Range]:
    """What of a range is known to have been unreadable before, ascending, neighbours joined."""
    length = source.size - offset if length is None else length
    if isinstance(source, Slice | Concat):
        parts = source.parts(offset, length)
        return joined(
            (start + part.shift, count)
            for part in parts
            for start, count in known_unreadable(part.source, part.offset, part.length)
        )
    return clipped(joined(source.unreadable), offset, length) if isinstance(source, Marked) else []


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in ascending ranges that do not touch each other."""
    found: list[Range] = []
    for start, length in sorted(ranges):
        if length and found and sum(found[-1]) >= start:
            first, before = found[-1]
            found[-1] = first, max(before, start + length - first)
        elif length:
            found.append((start, length))
    return found


def clipped(ranges: Iterable[Range], offset: int, length: int) -> list[Range]:
    """What of the ranges lies within ``length`` bytes from ``offset`` on."""
    end = offset + length
    return [
        (max(start, offset), min(start + count, end) - max(start, offset))
        for start, count in ranges
        if start < end and start + count > offset
    ]


class _Stretch:
    """What was spent on a stretch that fails."""

    def __init__(self) -> None:
        self.tries = 0
        self.seconds = 0.0


class Lenient:
    """A view of a source of which every range can be read.  It owns nothing.  For many threads.

    What is no matter of single ranges is raised as ever: storage that does not answer, a device that is gone, an
    image whose tables make no sense.
    """

    def __init__(
        self,
        source: Source,
        job: Job | None = None,
        *,
        limits: Limits = Limits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``job`` may stop it between two tries."""
        self._source, self._job, self._limits, self._clock = source, job, limits, clock
        self._sector = source.traits.sector_size
        self._lock = Lock()
        self._found: list[Range] = []
        self._seconds = 0.0
        self.known = known_unreadable(source)
        self.reason = ""  # why the first read failed

    @property
    def size(self) -> int:
        return self._source.size

    @property
    def traits(self) -> Traits:
        return self._source.traits

    @property
    def unreadable(self) -> Sequence[Range]:
        """All that reads as zeros for want of what stands there, as far as it was read or known before."""
        return joined([*self.known, *self.found])

    @property
    def found(self) -> list[Range]:
        """What could not be read so far."""
        with self._lock:
            self._found = joined(self._found)
            return list(self._found)

    def lost_in(self, offset: int, length: int) -> list[Range]:
        """What of a range that was read is zeros for want of what stands there; not always joined."""
        if not self.known and not self._found:
            return []
        with self._lock:
            return clipped([*self.known, *self._found], offset, length)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self._source.extents(offset, length)

    def close(self) -> None:
        """Nothing: the source is its opener's."""

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        """Fill ``buf``, with zeros where that cannot be done."""
        check_read("disk", self.size, offset, len(buf))
        at, end = offset, offset + len(buf)
        while at < end:
            try:
                self._source.read_into(at, buf[at - offset :])
            except DamagedRange as error:  # it is exact, and stays so however often it is read
                start = min(max(error.start, at), end - 1)
                stop = min(max(error.start + error.length, start + 1), end)
                if at < start:
                    self.read_into(at, buf[at - offset : start - offset])
                self._lose(start, buf[start - offset : stop - offset], error)
                at = stop
            except ReadError as error:
                if error.gone:
                    raise
                self._salvage(at, buf[at - offset :])
                return
            else:
                return

    # ------------------------------------------------------------------ what fails

    def _lose(self, start: int, piece: memoryview, error: DamagedRange | None = None) -> None:
        piece[:] = bytes(len(piece))
        with self._lock:
            self._found.append((start, len(piece)))
            self.reason = self.reason or (error.why if error else "")

    def _reads(self, start: int, piece: memoryview, stretch: _Stretch) -> bool:
        """Whether a range can be read; then it is."""
        began = self._clock()
        try:
            self._source.read_into(start, piece)
        except DamagedRange:
            self.read_into(start, piece)
        except ReadError as error:
            if error.gone:
                raise
            spent = self._clock() - began
            stretch.tries += 1
            stretch.seconds += spent
            with self._lock:
                self._seconds += spent
                self.reason = self.reason or error.why
            if self._job is not None:
                self._job.advance(0)
            return False
        return True

    def _exhausted(self, stretch: _Stretch) -> bool:
        limits = self._limits
        return stretch.tries >= limits.tries or stretch.seconds >= limits.seconds or self._seconds >= limits.total

    def _salvage(self, offset: int, buf: memoryview) -> None:
        """What reads in pieces first; then what does not."""
        failing: list[Range] = []
        least = _PIECE if self._seconds < self._limits.total else _LONGEST
        at, step, end = offset, least, offset + len(buf)
        first = _Stretch()
        while at < end:
            stop = self._cut(at + step, at, end)
            if self._reads(at, buf[at - offset : stop - offset], first):
                step = least
            else:
                failing.append((at, stop - at))
                step = min(2 * step, _LONGEST)
            at = stop
        for start, length in joined(failing):
            self._narrow(start, buf[start - offset : start + length - offset])

    def _narrow(self, offset: int, buf: memoryview) -> None:
        """All of a stretch that reads, within the limits; the rest is lost."""
        stretch, end = _Stretch(), offset + len(buf)

        def reads(start: int, stop: int) -> bool:
            return self._reads(start, buf[start - offset : stop - offset], stretch)

        at, step = offset, _PIECE
        while at < end:
            stop = self._cut(at + step, at, end)
            if self._exhausted(stretch):
                self._lose(at, buf[at - offset :])
                return
            if reads(at, stop):
                at, step = stop, min(2 * step, _LONGEST)
                continue
            low, high = failed = at, stop  # all before ``low`` is read; between the two, something failed
            while (middle := self._middle(low, high)) is not None and not self._exhausted(stretch):
                if reads(low, middle):
                    low = middle
                else:
                    high = middle
                    failed = low, high
            if failed != (low, high) and reads(low, high):  # it has read after all
                at, step = high, self._sector
                continue
            bad = self._end_of_bad(high, end, reads, stretch)
            self._lose(low, buf[low - offset : bad - offset])
            at, step = bad, self._sector

    def _end_of_bad(self, start: int, end: int, reads: Callable[[int, int], bool], stretch: _Stretch) -> int:
        """Where a run of bad sectors ends, of which ``start`` is the end of the first."""
        at, step, low = start, self._sector, start
        for count in self._counted(stretch):
            if at >= end:
                break
            stop = self._cut(at + step, at, end)
            if reads(at, stop):
                break
            low, at = at, stop
            step = min(2 * step, _LONGEST) if count >= _ONE_BY_ONE else step
        high = at  # the last step may have been long: what is good at its end is read
        while (middle := self._middle(low, high)) is not None:
            if reads(middle, high):
                high = middle
            else:
                low = middle
        return high

    def _counted(self, stretch: _Stretch) -> Iterator[int]:
        """1, 2, 3 ... as long as the limits allow."""
        count = 0
        while not self._exhausted(stretch):
            count += 1
            yield count

    def _cut(self, wanted: int, at: int, end: int) -> int:
        """The multiple of a sector up to ``wanted``, behind ``at``, or the end."""
        down = wanted // self._sector * self._sector
        return min(down if down > at else (at // self._sector + 1) * self._sector, end)

    def _middle(self, low: int, high: int) -> int | None:
        """A multiple of a sector in the middle of a range; None where it is one sector, or within one."""
        middle = (low + high) // 2 // self._sector * self._sector
        if middle <= low:
            middle = (low // self._sector + 1) * self._sector
        return middle if middle < high else None
