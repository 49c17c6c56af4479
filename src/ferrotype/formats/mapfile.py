"""The map that GNU ddrescue keeps beside an image: which areas of the disk it has read, and which not.

    # Mapfile. Created by GNU ddrescue version 1.27
    0x00500000     ?               1                        where it was, what it did, in which pass
    0x00000000  0x00400000  +                               start, length, status: + is read
    0x00400000  0x00100000  -                               ? not tried  * / - failed, so far or for good

Written from the manual of GNU ddrescue, chapter "Mapfile structure".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from ferrotype.block import Source, read
from ferrotype.block.lenient import clipped, joined
from ferrotype.errors import FerrotypeError
from ferrotype.formats.related import Related
from ferrotype.formats.split import name_of_whole
from ferrotype.units import MiB

__all__ = ["RescueMap", "map_beside"]

_SUFFIXES: Final = (".map", ".mapfile", ".log", ".logfile")
_MOST: Final = 64 * MiB  # bytes of a map
_MOST_RANGES: Final = 1 << 16  # kept apart; a disk with more bad places is known in larger steps
_TITLE: Final = re.compile(rb"#[ \t]*(mapfile|rescue logfile)\. created by", re.IGNORECASE)
_NUMBER: Final = rb"(0[xX][0-9a-fA-F]{1,15}|[0-9]{1,18})"
_AREA: Final = re.compile(rb"^[ \t]*" + _NUMBER + rb"[ \t]+" + _NUMBER + rb"[ \t]+([?*/+-])[ \t]*\r?$", re.MULTILINE)
_LINE: Final = re.compile(rb"^[ \t]*[^#\s].*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class RescueMap:
    """What a map says of an image."""

    unread: list[tuple[int, int]]  # (start, length) in bytes, ascending, within the image
    warnings: tuple[str, ...]


def map_beside(related: Related, size: int) -> RescueMap | None:
    """What the map beside an image of ``size`` bytes says; None where there is none.  It is found by its name."""
    if related.path is None:
        return None
    whole = name_of_whole(related.path)
    for stem in dict.fromkeys((whole.name, whole.stem)):
        for suffix in _SUFFIXES:
            name = stem + suffix
            if name != related.path.name and related.is_beside(name):
                found = _looked_at(name, related, size)
                if found is not None:
                    return found
    return None


def _looked_at(name: str, related: Related, size: int) -> RescueMap | None:
    try:
        file = related.file(name, "map of ddrescue", glance=True)
    except FerrotypeError:  # it is anything, and nobody named it
        return None
    try:
        if not _TITLE.match(read(file, 0, min(file.size, 64))):
            return None
        return _parsed(file, name, size)
    except FerrotypeError as error:
        return RescueMap([], (f"{name} beside it looks like a map of ddrescue and cannot be read: {error}",))
    finally:
        file.close()


def _parsed(file: Source, name: str, size: int) -> RescueMap:
    if file.size > _MOST:
        return RescueMap([], (f"{name} beside it is a map of ddrescue of more than {_MOST} bytes and was not read",))
    data = read(file, 0, file.size)
    unread: list[tuple[int, int]] = []
    end = count = 0
    for row in _AREA.finditer(data):
        start, length = _number(row[1]), _number(row[2])
        count += 1
        if row[3] == b"+":
            end = max(end, start + length)
        else:
            unread.append((start, length))
    warnings = []
    if count + 1 != sum(1 for _ in _LINE.finditer(data)):  # one line says where ddrescue was
        warnings.append(
            f"{name}, the map of ddrescue beside it, is damaged or cut short: more may not have been read"
        )
    if end > size:
        warnings.append(f"{name} says that {end} bytes of the disk were looked at, and the file has {size}")
    lost = _bounded(clipped(joined(unread), 0, size), size)
    if lost:
        warnings.append(
            f"{name} says that ddrescue has not read {sum(length for _, length in lost)} bytes in {len(lost)} "
            f"place{'' if len(lost) == 1 else 's'} of the disk: what the file holds there is kept, and counts as "
            "unreadable"
        )
    return RescueMap(lost, tuple(warnings))


def _number(text: bytes) -> int:
    return int(text, 16) if text[:2].lower() == b"0x" else int(text)


def _bounded(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The same ranges, or few that hold all of them."""
    grain = MiB
    while len(ranges) > _MOST_RANGES:
        wide = [(start // grain * grain, -(-(start + length) // grain) * grain) for start, length in ranges]
        ranges = clipped(joined((start, end - start) for start, end in wide), 0, size)
        grain *= 2
    return ranges
