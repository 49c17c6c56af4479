"""$MFT as it is left on a damaged NTFS volume: its bytes in the order of its records, whatever lies where.

$MFT       record 0 | 1 | 2 | ...                    records may cross from one run into the next
volume     [run 0      ] ... [run 1   ] ... [run 2]  what cannot be read comes as zeros, and no record begins so
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.extents import Offsets
from ferrotype.filesystems.ntfs_batches import Bytes
from ferrotype.filesystems.ntfs_mft import Content, Geometry
from ferrotype.filesystems.ntfs_records import STANDARD_STRIDE
from ferrotype.filesystems.remains import Ranges, Remains
from ferrotype.units import MiB

__all__ = ["Table"]

_BATCH: Final = 4 * MiB  # bytes of $MFT taken at once
_MOST_RECORDS: Final = 1 << 27  # of 1 KiB that is an $MFT of 128 GiB


class Table:
    """The records of $MFT."""

    def __init__(self, remains: Remains, geometry: Geometry, data: Content) -> None:
        self._remains, self._unit = remains, geometry.cluster_size
        self.size = geometry.record_size
        lengths = np.diff(np.array(data.vcns, np.int64))
        lcns = np.array(data.lcns, np.int64)
        # Runs may name the same clusters over and over; what is longer than the volume is not read.
        stored = np.cumsum(np.where(lcns >= 0, lengths, 0))
        kept = int(np.searchsorted(stored, geometry.clusters, "right"))
        self._lcns = lcns[:kept]
        self._vcns = np.array(data.vcns[: kept + 1], np.int64)
        self._vcn_list, self._lcn_list = self._vcns.tolist(), self._lcns.tolist()
        self.count = min(min(data.valid, int(self._vcns[-1]) * self._unit) // self.size, _MOST_RECORDS)

    def touched(self, ranges: Ranges) -> NDArray[np.bool_] | None:
        """Which records have bytes in a range; None where none has."""
        starts = self._lcns * self._unit
        ends = starts + np.diff(self._vcns) * self._unit
        hit = ranges.touch(starts, ends) & (self._lcns >= 0)
        if not hit.any():
            return None
        found = np.zeros(self.count, bool)
        for run in np.flatnonzero(hit).tolist():
            first = int(self._vcns[run]) * self._unit // self.size
            last = min(-(-int(self._vcns[run + 1]) * self._unit // self.size), self.count)
            for at in range(first, last, _BATCH // self.size):
                upto = min(at + _BATCH // self.size, last)
                found[at:upto] |= self._records_touched(at, upto, ranges)
        return found

    def _records_touched(self, first: int, last: int, ranges: Ranges) -> NDArray[np.bool_]:
        at = np.arange(first * self.size, last * self.size, STANDARD_STRIDE, dtype=np.int64)
        place = self._places(at)
        hit: NDArray[np.bool_] = np.any(
            ranges.touch(place, place + STANDARD_STRIDE).reshape(last - first, -1), axis=1
        )
        return hit

    def _places(self, at: Offsets) -> Offsets:
        """Where bytes of $MFT stand on the volume; before its beginning if nowhere."""
        run = np.searchsorted(self._vcns, at // self._unit, "right") - 1
        lcn = self._lcns[run]
        return np.where(lcn >= 0, (lcn - self._vcns[run]) * self._unit + at, -MiB)

    def record(self, number: int) -> bytes:
        """One record, zeros where there is none."""
        if not 0 <= number < self.count:
            return bytes(self.size)
        return bytes(self._read(number * self.size, self.size))

    def batches(self, only: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, Bytes]]:
        """All records as (number of the first, one row each), but for stretches that are known to be blank.

        With ``only``, nothing but the batches that have one of those.
        """
        step = _BATCH // self.size
        for first in range(0, self.count, step):
            last = min(first + step, self.count)
            if only is not None and not only[first:last].any():
                continue
            pieces = self._pieces(first * self.size, last * self.size)
            if not all(place < 0 or self._remains.blank(place, length) for place, length in pieces):
                data = self._read(first * self.size, (last - first) * self.size)
                yield first, np.frombuffer(data, np.uint8).reshape(-1, self.size)

    def _read(self, offset: int, length: int) -> bytearray:
        out = bytearray()
        for place, size in self._pieces(offset, offset + length):
            out += self._remains.read(place, size) if place >= 0 else bytes(size)
        return out

    def _pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """Where a stretch of $MFT stands on the volume, as (offset, length); -1 where nothing is stored."""
        pieces, run = list[tuple[int, int]](), bisect_right(self._vcn_list, start // self._unit) - 1
        while start < end:
            length = min(end, self._vcn_list[run + 1] * self._unit) - start
            lcn = self._lcn_list[run]
            pieces.append(((lcn - self._vcn_list[run]) * self._unit + start if lcn >= 0 else -1, length))
            start, run = start + length, run + 1
        return pieces
