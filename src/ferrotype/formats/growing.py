"""Writing images whose blocks stand in the file in the order in which they were first written.

    disk   | 0 | 1 | 2 | 3 | 4 |          slot of block 3 is 0, of block 0 is 1, of block 4 is 2
    file   | header, table | 3 | 0 | 4 |

Slots are given out under a lock, a whole write at once, and the bytes are written outside it.  What is never written
stays a hole in the file, or has no slot at all.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block.file import FileSink, check_write
from ferrotype.units import GiB, MiB

__all__ = ["GrowingBlocks"]

_STEP: Final = 256 * MiB  # bytes by which the file grows; a hole costs nothing


class GrowingBlocks:
    """The blocks of a disk that is being written.  For many threads."""

    def __init__(
        self,
        file: FileSink,
        size: int,
        *,
        block: int,
        start: int,
        stride: int | None = None,
        fresh: Callable[[int], None] | None = None,
    ) -> None:
        """The data of slot n begins at ``start + n * stride`` in the file, a stride being a block if not said.

        ``fresh`` is called with the offset of the data of each new slot, before anything is written to it.
        """
        self._file, self._size, self._block, self.start = file, size, block, start
        self._stride = stride or block
        self._fresh = fresh
        self._lock = Lock()
        self.used = 0  # slots
        # by block; -1: never written.  32 bits: of very large disks this is most of the memory needed
        self.slots: NDArray[np.int32] = np.full(-(-size // block), -1, "<i4")

    @property
    def end(self) -> int:
        """Where the next slot would begin, in bytes of the file."""
        return self.start + self.used * self._stride

    def write(self, offset: int, data: memoryview) -> None:
        """Write a range of the disk."""
        check_write("disk", self._size, offset, len(data))
        if not len(data):
            return
        first = offset // self._block
        places = self._take(first, (offset + len(data) - 1) // self._block + 1)
        at = 0
        for head, tail in self._adjacent(places):
            inside = offset + at - (first + head) * self._block
            count = min((tail - head) * self._block - inside, len(data) - at)
            self._file.write(int(places[head]) + inside, data[at : at + count])
            at += count

    def _adjacent(self, places: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Runs of blocks that follow each other in the file as well."""
        cuts = (np.flatnonzero(np.diff(places) != self._block) + 1).tolist()
        return list(zip([0, *cuts], [*cuts, len(places)], strict=True))

    def _take(self, first: int, end: int) -> NDArray[np.int64]:
        """Where the data of blocks begins in the file; those without a slot are given one."""
        with self._lock:
            slots = self.slots[first:end]
            new = np.flatnonzero(slots < 0)
            if len(new):
                slots[new] = np.arange(self.used, self.used + len(new))
                self.used += len(new)
                if self.end > self._file.size:
                    self._file.resize(self.end + (_STEP if self.end < 64 * GiB else 16 * _STEP))
            places = slots.astype(np.int64) * self._stride + self.start
        if self._fresh is not None:
            for place in places[new].tolist():
                self._fresh(place)
        return places
