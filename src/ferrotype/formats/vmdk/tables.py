"""Grain directory and grain tables: where the grains of a sparse VMDK extent stand.

    disk       | grain 0 | 1 | 2 | ...                     grains of one size, a table for every so many of them
    directory  | table 0 | table 1 | - | table 3 | ...     in memory, as offsets in the file
    table      | grain 0 | - | zero | grain 3 | ...        read in groups of tables, the ones used last are kept

All sparse extents have these two levels; what the numbers mean is told by ``decode``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly, read_exactly_into
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats.mapped import Kept, Kind, Mapping, cells
from ferrotype.units import MiB

__all__ = ["BAD", "Decode", "GrainTables", "Grains", "KeptGrains", "Shape", "keep_grains", "read_directory"]

BAD: Final = 255  # kind of an entry that cannot be; reading there raises

Grains = tuple[NDArray[np.uint8], NDArray[np.int64]]  # kinds and places
Decode = Callable[[NDArray[np.int64], int], Grains]  # entries as 64-bit numbers, number of the first grain

_MOST_TABLES: Final = 1 << 22  # 128 TiB of the usual grains; 32 MiB of memory
_GROUP: Final = 16384  # grains whose tables are read at a time
_KEPT: Final = 32 * MiB  # bytes of decoded tables kept
_MANY: Final = 4096  # tables from which on it pays to ask the file for its holes first


KeptGrains = Kept[tuple[object, int], Grains]  # by tables and number of the group


def keep_grains() -> KeptGrains:
    """Room for the decoded tables of one disk."""
    return Kept(_KEPT, lambda group: group[0].nbytes + group[1].nbytes)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of an extent's tables."""

    size: int  # bytes of the disk in the extent
    grain: int  # bytes
    per_table: int  # entries
    dtype: str  # of an entry, as numpy calls it

    @property
    def span(self) -> int:
        """Bytes of the disk under one table."""
        return self.grain * self.per_table

    @property
    def tables(self) -> int:
        return -(-self.size // self.span)

    @property
    def table_bytes(self) -> int:
        return self.per_table * np.dtype(self.dtype).itemsize


def read_directory(file: Source, offset: int, shape: Shape, what: str) -> NDArray[np.unsignedinteger[Any]]:
    """The entries of a grain directory.  Raises InvalidImage where it is not inside the file."""
    size = shape.tables * np.dtype(shape.dtype).itemsize
    if offset + size > file.size:
        raise InvalidImage(f"the {what} has {size} bytes and would end behind the file's {file.size}", offset=offset)
    if shape.tables > _MOST_TABLES:
        raise UnsupportedError(f"the {what} has {shape.tables} entries, which is more than {_MOST_TABLES}")
    data = read_exactly(file, offset, size, f"the {what}")
    return np.frombuffer(data, shape.dtype)


class GrainTables:
    """A ``Layout`` but for ``unpack``.  For many threads."""

    def __init__(
        self,
        file: Source,
        shape: Shape,
        directory: NDArray[np.int64],
        decode: Decode,
        *,
        copy: NDArray[np.int64] | None = None,
        kept: KeptGrains | None = None,
    ) -> None:
        """``directory``: offsets of tables in the file, which lie inside it; 0: none, all its grains are holes.

        ``copy`` is the redundant directory, whose tables stand in for those that hold impossible entries.  ``kept``
        may be shared by the extents of a disk.
        """
        self._file, self.shape, self._decode = file, shape, decode
        self._directory, self._copy = _without_holes(file, directory, shape.table_bytes), copy
        self._each = max(1, _GROUP // shape.per_table)  # tables of a group
        padded = np.zeros(-(-len(directory) // self._each) * self._each, bool)
        padded[: len(directory)] = self._directory != 0
        self._present = np.flatnonzero(padded.reshape(-1, self._each).any(axis=1))  # groups that have a table
        self._groups = kept if kept is not None else keep_grains()

    def mapping(self, offset: int, length: int, /) -> Mapping:
        grain, span = self.shape.grain, self._each * self.shape.span
        number = offset // span
        after = int(np.searchsorted(self._present, number))
        following = int(self._present[after]) if after < len(self._present) else None
        if following != number:
            end = offset + length if following is None else min(following * span, offset + length)
            return Mapping.uniform(offset, end - offset, Kind.HOLE)
        kinds, places = self._groups.of((self, number), lambda _: self._load(number))
        start, end = number * span, min((number + 1) * span, offset + length)
        first, last = (offset - start) // grain, -(-(end - start) // grain)
        kinds, places = kinds[first:last], places[first:last]
        if (kinds == BAD).any():
            bad = int(np.flatnonzero(kinds == BAD)[0])
            raise InvalidImage(
                f"the grain table entry of byte {start + (first + bad) * grain} of the disk cannot be right",
                offset=int(places[bad]),
            )
        return cells(start + first * grain, grain, kinds, places).clip(offset, end - offset)

    def _load(self, number: int) -> Grains:
        """The grains of a group.  Impossible tables are replaced by their copies, where these are sound."""
        first = number * self._each
        directory = self._directory[first : first + self._each]
        grain = first * self.shape.per_table
        kinds, places = self._decode(self._read(directory), grain)
        if self._copy is not None and (kinds == BAD).any():
            each = self.shape.per_table
            for table in np.unique(np.flatnonzero(kinds == BAD) // each).tolist():
                place = self._copy[first + table : first + table + 1]
                again = self._decode(self._read(place), grain + table * each)
                if not (again[0] == BAD).any():
                    kinds[table * each : (table + 1) * each], places[table * each : (table + 1) * each] = again
        return kinds, places

    def _read(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The entries of the tables at ``offsets``; those that follow each other in the file are read at once."""
        size = self.shape.table_bytes
        octets = memoryview(bytearray(len(offsets) * size))
        there = np.flatnonzero(offsets)
        if len(there):
            breaks = (np.diff(there) != 1) | (np.diff(offsets[there]) != size)
            heads = np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(there)]))
            for head, end in zip(heads.tolist(), heads[1:].tolist(), strict=False):
                at = int(there[head]) * size
                target = octets[at : at + (end - head) * size]
                read_exactly_into(self._file, int(offsets[there[head]]), target, "a grain table")
        return np.frombuffer(octets, self.shape.dtype).astype(np.int64)

    def groups(self) -> Iterator[Grains]:
        """The grains of all tables, a group at a time."""
        return map(self._load, self._present.tolist())


def _without_holes(file: Source, directory: NDArray[np.int64], table_bytes: int) -> NDArray[np.int64]:
    """The directory without the tables that stand in holes of the file, which are all zeros.

    A mostly empty disk of many TiB has GiB of such tables, which so need not be read.
    """
    used = directory[directory != 0]
    if len(used) < _MANY:
        return directory
    low, high = int(used.min()), int(used.max()) + table_bytes
    starts, ends = file.extents(low, high - low).runs(State.ZERO)
    if not len(starts):
        return directory
    at = np.searchsorted(starts, directory, "right") - 1
    empty = (at >= 0) & (directory + table_bytes <= ends[at])
    return np.where(empty, 0, directory)
