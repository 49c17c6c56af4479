"""A disk put together from parts of it, with zeros where nothing was saved."""

from __future__ import annotations

import re
from contextlib import suppress
from uuid import UUID

from ferrotype.block import Source, Traits
from ferrotype.block.file import check_read
from ferrotype.block.views import Concat
from ferrotype.errors import InvalidImage
from ferrotype.extents import ExtentMap, State
from ferrotype.units import KiB

__all__ = ["composed", "swap_page"]


class Blank:
    """Zeros that nothing was saved of."""

    def __init__(self, size: int, sector_size: int) -> None:
        self.size = size
        self.traits = Traits(sector_size=sector_size)

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("blank", self.size, offset, len(buf))
        buf[:] = bytes(len(buf))

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length, State.ZERO | State.HOLE)

    def close(self) -> None:
        """Nothing."""


def composed(pieces: list[tuple[int, Source]], size: int, sector_size: int) -> Source:
    """Pieces at their places, zeros between.  Raises InvalidImage where they overlap or lie outside."""
    row: list[Source] = []
    at = 0
    for start, source in sorted(pieces, key=lambda piece: piece[0]):
        if start < at:
            raise InvalidImage("saved parts of the disk overlap", offset=start)
        if start > at:
            row.append(Blank(start - at, sector_size))
        row.append(source)
        at = start + source.size
    if at > size:
        raise InvalidImage("saved parts lie behind the end of the disk", offset=at)
    if at < size:
        row.append(Blank(size - at, sector_size))
    return Sectored(row, sector_size)


class Sectored(Concat):
    """Sources in a row, as a disk whose sectors have a size that is known."""

    def __init__(self, sources: list[Source], sector_size: int) -> None:
        super().__init__([Blank(0, sector_size), *sources])


def swap_page(info: str, size: int) -> bytes:
    """The first page of a swap partition; mkswap(8), include/linux/swap.h of Linux."""
    found = dict(re.findall(r'^(UUID|LABEL)="?([^"\n]{0,64})"?$', info, re.MULTILINE))
    page = bytearray(4 * KiB)
    page[1024:1028] = (1).to_bytes(4, "little")
    page[1028:1032] = min(size // len(page) - 1, 0xFFFFFFFF).to_bytes(4, "little")
    with suppress(ValueError):
        page[1036:1052] = UUID(found.get("UUID", "")).bytes
    label = found.get("LABEL", "").encode()[:15]
    page[1052 : 1052 + len(label)] = label
    page[-10:] = b"SWAPSPACE2"
    return bytes(page)
