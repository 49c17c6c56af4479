"""What block-mapped formats have in common: a table with one number a block, and bitmaps with one bit a sector.

table    | 3 | - | 0 | 1 | - | - | ...      read in pieces, so that it may be larger than memory
bitmap   | 1 1 0 1 0 0 0 0 |                of one block: which of its sectors this layer has
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.mapped import Kept, Kind, Mapping, cells
from ferrotype.units import KiB, MiB

__all__ = ["SECTOR", "Table", "sector_cells"]

SECTOR: Final = 512  # bytes
_PIECE: Final = 256 * KiB  # bytes of a table read at a time
_KEPT: Final = 16 * MiB  # bytes of pieces kept


class Table:
    """A table of numbers of one width in a file.  For many threads."""

    def __init__(self, file: Source, offset: int, count: int, dtype: str, what: str) -> None:
        """``dtype`` as in numpy, such as ``>u4``.  Raises InvalidImage where the file ends before the table does."""
        self._dtype = np.dtype(dtype)
        self.offset, self.count, self.what = offset, count, what
        self.end = offset + count * self._dtype.itemsize
        if self.end > file.size:
            raise InvalidImage(
                f"the {what} has {count} entries and ends at {self.end}, the file at {file.size}", offset=offset
            )
        self._file = file
        self._each = _PIECE // self._dtype.itemsize
        self._pieces: Kept[int, NDArray[np.unsignedinteger]] = Kept(_KEPT, lambda piece: piece.nbytes)

    def __getitem__(self, number: int) -> int:
        return int(self.slice(number, 1)[0])

    def slice(self, first: int, count: int) -> NDArray[np.int64]:
        """Entries from ``first`` on, which must be there.  64-bit entries wrap around to negative numbers."""
        parts = [piece.astype(np.int64) for piece in self._parts(first, count)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def lead(self, first: int, count: int, value: int) -> int:
        """How many entries from ``first`` on have the value, at most ``count``.  Made for long empty stretches."""
        length = 0
        for piece in self._parts(first, count):
            other = piece != value
            if other.any():
                return length + int(other.argmax())
            length += len(piece)
        return length

    def check_distinct(self, none: int, most: int) -> None:
        """That no two blocks of the disk share one of the file, where a few bytes would stand for a great many runs.

        Reads all of the table: raises UnsupportedError where it has more than ``most`` entries.
        """
        if self.count > most:
            raise UnsupportedError(
                f"a {self.what} of {self.count} entries; at most {most} are read", offset=self.offset
            )
        entries = self.slice(0, self.count) if self.count else np.zeros(0, np.int64)
        used = np.sort(entries[entries != none])
        if (np.diff(used) == 0).any():
            raise InvalidImage(f"the {self.what} names a block twice", offset=self.offset, field=self.what)

    def _parts(self, first: int, count: int) -> Iterator[NDArray[np.unsignedinteger]]:
        while count:
            number, inside = divmod(first, self._each)
            part = self._pieces.of(number, self._read)[inside : inside + count]
            yield part
            first, count = first + len(part), count - len(part)

    def _read(self, number: int) -> NDArray[np.unsignedinteger]:
        width = self._dtype.itemsize
        first = number * self._each
        count = min(self._each, self.count - first)
        data = read_exactly(self._file, self.offset + first * width, count * width, self.what)
        return np.frombuffer(data, self._dtype).astype(self._dtype.newbyteorder("="), copy=False)


def sector_cells(start: int, bits: NDArray[np.bool_], places: NDArray[np.int64]) -> Mapping:
    """The mapping of blocks from ``start`` on, some of whose sectors are stored.

    ``bits``: a row for each block, a column for each of its sectors; ``places``: where each block's data begins.
    """
    blocks, sectors = bits.shape
    at = places[:, None] + np.arange(sectors, dtype=np.int64) * SECTOR
    kinds = np.where(bits, Kind.STORED, Kind.HOLE).astype(np.uint8)
    return cells(start, SECTOR, kinds.reshape(blocks * sectors), at.reshape(blocks * sectors))
