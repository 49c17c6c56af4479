"""Looking at a volume of which ranges are lost: what they touch, what can still be read, and the names to tell.

volume      |..........|xxxx|.....................|xxxxxxxx|.....|
Ranges                  start end                  start    end         bytes
Remains     what can be read, and a filler for what cannot
Paths       the answer: a set of names, bounded whatever the volume claims
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source
from ferrotype.errors import DeviceError, FormatError, IntegrityError, InvalidImage, StoreError
from ferrotype.extents import Offsets, State
from ferrotype.units import KiB, MiB

__all__ = ["NOWHERE", "UNREADABLE", "Intact", "Paths", "Ranges", "Remains", "printable"]

UNREADABLE: Final = (DeviceError, FormatError, IntegrityError, StoreError)  # what reading a damaged volume may raise

_GRAIN: Final = 4 * KiB  # bytes; what fails is cut in halves down to this, so that little around it is given up
_MOST_FAILURES: Final = 4096  # failed reads outside the ranges; behind them, what fails is given up whole
_LONGEST_PATH: Final = 32767  # characters; no system opens a longer one
_MOST_TEXT: Final = 256 * MiB  # bytes that all names told may take: two million files of usual length
_COST: Final = 64  # bytes that a short name takes beside its characters
_UNPRINTABLE: Final = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, line and paragraph ends
_REVERSING: Final = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Bytes of a volume, ascending and apart: starts[i] up to ends[i]."""

    starts: Offsets
    ends: Offsets

    def touch(self, starts: Offsets, ends: Offsets) -> NDArray[np.bool_]:
        """Which of the given runs of bytes share a byte with a range."""
        if not len(self.starts):
            return np.zeros(len(starts), bool)
        at = np.searchsorted(self.ends, starts, "right")  # the first range that ends behind the start of the run
        near = self.starts[np.minimum(at, len(self.starts) - 1)]
        touched: NDArray[np.bool_] = (at < len(self.starts)) & (near < ends) & (starts < ends)
        return touched

    def touches(self, start: int, end: int) -> bool:
        """Whether one run of bytes shares a byte with a range."""
        return bool(self.touch(np.array([start], np.int64), np.array([end], np.int64))[0])


NOWHERE: Final = Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))


class Remains:
    """What is left of a source.  Nothing is raised for what cannot be read."""

    def __init__(self, source: Source, ranges: Ranges) -> None:
        self._source, self._ranges = source, ranges
        self._failures = _MOST_FAILURES
        self.gaps: list[tuple[int, int]] = []  # (start, end), bytes of the volume that the last read lacks

    def read(self, offset: int, length: int, fill: int = 0) -> bytearray:
        """``length`` bytes at ``offset``, those that cannot be read as ``fill``.

        A range that fails is not searched for what may be left of it; elsewhere, a failure costs a few KiB around it.
        """
        out = bytearray([fill]) * length if fill else bytearray(length)
        start, end = max(offset, 0), min(offset + length, self._source.size)
        self.gaps = []
        if start >= end:
            self.gaps.append((offset, offset + length))
            return out
        outside = (offset, start), (end, offset + length)
        self.gaps += [gap for gap in outside if gap[0] < gap[1]]
        view, blank = memoryview(out), bytes([fill])
        for low, high, known in self._cuts(start, end):
            self._fill(low, view[low - offset : high - offset], blank, known=known)
        return out

    def blank(self, offset: int, length: int) -> bool:
        """Whether the source knows without reading that all of this is zeros."""
        if offset < 0 or length <= 0 or offset + length > self._source.size:
            return False
        try:
            extents = self._source.extents(offset, length)
        except UNREADABLE:
            return False
        return extents.total(State.ZERO) == length

    def _cuts(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """The bytes cut where ranges begin and end: (start, end, whether it is in a range)."""
        first = int(np.searchsorted(self._ranges.ends, start, "right"))
        last = int(np.searchsorted(self._ranges.starts, end, "left"))
        pieces, at = [], start
        for low, high in zip(
            self._ranges.starts[first:last].tolist(), self._ranges.ends[first:last].tolist(), strict=True
        ):
            low, high = max(low, at), min(high, end)
            if at < low:
                pieces.append((at, low, False))
            if low < high:
                pieces.append((low, high, True))
            at = max(at, high)
        if at < end:
            pieces.append((at, end, False))
        return pieces

    def _fill(self, offset: int, view: memoryview, blank: bytes, *, known: bool) -> None:
        try:
            self._source.read_into(offset, view)
            return
        except UNREADABLE:
            self._failures -= not known
        if known or len(view) <= _GRAIN or self._failures < 0:
            view[:] = blank * len(view)  # the failed read may have left anything there
            self.gaps.append((offset, offset + len(view)))
            return
        middle = max(len(view) // 2 // _GRAIN, 1) * _GRAIN
        self._fill(offset, view[:middle], blank, known=False)
        self._fill(offset + middle, view[middle:], blank, known=False)


class Intact(Remains):
    """A source of which nothing may be missing: the first failure is raised, and what would lie outside is damage."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, NOWHERE)

    def read(self, offset: int, length: int, fill: int = 0) -> bytearray:  # noqa: ARG002
        """Exactly these bytes.  Raises InvalidImage where they do not lie on the volume, and what reading raises."""
        if offset < 0 or offset + length > self._source.size:
            raise InvalidImage("the file system uses bytes that lie outside its volume", offset=offset)
        out = bytearray(length)
        if length:
            self._source.read_into(offset, memoryview(out))
        return out


def printable(name: str) -> str:
    r"""A name that can be shown and stored anywhere.

    Control characters, ends of lines, halves of characters and marks that turn the writing around stand as ``\x1b``,
    ``\udc80``.  A backslash stands as itself: this is for people, not to be undone.
    """
    if name.isascii() and name.isprintable():
        return name
    return "".join(_escaped(c) if c in _REVERSING or unicodedata.category(c) in _UNPRINTABLE else c for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Paths:
    """Names to be told, each once.  ``full`` when there are more than memory should hold."""

    def __init__(self) -> None:
        self._names = set[str]()
        self._left = _MOST_TEXT
        self.full = False

    def add(self, path: str) -> None:
        """Take one more name; one that no system could open is left out."""
        if self.full or len(path) > _LONGEST_PATH or path in self._names:
            return
        self._left -= len(path) + _COST
        if self._left < 0:
            self.stop()
        else:
            self._names.add(path)

    def stop(self) -> None:
        """No more names are taken; the answer says that there are some."""
        self.full = True
        self._names.add("<more files than can be listed>")

    def sorted(self) -> tuple[str, ...]:
        return tuple(sorted(self._names))
