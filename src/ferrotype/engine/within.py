"""Volumes that begin inside space that a file system calls free.

Most are remains of an earlier partitioning.  One that was written after the file system around it is alive, and the
file system around it is the leftover; one of which that cannot be told may be alive.  So they are looked for where
partitions and volumes begin, cheaply:

    1 MiB | 2 MiB | ...            multiples of 1 MiB, or of a larger power of two on large volumes
    63 sectors, cylinders          as partitions were aligned once
    behind one that was found      where its neighbour may begin

A place counts where it is free and not known to be zeros, has the sign of a volume, and opens as a file system that
proves itself: by its checksums and by the structures its first sector leads to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.block.views import Slice
from ferrotype.errors import DeviceError
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import Facts
from ferrotype.filesystems.registry import identify
from ferrotype.units import MiB, format_size
from ferrotype.volumes.scan import is_signed

__all__ = ["Inner", "inner_volumes"]

_PLACES: Final = 512  # multiples of the step that are looked at, at most
_CYLINDER: Final = 255 * 63 * 512  # bytes
_CYLINDERS: Final = 64
_FOUND: Final = 16  # volumes that are opened; more are remains of tests, not of partitions


@dataclass(frozen=True, slots=True)
class Inner:
    """A volume inside the free space of another."""

    start: int  # byte of the outer volume
    facts: Facts

    def order(self, outer: Facts) -> str | None:
        """How the two follow each other, in words, where it may be alive; None where it is the older one for sure.

        FAT and exFAT tell no time, and swap space has none: what cannot be told is kept.
        """
        if outer.kind == "swap":
            return "was written later"
        if self.facts.written is None or outer.written is None:
            return "may have been written later"
        return "was written later" if self.facts.written > outer.written else None

    @property
    def words(self) -> str:
        label = f" ({self.facts.label})" if self.facts.label else ""
        return f"{self.facts.kind}{label} of {format_size(self.facts.size)} at byte {self.start}"


def inner_volumes(view: Source, start: int, free: ExtentMap, known: ExtentMap) -> list[Inner]:
    """Volumes in the FREE space of ``view``, which begins at byte ``start`` of its disk; ascending.

    ``free`` and ``known`` are maps of the whole view.  Reads 4 KiB at each of at most some 600 places, and opens at
    most 16 file systems.  Never raises on content.
    """
    found: dict[int, Inner] = {}
    tried: set[int] = set()
    waiting = list(_places(view.size, start))[::-1]
    while waiting and len(found) < _FOUND:
        at = waiting.pop()
        if at in tried or not 0 < at < view.size or not _is_open(at, free, known):
            continue
        tried.add(at)
        inner = _look(view, at)
        if inner is not None:
            found[at] = inner
            waiting.append(at + inner.facts.size)
    return [found[at] for at in sorted(found)]


def _places(size: int, start: int) -> Iterator[int]:
    """Where volumes begin, in bytes of the view: aligned on the disk, and on the view itself."""
    step = MiB
    while size // step > _PLACES:
        step *= 2
    for origin in {-start % step, 0}:
        yield from range(origin, size, step)
    yield 63 * 512
    yield from range(_CYLINDER - start % _CYLINDER, min(size, _CYLINDERS * _CYLINDER), _CYLINDER)


def _is_open(at: int, free: ExtentMap, known: ExtentMap) -> bool:
    return bool(_state(free, at) & State.FREE) and not _state(known, at) & State.ZERO


def _state(extents: ExtentMap, at: int) -> int:
    return int(extents.states[int(np.searchsorted(extents.starts, at, "right")) - 1])


def _look(view: Source, at: int) -> Inner | None:
    try:
        if not is_signed(read(view, at, min(4096, view.size - at))):
            return None
        found = identify(Slice(view, at, view.size - at))
    except DeviceError:
        return None
    if found is None or found.filesystem is None or found.filesystem.facts.size > view.size - at:
        return None
    return Inner(at, found.filesystem.facts)
