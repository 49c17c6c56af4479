"""Make a container as small as its live records, in place.

Records from the end move into gaps nearer the start, a batch at a time:

    copy the batch into gaps -> durable -> catalog that names the new places -> durable -> the old places are gaps

so at any moment a durable catalog names only intact records, and no more than one batch of extra space is used.
At the end the last catalog moves down behind the last record and the file is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ferrotype.objects.layout import BLOCK, RECORDS_AT, CatalogEntry, Place
from ferrotype.units import MiB

BATCH: Final = 256 * MiB  # bytes moved between two catalogs
_SMALL_PASSES: Final = 4  # what moves leaves gaps of its own, and so does a catalog that is replaced
_LOOK_BACK: Final = 256  # records tried for one gap, from the end


class Movable(Protocol):
    """What compaction needs of a container."""

    def live(self) -> Sequence[CatalogEntry]: ...

    def catalogs(self) -> Sequence[CatalogEntry]:
        """Records that say where the live ones stand: never overwritten before the next ``settle``."""

    def volume_sizes(self) -> Sequence[int]: ...

    def move(self, entry: CatalogEntry, place: Place, gap: int, /) -> None: ...

    def settle(self) -> None: ...

    def cut(self) -> None: ...


def gaps_between(entries: Sequence[CatalogEntry], sizes: Sequence[int]) -> list[tuple[Place, int]]:
    """Dead ranges of each volume as (place, length), ascending; the space behind the last record is not one."""
    gaps = []
    ends = [RECORDS_AT] * len(sizes)
    for entry in sorted(entries, key=lambda e: (e.volume, e.offset)):
        if entry.offset > ends[entry.volume]:
            gaps.append((Place(entry.volume, ends[entry.volume]), entry.offset - ends[entry.volume]))
        ends[entry.volume] = entry.offset + entry.span
    for volume, end in enumerate(ends[:-1]):
        room = (sizes[volume] - end) // BLOCK * BLOCK  # a write that was cut may have left part of a block
        if room > 0:
            gaps.append((Place(volume, end), room))
    return gaps


def compact(container: Movable, advance: Callable[[int], None]) -> None:
    """Fill gaps from the end until nothing fits any more, then cut the file."""
    small = 0
    while small < _SMALL_PASSES and (moved := _fill_gaps(container, advance)):
        container.settle()
        small = 0 if moved >= BATCH // 2 else small + 1
    container.cut()


def _fill_gaps(container: Movable, advance: Callable[[int], None]) -> int:
    entries = sorted(container.live(), key=lambda e: (e.volume, e.offset))
    moved = 0
    for place, room in gaps_between([*entries, *container.catalogs()], container.volume_sizes()):
        while room and moved < BATCH:
            index = _last_that_fits(entries, place, room)
            if index is None:
                break
            entry = entries.pop(index)
            container.move(entry, place, room)
            advance(entry.span)
            moved += entry.span
            place, room = Place(place.volume, place.offset + entry.span), room - entry.span
        if moved >= BATCH:
            break
    return moved


def _last_that_fits(entries: list[CatalogEntry], place: Place, room: int) -> int | None:
    for index in range(len(entries) - 1, max(-1, len(entries) - 1 - _LOOK_BACK), -1):
        if entries[index].place < place:
            return None
        if entries[index].span <= room:
            return index
    return None
