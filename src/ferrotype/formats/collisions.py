"""Tables of an image that contradict each other: places of its file that stand for two things at once.

    disk   |  A  |  B  |  C  |              file   | header | tables |  a  |  b  |
              |     |     |                           ^                 ^
              |     +-----|---- both ---------------- | ----------------+
              |           +---- over the tables ------+
              +---- alone ...

No writer of these formats lets two clusters share bytes, or one lie on a table: one of the two over the other.
Vectorised; memory is 24 bytes a run of clusters, up to a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ferrotype.extents import Offsets

__all__ = ["Collisions"]

_MOST: Final = 1 << 22  # runs looked at: those of 256 GiB in clusters of 64 KiB, none beside its neighbour


class Collisions:
    """The runs of one disk in one file, and what is wrong with them."""

    def __init__(self) -> None:
        self._runs: list[Offsets] = []  # rows: where they start on the disk, in the file, and their lengths
        self._count = 0

    @property
    def full(self) -> bool:
        """Whether no more runs are taken; those behind are not looked at."""
        return self._count >= _MOST

    def add(self, starts: Offsets, places: Offsets, lengths: Offsets) -> None:
        """Runs that begin at ``starts`` of the disk and at ``places`` of the file; ``lengths`` in bytes."""
        self._runs.append(np.stack([starts, places, lengths]).astype(np.int64))
        self._count += len(starts)

    def told(self, own: tuple[Offsets, Offsets]) -> Iterator[str]:
        """A sentence on runs that share bytes, and one on those over the image's ``own`` bytes: starts and ends."""
        if not self._count:
            return
        starts, places, lengths = np.concatenate(self._runs, axis=1)
        order = np.lexsort((starts, places))
        starts, places, ends = starts[order], places[order], (places + lengths)[order]
        reach = np.maximum.accumulate(ends)
        shared = np.flatnonzero(places[1:] < reach[:-1]) + 1
        if len(shared):
            lost = int(np.minimum(ends[shared], reach[shared - 1]).sum() - places[shared].sum())
            yield _sentence(f"{lost} bytes of the disk stand where others of its bytes do", starts[shared])
        over = _touching(places, ends, *own)
        if len(over):
            yield _sentence("parts of the disk stand where the image has its own tables", starts[over])


def _sentence(what: str, starts: Offsets) -> str:
    return (
        f"its tables are damaged: {what}, from byte {int(starts.min())} of the disk on, so one of the two was "
        "overwritten; check it with the program that made it, or with qemu-img check"
    )


def _touching(places: Offsets, ends: Offsets, own_starts: Offsets, own_ends: Offsets) -> Offsets:
    """Numbers of the runs that share a byte with one of the ``own`` ranges."""
    order = np.argsort(own_starts, kind="stable")
    own_starts, reach = own_starts[order], np.maximum.accumulate(own_ends[order]) if len(own_ends) else own_ends
    last = np.searchsorted(own_starts, ends, "left") - 1  # the last one that begins before the run's end
    found: Offsets = np.flatnonzero((last >= 0) & (reach[np.maximum(last, 0)] > places)) if len(reach) else last[:0]
    return found
