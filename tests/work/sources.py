"""Disks of any size that take no memory."""

from __future__ import annotations

import random
from typing import Final

from ferrotype.block import Traits
from ferrotype.extents import ExtentMap
from tests.engine.images import CHUNK

_NOISE: Final = random.Random(4).randbytes(CHUNK)


class Numbered:
    """A source whose cells are noise that does not compress, each with its number in front: no two are the same.

    With ``halves``, the second half of each cell is zeros, so that it does compress.
    """

    def __init__(self, cells: int, *, halves: bool = False, day: int = 0, changed: range = range(0)) -> None:
        """The cells of ``changed`` differ from day to day."""
        self.size = cells * CHUNK
        self.traits = Traits(sector_known=True)
        self._noise = _NOISE[: CHUNK // 2] + bytes(CHUNK // 2) if halves else _NOISE
        self._day, self._changed = day, changed

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        at = 0
        while at < len(buf):
            cell, skip = divmod(offset + at, CHUNK)
            day = self._day if cell in self._changed else 0
            content = f"cell {cell:12} of day {day:3} ".encode() + self._noise
            count = min(CHUNK - skip, len(buf) - at)
            buf[at : at + count] = content[skip : skip + count]
            at += count

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        pass


class Blank:
    """A sink that forgets what is written."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.traits = Traits(sector_known=True, blank=True)

    def write(self, offset: int, data: memoryview, /) -> None:
        pass

    def write_zeros(self, offset: int, length: int, /) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
