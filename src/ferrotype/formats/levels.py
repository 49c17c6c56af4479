"""Tables in two levels, as qcow, qcow2 and QED have them: where the clusters of a disk stand.

    L1 table   | 0 | 3 MiB | 0 | 0 | 9 MiB | ...      one; in memory, without its zeros
                       |               |
    L2 table       |e|e|e|...      |e|e|e|...         ``entries`` each, one a cluster; read in pages
                      |
    cluster         data, in the file

A format says how its L2 entries are to be understood (``Decode``); where one contradicts the specification, the
clusters it stands for cannot be read, and all others can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.extents import Offsets, State
from ferrotype.formats.mapped import Kept, Kind, Mapping, cells
from ferrotype.units import MiB

__all__ = ["BAD", "Decode", "FirstLevel", "Geometry", "TwoLevels", "Words", "read_first_level"]

Words = NDArray[np.uint64]
Decode = Callable[[Words], tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Entries, one a row, as the kinds and places of their cells.  What may not be is of the kind ``BAD``."""

BAD: Final = 255  # kind of a cell whose entry contradicts the specification

_MOST_L1: Final = 256 * MiB  # bytes of an L1 table; none that a program wrote has as many
_WINDOW: Final = 1 << 20  # entries of the L1 table looked at in one go
_PAGE: Final = 8192  # cells of a page, or 32 times as many where entries have parts
_PAGES_KEPT: Final = 16 * MiB  # bytes
_WORTH_ASKING: Final = 64 * MiB  # bytes of L2 tables from which on the file is asked which of them are holes
_ALL: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of the tables; all are powers of two."""

    cluster: int  # bytes
    entries: int  # of an L2 table
    words: int = 1  # 64-bit words of an L2 entry
    parts: int = 1  # cells of a cluster that its entry tells apart
    order: str = ">u8"

    @property
    def table(self) -> int:
        """Bytes of an L2 table."""
        return self.entries * self.words * 8

    @property
    def reach(self) -> int:
        """Bytes of the disk that one L2 table describes."""
        return self.entries * self.cluster


@dataclass(frozen=True, slots=True, eq=False)
class FirstLevel:
    """The L1 entries that lead to an L2 table: their numbers, where it stands, and whether it can stand there."""

    numbers: Offsets
    places: Offsets
    bad: NDArray[np.bool_]


def read_first_level(
    file: Source,
    offset: int,
    count: int,
    geometry: Geometry,
    *,
    mask: int = _ALL,
    reserved: int = 0,
    align: int = 8,
    taken: Sequence[tuple[int, int]] = (),
) -> FirstLevel:
    """Read an L1 table of ``count`` entries, and judge where its L2 tables are said to stand.

    ``mask`` are the bits of an offset and ``reserved`` those that must be 0; ``taken`` are the (start, end) of what
    no L2 table may overlap.  Memory follows the entries in use.  Raises InvalidImage where the table lies outside
    the file.
    """
    if offset % 8 or offset < 0 or count * 8 > file.size - offset:
        raise InvalidImage("the L1 table does not lie in the file", offset=offset, field="l1_table_offset")
    if count * 8 > _MOST_L1:
        raise UnsupportedError(f"an L1 table of {count} entries", offset=offset, field="l1_size")
    numbers, entries = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for at in range(0, count, _WINDOW):
        window = np.frombuffer(read(file, offset + at * 8, min(_WINDOW, count - at) * 8), geometry.order)
        used = np.flatnonzero(window & np.uint64(mask))
        numbers.append(used + at)
        entries.append(window[used].astype(np.uint64))
    number, entry = np.concatenate(numbers), np.concatenate(entries)
    places = (entry & np.uint64(mask)).view(np.int64)
    bad = (places < 0) | (places % align != 0) | (places > file.size - geometry.table)
    bad |= (entry & np.uint64(reserved)) != 0
    for start, end in ((offset, offset + count * 8), *taken):
        bad |= (places < end) & (places > start - geometry.table)
    # Tables that overlap would let a small file describe a disk of any number of runs.
    order = np.argsort(places, kind="stable")
    bad[order[1:]] |= np.diff(places[order]) < geometry.table
    keep = bad | ~_holes(file, places, bad, geometry.table)
    return FirstLevel(number[keep], places[keep], bad[keep])


def _holes(file: Source, places: Offsets, bad: NDArray[np.bool_], table: int) -> NDArray[np.bool_]:
    """Which L2 tables lie in holes of the file, and so are all zeros; asked where there are many."""
    if len(places) * table < _WORTH_ASKING:
        return np.zeros(len(places), bool)
    starts, ends = file.extents(0, file.size).runs(State.ZERO)
    if not len(starts):
        return np.zeros(len(places), bool)
    run = np.searchsorted(starts, places, "right") - 1
    found: NDArray[np.bool_] = ~bad & (run >= 0) & (ends[run] - places >= table)
    return found


class TwoLevels:
    """The layout of a disk whose clusters are found through an L1 and L2 tables."""

    def __init__(
        self,
        file: Source,
        geometry: Geometry,
        first: FirstLevel,
        decode: Decode,
        unpack: Callable[[int], bytes] | None = None,
        taken: Callable[[], Sequence[tuple[int, int]]] = tuple,
    ) -> None:
        """``taken`` gives the (start, end) of what the image has in its file besides L2 tables and clusters."""
        self._taken = taken
        self._file, self._geometry, self._first = file, geometry, first
        self._decode, self._unpack = decode, unpack
        self._per_page = _PAGE if geometry.parts == 1 else _PAGE // 8  # entries
        self._pages: Kept[int, Mapping] = Kept(_PAGES_KEPT, _weight)

    def mapping(self, offset: int, length: int, /) -> Mapping:
        numbers = self._first.numbers
        number = offset // self._geometry.reach
        at = int(np.searchsorted(numbers, number))
        if at == len(numbers) or numbers[at] != number:
            end = offset + length
            if at < len(numbers):
                end = min(end, int(numbers[at]) * self._geometry.reach)
            return Mapping.uniform(offset, end - offset, Kind.HOLE)
        page = self._pages.of(offset // (self._per_page * self._geometry.cluster), self._load)
        found = page.clip(offset, min(offset + length, page.end) - offset)
        bad = np.flatnonzero(found.kinds == BAD)
        if len(bad):
            where = int(found.bounds[bad[0]])
            raise InvalidImage(f"the table entry of byte {where} of the disk is wrong", field="L2 entry")
        return found

    def own(self) -> tuple[Offsets, Offsets]:
        """Where the tables stand, and what else is the image's own."""
        places = self._first.places[~self._first.bad]
        starts, ends = np.array(self._taken(), np.int64).reshape(-1, 2).T
        return np.append(places, starts), np.append(places + self._geometry.table, ends)

    def unpack(self, place: int, /) -> bytes:
        if self._unpack is None:
            raise InvalidImage("a packed cluster, in a format that has none", offset=place)
        return self._unpack(place)

    def _load(self, page: int) -> Mapping:
        """The mapping of ``_per_page`` clusters: a part of one L2 table, or several whole ones."""
        geometry, first = self._geometry, self._first
        count, entries = self._per_page, geometry.entries
        start = page * count
        low = int(np.searchsorted(first.numbers, start // entries))
        high = int(np.searchsorted(first.numbers, (start + count - 1) // entries, "right"))
        words = np.zeros((count, geometry.words), np.uint64)
        bad = np.zeros(count, bool)
        step, inside = min(count, entries), start % entries
        for i in range(low, high):
            at = max(int(first.numbers[i]) * entries - start, 0)
            if first.bad[i]:
                bad[at : at + step] = True
                continue
            size = geometry.words * 8
            data = read(self._file, int(first.places[i]) + inside * size, step * size)
            words[at : at + step] = np.frombuffer(data, geometry.order).reshape(step, geometry.words)
        kinds, places = self._decode(words)
        kinds[np.repeat(bad, geometry.parts)] = BAD
        return self._whole(cells(start * geometry.cluster, geometry.cluster // geometry.parts, kinds, places))

    def _whole(self, mapping: Mapping) -> Mapping:
        """With the parts of each packed cluster as one run: it is unpacked as a whole."""
        if self._geometry.parts == 1:
            return mapping
        inner = (mapping.kinds == Kind.PACKED) & (mapping.bounds[:-1] % self._geometry.cluster != 0)
        keep = ~inner
        bounds = np.append(mapping.bounds[:-1][keep], mapping.bounds[-1])
        return Mapping(bounds, mapping.kinds[keep], mapping.places[keep], mapping.skips[keep])


def _weight(mapping: Mapping) -> int:
    return mapping.bounds.nbytes + mapping.kinds.nbytes + mapping.places.nbytes + mapping.skips.nbytes
