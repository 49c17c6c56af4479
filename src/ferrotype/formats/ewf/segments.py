"""The files one EWF image stands in, called segments: their names, and reading from any number of them.

    disk.E01  disk.E02 ... disk.E99  disk.EAA  disk.EAB ... disk.EZZ  disk.FAA ... disk.ZZZ
    disk.s01  disk.s02 ... disk.s99  disk.saa ...                                  disk.zzz
    disk.Ex01 disk.Ex02 .. disk.Ex99 disk.ExAA ...          disk.ExZZ disk.EyAA .. disk.EzZZ

Source: "Expert Witness Compression Format specification", Segment file extensions, and that of version 2.
"""

from __future__ import annotations

import re
from typing import Final

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage
from ferrotype.formats.numbered import Numbered
from ferrotype.formats.related import Related

__all__ = ["Segments", "segment_name"]

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
        self._files = Numbered(first, related)
        self._named = related.path is not None

    @property
    def names(self) -> list[str]:
        """Of the segments' files."""
        return self._files.names

    def __len__(self) -> int:
        return len(self._files)

    def size(self, number: int) -> int:
        """Bytes of a segment's file."""
        return self._files.sizes[number]

    def append(self) -> Source:
        """Open the segment after the last; it stays the set's.  Raises InvalidImage where it is missing."""
        number = len(self._files)
        name = segment_name(self.names[0], number + 1) if self._named else None
        source = self._files.add(name, "next segment") if name is not None else None
        if source is None:
            what = f"segment {number + 1} of the image is missing"
            raise InvalidImage(what + (f": there is no {name} beside it" if name else ", or the files are renamed"))
        return source

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Bytes of a segment.  Raises InvalidImage where they lie outside it."""
        if offset < 0 or length < 0 or offset + length > self.size(number):
            raise InvalidImage(
                f"{self.names[number]} ends before what should stand at its byte {offset}", offset=offset
            )
        with self._files.using(number) as source:
            return read(source, offset, length)

    def close_rest(self) -> None:
        """Close all but the first."""
        self._files.close_rest()

    def close(self) -> None:
        self._files.close()
