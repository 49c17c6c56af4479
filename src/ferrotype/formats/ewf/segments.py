"""The files one EWF image stands in, called segments: their names, and reading from any number of them.

    disk.E01  disk.E02 ... disk.E99  disk.EAA  disk.EAB ... disk.EZZ  disk.FAA ... disk.ZZZ
    disk.s01  disk.s02 ... disk.s99  disk.saa ...                                  disk.zzz
    disk.Ex01 disk.Ex02 .. disk.Ex99 disk.ExAA ...          disk.ExZZ disk.EyAA .. disk.EzZZ

Source: "Expert Witness Compression Format specification", Segment file extensions, and that of version 2.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage
from ferrotype.formats.related import Related

__all__ = ["Segments", "segment_name"]

_OPEN: Final = 64  # segments held open at once; an image may have thousands

_FIRST: Final = re.compile(r"(.*\.)([A-Za-z])([xX]?)01", re.DOTALL)


def segment_name(first: str, number: int) -> str | None:
    """The name of segment ``number`` (from 1) of the set whose first is called ``first``; None: there is none."""
    match = _FIRST.fullmatch(first)
    if match is None:
        return first if number == 1 else None
    head, letter, second = match.groups()
    if number < 100:
        return f"{head}{letter}{second}{number:02}"
    high, low = divmod(number - 100, 26 * 26)
    tail = _letter(low // 26) + _letter(low % 26)
    step = second or letter  # the letter that moves on after ZZ
    if ord(step.lower()) + high > ord("z"):
        return None
    step = chr(ord(step) + high)
    if letter.islower():
        tail = tail.lower()
    return f"{head}{letter}{step}{tail}" if second else f"{head}{step}{tail}"


def _letter(number: int) -> str:
    return chr(ord("A") + number)


class Segments:
    """The segments of one image, numbered from 0, opened when they are read.  For many threads."""

    def __init__(self, first: Source, related: Related) -> None:
        """``first`` stays the caller's until ``close``, which closes it as well."""
        self._related = related
        self.names = [related.path.name if related.path is not None else "the first segment"]
        self._sizes = [first.size]
        self._first = first
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.names)

    def size(self, number: int) -> int:
        """Bytes of a segment's file."""
        return self._sizes[number]

    def append(self) -> Source:
        """Open the segment after the last; it stays the set's.  Raises InvalidImage where it is missing."""
        number = len(self.names)
        name = segment_name(self.names[0], number + 1) if self._related.path is not None else None
        source = self._related.sibling(name, "next segment") if name is not None else None
        if source is None:
            what = f"segment {number + 1} of the image is missing"
            raise InvalidImage(what + (f": there is no {name} beside it" if name else ", or the files are renamed"))
        self.names.append(name or "")
        self._sizes.append(source.size)
        with self._lock:
            self._open[number] = _Opened(source)
        self._shut_some()
        return source

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a segment.  Raises InvalidImage where they lie outside it."""
        if offset < 0 or length < 0 or offset + length > self._sizes[number]:
            raise InvalidImage(
                f"{self.names[number]} ends before what should stand at its byte {offset}", offset=offset
            )
        if number == 0:
            return read(self._first, offset, length)
        with self._using(number) as source:
            return read(source, offset, length)

    @contextmanager
    def _using(self, number: int) -> Iterator[Source]:
        with self._lock:
            opened = self._open.get(number)
            if opened is not None:
                opened.users += 1
                self._open.move_to_end(number)
        if opened is None:
            opened = self._reopen(number)
        try:
            yield opened.source
        finally:
            with self._lock:
                opened.users -= 1

    def _reopen(self, number: int) -> _Opened:
        source = self._related.sibling(self.names[number], "segment")
        if source is None or source.size != self._sizes[number]:
            if source is not None:
                source.close()
            raise InvalidImage(f"{self.names[number]} was removed or changed while the image was open")
        with self._lock:
            found = self._open.get(number)  # another thread may have been faster
            opened = found or self._open.setdefault(number, _Opened(source))
            opened.users += 1
        if found is not None:
            source.close()
        self._shut_some()
        return opened

    def _shut_some(self) -> None:
        with self._lock:
            oldest = list(self._open.items())[: max(0, len(self._open) - _OPEN)]
            idle = [self._open.pop(number) for number, opened in oldest if not opened.users]
        for opened in idle:
            opened.source.close()

    def close_rest(self) -> None:
        """Close all but the first."""
        with ExitStack() as stack, self._lock:
            while self._open:
                stack.callback(self._open.popitem()[1].source.close)

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._first.close)
            self.close_rest()


class _Opened:
    """A segment that is open, and how many are reading from it."""

    __slots__ = ("source", "users")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.users = 0
